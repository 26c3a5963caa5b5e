"""Host memory: exact page-aligned buffers, page-locking with a cap, and the CPU as a device."""

import contextlib
import logging
import mmap
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import psutil
import torch
from torch import Tensor

from diffsynth.device.base import Capabilities, Event, MemoryFigures, Stream, check_copy

logger = logging.getLogger(__name__)

# Page-locked memory cannot be swapped, so a process that locks too much starves the rest of the machine.
# Windows counts it against a smaller pool than Linux does.
PINNED_SHARE_OF_RAM = 0.4 if sys.platform == "win32" else 0.5


class PinnedBudget:
    """How much host memory this process has page-locked, and how much it may.  Thread-safe."""

    def __init__(self, limit: int | None = None) -> None:
        """``limit`` in bytes; None: a share of the machine's memory that depends on the platform."""
        self._limit = limit
        self._used = 0
        self._reported = False
        self._lock = threading.Lock()

    @property
    def limit(self) -> int:
        """Bytes that may be page-locked at one time."""
        if self._limit is None:
            self._limit = int((host_memory().total or 0) * PINNED_SHARE_OF_RAM)
        return self._limit

    @limit.setter
    def limit(self, nbytes: int) -> None:
        self._limit = nbytes

    @property
    def used(self) -> int:
        """Bytes page-locked now."""
        return self._used

    def take(self, nbytes: int) -> bool:
        """Count ``nbytes`` as locked; False when that would exceed the limit."""
        limit = self.limit
        with self._lock:
            if self._used + nbytes > limit:
                return False
            self._used += nbytes
            return True

    def give_back(self, nbytes: int) -> None:
        """Count ``nbytes`` as unlocked again."""
        with self._lock:
            self._used -= nbytes

    def report(self, nbytes: int, reason: str) -> None:
        """Say once per process that copies will come from pageable memory, and why."""
        with self._lock:
            first, self._reported = not self._reported, True
        level = logging.WARNING if first else logging.DEBUG
        logger.log(
            level,
            "could not page-lock %d bytes of host memory (%s; %d of %d bytes are locked): "
            "copies from it are slower and do not overlap with computation",
            nbytes,
            reason,
            self._used,
            self.limit,
        )


PINNED = PinnedBudget()
"""The budget of this process: page-locked memory is a resource of the whole machine, not of one object."""


class _Pages(mmap.mmap):
    """Anonymous pages; they return to the system when the last tensor over them dies."""

    unpin: Callable[[], None] | None = None

    def __del__(self) -> None:
        # At interpreter exit the driver may be gone already, and the system frees the pages anyway.
        if self.unpin is not None and not sys.is_finalizing():
            self.unpin()


def host_pages(
    nbytes: int,
    pin: Callable[[Tensor], Callable[[], None]] | None = None,
    budget: PinnedBudget = PINNED,
) -> Tensor:
    """Host bytes of exactly ``nbytes``: (nbytes,) uint8, page-aligned, zero-filled.

    Args:
        nbytes: size in bytes, 0 allowed.
        pin: locks the pages of the tensor and returns the call that unlocks them; raises RuntimeError when
            the system refuses, upon which the memory stays pageable and one log line says so.
        budget: what the locked bytes are counted against.
    """
    if nbytes == 0:
        return torch.empty(0, dtype=torch.uint8)
    pages = _anonymous_pages(nbytes)
    tensor = torch.frombuffer(pages, dtype=torch.uint8)
    if pin is None:
        return tensor
    if not budget.take(nbytes):
        budget.report(nbytes, "the cap on page-locked memory is reached")
        return tensor
    try:
        unlock = pin(tensor)
    except RuntimeError as error:
        budget.give_back(nbytes)
        budget.report(nbytes, str(error))
        return tensor

    def unpin() -> None:
        unlock()
        budget.give_back(nbytes)

    pages.unpin = unpin
    return tensor


def _anonymous_pages(nbytes: int) -> _Pages:
    """Pages of this process alone, large ones where the system has them: locking them takes half the time."""
    if not hasattr(mmap, "MAP_PRIVATE"):
        return _Pages(-1, nbytes)
    pages = _Pages(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel built without them
            pages.madvise(mmap.MADV_HUGEPAGE)
    return pages


def host_memory() -> MemoryFigures:
    """Memory of the host: ``total`` and ``free`` obey a container's limit, ``allocated`` is this process."""
    memory = psutil.virtual_memory()
    total, free = int(memory.total), int(memory.available)
    limit = _container_limit()
    if limit is not None and limit[0] < total:
        total, free = limit[0], min(free, max(0, limit[0] - limit[1]))
    return MemoryFigures(total=total, free=free, allocated=int(psutil.Process().memory_info().rss))


def _container_limit() -> tuple[int, int] | None:
    """(limit, used) in bytes of the control group that the process runs in; None without one."""
    for limit_name, used_name in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        root = Path("/sys/fs/cgroup")
        try:
            limit = (root / limit_name).read_text(encoding="ascii").strip()
            used = (root / used_name).read_text(encoding="ascii").strip()
        except OSError:
            continue
        return (int(limit), int(used)) if limit.isdigit() else None
    return None


class ReachedEvent:
    """The event of a backend whose copies are done when they return: always reached."""

    def query(self) -> bool:
        """Always True."""
        return True

    def synchronize(self) -> None:
        """Nothing to wait for."""


class SynchronousBackend:
    """Verbs of a device without streams: copies are plain, events are always reached."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def empty(self, nbytes: int, *, label: str = "") -> Tensor:
        """See :meth:`Backend.empty`."""
        return torch.empty(nbytes, dtype=torch.uint8, device=self.device)

    def host_buffer(self, nbytes: int, *, pinned: bool = True) -> Tensor:
        """See :meth:`Backend.host_buffer`; never locked, since nothing overlaps here."""
        return host_pages(nbytes)

    def compute_stream(self) -> Stream:
        """None: there is only the order of the program."""
        return None

    def copy_stream(self) -> Stream:
        """None: there is only the order of the program."""
        return None

    def copy_async(self, dst: Tensor, src: Tensor, stream: Stream) -> None:
        """See :meth:`Backend.copy_async`; finished on return."""
        check_copy(dst, src)
        dst.copy_(src)

    def event(self) -> Event:
        """An event that is always reached."""
        return ReachedEvent()

    def record(self, event: Event, stream: Stream) -> None:
        """Nothing to do."""

    def wait(self, stream: Stream, event: Event) -> None:
        """Nothing to do."""


class CpuBackend(SynchronousBackend):
    """The CPU as a device: everything works, nothing overlaps."""

    @property
    def capabilities(self) -> Capabilities:
        """float8 products are left out: CPU builds lack them or run them slower than bfloat16."""
        return Capabilities(
            float64=True,
            complex64=True,
            bfloat16=True,
            float8_storage=True,
            float8_cast=True,
            float32_autocast=True,
            memory_info=True,
        )

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def memory(self) -> MemoryFigures:
        """Host memory; ``allocated`` is the resident size of the process, peaks are unknown."""
        return host_memory()

    def reset_peak(self) -> None:
        """Nothing to do: the peak is unknown."""

    def empty_cache(self) -> None:
        """Nothing to do: freed host memory is returned as it is freed."""

    def set_memory_cap(self, nbytes: int | None) -> None:
        """Not enforced on the CPU; see :meth:`Backend.set_memory_cap`."""
        if nbytes is not None and nbytes <= 0:
            raise ValueError(f"a memory cap is positive, got {nbytes}")
