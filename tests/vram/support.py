"""Fakes and small blocks for the tests of sources, streamer and managed modules."""

import threading
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from diffsynth.vram.blocks import BlockLayout, TensorSpec, make_layout
from diffsynth.vram.formats import StorageFormat
from diffsynth.vram.source import RamSource
from diffsynth.vram.streamer import Streamer
from tests.standin import StandIn


class FakeFile:
    """A packed file in memory: counts what is read, fails where it is told to, can be held up."""

    def __init__(self, blocks: Mapping[str, tuple[BlockLayout, Tensor]]) -> None:
        self._blocks = dict(blocks)
        self.fails: dict[str, BaseException] = {}
        self.reads: list[str] = []
        self.going = threading.Event()
        self.going.set()

    @property
    def layouts(self) -> Mapping[str, BlockLayout]:
        return {name: layout for name, (layout, _) in self._blocks.items()}

    def read_into(self, block: str, buffer: Tensor, *, keep_in_file_cache: bool = True) -> None:
        assert self.going.wait(10)
        if block in self.fails:
            raise self.fails[block]
        self.reads.append(block)
        layout, content = self._blocks[block]
        buffer[: layout.nbytes].copy_(content)

    def mapped(self, block: str) -> Tensor:
        if block in self.fails:
            raise self.fails[block]
        return self._blocks[block][1]


def raw_layout(nbytes: int) -> BlockLayout:
    """One tensor of float32 that fills a block of about so many bytes."""
    return make_layout({"x": TensorSpec((nbytes // 4,), torch.float32, StorageFormat.F32)})


def raw_blocks(sizes: Iterable[int], seed: int = 0) -> dict[str, tuple[BlockLayout, Tensor]]:
    """Blocks named b0, b1, ... with random values in host memory."""
    generator = torch.Generator().manual_seed(seed)
    blocks = {}
    for number, size in enumerate(sizes):
        layout = raw_layout(size)
        content = torch.zeros(layout.nbytes, dtype=torch.uint8)
        layout.views(content)["x"][""].copy_(torch.randn(size // 4, generator=generator))
        blocks[f"b{number}"] = (layout, content)
    return blocks


def page_locked(blocks: Mapping[str, tuple[BlockLayout, Tensor]], device: StandIn) -> RamSource:
    """The blocks in page-locked memory."""
    copies = {}
    for name, (layout, content) in blocks.items():
        memory = device.backend.host_buffer(layout.nbytes)
        copies[name] = (layout, memory.copy_(content))
    return RamSource(copies, device.backend, page_locked=True)


def tensor_of(layout: BlockLayout, views: Mapping[str, Mapping[str, Tensor]]) -> Tensor:
    """What a streamer of raw blocks prepares: the one tensor of the block."""
    return views["x"][""]


def expected(blocks: Mapping[str, tuple[BlockLayout, Tensor]], name: str) -> Tensor:
    """The values of a raw block."""
    layout, content = blocks[name]
    return layout.views(content)["x"][""]


def traverse(
    streamer: Streamer[Tensor], names: Iterable[str], into: Mapping[str, Tensor], stop_at: str | None = None
) -> None:
    """Use every block: its values are copied, on the device, to the tensors in ``into``."""
    for name in names:
        block = streamer.acquire(name)
        into[name].copy_(block)
        if name == stop_at:
            return
        streamer.release(name)


def reader_threads() -> list[str]:
    """Names of the reader threads that are alive."""
    return [t.name for t in threading.enumerate() if t.name.startswith("diffsynth-reader")]
