"""The streamer: blocks come to the device just before they compute, and leave their place afterwards.

A slot is a device buffer that holds one block at a time.  While a block computes in one slot, a copy stream
fills the others with the blocks that follow in the fixed cyclic order; the first blocks of the next traversal
arrive while the last ones of this traversal compute.  Where every second traversal goes back, as in training,
the slots keep what they hold over each turn.  Two marks guard each slot: computation waits until the slot is
filled, and filling waits until the computation that reads it is done.  Both waits are the device's; the host
waits only where the bytes have not yet come from the disk.
"""

from collections import deque
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from traceback import clear_frames
from typing import Any, Generic, Self, TypeVar

import torch
from torch import Tensor

from diffsynth.device import Backend, Event
from diffsynth.vram.blocks import BlockLayout, Views
from diffsynth.vram.source import BlockSource

T = TypeVar("T")


@dataclass(slots=True)
class Traffic:
    """What a streamer moved.  ``later - earlier`` is what happened in between."""

    bytes_to_device: int = 0
    bytes_from_disk: int = 0
    copies: int = 0
    stalls: int = 0
    """Times that a block was asked for before its copy was done."""
    traversals: int = 0
    """Times that the first block was asked for."""

    def __sub__(self, earlier: Self) -> "Traffic":
        return Traffic(**{f.name: getattr(self, f.name) - getattr(earlier, f.name) for f in fields(self)})

    def __add__(self, other: Self) -> "Traffic":
        return Traffic(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})


@dataclass(eq=False, slots=True)
class _Slot(Generic[T]):
    """A device buffer with everything that can be made beforehand."""

    windows: dict[int, Tensor]
    """By block size the part of the buffer that a copy fills."""
    contents: list[T]
    """By number of the structure what :meth:`Streamer.acquire` returns."""
    filled: Event
    read: Event
    name: str = ""
    issued: bool = False


