"""Files and sources for the tests of the loader: real key lists without data, sparse files, damaged files."""

import hashlib
import json
import math
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffsynth.loader.safetensors_file import DTYPE_BITS

MANIFESTS = Path(__file__).parents[1] / "manifest"
TINY = Path(__file__).parents[1] / "golden" / "pipelines" / "tiny_ltx2"
RELEASES = {"2.0": "ltx-2-19b", "2.3": "ltx-2.3-22b"}
PARTS = ("transformer", "text", "video_vae", "audio_vae", "vocoder")
SECTIONS = ("transformer", "vae", "audio_vae", "vocoder")

Entries = Mapping[str, tuple[str, tuple[int, ...]]]


class HeaderSource:
    """A weight source that knows names, dtypes and shapes, and holds no data."""

    def __init__(
        self, entries: Entries, metadata: Mapping[str, str] | None = None, name: str = "header"
    ) -> None:
        self.name = name
        self.metadata = dict(metadata or {})
        self.shapes = {key: shape for key, (_, shape) in entries.items()}
        self.dtypes = {key: dtype for key, (dtype, _) in entries.items()}

    def read(
        self, key: str, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> Tensor:
        raise AssertionError(f"{key} was read, a header was to be enough")

    def pieces(self, key: str) -> Iterator[tuple[slice, Tensor]]:
        raise AssertionError(f"{key} was read, a header was to be enough")


def manifest(*names: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Key -> (dtype, shape) of released files."""
    merged: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name in names:
        entries = json.loads((MANIFESTS / f"{name}.json").read_text(encoding="utf-8"))
        merged.update({key: (dtype, tuple(shape)) for key, (dtype, shape) in entries.items()})
    return merged


def single_file(version: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    """All tensors of the official single file."""
    return manifest(*(f"{RELEASES[version]}.{part}" for part in PARTS))


def single_file_metadata(version: str) -> dict[str, str]:
    """The metadata of the official single file."""
    sections: dict[str, Any] = {}
    for part in SECTIONS:
        text = (MANIFESTS / f"config.{RELEASES[version]}.{part}.json").read_text(encoding="utf-8")
        sections.update(json.loads(text))
    return {"config": json.dumps(sections), "model_version": f"{version}.0"}


def key_hash(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """The public key and shape hash of files.json."""
    lines = [*shapes, *(f"{key}:{'_'.join(map(str, shape))}" for key, shape in shapes.items())]
    return hashlib.md5(",".join(sorted(lines)).encode()).hexdigest()


def header_bytes(entries: Entries, metadata: Mapping[str, str] | None = None) -> tuple[bytes, int]:
    """The beginning of a safetensors file and the number of data bytes after it."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for key, (dtype, shape) in entries.items():
        size = DTYPE_BITS[dtype] * math.prod(shape) // 8
        header[key] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + size]}
        position += size
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text, position


def write_sparse(path: Path, entries: Entries, metadata: Mapping[str, str] | None = None) -> Path:
    """A file of the right size whose tensors are all zero and take no room on the disk."""
    start, size = header_bytes(entries, metadata)
    with path.open("wb") as file:
        file.write(start)
        file.truncate(len(start) + size)
    return path
