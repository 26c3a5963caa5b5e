"""Puts what the stages left into the layout of a released model, ready for the ordinary loader.

``nano.safetensors`` holds transformer, connectors, both autoencoders and the vocoder; the upsampler and the
LoRAs have files of their own, the text model a folder.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffsynth.errors import CheckpointError
from diffsynth.loader import NetworkKind
from training.nano.dit import GEMMA
from training.nano.parts import files_by_kind

FOLDER = "nano"
CHECKPOINT = "nano.safetensors"
ABOUT = "about.json"
UPSAMPLER = "nano-upscaler-x2.safetensors"
LORAS: Mapping[str, str] = {
    "distilled_lora.safetensors": "nano-distilled-lora.safetensors",
    "framed_lora.safetensors": "nano-framed-lora.safetensors",
}
"""What the stages call their LoRAs -> what users do."""
MODEL_VERSION = "2.0.0"
"""Of the layout: that of LTX-2."""
_TOGETHER = (
    NetworkKind.TRANSFORMER,
    NetworkKind.TEXT_CONNECTORS,
    NetworkKind.VIDEO_ENCODER,
    NetworkKind.VIDEO_DECODER,
    NetworkKind.AUDIO_ENCODER,
    NetworkKind.AUDIO_DECODER,
    NetworkKind.VOCODER,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportSettings:
    """How large the files may be together."""

    limit_bytes: int = 20_000_000


def export(settings: ExportSettings, folder: Path, device: str) -> None:
    """The stage: write ``FOLDER/nano``.  What is not trained yet is left out, and named.

    Raises:
        CheckpointError: a network of the checkpoint is missing, or the files are too large.
    """
    target = folder / FOLDER
    target.mkdir(parents=True, exist_ok=True)
    found = files_by_kind(folder)
    missing = [kind for kind in _TOGETHER if kind not in found]
    if missing:
        raise CheckpointError(f"{folder} holds no {', '.join(missing)}", hint="train those stages first")
    sources = list(dict.fromkeys(found[kind] for kind in _TOGETHER))
    config = {name: section for path in sources for name, section in _config(path).items()}
    tensors = {key: tensor for path in sources for key, tensor in load_file(path).items()}
    metadata = {"config": json.dumps(config), "model_version": MODEL_VERSION}
    save_file(_bf16(tensors), target / CHECKPOINT, metadata)
    others = {folder / source: name for source, name in LORAS.items()}
    if NetworkKind.UPSAMPLER in found:
        others[found[NetworkKind.UPSAMPLER]] = UPSAMPLER
    for source, name in others.items():
        if source.exists():
            save_file(_bf16(load_file(source)), target / name, _metadata(source))
        else:
            print(f"export: no {name}, {source.name} is not there", flush=True)
    shutil.copytree(folder / GEMMA, target / GEMMA, dirs_exist_ok=True)
    sizes = {str(p.relative_to(target)): p.stat().st_size for p in sorted(target.rglob("*")) if p.is_file()}
    sizes.pop(ABOUT, None)
    _write_about(folder, target, sizes)
    total = sum(sizes.values())
    print(f"export: {target}: {total / 1e6:.2f} MB: {sizes}", flush=True)
    if total >= settings.limit_bytes:
        raise CheckpointError(
            f"{total} bytes together are too many", hint=f"fewer than {settings.limit_bytes}"
        )


def _bf16(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: tensor.to(torch.bfloat16).contiguous() for key, tensor in tensors.items()}


def _metadata(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return dict(file.metadata() or {})


def _config(path: Path) -> dict[str, Any]:
    """The sections of a part; those of its JSON would be the same."""
    sections: dict[str, Any] = json.loads(_metadata(path)["config"])
    return sections


def _write_about(folder: Path, target: Path, sizes: Mapping[str, int]) -> None:
    """How and when every part was trained, with what seed, and what it was measured to be worth."""
    networks = {}
    for path in sorted(folder.glob("*.json")):
        notes = json.loads(path.read_text(encoding="utf-8"))
        networks[path.stem] = {key: value for key, value in notes.items() if key != "config"}
    stages = {}
    for path in sorted((folder / "done").glob("*.json")):
        notes = json.loads(path.read_text(encoding="utf-8"))
        stages[path.stem] = {key: value for key, value in notes.items() if key != "settings"}
    about = {
        "command": "python -m training.nano all --folder FOLDER --device cuda",
        "bytes": dict(sizes),
        "networks": networks,
        "stages": stages,
    }
    (target / ABOUT).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
