"""What a device can do, and the small set of verbs by which the package moves bytes to it.

Terms: the *compute stream* is the stream that operations on tensors run on; a *copy stream* runs beside it.
Nothing is ordered between two streams except by events: ``record`` marks a point of one stream, ``wait``
makes another stream go on only after that point.
"""

from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

Stream: TypeAlias = Any
"""A stream of some backend: opaque, to be handed back to the backend that made it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Capabilities:
    """What one device can do.  Code asks these, never the device's name.

    The defaults are those of a device about which nothing is known.
    """

    float64: bool = False
    """float64 tensors and arithmetic."""
    complex64: bool = False
    """complex64 tensors and arithmetic (FFT, complex rotation)."""
    bfloat16: bool = False
    """bfloat16 arithmetic in hardware; where False it is absent or emulated slowly."""
    float8_storage: bool = False
    """float8 tensors may exist and be copied.  Where False the bytes travel as uint8."""
    float8_cast: bool = False
    """``.to()`` between float8 and wider types.  Where False, look bytes up in a 256-entry table."""
    float8_arithmetic: bool = False
    """float8 matrix products (``torch._scaled_mm``)."""
    int8_arithmetic: bool = False
    """int8 matrix products (``torch._int_mm``)."""
    float32_autocast: bool = False
    """``torch.autocast(dtype=torch.float32)`` has an effect."""
    streams: bool = False
    """Copies run beside the arithmetic.  Where False, copies are finished when ``copy_async`` returns."""
    events: bool = False
    """Events order streams.  Where False, ``record`` and ``wait`` have nothing to do."""
    pinned_memory: bool = False
    """``host_buffer(pinned=True)`` gives page-locked memory, without which copies do not overlap."""
    memory_info: bool = False
    """Free and total memory of the device are known."""
    memory_cap: bool = False
    """``set_memory_cap`` is enforced by the allocator."""
    context_bytes: int = 0
    """What a process is assumed to take of the device beside its tensors: driver context, library handles.
    0: nothing; :func:`diffsynth.device.measured_context` finds more where there is more."""
    workspaces: bool = False
    """Libraries take memory beside tensors while they compute, and copies and products are worth timing."""
    max_tensor_bytes: int | None = None
    """Largest single tensor that every operation accepts, in bytes; None: no limit but memory."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryFigures:
    """Memory of a device in bytes; None where the backend cannot tell."""

    total: int | None = None
    free: int | None = None
    """Free on the whole device, other processes counted."""
    allocated: int | None = None
    """Held by tensors of this process."""
    peak_allocated: int | None = None
    """Largest ``allocated`` since the last ``reset_peak``."""
    reserved: int | None = None
    """Held by this process's allocator, its unused cache included."""
    peak_reserved: int | None = None
    """Largest ``reserved`` since the last ``reset_peak``: the figure that a memory limit is about."""


class Event(Protocol):
    """A reusable mark in a stream.  An event that was never recorded counts as reached."""

    def query(self) -> bool:
        """True when everything before the mark is done.  Never blocks."""
        ...

    def synchronize(self) -> None:
        """Block the host until everything before the mark is done."""
        ...


class Backend(Protocol):
    """One device, as the memory manager sees it.  Made by :func:`diffsynth.device.backend_for`."""

    @property
    def device(self) -> torch.device:
        """The device, with its index where it has one."""
        ...

    @property
    def capabilities(self) -> Capabilities:
        """What the device can do."""
        ...

    def empty(self, nbytes: int, *, label: str = "") -> Tensor:
        """Uninitialised bytes on the device: (nbytes,) uint8.  ``label`` names it in diagnostics.

        Allocation belongs to the compute stream: before a copy stream writes here for the first time it
        must wait for an event recorded on the compute stream after this call (or ``synchronize`` must be
        called), since the allocator may hand out memory that earlier computation still reads.

        Raises:
            torch.OutOfMemoryError, or what :func:`diffsynth.device.is_out_of_memory` recognises.
        """
        ...

    def host_buffer(self, nbytes: int, *, pinned: bool = True) -> Tensor:
        """Host bytes of exactly this size (rounded up to a page only): (nbytes,) uint8, page-aligned.

        With ``pinned`` the pages are locked where the backend can and the process's cap allows; otherwise
        the memory is pageable and a log line says so, once.  The pages return to the system when the last
        tensor over them dies.
        """
        ...

    def compute_stream(self) -> Stream:
        """The stream on which operations of the calling thread run now."""
        ...

    def copy_stream(self) -> Stream:
        """A new stream beside the compute stream; keep it, do not make one per copy."""
        ...

    def copy_async(self, dst: Tensor, src: Tensor, stream: Stream) -> None:
        """Copy ``src`` to ``dst`` on ``stream``: same shape, same dtype, both contiguous.

        The caller keeps both alive, leaves ``src`` unchanged and ``dst`` untouched until an event that was
        recorded on ``stream`` afterwards is reached.

        Raises:
            ValueError: the tensors differ in shape or dtype, or are not contiguous.
        """
        ...

    def event(self) -> Event:
        """A new event; reuse it, so that a loop makes none."""
        ...

    def record(self, event: Event, stream: Stream) -> None:
        """Mark the present end of ``stream`` with ``event``."""
        ...

    def wait(self, stream: Stream, event: Event) -> None:
        """Let what is issued on ``stream`` from now on run after ``event``.  The host does not wait."""
        ...

    def synchronize(self) -> None:
        """Block the host until all streams of the device are done."""
        ...

    def memory(self) -> MemoryFigures:
        """Memory figures of now, without waiting for the device."""
        ...

    def reset_peak(self) -> None:
        """Start the peak figures anew."""
        ...

    def empty_cache(self) -> None:
        """Give the allocator's unused memory back to the device."""
        ...

    def set_memory_cap(self, nbytes: int | None) -> None:
        """Let this process's allocator take at most ``nbytes`` of the device; None lifts the cap.

        Without effect where ``capabilities.memory_cap`` is False.

        Raises:
            ValueError: ``nbytes`` is not positive.
        """
        ...


def check_copy(dst: Tensor, src: Tensor) -> None:
    """Refuse a copy that is not one run of bytes: it would hide a conversion or a second buffer.

    Raises:
        ValueError: the tensors differ in shape or dtype, or are not contiguous.
    """
    if dst.shape != src.shape or dst.dtype != src.dtype:
        raise ValueError(
            f"a copy keeps shape and dtype: {tuple(src.shape)} {src.dtype} to {tuple(dst.shape)} {dst.dtype}"
        )
    if not (dst.is_contiguous() and src.is_contiguous()):
        raise ValueError("a copy needs contiguous tensors on both sides")
