"""Picture and text to video with sound by the distilled LTX-2: 8 steps at half size, then the upscaler and 3
steps, without guidance.
"""

from common import load, save, settings
from inputs import FIRST_FRAME

pipe = load("LTX-2", "distilled", "upscaler")
video, audio = pipe(
    prompt=(
        "A red rowing boat drifts slowly across a quiet lake at sunset. Small waves lap against its "
        "hull, a bird calls from the far shore, and the camera glides closer."
    ),
    input_images=[FIRST_FRAME],
    use_two_stage_pipeline=True,
    use_distilled_pipeline=True,
    seed=43,
    **settings(height=1024, width=1536, num_frames=121),
)
save(video, audio, "ltx2_distilled_i2av.mp4")
