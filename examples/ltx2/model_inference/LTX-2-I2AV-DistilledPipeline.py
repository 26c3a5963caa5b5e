"""Picture and text to video with sound by LTX-2 with the distilled checkpoint: 8 steps at half size, then
the upsampler and 3 steps, without guidance.
"""

from pathlib import Path

import torch
from PIL import Image

from diffsynth.device import backend_for, best_device
from diffsynth.pipelines.ltx2_audio_video import LTX2AudioVideoPipeline, ModelConfig
from diffsynth.utils.data.media_io_ltx2 import write_video_audio_ltx2

PICTURE = Path(__file__).parents[1] / "first_frame.png"
PROMPT = (
    "A red rowing boat drifts slowly across a quiet lake at sunset. Small waves lap against its hull, a"
    " bird calls from the far shore, and the camera glides closer."
)


def main(
    height: int = 1024,
    width: int = 1536,
    num_frames: int = 121,
    output_path: str = "ltx2_distilled_i2av.mp4",
) -> None:
    device = best_device()
    total = backend_for(device).memory().total
    vram_config = {
        "offload_dtype": torch.bfloat16,
        "offload_device": "cpu",
        "onload_dtype": torch.bfloat16,
        "onload_device": "cpu",
        "preparing_dtype": torch.bfloat16,
        "preparing_device": device,
        "computation_dtype": torch.bfloat16,
        "computation_device": device,
    }
    pipe = LTX2AudioVideoPipeline.from_pretrained(
        torch_dtype=torch.bfloat16,
        device=device,
        model_configs=[
            ModelConfig(
                model_id="google/gemma-3-12b-it-qat-q4_0-unquantized",
                origin_file_pattern="model-*.safetensors",
                **vram_config,
            ),
            ModelConfig(
                model_id="Lightricks/LTX-2",
                origin_file_pattern="ltx-2-19b-distilled.safetensors",
                **vram_config,
            ),
            ModelConfig(
                model_id="Lightricks/LTX-2",
                origin_file_pattern="ltx-2-spatial-upscaler-x2-1.0.safetensors",
                **vram_config,
            ),
        ],
        tokenizer_config=ModelConfig(model_id="google/gemma-3-12b-it-qat-q4_0-unquantized"),
        # All of the card but half a GB; without a card, or where it does not tell its size, no limit.
        vram_limit=total / 1024**3 - 0.5 if total and device.type != "cpu" else None,
    )
    video, audio = pipe(
        prompt=PROMPT,
        input_images=[Image.open(PICTURE)],
        input_images_indexes=[0],
        input_images_strength=1.0,
        seed=43,
        height=height,
        width=width,
        num_frames=num_frames,
        tiled=True,
        use_two_stage_pipeline=True,
        use_distilled_pipeline=True,
    )
    write_video_audio_ltx2(video=video, audio=audio, output_path=output_path)
    print(output_path)


if __name__ == "__main__":
    main()
