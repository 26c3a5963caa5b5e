"""A process that runs a large network under the memory manager and reports what memory it took.

``python -m tests.vram.host_memory FOLDER BLOCKS MODE...``: the output is JSON, one entry per mode.
"""

import gc
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.footprint import Watch, held, high_water_mark
from diffsynth.device import backend_for
from diffsynth.vram.binding import module_layouts
from diffsynth.vram.blocks import Entry
from diffsynth.vram.file_source import MappedSource, MixedSource
from diffsynth.vram.formats import CHUNK_ELEMENTS, StorageFormat, decode_scratch_bytes
from diffsynth.vram.identity import identify
from diffsynth.vram.linear import decoded_bytes
from diffsynth.vram.managed import ManagedModule
from diffsynth.vram.packed_file import PackedFile
from diffsynth.vram.packed_writer import write_packed
from diffsynth.vram.plan import PhasePlan
from diffsynth.vram.planner import Block, Budget, Choice, PhaseDemand, plan

WIDTH = 4096
LINEARS = 2
TOKENS = 2
TRAVERSALS = 2
ACTIVATIONS = 16 * TOKENS * WIDTH * 4
WORKSPACE = 2 * 4 * CHUNK_ELEMENTS
"""The CPU multiplies operands of two dtypes through a temporary, which other devices do not need."""
SHARE = 0.4
"""Of the streamed blocks that may stay in memory in the mode ``share``."""


class Layers(nn.Module):
    """One block: almost nothing to compute, but 16 MB of weights per linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(LINEARS))

    def forward(self, x: Tensor) -> Tensor:
        """``x`` (tokens, width)."""
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return x


class Network(nn.Module):
    """Blocks one after another."""

    def __init__(self, num_blocks: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Layers() for _ in range(num_blocks))

    def forward(self, x: Tensor) -> Tensor:
        """``x`` (tokens, width)."""
        for block in self.blocks:
            x = block(x)
        return x


def run(folder: Path, num_blocks: int, modes: Sequence[str]) -> dict[str, Any]:
    """Write the network, then run it in the modes ``disk``, ``share`` and ``mapped``."""
    backend = backend_for(torch.device("cpu"))
    with torch.device("meta"):
        module = Network(num_blocks)
    names = [f"blocks.{number}" for number in range(num_blocks)]
    layouts = module_layouts(
        module, blocks=names, dtype_of=lambda _: torch.float32, format_of=lambda _: StorageFormat.INT8
    )
    source = folder / "source"
    source.write_bytes(b"stands for the checkpoint")
    identity = identify("network", "int8", [source], layouts)
    path = folder / "packed.safetensors"
    write_packed(path, layouts, identity, _Weights())
    found = {}
    try:
        with PackedFile.open(path, identity) as file:
            managed = ManagedModule(module, MixedSource(file, backend), backend, blocks=names)
            entries = [entry for entry in layouts[names[0]].entries if len(entry.shape) == 2]
            demand = PhaseDemand(
                name="denoise",
                part="network",
                blocks=tuple(Block(name, layouts[name].nbytes) for name in names),
                scratch_bytes=max(map(_scratch_bytes, entries)),
                choices=(Choice(activation_bytes=ACTIVATIONS, workspace_bytes=WORKSPACE, flops=1e9),),
                traversals=TRAVERSALS,
            )
            for mode in modes:
                found[mode] = _run_mode(mode, managed, file, demand)
    finally:
        path.unlink()
    return {"modes": found, "weights_bytes": sum(layout.nbytes for layout in layouts.values())}


def _run_mode(mode: str, managed: ManagedModule, file: PackedFile, demand: PhaseDemand) -> dict[str, Any]:
    backend = backend_for(torch.device("cpu"))
    gc.collect()
    base = held().own
    chosen = _plan(mode, demand, base)
    source: Any = MappedSource(file, backend)
    if mode != "mapped":
        source = MixedSource(file, backend, in_ram=chosen.ram_blocks, page_locked=chosen.pinned)
    with Watch(0.002) as watch, torch.inference_mode():
        x = torch.ones(TOKENS, WIDTH)
        managed.enter(residents=chosen.residents, slots=chosen.slots, source=source)
        read = []
        for _ in range(TRAVERSALS):
            before = managed.traffic
            result = managed.module(x)
            read.append((managed.traffic - before).bytes_from_disk)
        managed.exit()
        peak = watch.peak
    gc.collect()
    return {
        "base": base,
        "peak": peak.own,
        "peak_with_file_pages": peak.resident,
        "after": held().own,
        "planned_host": chosen.peak_host_bytes,
        # On the CPU what a device would hold lies in the same memory.
        "planned_device": chosen.peak_vram_bytes,
        "in_ram": sum(b.nbytes for b in demand.blocks if b.name in chosen.ram_blocks),
        "streamed": chosen.bytes_per_traversal,
        "planned_disk": chosen.disk_bytes_per_traversal,
        "from_disk": read,
        "sum": float(result.float().sum()),
        "high_water_mark": high_water_mark(),
    }


def _plan(mode: str, demand: PhaseDemand, base: int) -> PhasePlan:
    """Device: two slots and two residents.  Host: the ring, and in the mode ``share`` some blocks."""
    block = demand.blocks[0].nbytes
    device = 4 * block + demand.scratch_bytes + ACTIVATIONS + WORKSPACE
    streamed = (len(demand.blocks) - 2) * block
    host = base + 3 * block + (int(SHARE * streamed) if mode == "share" else 0)
    budget = Budget(
        vram_bytes=device,
        host_bytes=host,
        link_bytes_per_s=10e9,
        disk_bytes_per_s=2e9,
        tflops=1.0,
        host_base_bytes=base,
    )
    return plan([demand], budget).phase(demand.name)


def _scratch_bytes(entry: Entry) -> int:
    return decoded_bytes(entry) + decode_scratch_bytes(entry.format, entry.shape)


class _Weights:
    """The same random weight for every layer: reading it costs nothing."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        weight = torch.randint(-127, 128, (WIDTH, WIDTH), dtype=torch.int8, generator=generator)
        self._parts = {"": weight, "scale": torch.full((WIDTH,), 1e-4)}
        self._bias = torch.zeros(WIDTH)

    def __call__(self, name: str) -> Tensor | Mapping[str, Tensor]:
        return self._bias if name.endswith("bias") else self._parts


if __name__ == "__main__":
    print(json.dumps(run(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])))
