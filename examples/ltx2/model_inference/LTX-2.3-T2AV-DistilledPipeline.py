"""Text to video with sound by the distilled LTX-2.3: 8 steps at half size, then the upscaler and 3 steps,
without guidance.
"""

from common import load, save, settings

pipe = load("LTX-2.3", "distilled", "upscaler")
video, audio = pipe(
    prompt=(
        "An old fisherman mends a net on a pier at dawn. He looks up, laughs and says: 'She will bite "
        "today.' Gulls cry above him, ropes creak, and small waves slap against the wood. The camera "
        "stands still."
    ),
    use_two_stage_pipeline=True,
    use_distilled_pipeline=True,
    seed=43,
    **settings(height=1024, width=1536, num_frames=121),
)
save(video, audio, "ltx2.3_distilled.mp4")
