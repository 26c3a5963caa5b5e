"""A small network to pack, whose sources are real files; also run as a program, to be killed.

    python -m tests.vram.packing FOLDER CACHE [SLEEP_AFTER]

makes the packed file in CACHE from the source in FOLDER and says whether it was "made" or "found"; with
SLEEP_AFTER it writes FOLDER/asleep.PID when it has read so many tensors, and sleeps for good.
"""

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffsynth.vram.blocks import BlockLayout, TensorSpec, make_layout, unpack
from diffsynth.vram.cache import PackedCache
from diffsynth.vram.formats import StorageFormat, as_is, decode, encode
from diffsynth.vram.identity import Identity, identify
from diffsynth.vram.packed_file import PackedFile
from diffsynth.vram.packed_writer import write_packed

NUM_BLOCKS = 3
PIECE_BYTES = 1000
"""So small that most blocks have several pieces, and the last one is shorter."""


def make_source(path: Path, seed: int = 0) -> dict[str, Tensor]:
    """Write a checkpoint and return its tensors."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    tensors = {"table": normal(3, 5), "head.weight": normal(4, 33).bfloat16()}
    tensors["embedding"] = normal(16, 64).bfloat16()  # fills a block of its own to the last byte
    for index in range(NUM_BLOCKS):
        tensors[f"blocks.{index}.linear.weight"] = normal(24, 64).bfloat16()
        tensors[f"blocks.{index}.linear.bias"] = normal(24).bfloat16()
    save_file(tensors, path)
    return tensors


def layouts(tensors: dict[str, Tensor], format: StorageFormat) -> dict[str, BlockLayout]:
    """One block per index, and the rest; weights of linear layers in ``format``."""
    blocks: dict[str, dict[str, TensorSpec]] = {f"blocks.{i}": {} for i in range(NUM_BLOCKS)}
    blocks |= {"embedding": {}, "rest": {}}
    for name, tensor in tensors.items():
        block = next((b for b in blocks if f"{name}.".startswith(f"{b}.")), "rest")
        kept = format if name.endswith("linear.weight") else as_is(tensor.dtype)
        blocks[block][name] = TensorSpec(tuple(tensor.shape), tensor.dtype, kept)
    return {name: make_layout(specs) for name, specs in blocks.items()}


class Network:
    """A source file and what is needed to pack it."""

    def __init__(self, folder: Path, format: StorageFormat = StorageFormat.INT8) -> None:
        self.source = folder / "model.safetensors"
        self.format = format
        self.tensors = load_file(self.source)
        self.blocks = layouts(self.tensors, format)

    def identity(self) -> Identity:
        """Of the packed file of now."""
        return identify("tiny", str(self.format), [self.source], self.blocks)

    def read(self, name: str) -> Tensor:
        """One tensor."""
        return self.tensors[name]

    def write(self, path: Path, read: Callable[[str], Tensor] | None = None) -> None:
        """Pack to ``path``."""
        write_packed(path, self.blocks, self.identity(), read or self.read, piece_bytes=PIECE_BYTES)

    def check(self, file: PackedFile, *, mapped: bool = False) -> None:
        """Every tensor must be exactly what its format makes of the source; CheckpointError passes."""
        assert list(file.layouts) == list(self.blocks)
        for block, layout in file.layouts.items():
            buffer = torch.full((layout.nbytes,), 255, dtype=torch.uint8)
            if mapped:
                buffer = file.mapped(block)
            else:
                file.read_into(block, buffer)
            for entry in layout.entries:
                weight = self.tensors[entry.name]
                parts = encode(weight, entry.format)
                expected = decode(parts, entry.format, entry.shape, entry.dtype)
                assert torch.equal(unpack(layout, buffer, entry.name), expected), entry.name


def main() -> None:
    """See the module."""
    network = Network(Path(sys.argv[1]))
    sleep_after = int(sys.argv[3]) if len(sys.argv) > 3 else -1
    count = 0

    def read(name: str) -> Tensor:
        nonlocal count
        if count == sleep_after:
            Path(sys.argv[1], f"asleep.{os.getpid()}").touch()
            time.sleep(600)
        count += 1
        time.sleep(0.02)
        return network.read(name)

    cache = PackedCache(sys.argv[2])
    with cache.get_or_build(network.identity(), lambda path: network.write(path, read)) as file:
        print("made" if count else "found", file.path, flush=True)


if __name__ == "__main__":
    main()
