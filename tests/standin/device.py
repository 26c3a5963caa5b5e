"""The stand-in as one object: open it with ``with``, and ``"standin"`` is a device until it closes."""

import sys
import threading
from types import TracebackType
from typing import ClassVar, Self

import torch

from diffsynth.device import PinnedBudget, register_backend, unregister_backend
from tests.standin.backend import StandInBackend
from tests.standin.counters import Counters
from tests.standin.errors import UnsupportedOnDeviceError
from tests.standin.memory import Memory
from tests.standin.registration import register_once
from tests.standin.streams import Scheduler
from tests.standin.tensor import DEVICE_TYPE

_MISSING = frozenset({torch.float64, torch.complex32, torch.complex64, torch.complex128})


class StandIn:
    """A small, strict device.  One may be open at a time; all threads of the process see it.

    Args:
        capacity_bytes: memory of the device; None: as much as the host has.
        seed: of the order in which copies arrive.
        strict_dtypes: refuse float64, complex numbers and everything with float8 but moving bytes.
        pin_limit_bytes: host memory that may be page-locked; 0 makes every page-locking fail.
        context_bytes: of the device, which are never free.
        library_bytes: which the first operation on two tensors takes, for good.
    """

    _current: ClassVar["StandIn | None"] = None

    def __init__(
        self,
        capacity_bytes: int | None = None,
        *,
        seed: int = 0,
        strict_dtypes: bool = True,
        pin_limit_bytes: int = sys.maxsize,
        context_bytes: int = 0,
        library_bytes: int = 0,
    ) -> None:
        self.strict_dtypes = strict_dtypes
        self.lock = threading.RLock()
        self.counters = Counters()
        self.scheduler = Scheduler(seed, self.counters, self.lock)
        capacity = sys.maxsize if capacity_bytes is None else capacity_bytes
        self.memory = Memory(capacity, self.scheduler, self.counters, self.lock)
        self.memory.context, self.library_bytes = context_bytes, library_bytes
        self.pinned = PinnedBudget(pin_limit_bytes)
        self.backend = StandInBackend(self)

    @classmethod
    def current(cls) -> "StandIn":
        """The open stand-in.

        Raises:
            UnsupportedOnDeviceError: none is open.
        """
        if cls._current is None:
            raise UnsupportedOnDeviceError(
                "no stand-in is open: the device exists inside `with StandIn(...)`"
            )
        return cls._current

    @classmethod
    def is_open(cls) -> bool:
        """Whether the device exists now."""
        return cls._current is not None

    def __enter__(self) -> Self:
        if StandIn._current is not None:
            raise UnsupportedOnDeviceError("another stand-in is open")
        register_once()
        register_backend(DEVICE_TYPE, lambda device: self.backend)
        StandIn._current = self
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        StandIn._current = None
        unregister_backend(DEVICE_TYPE)
        if error is None:
            self.scheduler.finish()

    # -- what tests read ------------------------------------------------------------------------------

    @property
    def torch_device(self) -> torch.device:
        """The device as tensors on it report it."""
        return torch.device(DEVICE_TYPE, 0)

    @property
    def current_bytes(self) -> int:
        """Bytes of all live storages."""
        return self.memory.current

    @property
    def peak_bytes(self) -> int:
        """Largest ``current_bytes`` since the last reset."""
        return self.memory.peak

    def reset_peak(self) -> None:
        """Start the peak anew."""
        self.memory.peak = self.memory.current

    def ledger(self, count: int = 10) -> str:
        """The largest live allocations as lines: bytes, what made them, where."""
        return self.memory.ledger(count)

    def take_elsewhere(self, nbytes: int) -> None:
        """Let another process hold ``nbytes`` of the device from now on."""
        self.memory.others = nbytes

    # -- what operations report -----------------------------------------------------------------------

    def check_dtype(self, dtype: torch.dtype, operation: str) -> None:
        """Raise when the device has no such dtype."""
        if self.strict_dtypes and dtype in _MISSING:
            raise UnsupportedOnDeviceError(f"{operation}: the device has no {dtype}")

    def load_libraries(self) -> None:
        """Take what the libraries of the device take once they are used."""
        self.memory.context += self.library_bytes
        self.library_bytes = 0

    def sync_compute(self) -> None:
        """The host waits for the compute stream, as it does to learn a value."""
        self.scheduler.host_waits(self.scheduler.compute.clock())

    def count_to_device(self, nbytes: int) -> None:
        """A copy from the host, in the order of the program."""
        self.counters.host_to_device_bytes += nbytes
        self.counters.host_to_device_copies += 1

    def count_to_host(self, nbytes: int) -> None:
        """A copy to the host, which waits for it."""
        self.counters.device_to_host_bytes += nbytes
        self.counters.device_to_host_copies += 1
        self.sync_compute()
