"""Text to video with sound by the distilled LTX-2: 8 steps at half size, then the upscaler and 3 steps,
without guidance.
"""

from common import load, save, settings

pipe = load("LTX-2", "distilled", "upscaler")
video, audio = pipe(
    prompt=(
        "A girl is very happy, she is speaking: 'I enjoy working with it.' Sunlight falls through the "
        "window behind her, and birds sing outside."
    ),
    use_two_stage_pipeline=True,
    use_distilled_pipeline=True,
    seed=43,
    **settings(height=1024, width=1536, num_frames=121),
)
save(video, audio, "ltx2_distilled.mp4")
