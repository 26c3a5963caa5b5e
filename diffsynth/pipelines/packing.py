"""The packed weights of a pipeline: how each network is divided, and where its blocks come from."""

from collections.abc import Mapping
from functools import cached_property
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from diffsynth.device import Backend
from diffsynth.loader import NetworkWeights
from diffsynth.pipelines.storage import ROLES, PartLayouts, Storage, part_layouts
from diffsynth.vram.binding import REST
from diffsynth.vram.blocks import BlockLayout, pack_entry
from diffsynth.vram.cache import PackedCache
from diffsynth.vram.file_source import MixedSource
from diffsynth.vram.formats import AS_IS, SCALE, StorageFormat
from diffsynth.vram.identity import Identity, identify
from diffsynth.vram.packed_file import PackedFile
from diffsynth.vram.packed_writer import Progress, write_packed
from diffsynth.vram.plan import PhasePlan
from diffsynth.vram.source import BlockSource, RamSource

SLICE = "slices.{}"
"""Name of the block with the slice of the text projections for one hidden state."""
SLICES_BYTES = 2**29
"""Of the slices of one text projection that are cut at a time while it is packed."""
WORKING_BYTES = 2**26
"""Pieces on their way from the file and to another format."""


class PackedWeights:
    """Packs each network when it is first asked for: into a file of the cache, or into host memory."""

    def __init__(
        self,
        weights: Mapping[str, NetworkWeights],
        storage: Storage,
        dtype: torch.dtype,
        backend: Backend,
        *,
        cache: PackedCache | None,
    ) -> None:
        """Nothing is read yet.

        Args:
            weights: by part, where its tensors lie.
            storage: formats.
            dtype: that the networks compute in.
            backend: of the device.
            cache: of packed files; None packs into host memory.
        """
        self._weights = weights
        self._storage = storage
        self._dtype = dtype
        self._backend = backend
        self._cache = cache
        self._layouts: dict[str, PartLayouts] = {}
        self._files: dict[str, PackedFile] = {}
        self._in_ram: dict[str, dict[str, tuple[BlockLayout, Tensor]]] = {}

    @cached_property
    def policies(self) -> dict[str, str]:
        """Of the networks that a storage format is about: part -> how it is stored."""
        return {part: self._policy(part) for part in self._weights if part in ROLES}

    def _policy(self, part: str) -> str:
        return self._storage.policy_of(part, self._weights[part], self._dtype)

    def layouts(self, part: str) -> PartLayouts:
        """How a network is divided."""
        if part not in self._layouts:
            module = self._weights[part].build()
            self._layouts[part] = part_layouts(part, module, self._storage, self._dtype)
        return self._layouts[part]

    def blocks(self, part: str) -> dict[str, BlockLayout]:
        """All blocks of a network in the order of the packed file."""
        layouts = self.layouts(part)
        blocks = {**layouts.host, **({REST: layouts.rest} if layouts.rest else {})}
        blocks |= {SLICE.format(index): layout for index, layout in enumerate(layouts.slices)}
        return {**blocks, **layouts.blocks}

    def host_bytes(self) -> int:
        """What stays in host memory for good once every network was used: those that no file holds."""
        parts = [part for part in self._weights if self._cache_of(part) is None]
        return sum(layout.nbytes for part in parts for layout in self.blocks(part).values())

    def convert(self, part: str, progress: Progress | None = None) -> None:
        """Pack a network, unless that was done before.

        Args:
            part: its name.
            progress: told at the beginning and after every block: bytes done, bytes in all.  Nothing is left
                of what it interrupts by raising.

        Raises:
            CheckpointError, OutputError: weights cannot be read or converted.
        """
        if part in self._files or part in self._in_ram:
            return
        cache = self._cache_of(part)
        if cache is None:
            self._in_ram[part] = self._packed_in_ram(part, progress)
        else:
            self._files[part] = self._packed_file(part, cache, progress)

    def is_packed(self, part: str) -> bool:
        """Whether :meth:`convert` has nothing to do.

        Raises:
            CheckpointError: a file is missing or cannot be read.
        """
        if part in self._files or part in self._in_ram:
            return True
        cache = self._cache_of(part)
        found = None if cache is None else cache.find(self._identity(part))
        if found is not None:
            self._files[part] = found
        return found is not None

    def source(self, part: str, plan: PhasePlan | None) -> BlockSource:
        """The blocks of a network, as a plan wants them kept; None: all on the disk.

        Raises:
            CheckpointError, OutputError: weights cannot be read or converted.
        """
        self.convert(part)
        if part in self._in_ram:
            return RamSource(self._in_ram[part], self._backend)
        return MixedSource(
            self._files[part],
            self._backend,
            in_ram=() if plan is None else plan.ram_blocks,
            page_locked=plan is not None and plan.pinned,
        )

    def close(self) -> None:
        """Close the packed files, and drop what lies in host memory."""
        for file in self._files.values():
            file.close()
        self._files.clear()
        self._in_ram.clear()

    def _cache_of(self, part: str) -> PackedCache | None:
        return self._cache if self._weights[part].files.paths else None

    def _identity(self, part: str) -> Identity:
        weights = self._weights[part]
        return identify(part, self._policy(part), weights.files.paths, self.blocks(part))

    def _packed_file(self, part: str, cache: PackedCache, progress: Progress | None) -> PackedFile:
        blocks, identity = self.blocks(part), self._identity(part)
        reader = _Reader(self._weights[part], blocks, self._dtype)

        def build(path: Path) -> None:
            if progress is not None:
                progress(0, _total_bytes(blocks))
            write_packed(path, blocks, identity, reader, progress=progress)

        return cache.get_or_build(identity, build)

    def _packed_in_ram(self, part: str, progress: Progress | None) -> dict[str, tuple[BlockLayout, Tensor]]:
        blocks = self.blocks(part)
        done, total = 0, _total_bytes(blocks)
        tell = progress or (lambda done, total: None)
        reader = _Reader(self._weights[part], blocks, self._dtype)
        packed: dict[str, tuple[BlockLayout, Tensor]] = {}
        tell(done, total)
        with torch.inference_mode(False):
            for name, layout in blocks.items():
                memory = self._backend.host_buffer(layout.nbytes, pinned=False)
                for entry in layout.entries:
                    pack_entry(layout, entry.name, reader(entry.name), memory)
                packed[name] = (layout, memory)
                done += layout.nbytes
                tell(done, total)
        return packed


