"""The streamer on the strict stand-in: late copies, poison, counters; bytes are compared exactly."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from diffsynth.device import backend_for
from diffsynth.errors import CheckpointError
from diffsynth.vram.file_source import FileSource, MappedSource, MixedSource
from diffsynth.vram.source import BlockSource, RamSource
from diffsynth.vram.streamer import Streamer, Traffic
from tests.standin import HazardError, StandIn
from tests.standin.backend import StandInBackend
from tests.vram.support import (
    FakeFile,
    expected,
    page_locked,
    raw_blocks,
    reader_threads,
    tensor_of,
    traverse,
)

SIZES = (1024, 512, 2048, 512, 1024, 256)
BLOCKS = raw_blocks(SIZES)
NAMES = tuple(BLOCKS)
RESIDENTS = {"none": (), "some": ("b1", "b4"), "first": ("b0",), "last": ("b5",), "all": NAMES}


@pytest.fixture
def device(request: pytest.FixtureRequest) -> Iterator[StandIn]:
    with StandIn(seed=getattr(request, "param", 0)) as device:
        yield device


def targets(device: StandIn) -> dict[str, Tensor]:
    return {name: torch.empty_like(expected(BLOCKS, name), device=device.torch_device) for name in NAMES}


def streamer_of(device: StandIn, source: BlockSource, slots: int, residents: object = ()) -> Streamer[Tensor]:
    assert isinstance(residents, tuple)
    return Streamer(device.backend, source, NAMES, slots=slots, residents=residents, prepare=tensor_of)


def check(into: dict[str, Tensor], names: tuple[str, ...] = NAMES) -> None:
    for name in names:
        assert torch.equal(into[name].cpu(), expected(BLOCKS, name)), name


def nbytes(names: object) -> int:
    assert isinstance(names, (tuple, set, list))
    return sum(BLOCKS[name][0].nbytes for name in names)


# -- the right bytes, exactly as many as needed ------------------------------------------------------------


@pytest.mark.parametrize("device", [0, 1, 2], indirect=True)
@pytest.mark.parametrize("residents", RESIDENTS)
@pytest.mark.parametrize("slots", [1, 2, 3, 4])
def test_every_traversal_moves_the_missing_bytes_once_without_waiting(
    device: StandIn, slots: int, residents: str
) -> None:
    into = targets(device)
    with streamer_of(device, page_locked(BLOCKS, device), slots, RESIDENTS[residents]) as streamer:
        streamed = [name for name in NAMES if name not in streamer.residents]
        for _ in range(3):
            before, traffic = device.counters.snapshot(), streamer.traffic
            traverse(streamer, NAMES, into)
            moved, own = device.counters - before, streamer.traffic - traffic
            assert moved.host_to_device_bytes == own.bytes_to_device == nbytes(streamed)
            assert moved.host_to_device_copies == own.copies == len(streamed)
            assert (moved.host_syncs, moved.allocations, moved.pageable_copies) == (0, 0, 0)
            assert own.traversals == 1
            assert streamer.traversal_bytes == nbytes(streamed)
        check(into)


@pytest.mark.parametrize("device", range(5), indirect=True)
def test_residents_are_those_asked_for_unless_all_fit_the_slots(device: StandIn) -> None:
    source = page_locked(BLOCKS, device)
    with streamer_of(device, source, 3, ("b1", "b4")) as streamer:
        assert streamer.residents == ("b1", "b4")
        assert streamer.device_bytes == device.current_bytes == nbytes(("b1", "b4")) + 3 * 2048
    with streamer_of(device, source, 4, ("b1", "b4")) as streamer:
        assert streamer.residents == NAMES
        assert device.current_bytes == nbytes(NAMES) < nbytes(("b1", "b4")) + 4 * 2048


def test_the_first_blocks_of_the_next_traversal_come_while_the_last_compute(device: StandIn) -> None:
    into = targets(device)
    with streamer_of(device, page_locked(BLOCKS, device), 2) as streamer:
        traverse(streamer, NAMES[:-1], into)
        copies = streamer.traffic.copies
        assert copies == len(NAMES) + 1  # b0 again, in the place of the block before the last
        streamer.acquire("b5")
        streamer.release("b5")
        assert streamer.traffic.copies == copies + 1
        before = device.counters.snapshot()
        into["b0"].copy_(streamer.acquire("b0"))
        assert (device.counters - before).host_to_device_copies == 0
        check(into, NAMES[:-1])


def test_first_filling_happens_when_the_streamer_is_made(device: StandIn) -> None:
    with streamer_of(device, page_locked(BLOCKS, device), 2, ("b1",)) as streamer:
        assert streamer.traffic == Traffic(bytes_to_device=nbytes(("b0", "b1", "b2")), copies=3)


# -- what must be impossible --------------------------------------------------------------------------------


class Careless(StandInBackend):
    """A backend that forgets to let one kind of stream wait."""

    def __init__(self, owner: StandIn, *, compute: bool) -> None:
        super().__init__(owner)
        self._compute = compute

    def wait(self, stream: object, event: object) -> None:
        if (stream is self.compute_stream()) != self._compute:
            super().wait(stream, event)  # type: ignore[arg-type]


@pytest.mark.parametrize("compute", [True, False], ids=["reading early", "overwriting"])
def test_without_its_guards_the_streamer_would_be_caught(compute: bool) -> None:
    """The bench itself: each of the two waits is needed, and missing it is found."""
    with pytest.raises(HazardError), StandIn() as device:
        into = targets(device)
        source = page_locked(BLOCKS, device)
        device.backend = Careless(device, compute=compute)
        streamer = streamer_of(device, source, 2)
        for _ in range(3):
            traverse(streamer, NAMES, into)


def test_a_block_that_was_never_asked_for_in_order_is_found_all_the_same(device: StandIn) -> None:
    into = targets(device)
    with streamer_of(device, page_locked(BLOCKS, device), 2, ("b4",)) as streamer:
        for name in ("b3", "b0", "b5", "b4", "b2", "b2", "b1", "b0"):
            traverse(streamer, [name], into)
        check(into)
        with pytest.raises(KeyError, match="neither resident nor streamed"):
            streamer.acquire("rest")


@pytest.mark.parametrize("slots", [1, 2, 4])
@pytest.mark.parametrize("stop_at", ["b0", "b2", "b5"])
def test_a_traversal_may_end_in_the_middle_of_a_block(device: StandIn, slots: int, stop_at: str) -> None:
    into = targets(device)
    with streamer_of(device, page_locked(BLOCKS, device), slots, ("b3",)) as streamer:
        for _ in range(2):
            traverse(streamer, NAMES, into, stop_at=stop_at)
            for tensor in into.values():
                tensor.zero_()
            traverse(streamer, NAMES, into)
            check(into)
        before = streamer.traffic
        traverse(streamer, NAMES, into)
        assert (streamer.traffic - before).bytes_to_device == nbytes(NAMES) - nbytes(("b3",))


# -- memory ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("used", [0, 3, 6])
def test_close_returns_all_memory_with_copies_on_their_way(device: StandIn, used: int) -> None:
    into = targets(device)
    before = device.current_bytes
    streamer = streamer_of(device, page_locked(BLOCKS, device), 3, ("b1",))
    traverse(streamer, NAMES[:used], into)
    streamer.close()
    streamer.close()
    assert device.current_bytes == before
    assert streamer.device_bytes == 0
    check(into, NAMES[:used])


@pytest.mark.parametrize("short", [1, 2048])
def test_a_streamer_that_does_not_fit_leaves_nothing_behind(short: int) -> None:
    needed = nbytes(("b1",)) + 2 * 2048
    with StandIn(needed - short) as device:
        source = page_locked(BLOCKS, device)
        with pytest.raises(torch.OutOfMemoryError, match=r"block (slot|b1)"):
            streamer_of(device, source, 2, ("b1",))
        assert device.current_bytes == 0
        with streamer_of(device, source, 1, ("b1",)):
            assert device.peak_bytes <= needed - short


def test_arguments_are_checked(device: StandIn) -> None:
    source = page_locked(BLOCKS, device)
    with pytest.raises(ValueError, match="slots=-1"):
        streamer_of(device, source, -1)
    with pytest.raises(ValueError, match="rest"):
        streamer_of(device, source, 1, ("rest",))


def test_without_slots_only_residents_can_be_used(device: StandIn) -> None:
    with streamer_of(device, page_locked(BLOCKS, device), 0, ("b2",)) as streamer:
        assert device.current_bytes == nbytes(("b2",))
        assert torch.equal(streamer.acquire("b2").cpu(), expected(BLOCKS, "b2"))
        with pytest.raises(KeyError):
            streamer.acquire("b0")


# -- every source -------------------------------------------------------------------------------------------


def sources(device: StandIn) -> dict[str, BlockSource]:
    backend, file = device.backend, FakeFile(BLOCKS)
    return {
        "locked": page_locked(BLOCKS, device),
        "pageable": RamSource(BLOCKS, backend),
        "mapped": MappedSource(file, backend),
        "file": FileSource(file, backend),
        "file, one buffer": FileSource(file, backend, ring_buffers=1, reader_threads=1),
        "file, many": FileSource(file, backend, ring_buffers=7, reader_threads=4),
        "mixed": MixedSource(file, backend, in_ram=("b0", "b1", "b3")),
        "mixed, locked": MixedSource(file, backend, in_ram=("b0", "b1", "b3"), page_locked=True),
        "all in ram": MixedSource(file, backend, in_ram=NAMES, page_locked=True),
    }


SOURCES = (
    *("locked", "pageable", "mapped", "file", "file, one buffer", "file, many"),
    *("mixed", "mixed, locked", "all in ram"),
)


@pytest.mark.parametrize("slots", [1, 2, 4])
@pytest.mark.parametrize(
    "kind",
    [
        "locked",
        "pageable",
        "mapped",
        "file",
        "file, one buffer",
        "file, many",
        "mixed",
        "mixed, locked",
        "all in ram",
    ],
)
def test_every_source_gives_the_same_bytes_through_page_locked_memory(
    device: StandIn, kind: str, slots: int
) -> None:
    into = targets(device)
    source = sources(device)[kind]
    for residents in ((), ("b1", "b4")):
        with streamer_of(device, source, slots, residents) as streamer:
            before = device.counters.snapshot()
            for stop_at in (None, "b3", None, None):
                for tensor in into.values():
                    tensor.zero_()
                traverse(streamer, NAMES, into, stop_at)
            moved = device.counters - before
            assert (moved.host_syncs, moved.allocations, moved.pageable_copies) == (0, 0, 0)
            check(into)
        assert reader_threads() == []


def test_on_a_device_without_streams_everything_works_too() -> None:
    backend, into = backend_for("cpu"), {name: torch.empty_like(expected(BLOCKS, name)) for name in NAMES}
    file = FakeFile(BLOCKS)
    for source in (RamSource(BLOCKS, backend), MappedSource(file, backend), FileSource(file, backend)):
        with Streamer(backend, source, NAMES, slots=2, residents=("b1",), prepare=tensor_of) as streamer:
            for stop_at in (None, "b3", None):
                traverse(streamer, NAMES, into, stop_at)
            assert streamer.traffic.stalls == 0
        check(into)


def test_an_unreadable_block_raises_where_it_is_asked_for_and_only_there(device: StandIn) -> None:
    into, file = targets(device), FakeFile(BLOCKS)
    for source in (FileSource(file, device.backend), MappedSource(file, device.backend)):
        file.fails["b4"] = OSError("Input/output error")
        with streamer_of(device, source, 3) as streamer:
            for _ in range(2):
                for tensor in into.values():
                    tensor.zero_()
                with pytest.raises(CheckpointError, match=r"b4.*Input/output error"):
                    traverse(streamer, NAMES, into)
                check(into, NAMES[:4])
            file.fails.clear()
            traverse(streamer, NAMES, into)
            check(into)
        assert device.current_bytes == nbytes(NAMES)  # those of `into`
        assert reader_threads() == []


def test_an_unreadable_resident_leaves_nothing_behind(device: StandIn) -> None:
    file = FakeFile(BLOCKS)
    file.fails["b4"] = CheckpointError("damaged")
    with pytest.raises(CheckpointError, match="damaged"):
        streamer_of(device, FileSource(file, device.backend), 2, ("b1", "b4"))
    assert device.current_bytes == 0
    assert reader_threads() == []


def test_stalls_and_disk_bytes_are_counted(device: StandIn) -> None:
    into, file = targets(device), FakeFile(BLOCKS)
    with streamer_of(device, FileSource(file, device.backend), 2) as streamer:
        traverse(streamer, NAMES, into)
        traverse(streamer, NAMES, into)
        traffic = streamer.traffic
        assert traffic.traversals == 2
        assert traffic.bytes_from_disk >= 2 * nbytes(NAMES)
        assert 0 < traffic.stalls <= 2 * len(NAMES)
