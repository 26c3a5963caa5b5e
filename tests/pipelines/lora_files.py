"""One LoRA for the tiny transformer, written in every key format."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

Factors = Mapping[str, tuple[Tensor, Tensor]]
"""Layer -> A (rank, in) and B (out, rank) in bf16."""

RANK, ALPHA = 3, 6.0
SCALE = ALPHA / RANK
"""A power of two: formats without alpha state it in B without a rounding."""

DIFFUSERS = {
    "patchify_proj": "proj_in",
    "audio_patchify_proj": "audio_proj_in",
    "adaln_single": "time_embed",
    "audio_adaln_single": "audio_time_embed",
    "av_ca_video_scale_shift_adaln_single": "av_cross_attn_video_scale_shift",
    "av_ca_audio_scale_shift_adaln_single": "av_cross_attn_audio_scale_shift",
    "av_ca_a2v_gate_adaln_single": "av_cross_attn_video_a2v_gate",
    "av_ca_v2a_gate_adaln_single": "av_cross_attn_audio_v2a_gate",
}


def random_factors(weights: Mapping[str, Tensor], *, seed: int = 1, rank: int = RANK) -> Factors:
    """For each weight (out, in) an update about half as large as it is, once it is scaled."""
    random = torch.Generator().manual_seed(seed)

    def factors(weight: Tensor) -> tuple[Tensor, Tensor]:
        down = torch.randn(rank, weight.shape[1], generator=random)
        up = torch.randn(weight.shape[0], rank, generator=random)
        size = 0.5 * weight.float().std() / (SCALE * rank**0.5)
        return down.bfloat16(), (up * size).bfloat16()

    return {layer: factors(weight) for layer, weight in weights.items()}


def write_official(
    factors: Factors, folder: Path, *, prefix: str = "diffusion_model.", adapter: str = ""
) -> Path:
    """As the official trainer does: ``alpha / rank`` is in B."""
    state = {}
    for layer, (down, up) in factors.items():
        state[f"{prefix}{layer}.lora_A{adapter}.weight"] = down
        state[f"{prefix}{layer}.lora_B{adapter}.weight"] = up * SCALE
    return _written(state, folder)


def _bare(factors: Factors, folder: Path) -> Path:
    return write_official(factors, folder, prefix="")


def _diffsynth(factors: Factors, folder: Path) -> Path:
    return write_official(factors, folder, prefix="", adapter=".default")


def _raw_peft(factors: Factors, folder: Path) -> Path:
    (folder / "adapter_config.json").write_text(json.dumps({"r": RANK, "lora_alpha": ALPHA}))
    return _peft(factors, folder, "base_model.model.", lambda layer: layer)


def _comfyui(factors: Factors, folder: Path) -> Path:
    return _with_alpha(factors, folder, lambda layer: f"diffusion_model.{layer}")


def _kohya(factors: Factors, folder: Path) -> Path:
    return _with_alpha(factors, folder, lambda layer: f"lora_unet_{layer.replace('.', '_')}")


def _diffusers(factors: Factors, folder: Path) -> Path:
    def renamed(layer: str) -> str:
        top, *rest = layer.split(".")
        return ".".join([DIFFUSERS.get(top, top), *rest])

    stated = {"transformer.r": RANK, "transformer.lora_alpha": ALPHA}
    return _peft(
        factors, folder, "transformer.", renamed, metadata={"lora_adapter_metadata": json.dumps(stated)}
    )


def _peft(
    factors: Factors,
    folder: Path,
    prefix: str,
    spelled: Callable[[str], str],
    metadata: Mapping[str, str] | None = None,
) -> Path:
    state = {}
    for layer, (down, up) in factors.items():
        state[f"{prefix}{spelled(layer)}.lora_A.weight"] = down
        state[f"{prefix}{spelled(layer)}.lora_B.weight"] = up
    return _written(state, folder, metadata)


def _with_alpha(factors: Factors, folder: Path, spelled: Callable[[str], str]) -> Path:
    state = {}
    for layer, (down, up) in factors.items():
        state[f"{spelled(layer)}.lora_down.weight"] = down
        state[f"{spelled(layer)}.lora_up.weight"] = up
        state[f"{spelled(layer)}.alpha"] = torch.tensor(ALPHA)
    return _written(state, folder)


def _written(state: Mapping[str, Tensor], folder: Path, metadata: Mapping[str, str] | None = None) -> Path:
    file = folder / "lora.safetensors"
    save_file(dict(state), file, None if metadata is None else dict(metadata))
    return file


WRITERS: Mapping[str, tuple[Callable[[Factors, Path], Path], str]] = {
    "official": (write_official, "none"),
    "bare PEFT": (_bare, "none"),
    "DiffSynth": (_diffsynth, "none"),
    "raw PEFT": (_raw_peft, "adapter_config.json"),
    "ComfyUI": (_comfyui, "tensors"),
    "kohya": (_kohya, "tensors"),
    "diffusers": (_diffusers, "metadata"),
}
"""Format as a report names it -> what writes it, and where it has its alpha."""


def write_all(factors: Factors, folder: Path) -> dict[str, Path]:
    """The same update in every format, each in a folder of its own."""
    found = {}
    for format, (write, _) in WRITERS.items():
        own = folder / format.replace(" ", "_")
        own.mkdir()
        found[format] = write(factors, own)
    return found
