"""Text to video with sound by LTX-2 in two stages: 40 guided steps at half size, then the upscaler and 3
steps with the distilled LoRA.
"""

from common import load, save, settings

pipe = load("LTX-2", "dev", "upscaler", "distilled-lora")
video, audio = pipe(
    prompt=(
        "A girl is very happy, she is speaking: 'I enjoy working with it.' Sunlight falls through the "
        "window behind her, and birds sing outside."
    ),
    negative_prompt=pipe.default_negative_prompt["LTX-2"],
    use_two_stage_pipeline=True,
    seed=43,
    **settings(height=1024, width=1536, num_frames=121),
)
save(video, audio, "ltx2_twostage.mp4")
