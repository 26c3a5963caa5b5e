"""Picture and text to video with sound by LTX-2 in two stages: 40 guided steps at half size, then the
upscaler and 3 steps with the distilled LoRA.
"""

from common import load, save, settings
from inputs import FIRST_FRAME

pipe = load("LTX-2", "dev", "upscaler", "distilled-lora")
video, audio = pipe(
    prompt=(
        "A red rowing boat drifts slowly across a quiet lake at sunset. Small waves lap against its "
        "hull, a bird calls from the far shore, and the camera glides closer."
    ),
    negative_prompt=pipe.default_negative_prompt["LTX-2"],
    input_images=[FIRST_FRAME],
    use_two_stage_pipeline=True,
    seed=43,
    **settings(height=1024, width=1536, num_frames=121),
)
save(video, audio, "ltx2_twostage_i2av.mp4")
