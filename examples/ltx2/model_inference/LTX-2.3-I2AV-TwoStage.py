"""Pictures and text to video with sound by LTX-2.3 in two stages: the first frame and the last."""

from common import load, save, settings
from inputs import FIRST_FRAME, closer

pipe = load("LTX-2.3", "dev", "upscaler", "distilled-lora")
video, audio = pipe(
    prompt=(
        "A red rowing boat rocks on a lake at sunset while the camera glides towards it. The mooring "
        "rope creaks, a frog croaks, far away a church bell rings twice."
    ),
    negative_prompt=pipe.default_negative_prompt["LTX-2.3"],
    input_images=[FIRST_FRAME, closer(1.0)],
    input_images_indexes=[0, -1],
    use_two_stage_pipeline=True,
    seed=43,
    **settings(height=1024, width=1536, num_frames=121),
)
save(video, audio, "ltx2.3_twostage_i2av.mp4")
