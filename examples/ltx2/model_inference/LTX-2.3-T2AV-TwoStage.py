"""Text to video with sound by LTX-2.3 in two stages: 30 guided steps at half size, then the upscaler and 3
steps with the distilled LoRA.
"""

from common import load, save, settings

pipe = load("LTX-2.3", "dev", "upscaler", "distilled-lora")
video, audio = pipe(
    prompt=(
        "An old fisherman mends a net on a pier at dawn. He looks up, laughs and says: 'She will bite "
        "today.' Gulls cry above him, ropes creak, and small waves slap against the wood. The camera "
        "stands still."
    ),
    negative_prompt=pipe.default_negative_prompt["LTX-2.3"],
    use_two_stage_pipeline=True,
    seed=43,
    **settings(height=1024, width=1536, num_frames=121),
)
save(video, audio, "ltx2.3_twostage.mp4")
