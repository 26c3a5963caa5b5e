"""Text to sound alone by LTX-2.3, as long as a video of so many frames would be."""

from common import load, save, settings

pipe = load("LTX-2.3", "dev")
video, audio = pipe(
    prompt=(
        "A thunderstorm comes nearer over a forest: wind in the leaves, first drops, a long roll of "
        "thunder, then heavy rain."
    ),
    negative_prompt=pipe.default_negative_prompt["LTX-2.3"],
    audio_only=True,
    seed=43,
    **settings(height=512, width=768, num_frames=121),
)
save(video, audio, "ltx2.3_sound.wav")
