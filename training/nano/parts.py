"""The trained networks in a folder, found by what the files hold."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from diffsynth.errors import CheckpointError
from diffsynth.loader import NetworkKind, WeightFiles, load_network, recognise


def files_by_kind(folder: Path) -> dict[NetworkKind, Path]:
    """Every network that lies in a file of the folder itself, and its file."""
    return {kind: path for path in sorted(folder.glob("*.safetensors")) for kind in _kinds(path)}


def load_part(folder: Path, kind: NetworkKind, device: torch.device | str, dtype: torch.dtype) -> Any:
    """A network of a folder, ready to run.

    Raises:
        CheckpointError: no file holds it, or the file is damaged.
    """
    found = files_by_kind(folder)
    if kind not in found:
        raise CheckpointError(f"{folder} holds no {kind}", hint="train that stage first")
    return load_network(kind, WeightFiles(found[kind]), dtype=dtype, device=device)


def working_dtype(device: torch.device | str) -> torch.dtype:
    """bfloat16 where it is fast, else float32."""
    return torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32


def _kinds(path: Path) -> Iterator[NetworkKind]:
    yield from (kind for kind in recognise(WeightFiles(path)) if kind is not NetworkKind.LORA)
