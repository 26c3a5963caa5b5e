"""Picture and text to video with sound by LTX-2 in one stage: 40 guided steps at full size."""

from common import load, save, settings
from inputs import FIRST_FRAME

pipe = load("LTX-2", "dev")
video, audio = pipe(
    prompt=(
        "A red rowing boat drifts slowly across a quiet lake at sunset. Small waves lap against its "
        "hull, a bird calls from the far shore, and the camera glides closer."
    ),
    negative_prompt=pipe.default_negative_prompt["LTX-2"],
    input_images=[FIRST_FRAME],
    seed=43,
    **settings(height=512, width=768, num_frames=121),
)
save(video, audio, "ltx2_onestage_i2av.mp4")
