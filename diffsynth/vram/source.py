"""Sources: where the bytes of blocks lie on the host, and how they come into a buffer to be copied from.

Those with a file behind them are in :mod:`diffsynth.vram.file_source`.

| source        | holds                               | host memory                                    |
|---------------|-------------------------------------|------------------------------------------------|
| `RamSource`   | blocks in memory                    | all blocks                                     |
| `MappedSource`| a packed file, mapped               | the ring; the pages belong to the system       |
| `FileSource`  | a packed file, read by threads      | the ring                                       |
| `MixedSource` | the same, a fixed share kept in RAM | the ring and that share, blocks resident on    |
|               |                                     | the device left out                            |

The ring (:mod:`diffsynth.vram.readahead`) exists where bytes cannot be copied from where they lie: always for
files, and for pageable memory where the device copies from page-locked memory only without holding up the
program.
"""

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor

from diffsynth.device import Backend, Stream
from diffsynth.errors import CheckpointError
from diffsynth.vram.blocks import BlockLayout, pack
from diffsynth.vram.readahead import Order, ReadAhead

RING_BUFFERS = 3
"""Buffers of a ring: one being copied, one waiting, one being filled."""
READER_THREADS = 2


class BlockSource(Protocol):
    """Blocks of one network.  One streamer at a time uses it, from one thread."""

    @property
    def names(self) -> tuple[str, ...]:
        """The blocks there are."""
        ...

    @property
    def host_bytes(self) -> int:
        """Host memory held now that the system cannot take back, in bytes."""
        ...

    @property
    def bytes_from_disk(self) -> int:
        """Bytes read from files since the source was made (the system may have had them in memory)."""
        ...

    def layout(self, name: str) -> BlockLayout:
        """What lies where in the block."""
        ...

    def host_view(self, name: str) -> Tensor:
        """The bytes of a block that stays on the host: (nbytes,) uint8, not to be written to.

        Raises:
            CheckpointError: the block cannot be read.
        """
        ...

    def start(self, names: Sequence[str], *, repeat: bool, again: int = 0) -> None:
        """State the order of use, once or over and over; reading ahead begins.  Implies :meth:`stop`.

        Over and over, the names from number ``again`` on follow the last; a name may come more than once.
        """
        ...

    def poll(self, name: str) -> Tensor | None:
        """Like :meth:`stage`, but None where that would wait or raise."""
        ...

    def stage(self, name: str) -> Tensor:
        """Bytes of a block that a device can copy, (nbytes,) uint8.

        A name out of order is found too, but what was read ahead is lost.  The bytes stay until
        :meth:`copied`, which must follow.

        Raises:
            CheckpointError: the block cannot be read.
        """
        ...

    def copied(self, name: str, stream: Stream) -> None:
        """The copy of what was staged last has been issued on ``stream``."""
        ...

    def stop(self) -> None:
        """End of use: frees everything that :meth:`start` made.  Copies must be done.  May start again."""
        ...


class HostSource(ABC):
    """What the sources share: the ring, for blocks that cannot be copied from where they lie."""

    def __init__(
        self, layouts: Mapping[str, BlockLayout], backend: Backend, ring_buffers: int, reader_threads: int
    ) -> None:
        self._layouts = layouts
        self._backend = backend
        self._ring_buffers = ring_buffers
        self._reader_threads = reader_threads
        self._ring: ReadAhead | None = None
        self._from_ring = False
        self._bytes_from_disk = 0
        self._counting = threading.Lock()

    # -- to be filled in --------------------------------------------------------------------------------

    @abstractmethod
    def _is_direct(self, name: str) -> bool:
        """Whether a device can copy the block from where it lies (by now)."""

    @abstractmethod
    def _direct(self, name: str) -> Tensor:
        """The bytes of such a block."""

    @abstractmethod
    def _read(self, name: str, buffer: Tensor) -> None:
        """Fill a buffer of the ring; called by reader threads.  Raises CheckpointError or OSError."""

    def _passes_by(self, name: str, under_way: bool) -> bool:
        """Whether readers pass the block by; ``under_way``: one of them has it in hand."""
        return self._is_direct(name)

    # -- BlockSource ------------------------------------------------------------------------------------

    @property
    def names(self) -> tuple[str, ...]:
        """See :class:`BlockSource`."""
        return tuple(self._layouts)

    @property
    def host_bytes(self) -> int:
        """See :class:`BlockSource`."""
        return self._ring.nbytes if self._ring is not None else 0

    @property
    def bytes_from_disk(self) -> int:
        """See :class:`BlockSource`."""
        return self._bytes_from_disk

    def layout(self, name: str) -> BlockLayout:
        """See :class:`BlockSource`."""
        return self._layouts[name]

    def start(self, names: Sequence[str], *, repeat: bool, again: int = 0) -> None:
        """See :class:`BlockSource`."""
        self.stop()
        sizes = {name: self._layouts[name].nbytes for name in names if not self._is_direct(name)}
        if sizes:
            self._ring = ReadAhead(
                self._backend,
                Order(names, repeat=repeat, again=again),
                self._read_checked,
                sizes,
                buffers=self._ring_buffers if repeat else min(self._ring_buffers, len(sizes)),
                threads=self._reader_threads,
                passes_by=self._passes_by,
            )

    def poll(self, name: str) -> Tensor | None:
        """See :class:`BlockSource`."""
        self._from_ring = not self._is_direct(name)
        if self._from_ring:
            assert self._ring is not None, "started with the names that are asked for"
            return self._ring.poll(name)
        try:
            return self._direct(name)
        except (CheckpointError, OSError):
            return None  # `stage` will raise it

    def stage(self, name: str) -> Tensor:
        """See :class:`BlockSource`."""
        self._from_ring = not self._is_direct(name)
        if self._from_ring:
            assert self._ring is not None, "started with the names that are asked for"
            return self._ring.stage(name)
        with checkpoint_errors(name):
            return self._direct(name)

    def copied(self, name: str, stream: Stream) -> None:
        """See :class:`BlockSource`."""
        if self._from_ring:
            assert self._ring is not None, "a block was staged from it"
            self._ring.copied(name, stream)

    def stop(self) -> None:
        """See :class:`BlockSource`."""
        ring, self._ring = self._ring, None
        if ring is not None:
            ring.stop()

    # ---------------------------------------------------------------------------------------------------

    def count_from_disk(self, nbytes: int) -> None:
        """Add to :attr:`bytes_from_disk`; for any thread."""
        with self._counting:
            self._bytes_from_disk += nbytes

    def _read_checked(self, name: str, buffer: Tensor) -> None:
        with checkpoint_errors(name):
            self._read(name, buffer)


