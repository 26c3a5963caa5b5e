"""Text to video with sound by LTX-2 in one stage: 40 guided steps at full size."""

from common import load, save, settings

pipe = load("LTX-2", "dev")
video, audio = pipe(
    prompt=(
        "A girl is very happy, she is speaking: 'I enjoy working with it.' Sunlight falls through the "
        "window behind her, and birds sing outside."
    ),
    negative_prompt=pipe.default_negative_prompt["LTX-2"],
    seed=43,
    **settings(height=512, width=768, num_frames=121),
)
save(video, audio, "ltx2_onestage.mp4")
