"""Streams, events and late copies: who may touch which bytes when.

Each stream numbers what is issued on it.  A stream's ``seen`` says up to which number of every other stream
its next operation is ordered after; events carry such a clock from one stream to another.  Two accesses of
overlapping bytes, at least one of them a write, must be ordered by these clocks, whatever happened in time.
"""

import random
import zlib
from collections import deque
from dataclasses import dataclass, field
from threading import RLock

import torch
from torch import Tensor

from tests.standin.counters import Counters
from tests.standin.errors import HazardError

Clock = dict[int, int]
COMPUTE = 0
POISON = 0xFF  # a NaN in float32, bfloat16, float16 and both float8 types


@dataclass(frozen=True, slots=True)
class Span:
    """A range of bytes of one storage, and whether it is written."""

    low: int
    high: int
    write: bool

    def conflicts(self, other: "Span") -> bool:
        """True when the two overlap and one of them writes."""
        return (self.write or other.write) and self.low < other.high and other.low < self.high


@dataclass(slots=True)
class AccessLog:
    """Latest access of each range, per stream."""

    by_stream: dict[int, dict[Span, tuple[int, str]]] = field(default_factory=dict)

    def note(self, stream: int, number: int, span: Span, operation: str) -> None:
        self.by_stream.setdefault(stream, {})[span] = (number, operation)

    def unordered(self, stream: int, seen: Clock, span: Span) -> tuple[Span, str] | None:
        """An earlier access of another stream that conflicts and is not ordered before; None when fine."""
        for other, entries in self.by_stream.items():
            if other == stream:
                continue
            reached = seen.get(other, 0)
            for earlier, (number, operation) in entries.items():
                if number > reached and earlier.conflicts(span):
                    return earlier, operation
        return None


Touch = tuple[AccessLog, Span, str]
"""One access: the log of the storage, the bytes, and the storage's name."""


@dataclass(eq=False, slots=True)
class StandInStream:
    """A stream: opaque outside, compared by identity."""

    number: int
    issued: int = 0
    seen: Clock = field(default_factory=dict)
    pending: deque["PendingCopy"] = field(default_factory=deque)

    @property
    def name(self) -> str:
        return "the compute stream" if self.number == COMPUTE else f"copy stream {self.number}"

    def clock(self) -> Clock:
        """Everything that the end of this stream is ordered after, itself included."""
        return self.seen | {self.number: self.issued}


@dataclass(eq=False, slots=True)
class PendingCopy:
    """A copy that was issued and has not arrived.  Tensors are the CPU tensors inside."""

    stream: int
    number: int
    clock: Clock
    dst: Tensor
    src: Tensor
    label: str
    checksum: int | None
    """Of a host source when the copy was issued."""

    def arrive(self) -> None:
        self.check_source()
        self.dst.copy_(self.src)

    def check_source(self) -> None:
        """Raise when the host has written to the source, as far as its bytes show it."""
        if self.checksum is not None and checksum(self.src) != self.checksum:
            self.checksum = None  # once is enough
            raise HazardError(
                f"the host source of {self.label} was overwritten before the host knew the copy to be done"
            )


class StandInEvent:
    """An event of the stand-in; follows :class:`diffsynth.device.Event`."""

    def __init__(self, scheduler: "Scheduler") -> None:
        self._scheduler = scheduler
        self.clock: Clock = {}
        self.polls_left = 0

    def query(self) -> bool:
        """False for a seeded number of times after each record, to catch code that counts on luck."""
        with self._scheduler.lock:
            if self.polls_left > 0:
                self.polls_left -= 1
                return False
            self._scheduler.host_saw(self.clock)
            return True

    def synchronize(self) -> None:
        """The host waits; what is issued afterwards anywhere is ordered after the event."""
        with self._scheduler.lock:
            self._scheduler.host_waits(self.clock)


