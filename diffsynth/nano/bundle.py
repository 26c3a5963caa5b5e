"""The trained weights that come with the package, and the settings that they were made for.

from diffsynth import nano

pipe = LTX2AudioVideoPipeline.from_pretrained(**nano.models())
video, audio = pipe(prompt=nano.EXAMPLE, seed=1, **nano.settings())
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffsynth.errors import CheckpointError
from diffsynth.loader import ModelConfig

NAME = "nano"
"""Where a model is named: in ``--model`` and in the configuration of a training."""
WEIGHTS = Path(__file__).parent / "weights"
EXAMPLE = "a red circle moves left over a blue background, a high beep"
DISTILLED_LORA_STRENGTH = 1.0
"""In both uses: on the whole run, and in the second stage."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NanoFiles:
    """Where everything lies; names are those that ``python -m training.nano export`` gives."""

    checkpoint: Path
    gemma: Path
    """Folder of the text model, with its tokenizer."""
    upsampler: Path
    distilled_lora: Path
    framed_lora: Path
    """Draws a white frame around the picture."""


def files(folder: Path | None = None) -> NanoFiles:
    """The files of the package, or those of another export.

    Raises:
        CheckpointError: one is missing, as in a source tree without its large files.
    """
    folder = WEIGHTS if folder is None else folder
    found = NanoFiles(
        checkpoint=folder / "nano.safetensors",
        gemma=folder / "gemma",
        upsampler=folder / "nano-upscaler-x2.safetensors",
        distilled_lora=folder / "nano-distilled-lora.safetensors",
        framed_lora=folder / "nano-framed-lora.safetensors",
    )
    loras = (found.distilled_lora, found.framed_lora)
    needed = (found.checkpoint, found.gemma / "model.safetensors", found.upsampler, *loras)
    missing = [str(path.relative_to(folder)) for path in needed if not path.is_file()]
    if missing:
        raise CheckpointError(
            f"the weights of nano are not complete: {folder} has no {', '.join(missing)}",
            hint="`git checkout -- diffsynth/nano/weights` in a clone, or install the package anew; "
            "`python -m training.nano all --folder runs/nano --device cuda` trains them, "
            "and runs/nano/nano is that folder",
        )
    return found


def models(*, distilled: bool = False) -> dict[str, Any]:
    """Arguments of :meth:`LTX2AudioVideoPipeline.from_pretrained`, for one stage and for two.

    Args:
        distilled: with the distilled LoRA on the whole run: 8 steps without guidance.

    Raises:
        CheckpointError: see :func:`files`.
    """
    found = files()
    lora, strength = ModelConfig(path=found.distilled_lora), DISTILLED_LORA_STRENGTH
    own: dict[str, Any] = {"stage2_lora_config": lora, "stage2_lora_strength": strength}
    return {
        "model_configs": [
            ModelConfig(path=path) for path in (found.checkpoint, found.gemma, found.upsampler)
        ],
        "tokenizer_config": ModelConfig(path=found.gemma),
        **({"loras": [(lora, strength)]} if distilled else own),
    }


def settings(*, distilled: bool = False) -> dict[str, Any]:
    """Arguments of a call, besides prompt and seed, with which nano is at its best.

    Plain guidance of 3 for both streams is what a call has without further words.
    """
    size = {"height": 256, "width": 256, "num_frames": 25, "frame_rate": 24.0}
    steps = {"use_distilled_pipeline": True} if distilled else {"num_inference_steps": 20}
    return {**size, **steps, "negative_prompt": ""}