class Streamer(Generic[T]):
    """Brings blocks to the device in cyclic order, or there and back.  For one thread and one compute stream.

    ``with`` closes it.  All device memory is allocated when it is made.
    """

    def __init__(
        self,
        backend: Backend,
        source: BlockSource,
        blocks: Sequence[str],
        *,
        slots: int,
        residents: Collection[str] = (),
        prepare: Callable[[BlockLayout, Views], T],
        label: str = "block",
        back: bool = False,
    ) -> None:
        """Allocate, load the residents and start to fill the slots.

        Args:
            backend: of the device.
            source: of the blocks; this streamer starts it and stops it.
            blocks: names in the order of use.
            slots: buffers of the size of the largest block that is not resident.  If there are as many as
                such blocks, all become residents, which needs no more memory.  With 0, blocks that are not
                resident cannot be used.
            residents: blocks that stay on the device until :meth:`close`.
            prepare: makes what :meth:`acquire` returns from the views of a block; called beforehand, once per
                buffer and structure.  Blocks whose entries agree in all but their names share what it makes,
                so only the order of the entries counts.
            label: of the buffers, in diagnostics.
            back: after the last block they come in reverse, from the last to the first, and so on.

        Raises:
            ValueError: ``slots`` is negative or ``residents`` are not among the blocks.
            CheckpointError: a resident block cannot be read.
            torch.OutOfMemoryError: or what the backend raises when memory does not suffice; nothing stays
                allocated.
        """
        self._backend = backend
        self._source = source
        self._prepare = prepare
        self._label = label
        self._resident: dict[str, T] = {}
        self._queue: deque[_Slot[T]] = deque()
        self._copy_stream = backend.copy_stream()
        self._done = backend.event()
        self._traffic = Traffic()
        self._disk_before = source.bytes_from_disk
        self._device_bytes = 0
        self._closed = False
        self._arrange(blocks, slots, residents, back)
        try:
            with torch.inference_mode(False):  # its tensors could not be written to outside of that mode
                self._open(slots)
        except BaseException as error:
            self.close()
            clear_frames(error.__traceback__)  # whoever handles the error needs the memory now
            raise

    # -- while streaming ------------------------------------------------------------------------------

    def acquire(self, name: str) -> T:
        """What ``prepare`` made of the block's views; operations issued from now on find the block's bytes.

        Blocks come in cyclic order.  Another one than the next is found too, but what was fetched meanwhile
        is lost: so a traversal may end early and the next begin at the first block.

        Raises:
            CheckpointError: the block cannot be read.
            KeyError: the block is neither resident nor streamed.
        """
        if name == self._first:
            self._traffic.traversals += 1
        resident = self._resident.get(name)
        if resident is not None:
            return resident
        if not self._queue or self._queue[0].name != name:
            self._restart(name)
        slot = self._queue[0]
        if not slot.issued:
            self._issue(slot, self._source.stage(name))
        if not slot.filled.query():
            self._traffic.stalls += 1
        self._backend.wait(self._backend.compute_stream(), slot.filled)
        return slot.contents[self._number[name]]

    def release(self, name: str) -> None:
        """Operations that use the block have been issued: its slot may be filled again after them."""
        if name in self._resident or not self._queue or self._queue[0].name != name:
            return
        self._backend.record(self._queue[0].read, self._backend.compute_stream())
        self._seek((self._position + 1) % len(self._course))

    @property
    def traffic(self) -> Traffic:
        """Everything moved so far, the residents and the first filling included."""
        return replace(self._traffic, bytes_from_disk=self._source.bytes_from_disk - self._disk_before)

    @property
    def device_bytes(self) -> int:
        """Device memory held now."""
        return self._device_bytes

    @property
    def traversal_bytes(self) -> int:
        """Bytes that one traversal brings to the device; there and back, half of what both bring."""
        if not self._back:
            return sum(self._nbytes[name] for name in self._streamed)
        return sum(self._nbytes[name] for name in self._fetches(len(self._queue))[len(self._queue) :]) // 2

    def close(self) -> None:
        """Wait for copies on their way, give all memory back and stop the source.  May be called twice."""
        if self._closed:
            return
        self._closed = True
        try:
            self._finish_copies()
        finally:
            for slot in self._queue:
                slot.windows.clear()
                slot.contents.clear()
            self._queue.clear()
            self._resident.clear()
            self._device_bytes = 0
            self._source.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    # -- inside ---------------------------------------------------------------------------------------

    def _arrange(self, blocks: Sequence[str], slots: int, residents: Collection[str], back: bool) -> None:
        """Decide which blocks stay, and make the tables that streaming looks things up in."""
        unknown = set(residents) - set(blocks)
        if slots < 0 or unknown:
            raise ValueError(f"slots={slots}, residents that are no blocks: {sorted(unknown)}")
        moving = [name for name in blocks if name not in residents]
        if slots >= len(moving):
            moving = []
        staying = set(blocks) - set(moving)
        self.residents = tuple(name for name in blocks if name in staying)
        """Blocks that stay, in the order of use."""
        self._first = blocks[0] if blocks else ""
        self._streamed = moving if slots else []
        self._back = back
        self._position = 0
        self._course = _course(self._streamed, slots, back=back)
        layouts = {name: self._source.layout(name) for name in blocks}
        self._nbytes = {name: layout.nbytes for name, layout in layouts.items()}
        distinct: dict[Hashable, BlockLayout] = {}
        for name in self._streamed:
            distinct.setdefault(_structure(layouts[name]), layouts[name])
        self._layouts = list(distinct.values())
        numbers = {structure: number for number, structure in enumerate(distinct)}
        self._number = {name: numbers[_structure(layouts[name])] for name in self._streamed}

    def _open(self, slots: int) -> None:
        """Allocate everything, then load the residents and begin to fill the slots."""
        resident = {name: self._empty(self._nbytes[name], name) for name in self.residents}
        ring = []
        if self._streamed:
            largest = max(self._nbytes[name] for name in self._streamed)
            ring = [self._slot(self._empty(largest, f"slot {i}")) for i in range(slots)]
        self._backend.record(self._done, self._backend.compute_stream())
        self._backend.wait(self._copy_stream, self._done)
        for nbytes in sorted({self._nbytes[name] for name in resident}, reverse=True):
            # Equal sizes together: the ring's buffers are as large as the largest block that passes.
            self._load({name: buffer for name, buffer in resident.items() if self._nbytes[name] == nbytes})
        fetches = self._fetches(slots)
        self._source.start(fetches, repeat=True, again=slots if self._back else 0)
        for slot, name in zip(ring, self._streamed, strict=False):
            slot.name = name
            self._queue.append(slot)
        self._fill()

    def _fetches(self, slots: int) -> list[str]:
        """Blocks in the order in which they are copied: the first filling, then a cycle.

        There and back, what the slots hold at a turn is not copied again; the cycle comes after the filling.
        """
        if not self._back:
            return self._streamed
        return [*self._streamed, *reversed(self._streamed[: max(0, len(self._streamed) - slots)])]

    def _load(self, buffers: Mapping[str, Tensor]) -> None:
        """Bring some residents to the device, and wait for them."""
        self._source.start(tuple(buffers), repeat=False)
        for name, buffer in buffers.items():
            self._copy(name, buffer, self._source.stage(name))
            self._resident[name] = self._contents(self._source.layout(name), buffer)
        self._finish_copies()

    def _finish_copies(self) -> None:
        """Wait for all copies: their host side may be freed afterwards."""
        self._backend.record(self._done, self._copy_stream)
        self._done.synchronize()
        self._backend.wait(self._backend.compute_stream(), self._done)

    def _empty(self, nbytes: int, what: str) -> Tensor:
        buffer = self._backend.empty(nbytes, label=f"{self._label} {what}")
        self._device_bytes += nbytes
        return buffer

    def _slot(self, buffer: Tensor) -> _Slot[T]:
        return _Slot(
            windows={nbytes: buffer[:nbytes] for nbytes in {layout.nbytes for layout in self._layouts}},
            contents=[self._contents(layout, buffer) for layout in self._layouts],
            filled=self._backend.event(),
            read=self._backend.event(),
        )

    def _contents(self, layout: BlockLayout, buffer: Tensor) -> T:
        return self._prepare(layout, layout.views(buffer, float8=self._backend.capabilities.float8_storage))

    def _fill(self) -> None:
        """Issue the copies whose bytes are there; the others follow when they are."""
        for slot in self._queue:
            if not slot.issued:
                staged = self._source.poll(slot.name)
                if staged is None:
                    return
                self._issue(slot, staged)

    def _issue(self, slot: _Slot[T], staged: Tensor) -> None:
        self._backend.wait(self._copy_stream, slot.read)
        self._copy(slot.name, slot.windows[self._nbytes[slot.name]], staged)
        self._backend.record(slot.filled, self._copy_stream)
        slot.issued = True

    def _copy(self, name: str, target: Tensor, staged: Tensor) -> None:
        try:
            self._backend.copy_async(target, staged, self._copy_stream)
        finally:  # an interrupt may come after the copy was issued
            self._source.copied(name, self._copy_stream)
        self._traffic.copies += 1
        self._traffic.bytes_to_device += self._nbytes[name]

    def _restart(self, name: str) -> None:
        """Let ``name`` come next, where the course has it next: what is passed over is given up."""
        if name not in self._nbytes or name in self._resident or not self._course:
            raise KeyError(f"block {name!r} is neither resident nor streamed")
        for slot in self._queue:
            # Its last reader may have stopped in the middle, without a release.
            self._backend.record(slot.read, self._backend.compute_stream())
        length = len(self._course)
        places = ((self._position + i) % length for i in range(length))
        self._seek(next(place for place in places if self._course[place][0] == name))

    def _seek(self, position: int) -> None:
        """Go on at a position of the course: slots without a block that comes soon get those that are
        missing, and are filled."""
        self._position = position
        coming = self._course[position]
        holding = {slot.name: slot for slot in self._queue}
        free = [slot for slot in self._queue if slot.name not in coming]
        self._queue.clear()
        for name in coming:
            slot = holding.get(name)
            if slot is None:
                slot = free.pop(0)
                slot.name, slot.issued = name, False
            self._queue.append(slot)
        self._fill()


def _course(names: Sequence[str], slots: int, *, back: bool) -> list[tuple[str, ...]]:
    """By position in a cycle the ``slots`` different blocks that are used next, the nearest first."""
    order = [*names, *reversed(names)] if back else list(names)
    course = []
    for position in range(len(order)):
        coming = dict.fromkeys(order[position:] + order[:position])
        course.append(tuple(coming)[:slots])
    return course


def _structure(layout: BlockLayout) -> Hashable:
    """Everything about a layout but the names."""
    return layout.nbytes, tuple(entry._replace(name="") for entry in layout.entries)