class Scheduler:
    """All streams of the stand-in, and the copies on their way.  Callers hold ``lock``; events take it."""

    def __init__(self, seed: int, counters: Counters, lock: RLock) -> None:
        self.lock = lock
        self._random = random.Random(seed)
        self.compute = StandInStream(COMPUTE)
        self._streams: dict[int, StandInStream] = {COMPUTE: self.compute}
        self._host: Clock = {}
        self._arrived: list[PendingCopy] = []
        self._violations: list[str] = []
        self._counters = counters

    # -- streams and events ---------------------------------------------------------------------------

    def new_stream(self) -> StandInStream:
        stream = StandInStream(len(self._streams), seen=dict(self._host))
        self._streams[stream.number] = stream
        return stream

    def record(self, event: StandInEvent, stream: StandInStream) -> None:
        event.clock = stream.clock()
        event.polls_left = self._random.randrange(3)

    def wait(self, stream: StandInStream, event: StandInEvent) -> None:
        _merge(stream.seen, event.clock)
        if stream is self.compute:
            self.deliver(event.clock)

    def host_waits(self, clock: Clock | None = None) -> None:
        """The host blocks until ``clock`` is reached (None: everything); counted."""
        self._counters.host_syncs += 1
        self.host_saw({s.number: s.issued for s in self._streams.values()} if clock is None else clock)

    def host_saw(self, clock: Clock) -> None:
        """The host knows that ``clock`` is reached, so that whatever it issues from now on comes after."""
        self.deliver(clock)
        for copy in self._arrived:
            copy.check_source()
        self._arrived = [c for c in self._arrived if c.number > clock.get(c.stream, 0)]
        _merge(self._host, clock)
        for stream in self._streams.values():
            _merge(stream.seen, clock)

    # -- accesses -------------------------------------------------------------------------------------

    def access(self, stream: StandInStream, touched: list[Touch], operation: str) -> None:
        """Check one operation's accesses, then note them.

        Raises:
            HazardError: one of them is not ordered after a conflicting access on another stream.
        """
        for log, span, label in touched:
            found = log.unordered(stream.number, stream.seen, span)
            if found is not None:
                raise HazardError(_explain(stream, operation, span, label, *found))
        stream.issued += 1
        for log, span, _ in touched:
            log.note(stream.number, stream.issued, span, operation)

    def note_allocation(self, log: AccessLog) -> None:
        """Fresh memory belongs to the compute stream: its last tenant may still be read there."""
        self.compute.issued += 1
        log.note(COMPUTE, self.compute.issued, Span(0, 2**62, True), "its allocation")

    def note_release(self, log: AccessLog, label: str) -> None:
        """Freed memory is handed to the compute stream again, so copies in it must be ordered before."""
        found = log.unordered(COMPUTE, self.compute.seen, Span(0, 2**62, True))
        if found is not None:
            self._violations.append(
                f"{label} was freed while {found[1]} was on its way: let the compute stream wait for it first"
            )

    def raise_violation(self) -> None:
        """Raise what could not be raised where it happened (in a destructor)."""
        if self._violations:
            message = "; ".join(self._violations)
            self._violations.clear()
            raise HazardError(message)

    def finish(self) -> None:
        """Let everything arrive, and raise what is left to raise."""
        self.host_saw({s.number: s.issued for s in self._streams.values()})
        self.raise_violation()

    # -- copies ---------------------------------------------------------------------------------------

    def issue_copy(
        self, stream: StandInStream, dst: Tensor, src: Tensor, touched: list[Touch], label: str
    ) -> None:
        """Queue a copy between CPU tensors; the destination is poisoned until it arrives.

        ``touched`` names the sides that lie on the device; a host source is watched by its checksum.
        """
        host_source = all(span.write for _, span, _ in touched)
        if host_source:
            self._reuse_source(src)
        self.access(stream, touched, f"the copy of {label}")
        for earlier in self._overlapping(dst, src if host_source else None):
            self.deliver(earlier)
        if not any(span.write for _, span, _ in touched):
            self._overwrite_source(stream, dst, label)
        value = checksum(src) if host_source else None
        copy = PendingCopy(stream.number, stream.issued, stream.clock(), dst, src, label, value)
        stream.pending.append(copy)
        _bytes(dst).fill_(POISON)

    def _reuse_source(self, src: Tensor) -> None:
        """Check earlier copies from these bytes: waiting on the device does not free a source, only the
        host's own knowledge does.  An unchanged source may be sent again and again."""
        same = [c for c in self._arrived if _overlap(c.src, src)]
        for copy in same:
            copy.check_source()
        exact = [c for c in same if c.src.data_ptr() == src.data_ptr() and c.src.nbytes == src.nbytes]
        self._arrived = [c for c in self._arrived if c not in exact]

    def _overwrite_source(self, stream: StandInStream, dst: Tensor, label: str) -> None:
        """A device may write where it has read, in the order of its streams, and the host need not know."""
        for copy in [c for c in self._arrived if _overlap(c.src, dst)]:
            copy.check_source()
            if copy.number > stream.clock().get(copy.stream, 0):
                raise HazardError(f"the copy of {label} overwrites the source of {copy.label}, unordered")
            self._arrived.remove(copy)

    def _overlapping(self, dst: Tensor, host_source: Tensor | None) -> list[Clock]:
        """Clocks of pending copies that must be done before ``dst`` is poisoned or the source is summed.

        They are ordered before, so they may arrive now.
        """
        found = []
        for stream in self._streams.values():
            for copy in stream.pending:
                into_source = host_source is not None and _overlap(copy.dst, host_source)
                if into_source or _overlap(copy.src, dst):
                    found.append(copy.clock)
        return found

    def deliver(self, clock: Clock) -> None:
        """Let all copies up to ``clock`` arrive: in order within a stream, in a seeded order between."""
        while True:
            ready = [
                s
                for s in self._streams.values()
                if s.pending and s.pending[0].number <= clock.get(s.number, 0)
            ]
            free = [s for s in ready if not self._blocked(s)]
            if not free:
                return
            copy = self._random.choice(free).pending.popleft()
            copy.arrive()
            if copy.checksum is not None:
                self._arrived.append(copy)

    def _blocked(self, stream: StandInStream) -> bool:
        """True when the stream's next copy comes after a copy of another stream that has not arrived."""
        needed = stream.pending[0].clock
        return any(
            other is not stream and other.pending and other.pending[0].number <= needed.get(other.number, 0)
            for other in self._streams.values()
        )

    @property
    def num_pending(self) -> int:
        return sum(len(stream.pending) for stream in self._streams.values())


def checksum(tensor: Tensor) -> int:
    return zlib.crc32(_bytes(tensor).numpy().data)


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().reshape(-1).view(torch.uint8)


def _overlap(a: Tensor, b: Tensor) -> bool:
    """Whether two contiguous CPU tensors share bytes."""
    return a.data_ptr() < b.data_ptr() + b.nbytes and b.data_ptr() < a.data_ptr() + a.nbytes


def _merge(into: Clock, clock: Clock) -> None:
    for stream, number in clock.items():
        if number > into.get(stream, 0):
            into[stream] = number


def _explain(
    stream: StandInStream, operation: str, span: Span, label: str, earlier: Span, earlier_operation: str
) -> str:
    verb = "overwrites" if span.write else "reads"
    before = "was written" if earlier.write else "was read"
    return (
        f"{operation} on {stream.name} {verb} {label} (bytes {span.low} to {span.high}), which {before} by "
        f"{earlier_operation} on another stream, and no event orders the two"
    )