@contextmanager
def checkpoint_errors(name: str) -> Iterator[None]:
    """Errors of the system while it reads a block become CheckpointError."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"block {name!r} cannot be read: {error}",
            hint="check the disk; `diffsynth cache clear` drops packed files",
        ) from error


class RamSource(HostSource):
    """Blocks that lie in host memory."""

    def __init__(
        self,
        blocks: Mapping[str, tuple[BlockLayout, Tensor]],
        backend: Backend,
        *,
        page_locked: bool = False,
        ring_buffers: int = RING_BUFFERS,
        reader_threads: int = READER_THREADS,
    ) -> None:
        """Take over packed blocks.

        Args:
            blocks: layout and bytes (nbytes or more,) uint8 of each block.
            backend: of the device that they will be copied to.
            page_locked: whether the bytes come from ``backend.host_buffer``; they are then copied directly.
            ring_buffers: buffers of the ring, where one is needed.
            reader_threads: threads that fill it.
        """
        super().__init__(
            {name: layout for name, (layout, _) in blocks.items()}, backend, ring_buffers, reader_threads
        )
        self._bytes = {name: memory[: layout.nbytes] for name, (layout, memory) in blocks.items()}
        self._copies_directly = page_locked or not backend.capabilities.pinned_memory

    @classmethod
    def pack(
        cls,
        layouts: Mapping[str, BlockLayout],
        tensors: Mapping[str, Mapping[str, Tensor]],
        backend: Backend,
        *,
        page_locked: bool = True,
    ) -> "RamSource":
        """Pack tensors, given by block and by name in the block, into buffers of their own.

        Raises:
            CheckpointError: see :func:`diffsynth.vram.blocks.pack`.
        """
        blocks = {}
        with torch.inference_mode(False):
            for name, layout in layouts.items():
                memory = backend.host_buffer(layout.nbytes, pinned=page_locked)
                blocks[name] = (layout, pack(layout, tensors[name], memory))
        return cls(blocks, backend, page_locked=page_locked)

    @property
    def host_bytes(self) -> int:
        """The blocks, and the ring while there is one."""
        return sum(memory.numel() for memory in self._bytes.values()) + super().host_bytes

    def host_view(self, name: str) -> Tensor:
        """See :class:`BlockSource`."""
        return self._bytes[name]

    def _is_direct(self, name: str) -> bool:
        return self._copies_directly

    def _direct(self, name: str) -> Tensor:
        return self._bytes[name]

    def _read(self, name: str, buffer: Tensor) -> None:
        buffer.copy_(self._bytes[name])


class TensorSource(HostSource):
    """Blocks packed by the reader threads from loose tensors each time they are wanted.

    For factors that lie in memory or in a mapped file anyway, and that need no copy of their own there.
    """

    def __init__(
        self,
        layouts: Mapping[str, BlockLayout],
        tensor_of: Callable[[str], Tensor],
        backend: Backend,
        *,
        ring_buffers: int = RING_BUFFERS,
        reader_threads: int = READER_THREADS,
    ) -> None:
        """Nothing is read yet.

        Args:
            layouts: of the blocks.
            tensor_of: name of an entry -> its tensor on the CPU; called by reader threads.
            backend: of the device that blocks will be copied to.
            ring_buffers: buffers of the ring.
            reader_threads: threads that fill it.
        """
        super().__init__(layouts, backend, ring_buffers, reader_threads)
        self._tensor_of = tensor_of

    def host_view(self, name: str) -> Tensor:
        """A new copy of the block."""
        memory = torch.empty(self._layouts[name].nbytes, dtype=torch.uint8)
        self._read(name, memory)
        return memory

    def _is_direct(self, name: str) -> bool:
        return False

    def _direct(self, name: str) -> Tensor:
        raise NotImplementedError("every block is packed into the ring")

    def _read(self, name: str, buffer: Tensor) -> None:
        layout = self._layouts[name]
        pack(layout, {entry.name: self._tensor_of(entry.name) for entry in layout.entries}, buffer)
