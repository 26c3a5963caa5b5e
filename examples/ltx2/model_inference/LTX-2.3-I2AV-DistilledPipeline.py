"""Picture and text to video with sound by the distilled LTX-2.3: 8 steps at half size, then the upscaler and
3 steps, without guidance.
"""

from common import load, save, settings
from inputs import FIRST_FRAME

pipe = load("LTX-2.3", "distilled", "upscaler")
video, audio = pipe(
    prompt=(
        "A red rowing boat rocks on a lake at sunset while a breeze begins to ripple the water. The "
        "mooring rope creaks, a frog croaks, far away a church bell rings twice, and the camera rises "
        "slowly until the far shore comes into view."
    ),
    input_images=[FIRST_FRAME],
    input_images_strength=0.9,
    use_two_stage_pipeline=True,
    use_distilled_pipeline=True,
    seed=43,
    **settings(height=1024, width=1536, num_frames=121),
)
save(video, audio, "ltx2.3_distilled_i2av.mp4")