def _total_bytes(blocks: Mapping[str, BlockLayout]) -> int:
    return sum(layout.nbytes for layout in blocks.values())


class _Reader:
    """Reads the tensors of packed blocks from a checkpoint, one at a time.

    Weights that will be quantised are read in float32, which every stored dtype fits into exactly; float8
    that will be fp8 is taken over as it is stored, with a factor for each row.  Every row of a text
    projection holds columns of all slices, so it is read once for each ``SLICES_BYTES`` of them.
    """

    def __init__(
        self, weights: NetworkWeights, blocks: Mapping[str, BlockLayout], dtype: torch.dtype
    ) -> None:
        self._weights = weights
        self._dtype = dtype
        self._entries = {e.name: e for layout in blocks.values() for e in layout.entries}
        self._num_slices = sum(name.startswith(SLICE.format("")) for name in blocks)
        self._slices: dict[str, dict[int, Tensor]] = {}

    def __call__(self, name: str) -> Tensor | Mapping[str, Tensor]:
        projection, colon, index = name.partition(":")
        if colon:
            return self._slice(projection, int(index))
        self._slices.clear()
        format = self._entries[name].format
        if format is StorageFormat.FP8 and self._weights.is_float8(name):
            values, factors = self._weights.read_float8(name)
            return {"": values, SCALE: factors}
        return self._weights.read(name, dtype=self._dtype if format in AS_IS else torch.float32)

    def _slice(self, projection: str, index: int) -> Tensor:
        if index not in self._slices.get(projection, {}):
            self._slices.pop(projection, None)
            self._slices[projection] = self._read_slices(projection, index)
        return self._slices[projection][index]

    def _read_slices(self, projection: str, first: int) -> dict[int, Tensor]:
        """The slices from ``first`` on, by index."""
        shape = self._entries[f"{projection}:{first}"].shape
        indices = range(first, min(first + slices_at_once(shape, self._dtype), self._num_slices))
        found = {index: torch.empty(shape, dtype=self._dtype) for index in indices}
        for rows, piece in self._weights.pieces(projection, dtype=self._dtype):
            for index, part in found.items():
                part[rows] = piece[:, index :: self._num_slices]
        return found


def slices_at_once(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """How many slices of a text projection are cut at a time."""
    return max(1, SLICES_BYTES // (prod(shape) * dtype.itemsize))


def conversion_bytes(layouts: PartLayouts, dtype: torch.dtype) -> int:
    """Host memory that packing a network takes at most, beside what the process has.

    The largest block is put together from its tensors, of which the largest may be there as it was read.  The
    one tensor of a host block is that block.
    """
    blocks = [*layouts.blocks.values(), *layouts.slices, *([layouts.rest] if layouts.rest else [])]
    block = max((layout.nbytes for layout in blocks), default=0)
    entries = [e for layout in (*blocks, *layouts.host.values()) for e in layout.entries if ":" not in e.name]
    sizes = (prod(e.shape) * (dtype if e.format in AS_IS else torch.float32).itemsize for e in entries)
    cut = sum(
        min(slices_at_once(e.shape, dtype), len(layouts.slices)) * prod(e.shape) * dtype.itemsize
        for layout in layouts.slices[:1]
        for e in layout.entries
    )
    return block + max(max(sizes, default=0), cut) + WORKING_BYTES
