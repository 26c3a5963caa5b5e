"""LTX-2.3 makes a second of a clip anew, pictures from 1 s to 2 s and sound from 0.5 s to 1.5 s, and keeps
the rest.
"""

from common import load, save, settings
from inputs import SAMPLING_RATE, clip, tune

pipe = load("LTX-2.3", "dev", "upscaler", "distilled-lora")
chosen = settings(height=1024, width=1536, num_frames=121)
# Instead of what is drawn here: retake_video="clip.mp4", retake_audio="clip.mp4".
video, audio = pipe(
    prompt=(
        "A red rowing boat on a lake at sunset. A large fish leaps out of the water beside it and falls "
        "back with a splash."
    ),
    negative_prompt=pipe.default_negative_prompt["LTX-2.3"],
    retake_video=clip(chosen),
    retake_video_regions=[(1.0, 2.0)],
    retake_audio=tune(chosen),
    audio_sample_rate=SAMPLING_RATE,
    retake_audio_regions=[(0.5, 1.5)],
    use_two_stage_pipeline=True,
    seed=43,
    **chosen,
)
save(video, audio, "ltx2.3_twostage_retake.mp4")
