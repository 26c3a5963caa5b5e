"""What the scripts of this folder share: the files of each model, memory, options, and how a result is saved.

Every script takes the same options, for a try at a smaller size or on a smaller machine:

    python LTX-2-T2AV-OneStage.py --height 256 --width 384 --num-frames 49 --vram-limit 8gb
"""

import argparse
import sys
import wave
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from diffsynth.device import backend_for, best_device
from diffsynth.pipelines.ltx2_audio_video import LTX2AudioVideoPipeline, ModelConfig
from diffsynth.utils.data.media_io_ltx2 import write_video_audio_ltx2

GEMMA = "google/gemma-3-12b-it-qat-q4_0-unquantized"
FILES = {
    "LTX-2": {
        "dev": "ltx-2-19b-dev.safetensors",
        "distilled": "ltx-2-19b-distilled.safetensors",
        "upscaler": "ltx-2-spatial-upscaler-x2-1.0.safetensors",
        "distilled-lora": "ltx-2-19b-distilled-lora-384.safetensors",
    },
    "LTX-2.3": {
        "dev": "ltx-2.3-22b-dev.safetensors",
        "distilled": "ltx-2.3-22b-distilled-1.1.safetensors",
        "upscaler": "ltx-2.3-spatial-upscaler-x2-1.1.safetensors",
        "distilled-lora": "ltx-2.3-22b-distilled-lora-384-1.1.safetensors",
    },
}
"""In the repositories Lightricks/LTX-2 and Lightricks/LTX-2.3 of ModelScope and Hugging Face."""


def load(model: str, *files: str) -> LTX2AudioVideoPipeline:
    """A pipeline of these files of the table, fetched first where they are not on this machine."""
    configs = {
        file: ModelConfig(model_id=f"Lightricks/{model}", origin_file_pattern=FILES[model][file])
        for file in files
    }
    distilled_lora = configs.pop("distilled-lora", None)
    return LTX2AudioVideoPipeline.from_pretrained(
        torch_dtype=torch.bfloat16,
        device=best_device(),
        model_configs=[
            ModelConfig(model_id=GEMMA, origin_file_pattern="model-*.safetensors"),
            *configs.values(),
        ],
        stage2_lora_config=distilled_lora,
        **_memory(),
    )


def lora(name: str, suffix: str = "") -> ModelConfig:
    """A LoRA from a repository of its own; a file of yours is ``ModelConfig(path="my.safetensors")``."""
    return ModelConfig(
        model_id=f"Lightricks/{name}", origin_file_pattern=f"{name.lower()}{suffix}.safetensors"
    )


def settings(
    height: int, width: int, num_frames: int, num_inference_steps: int | None = None
) -> dict[str, int]:
    """Size and length of the video and the steps, unless the command line says otherwise."""
    said = dict(locals())
    asked = {name: getattr(_options(), name) for name in said}
    return {n: v for values in (said, asked) for n, v in values.items() if v is not None}


def save(video: list[Image.Image] | None, audio: torch.Tensor | None, name: str) -> None:
    """Write an mp4, or a wav where there is sound alone; frame and sampling rates come with the result."""
    path = Path(_options().output or name)
    if video is not None:
        write_video_audio_ltx2(video, audio, path)
    elif audio is not None:
        with wave.open(str(path), "wb") as file:
            file.setparams((2, 2, audio.sampling_rate, 0, "NONE", ""))
            file.writeframes((audio.clamp(-1, 1) * 32767).short().T.contiguous().numpy().tobytes())
    print(path)


def _memory() -> dict[str, Any]:
    """The limits of the command line; without ``--vram-limit`` all that a card has free, in bf16."""
    names = ("vram_limit", "host_limit", "storage")
    given = {name: value for name in names if (value := getattr(_options(), name)) is not None}
    device = best_device()
    if "vram_limit" in given or device.type == "cpu" or backend_for(device).memory().free is None:
        return given
    return {"vram_limit": "auto", "storage": "bf16", **given}


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=sys.modules["__main__"].__doc__)
    for name in ("height", "width", "num-frames", "num-inference-steps"):
        parser.add_argument(f"--{name}", type=int, help="instead of what the script says")
    parser.add_argument("--output", help="the file to write")
    parser.add_argument("--vram-limit", type=_number_or_name, help="GB of device memory, or such as 8gb")
    parser.add_argument("--host-limit", type=float, help="GB of host memory")
    parser.add_argument("--storage", help="of waiting weights: bf16, int8, int4, fp8")
    return parser.parse_args()


def _number_or_name(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text
