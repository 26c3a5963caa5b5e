"""Sources with a packed file behind them: mapped, read by threads, or partly kept in memory.

See :mod:`diffsynth.vram.source` for what they have in common.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Protocol

from torch import Tensor

from diffsynth.device import Backend, Stream
from diffsynth.vram.blocks import BlockLayout
from diffsynth.vram.source import READER_THREADS, RING_BUFFERS, HostSource


class BlockFile(Protocol):
    """A packed file, as sources need it; methods may be called from several threads."""

    @property
    def layouts(self) -> Mapping[str, BlockLayout]:
        """Layouts of the blocks by name, in the order of the file."""
        ...

    def read_into(self, block: str, buffer: Tensor, *, keep_in_file_cache: bool = True) -> object:
        """Fill ``buffer`` (nbytes or more,) uint8.  Raises CheckpointError or OSError.

        ``keep_in_file_cache``: whether the system should keep the bytes for the next read.
        """
        ...

    def mapped(self, block: str) -> Tensor:
        """The block's bytes in the mapped file.  Raises CheckpointError or OSError."""
        ...


class MappedSource(HostSource):
    """A packed file whose pages the system brings in, and drops, as it sees fit."""

    def __init__(
        self,
        file: BlockFile,
        backend: Backend,
        *,
        ring_buffers: int = RING_BUFFERS,
        reader_threads: int = READER_THREADS,
    ) -> None:
        super().__init__(file.layouts, backend, ring_buffers, reader_threads)
        self._file = file
        self._copies_directly = not backend.capabilities.pinned_memory

    def host_view(self, name: str) -> Tensor:
        """See :class:`BlockSource`."""
        return self._file.mapped(name)

    def copied(self, name: str, stream: Stream) -> None:
        """See :class:`BlockSource`."""
        if not self._from_ring:
            self.count_from_disk(self._layouts[name].nbytes)
        super().copied(name, stream)

    def _is_direct(self, name: str) -> bool:
        return self._copies_directly

    def _direct(self, name: str) -> Tensor:
        return self._file.mapped(name)[: self._layouts[name].nbytes]

    def _read(self, name: str, buffer: Tensor) -> None:
        buffer.copy_(self._file.mapped(name)[: buffer.numel()])
        self.count_from_disk(buffer.numel())


class MixedSource(HostSource):
    """A packed file read by threads, of which a fixed share stays in memory once it was read.

    Which blocks stay is decided beforehand: a cache that keeps what was used last never has what a cycle
    longer than the cache wants next.
    """

    def __init__(
        self,
        file: BlockFile,
        backend: Backend,
        *,
        in_ram: Collection[str] = (),
        page_locked: bool = False,
        keep_in_file_cache: bool = True,
        ring_buffers: int = RING_BUFFERS,
        reader_threads: int = READER_THREADS,
    ) -> None:
        """Open a source; nothing is read yet.

        Args:
            file: the packed file.
            backend: of the device that blocks will be copied to.
            in_ram: blocks that stay in host memory after their first use, except those resident on the
                device, of which the file is copy enough.
            page_locked: whether they stay in page-locked memory and are copied from there.
            keep_in_file_cache: whether the system should keep the other blocks in its own memory: of use when
                they fit there together.
            ring_buffers: buffers of the ring.
            reader_threads: threads that fill it.
        """
        super().__init__(file.layouts, backend, ring_buffers, reader_threads)
        self._file = file
        self._in_ram = frozenset(in_ram)
        self._page_locked = page_locked
        self._keep_in_file_cache = keep_in_file_cache
        self._copies_directly = page_locked or not backend.capabilities.pinned_memory
        self._keep: frozenset[str] = frozenset()
        self._kept: dict[str, Tensor] = {}

    @property
    def host_bytes(self) -> int:
        """The share in memory as far as it was read, and the ring."""
        return sum(memory.numel() for memory in tuple(self._kept.values())) + super().host_bytes

    def host_view(self, name: str) -> Tensor:
        """See :class:`BlockSource`; mapped, since such blocks are read at a few places only."""
        return self._file.mapped(name)

    def start(self, names: Sequence[str], *, repeat: bool, again: int = 0) -> None:
        """See :class:`BlockSource`.  Only what is used over and over is kept in memory."""
        self._keep = self._in_ram.intersection(names) if repeat else frozenset()
        super().start(names, repeat=repeat, again=again)

    def poll(self, name: str) -> Tensor | None:
        """See :class:`BlockSource`."""
        self._retire_ring()
        return super().poll(name)

    def stop(self) -> None:
        """See :class:`BlockSource`."""
        super().stop()
        self._kept.clear()

    def _retire_ring(self) -> None:
        """Drop the ring when every block of the cycle has come to stay in memory."""
        if self._ring is not None and len(self._kept) == len(self._keep) > 0 and self._ring.idle():
            super().stop()

    def _is_direct(self, name: str) -> bool:
        return self._copies_directly and name in self._kept

    def _direct(self, name: str) -> Tensor:
        return self._kept[name]

    def _passes_by(self, name: str, under_way: bool) -> bool:
        stays_soon = under_way and self._copies_directly and name in self._keep
        return stays_soon or self._is_direct(name)

    def _read(self, name: str, buffer: Tensor) -> None:
        kept = self._kept.get(name)
        if kept is not None:
            buffer.copy_(kept)
            return
        stays = name in self._keep
        self._file.read_into(name, buffer, keep_in_file_cache=self._keep_in_file_cache and not stays)
        self.count_from_disk(buffer.numel())
        if stays:
            memory = self._backend.host_buffer(buffer.numel(), pinned=self._page_locked)
            memory.copy_(buffer)
            self._kept.setdefault(name, memory)  # never replaced: it may be on its way to the device


class FileSource(MixedSource):
    """A packed file read by threads; nothing but the ring is in memory."""

    def __init__(
        self,
        file: BlockFile,
        backend: Backend,
        *,
        keep_in_file_cache: bool = True,
        ring_buffers: int = RING_BUFFERS,
        reader_threads: int = READER_THREADS,
    ) -> None:
        super().__init__(
            file,
            backend,
            keep_in_file_cache=keep_in_file_cache,
            ring_buffers=ring_buffers,
            reader_threads=reader_threads,
        )
