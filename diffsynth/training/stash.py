"""Where hidden states wait from forward to backward: on the device, or in host memory."""

from collections.abc import Sequence
from dataclasses import dataclass
from operator import ge
from typing import Any, Protocol

import torch
from torch import Tensor

from diffsynth.device import Backend, Event


class Stash(Protocol):
    """Keeps tensors: what was put last is taken first."""

    def put(self, tensors: Sequence[Tensor]) -> Any:
        """Keep tensors that nobody changes; returns the ticket for :meth:`take`."""
        ...

    def take(self, ticket: Any) -> Sequence[Tensor]:
        """The tensors on the device again, once."""
        ...


class DeviceStash:
    """The tensors themselves."""

    def put(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """See :class:`Stash`."""
        return list(tensors)

    def take(self, ticket: list[Tensor]) -> list[Tensor]:
        """See :class:`Stash`."""
        tensors = list(ticket)
        ticket.clear()
        return tensors


@dataclass(eq=False, slots=True)
class _Kept:
    """Tensors of one block, and where they are now."""

    buffers: list[Tensor]
    """Host memory, bytes; that of a larger pass serves a smaller one."""
    memory: list[Tensor]
    """The beginnings of the buffers as tensors."""
    done: Event
    """Behind the last copy of them, in either direction."""
    on_device: list[Tensor]
    """While a copy reads them, or has filled them."""


class HostStash:
    """Copies in page-locked host memory, made beside the computation in both directions.

    On the device are the tensors of two blocks: those on their way there or back, and those in use.  Host
    memory is taken in the first pass and used again in all that are not larger: page-locking takes long.
    """

    def __init__(self, backend: Backend) -> None:
        """Nothing is allocated yet."""
        self._backend = backend
        self._stream = backend.copy_stream()
        self._computed = backend.event()
        self._kept: list[_Kept] = []
        self._depth = 0
        """So many of them are in use: those of the blocks that were put and not taken."""

    @property
    def host_bytes(self) -> int:
        """Host memory held now."""
        return sum(buffer.nbytes for kept in self._kept for buffer in kept.buffers)

    def put(self, tensors: Sequence[Tensor]) -> int:
        """See :class:`Stash`."""
        number = self._depth
        self._depth += 1
        kept = self._place(number, tensors)
        backend = self._backend
        backend.record(self._computed, backend.compute_stream())
        backend.wait(self._stream, self._computed)
        for source, memory in zip(tensors, kept.memory, strict=True):
            backend.copy_async(memory, source, self._stream)
        backend.record(kept.done, self._stream)
        kept.on_device = list(tensors)
        if number > 0:
            self._let_go(self._kept[number - 1])
        return number

    def take(self, ticket: int) -> list[Tensor]:
        """See :class:`Stash`."""
        self._depth = ticket
        kept = self._kept[ticket]
        if not kept.on_device:  # a pass was given up in between
            self._fetch(kept)
        self._backend.wait(self._backend.compute_stream(), kept.done)
        tensors, kept.on_device = kept.on_device, []
        if ticket > 0:
            self._fetch(self._kept[ticket - 1])
        return tensors

    def close(self) -> None:
        """Wait for copies on their way, and give all memory back."""
        for kept in self._kept:
            kept.done.synchronize()
            self._let_go(kept)
        self._kept.clear()
        self._depth = 0

    def _place(self, number: int, tensors: Sequence[Tensor]) -> _Kept:
        sizes = [tensor.nbytes for tensor in tensors]
        kept = self._kept[number] if number < len(self._kept) else None
        with torch.inference_mode(False):
            if kept is None or not _holds([buffer.nbytes for buffer in kept.buffers], sizes):
                if kept is not None:
                    kept.done.synchronize()  # its memory goes
                buffers = [self._backend.host_buffer(size) for size in sizes]
                kept = _Kept(buffers, [], self._backend.event(), [])
                self._kept[number : number + 1] = [kept]
            kept.memory = [
                buffer[:size].view(tensor.dtype).view(tensor.shape)
                for buffer, size, tensor in zip(kept.buffers, sizes, tensors, strict=True)
            ]
        return kept

    def _fetch(self, kept: _Kept) -> None:
        """Begin to bring tensors back; those that never went need not."""
        if kept.on_device:
            return
        backend, device = self._backend, self._backend.device
        kept.on_device = [torch.empty(m.shape, dtype=m.dtype, device=device) for m in kept.memory]
        backend.record(self._computed, backend.compute_stream())
        backend.wait(self._stream, self._computed)
        for target, memory in zip(kept.on_device, kept.memory, strict=True):
            backend.copy_async(target, memory, self._stream)
        backend.record(kept.done, self._stream)

    def _let_go(self, kept: _Kept) -> None:
        """Free the device's tensors for computation that follows the copy."""
        if kept.on_device:
            self._backend.wait(self._backend.compute_stream(), kept.done)
            kept.on_device = []


def _holds(there: Sequence[int], wanted: Sequence[int]) -> bool:
    """Whether buffers of these sizes are as many as the tensors, and none is smaller."""
    return len(there) == len(wanted) and all(map(ge, there, wanted))
