"""Picture and text to video with sound by LTX-2.3 in one stage: 30 guided steps at full size."""

from common import load, save, settings
from inputs import FIRST_FRAME

pipe = load("LTX-2.3", "dev")
video, audio = pipe(
    prompt=(
        "A red rowing boat rocks on a lake at sunset while a breeze begins to ripple the water. The "
        "mooring rope creaks, a frog croaks, far away a church bell rings twice, and the camera rises "
        "slowly until the far shore comes into view."
    ),
    negative_prompt=pipe.default_negative_prompt["LTX-2.3"],
    input_images=[FIRST_FRAME],
    seed=43,
    **settings(height=512, width=768, num_frames=121),
)
save(video, audio, "ltx2.3_onestage_i2av.mp4")
