"""What the scripts of the camera LoRAs share: LTX-2 in two stages, in which the LoRA moves the camera."""

from common import load, lora, save, settings


def film(move: str, prompt: str) -> None:
    """Load the LoRA of a movement, such as Dolly-In; the prompt tells what the camera comes to see."""
    pipe = load("LTX-2", "dev", "upscaler", "distilled-lora")
    # 1.0 is the full strength; less makes the movement weaker.
    pipe.load_lora(pipe.dit, lora(f"LTX-2-19b-LoRA-Camera-Control-{move}"), alpha=1.0)
    video, audio = pipe(
        prompt=prompt,
        negative_prompt=pipe.default_negative_prompt["LTX-2"],
        use_two_stage_pipeline=True,
        seed=43,
        **settings(height=1024, width=1536, num_frames=121),
    )
    save(video, audio, f"ltx2_camera_{move.lower().replace('-', '_')}.mp4")
