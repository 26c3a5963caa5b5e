"""Writing LoRAs in the key format of the official files."""

import json
from collections.abc import Mapping

import torch
from torch import Tensor

from diffsynth.lora.fuse import LoraUpdate

PREFIX = "diffusion_model."


def official_tensors(
    updates: Mapping[str, LoraUpdate], dtype: torch.dtype = torch.bfloat16
) -> dict[str, Tensor]:
    """The tensors of a file, on the CPU: ``diffusion_model.<layer>.lora_A.weight`` and ``.lora_B.weight``.

    The format states no alpha, so a scale other than 1 is multiplied into ``B``, in float32 before the one
    rounding to ``dtype``.

    Args:
        updates: name of the layer in the transformer -> its pair of factors.
        dtype: of the file; bfloat16 in the official ones.

    Raises:
        ValueError: an update that is no pair of factors, or one with differences beside it.
    """
    tensors: dict[str, Tensor] = {}
    for layer, update in updates.items():
        down, up = update.down, update.up
        if down is None or up is None or update.weight_diff is not None or update.bias_diff is not None:
            raise ValueError(f"{layer}: the official format holds pairs of factors and nothing else")
        scaled = up if update.scale == 1 else up.float() * update.scale
        for name, tensor in (("lora_A", down), ("lora_B", scaled)):
            tensors[f"{PREFIX}{layer}.{name}.weight"] = tensor.detach().to("cpu", dtype).contiguous()
    return tensors


def official_metadata(
    base_model: str, record: Mapping[str, object], reference_factors: tuple[int, int] | None = None
) -> dict[str, str]:
    """The metadata of a file.

    Args:
        base_model: "LTX-2" or "LTX-2.3"; :func:`~diffsynth.lora.file.read_lora` warns on the other one.
        record: what made the file, ready for JSON; kept under ``training``.
        reference_factors: size of the video / size of its reference clips, and frames alike, for an
            in-context LoRA.
    """
    stated = {"format": "pt", "base_model": base_model, "training": json.dumps(record, ensure_ascii=False)}
    if reference_factors is None:
        return stated
    size, time = map(str, reference_factors)
    names = ("reference_downscale_factor", "reference_spatial_scale_factor")
    return stated | dict.fromkeys(names, size) | {"reference_temporal_scale_factor": time}
