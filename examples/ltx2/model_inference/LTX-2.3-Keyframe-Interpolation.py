"""LTX-2.3 in two stages finds the way between pictures: each guides as a keyframe, the last at frame -1."""

from common import load, save, settings
from inputs import closer

pipe = load("LTX-2.3", "dev", "upscaler", "distilled-lora")
# Instead of the drawn ones: input_images=["first.png", "last.png"]; any more, any frames.
video, audio = pipe(
    prompt=(
        "The camera glides across a lake at sunset towards a red rowing boat, until its hull fills the "
        "picture. Water drips from the oars."
    ),
    negative_prompt=pipe.default_negative_prompt["LTX-2.3"],
    input_images=[closer(0.0), closer(1.0)],
    input_images_indexes=[0, -1],
    input_images_as_keyframes=True,
    use_two_stage_pipeline=True,
    seed=43,
    **settings(height=1024, width=1536, num_frames=121),
)
save(video, audio, "ltx2.3_keyframes.mp4")
