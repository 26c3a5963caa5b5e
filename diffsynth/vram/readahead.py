"""Reader threads that fill a ring of page-locked buffers, in the order in which blocks will be wanted.

A device copies from page-locked memory only without holding up the program, and locking all of a model is
more than most machines bear.  So a few buffers go round: free -> being filled -> waiting -> being copied to
the device -> free.  Threads do the filling and wait, on their own time, for the copy out of a buffer to be
done; the thread that computes never waits for the device here.
"""

import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from diffsynth.device import Backend, Event, Stream

_POLL_S = 0.001  # how often a reader looks whether its buffer has been copied; a block takes about 20 ms
_WAKE_S = 0.2  # a wait without a limit cannot be interrupted by the keyboard on every platform


@dataclass(eq=False, slots=True)
class _Buffer:
    """One buffer of the ring and the mark behind the last copy out of it."""

    memory: Tensor
    copied: Event
    windows: dict[int, Tensor] = field(default_factory=dict)

    def window(self, nbytes: int) -> Tensor:
        if nbytes not in self.windows:
            self.windows[nbytes] = self.memory[:nbytes]
        return self.windows[nbytes]


@dataclass(eq=False, slots=True)
class _Job:
    """One block on its way into one buffer."""

    name: str
    buffer: _Buffer
    finished: bool = False
    dropped: bool = False
    error: BaseException | None = None


class Order:
    """Names in the order of use, once or over and over; then those from number ``again`` on."""

    def __init__(self, names: Sequence[str], *, repeat: bool, again: int = 0) -> None:
        self._names = tuple(names)
        self._repeat = repeat
        self._again = again
        self._position = 0

    def __len__(self) -> int:
        return len(self._names)

    def peek(self) -> str | None:
        """The name that comes next; None behind the last of an order without repetition."""
        return self._names[self._position] if self._position < len(self._names) else None

    def advance(self) -> None:
        """Go on to the name after it."""
        self._position += 1
        if self._repeat and self._position == len(self._names):
            self._position = self._again

    def seek(self, name: str) -> None:
        """Let ``name`` come next, from its nearest place onwards."""
        order = range(len(self._names))
        places = (*order[self._position :], *order[: self._position])
        self._position = next(place for place in places if self._names[place] == name)


class ReadAhead:
    """See the module.  All methods are for one thread, the one that computes."""

    def __init__(
        self,
        backend: Backend,
        order: Order,
        read: Callable[[str, Tensor], None],
        sizes: dict[str, int],
        *,
        buffers: int,
        threads: int,
        passes_by: Callable[[str, bool], bool],
    ) -> None:
        """Allocate the ring and start reading.

        Args:
            backend: of the device that copies out of the buffers.
            order: of the blocks.
            read: fills a buffer (nbytes,) uint8 with the bytes of a block; called by the reader threads.
            sizes: bytes of every block that may be read.
            buffers: number of buffers, each as large as the largest block.
            threads: number of reader threads.
            passes_by: whether a block needs no reading (any more), given whether it is being read now.
        """
        self._backend = backend
        self._order = order
        self._read = read
        self._sizes = sizes
        self._passes_by = passes_by
        self._wanted = threading.Condition()
        self._stopping = threading.Event()
        self._jobs: deque[_Job] = deque()
        largest = max(sizes.values())
        with torch.inference_mode(False):  # the reader threads write to the buffers outside of that mode
            self._free = deque(_Buffer(backend.host_buffer(largest), backend.event()) for _ in range(buffers))
        self._num_buffers = buffers
        self.nbytes = buffers * largest
        self._threads = [
            threading.Thread(target=self._run, name=f"diffsynth-reader-{i}", daemon=True)
            for i in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    # -- the thread that computes ---------------------------------------------------------------------

    def poll(self, name: str) -> Tensor | None:
        """The bytes of a block if they are there.  An error of reading waits for :meth:`stage`."""
        with self._wanted:
            job = self._find(name)
            if job is None or not job.finished or job.error is not None:
                return None
            return job.buffer.window(self._sizes[name])

    def stage(self, name: str) -> Tensor:
        """The bytes of a block, waiting for them if need be.

        Raises:
            CheckpointError: the block cannot be read.
        """
        with self._wanted:
            while True:
                job = self._find(name)
                if job is not None and job.finished:
                    break
                self._wanted.wait(_WAKE_S)
            if job.error is not None:
                self._drop(self._jobs.popleft())
                error, job.error = job.error, None
                try:
                    raise error
                finally:
                    del error  # else the error would keep this frame alive, and the tensors of its callers
            return job.buffer.window(self._sizes[name])

    def copied(self, name: str, stream: Stream) -> None:
        """The copy out of the buffer of ``name`` was issued on ``stream``: when it is done, read on."""
        with self._wanted:
            job = self._jobs.popleft()
            assert job.name == name, "blocks are handed back in the order in which they were staged"
            self._backend.record(job.buffer.copied, stream)
            self._free.append(job.buffer)
            self._wanted.notify_all()

    def idle(self) -> bool:
        """Whether nothing is left to read and every copy out of the buffers is done."""
        with self._wanted:
            if self._next() is not None:
                return False
            while self._jobs and self._jobs[0].finished:
                self._drop(self._jobs.popleft())
            return len(self._free) == self._num_buffers and all(b.copied.query() for b in self._free)

    def stop(self) -> None:
        """End the threads and drop the buffers.  Copies out of them must be done."""
        self._stopping.set()
        with self._wanted:
            self._wanted.notify_all()
        for thread in self._threads:
            thread.join()
        self._jobs.clear()
        self._free.clear()

    def _find(self, name: str) -> _Job | None:
        """The job of ``name`` at the head of the queue; what was read for another order is dropped."""
        while self._jobs and self._jobs[0].name != name:
            self._drop(self._jobs.popleft())
        if self._jobs:
            return self._jobs[0]
        if self._next() != name:
            self._order.seek(name)
            self._wanted.notify_all()
        return None

    def _drop(self, job: _Job) -> None:
        """Free the buffer now, or by its thread as soon as it is filled."""
        if job.finished:
            self._free.append(job.buffer)
            self._wanted.notify_all()
        job.dropped = True

    # -- the reader threads ---------------------------------------------------------------------------

    def _next(self) -> str | None:
        """The next name that needs reading; None when there is none."""
        for _ in range(len(self._order)):
            name = self._order.peek()
            if name is None:
                return None
            under_way = any(job.name == name and not job.finished for job in self._jobs)
            if not self._passes_by(name, under_way):
                return name
            self._order.advance()
        return None

    def _begin(self) -> _Job | None:
        """Take the next job, waiting until there is one and a buffer for it; None: stop."""
        with self._wanted:
            while not self._stopping.is_set():
                name = self._next() if self._free else None
                if name is not None:
                    self._order.advance()
                    job = _Job(name, self._free.popleft())
                    self._jobs.append(job)
                    return job
                self._wanted.wait()
        return None

    def _run(self) -> None:
        while (job := self._begin()) is not None:
            try:
                while not job.buffer.copied.query():
                    if self._stopping.wait(_POLL_S):
                        return
                self._read(job.name, job.buffer.window(self._sizes[job.name]))
            except BaseException as error:  # raised again by `stage`, in the thread that asked for the block
                job.error = error
            with self._wanted:
                job.finished = True
                if job.dropped:
                    self._free.append(job.buffer)
                self._wanted.notify_all()
