"""Memory of the stand-in: every storage counted, a hard capacity, a ledger of what lives."""

import sys
from dataclasses import dataclass, field
from threading import RLock
from types import FrameType
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from tests.standin.counters import Counters
from tests.standin.streams import AccessLog

if TYPE_CHECKING:
    from tests.standin.streams import Scheduler

_OUTSIDE = ("torch", "tests.standin", "einops", "contextlib")


@dataclass(eq=False)
class Allocation:
    """One storage on the device.  It dies with the last tensor over it, and its bytes are free again."""

    storage: torch.UntypedStorage
    nbytes: int
    label: str
    contents: str
    origin: str
    memory: "Memory"
    log: AccessLog = field(default_factory=AccessLog)

    def __del__(self) -> None:
        self.memory.release(self)


class Memory:
    """Counts allocations against the capacity."""

    def __init__(self, capacity: int, scheduler: "Scheduler", counters: Counters, lock: RLock) -> None:
        self._lock = lock
        self.capacity = capacity
        self.cap: int | None = None
        self.others = 0
        self.context = 0
        self.current = 0
        self.peak = 0
        self._scheduler = scheduler
        self._counters = counters
        self._live: WeakValueDictionary[int, Allocation] = WeakValueDictionary()

    @property
    def limit(self) -> int:
        """What the tensors of this process may take together, in bytes."""
        limit = self.capacity - self.others - self.context
        return limit if self.cap is None else min(limit, self.cap)

    def adopt(self, inner: Tensor, label: str) -> Allocation:
        """The allocation under ``inner``; a storage not seen before is counted, and may not fit.

        Raises:
            torch.OutOfMemoryError: it does not fit.
        """
        storage = inner.untyped_storage()
        known = self._live.get(storage._cdata)
        if known is not None:
            return known
        nbytes = storage.nbytes()
        self._take(nbytes, label)
        self._counters.allocations += 1
        shape = "x".join(map(str, inner.shape)) or "scalar"
        dtype = str(inner.dtype).removeprefix("torch.")
        allocation = Allocation(storage, nbytes, label, f"{dtype} {shape}", _origin(), self)
        self._live[storage._cdata] = allocation
        self._scheduler.note_allocation(allocation.log)
        return allocation

    def recount(self, allocation: Allocation) -> None:
        """Follow a storage that was resized in place.

        Raises:
            torch.OutOfMemoryError: it does not fit any more.
        """
        nbytes = allocation.storage.nbytes()
        self._take(nbytes - allocation.nbytes, allocation.label)
        allocation.nbytes = nbytes

    def _take(self, nbytes: int, label: str) -> None:
        if nbytes > 0 and self.current + nbytes > self.limit:
            raise torch.OutOfMemoryError(
                f"standin out of memory: {label} needs {nbytes} bytes, {self.current} of {self.limit} are in "
                f"use; the largest are:\n{self.ledger()}"
            )
        self.current += nbytes
        self.peak = max(self.peak, self.current)

    def release(self, allocation: Allocation) -> None:
        """Called as the allocation dies."""
        with self._lock:  # whichever thread drops the last tensor
            self.current -= allocation.nbytes
            self._scheduler.note_release(allocation.log, allocation.label)

    def largest(self, count: int = 10) -> list[Allocation]:
        """The largest live allocations, largest first."""
        return sorted(self._live.values(), key=lambda a: a.nbytes, reverse=True)[:count]

    def ledger(self, count: int = 10) -> str:
        """The largest live allocations as lines: bytes, name, contents, where."""
        return "\n".join(f"{a.nbytes:>12}  {a.label}  {a.contents}  {a.origin}" for a in self.largest(count))


def _origin() -> str:
    """File and line of the innermost caller outside torch and the stand-in."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        module = str(frame.f_globals.get("__name__", ""))
        if not module.startswith(_OUTSIDE) or module.startswith("tests.standin.test_"):
            return f"{frame.f_code.co_filename}:{frame.f_lineno}"
        frame = frame.f_back
    return "?"
