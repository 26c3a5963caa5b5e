"""The stand-in behind the package's own interface of a device."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from diffsynth.device import CONTEXT_BYTES, Capabilities, Event, MemoryFigures, Stream
from diffsynth.device.base import check_copy
from diffsynth.device.host import host_pages
from tests.standin.streams import POISON, StandInEvent, StandInStream
from tests.standin.tensor import DEVICE_TYPE, StandInTensor

if TYPE_CHECKING:
    from tests.standin.device import StandIn


class StandInBackend:
    """Follows :class:`diffsynth.device.Backend`."""

    def __init__(self, owner: "StandIn") -> None:
        self._owner = owner
        self._pinned: dict[int, int] = {}

    @property
    def device(self) -> torch.device:
        return self._owner.torch_device

    @property
    def capabilities(self) -> Capabilities:
        loose = not self._owner.strict_dtypes
        return Capabilities(
            float64=loose,
            complex64=loose,
            bfloat16=True,
            float8_storage=True,
            float8_cast=loose,
            float32_autocast=loose,
            streams=True,
            events=True,
            pinned_memory=True,
            memory_info=True,
            memory_cap=True,
            context_bytes=CONTEXT_BYTES if self._owner.memory.context else 0,
            workspaces=self._owner.memory.context > 0,
        )

    def empty(self, nbytes: int, *, label: str = "") -> Tensor:
        inner = torch.full((nbytes,), POISON, dtype=torch.uint8)
        with self._owner.lock:
            return StandInTensor.wrap(inner, label or "buffer", self._owner)

    def host_buffer(self, nbytes: int, *, pinned: bool = True) -> Tensor:
        return host_pages(nbytes, self._pin if pinned else None, self._owner.pinned)

    def _pin(self, pages: Tensor) -> Callable[[], None]:
        address = pages.data_ptr()
        self._pinned[address] = pages.numel()

        def unpin() -> None:
            del self._pinned[address]

        return unpin

    def _is_pinned(self, tensor: Tensor) -> bool:
        low, high = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
        return any(start <= low and high <= start + size for start, size in self._pinned.items())

    def compute_stream(self) -> StandInStream:
        return self._owner.scheduler.compute

    def copy_stream(self) -> StandInStream:
        with self._owner.lock:
            return self._owner.scheduler.new_stream()

    def copy_async(self, dst: Tensor, src: Tensor, stream: Stream) -> None:
        check_copy(dst, src)
        owner, scheduler = self._owner, self._owner.scheduler
        label = " to ".join(_label(t) for t in (src, dst))
        touched = [
            (t.allocation.log, t.span(write), t.allocation.label)
            for t, write in ((dst, True), (src, False))
            if isinstance(t, StandInTensor)
        ]
        with owner.lock:
            scheduler.raise_violation()
            scheduler.issue_copy(stream, _inside(dst), _inside(src), touched, label)
            if stream is scheduler.compute:
                scheduler.deliver(stream.clock())
            self._count(dst, src)

    def _count(self, dst: Tensor, src: Tensor) -> None:
        counters = self._owner.counters
        if not isinstance(src, StandInTensor):
            counters.host_to_device_bytes += dst.nbytes
            counters.host_to_device_copies += 1
        elif not isinstance(dst, StandInTensor):
            counters.device_to_host_bytes += dst.nbytes
            counters.device_to_host_copies += 1
        host = [t for t in (dst, src) if not isinstance(t, StandInTensor)]
        counters.pageable_copies += sum(not self._is_pinned(t) for t in host)

    def event(self) -> StandInEvent:
        return StandInEvent(self._owner.scheduler)

    def record(self, event: Event, stream: Stream) -> None:
        with self._owner.lock:
            self._owner.scheduler.record(_own(event), stream)

    def wait(self, stream: Stream, event: Event) -> None:
        with self._owner.lock:
            self._owner.scheduler.wait(stream, _own(event))

    def synchronize(self) -> None:
        with self._owner.lock:
            self._owner.scheduler.host_waits()

    def memory(self) -> MemoryFigures:
        memory = self._owner.memory
        return MemoryFigures(
            total=memory.capacity,
            free=memory.capacity - memory.others - memory.context - memory.current,
            allocated=memory.current,
            peak_allocated=memory.peak,
            reserved=memory.current,
            peak_reserved=memory.peak,
        )

    def reset_peak(self) -> None:
        self._owner.reset_peak()

    def empty_cache(self) -> None:
        """The stand-in keeps no cache."""

    def set_memory_cap(self, nbytes: int | None) -> None:
        if nbytes is not None and nbytes <= 0:
            raise ValueError(f"a memory cap is positive, got {nbytes}")
        self._owner.memory.cap = nbytes


def _own(event: Event) -> StandInEvent:
    if not isinstance(event, StandInEvent):
        raise TypeError(f"an event of another backend on {DEVICE_TYPE}: {event!r}")
    return event


def _inside(tensor: Tensor) -> Tensor:
    return tensor.inside if isinstance(tensor, StandInTensor) else tensor


def _label(tensor: Tensor) -> str:
    if isinstance(tensor, StandInTensor):
        return tensor.allocation.label
    return f"host {tuple(tensor.shape)} {tensor.dtype}"
