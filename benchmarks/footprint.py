"""How much memory a process holds, watched while it works.

On Linux, what belongs to the process alone (its own pages, and shared memory, as which drivers' page-locked
buffers count) is told apart from pages of mapped files, which the system takes back whenever it wants.
"""

import threading
import time
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

import psutil

_STATUS = Path("/proc/self/status")
_INTERVAL_S = 0.01


class Held(NamedTuple):
    """Bytes of the process now."""

    own: int
    """Anonymous and shared: what a limit is about."""
    resident: int
    """Those and the pages of mapped files."""


def held() -> Held:
    """Memory of this process; where the system does not tell them apart, all of it counts as its own."""
    try:
        lines = _STATUS.read_text(encoding="ascii").splitlines()
    except OSError:
        resident = int(psutil.Process().memory_info().rss)
        return Held(resident, resident)
    found = {name: text for name, _, text in (line.partition(":") for line in lines)}
    anonymous, file, shared = (_bytes(found.get(f"Rss{kind}")) for kind in ("Anon", "File", "Shmem"))
    return Held(anonymous + shared, anonymous + shared + file)


def high_water_mark() -> int | None:
    """The largest resident size since the process began, as the system counted it; None if it does not."""
    try:
        lines = _STATUS.read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((_bytes(line.partition(":")[2]) for line in lines if line.startswith("VmHWM:")), None)


class Watch:
    """A thread that looks every few milliseconds: ``with Watch() as watch: ...; watch.peak``."""

    def __init__(self, interval_s: float = _INTERVAL_S) -> None:
        self._interval_s = interval_s
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._peak = held()
        self._since_mark = self._peak
        self._thread = threading.Thread(target=self._run, name="memory watch", daemon=True)

    @property
    def peak(self) -> Held:
        """Largest values since the beginning."""
        self._look()
        return self._peak

    def mark(self) -> Held:
        """Largest values since the last mark, and a new mark."""
        self._look()
        with self._lock:
            since, self._since_mark = self._since_mark, held()
        return since

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.is_set():
            self._look()
            time.sleep(self._interval_s)

    def _look(self) -> None:
        now = held()
        with self._lock:
            self._peak = Held(*map(max, self._peak, now))
            self._since_mark = Held(*map(max, self._since_mark, now))


def _bytes(text: str | None) -> int:
    """``  1234 kB`` -> 1263616."""
    return 1024 * int(text.split()[0]) if text else 0
