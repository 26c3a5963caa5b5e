"""Blocks that come there and back, as training uses them, on the strict stand-in."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from diffsynth.vram.file_source import FileSource
from diffsynth.vram.source import BlockSource
from diffsynth.vram.streamer import Streamer
from tests.standin import StandIn
from tests.vram.support import FakeFile, expected, page_locked, raw_blocks, tensor_of, traverse
from tests.vram.test_streamer import SOURCES, sources

BLOCKS = raw_blocks((1024, 512, 2048, 512, 1024, 256))
NAMES = tuple(BLOCKS)
BACK = NAMES[::-1]


@pytest.fixture(params=[0, 1, 2])
def device(request: pytest.FixtureRequest) -> Iterator[StandIn]:
    with StandIn(seed=request.param) as device:
        yield device


def targets(device: StandIn) -> dict[str, Tensor]:
    return {name: torch.empty_like(expected(BLOCKS, name), device=device.torch_device) for name in NAMES}


def streamer_of(
    device: StandIn, source: BlockSource, slots: int, residents: tuple[str, ...] = ()
) -> Streamer[Tensor]:
    return Streamer(
        device.backend, source, NAMES, slots=slots, residents=residents, prepare=tensor_of, back=True
    )


def check(into: dict[str, Tensor]) -> None:
    for name in NAMES:
        assert torch.equal(into[name].cpu(), expected(BLOCKS, name)), name
        into[name].zero_()


def both_ways(streamer: Streamer[Tensor], into: dict[str, Tensor]) -> None:
    for order in (NAMES, BACK):
        traverse(streamer, order, into)
        check(into)


@pytest.mark.parametrize("residents", [(), ("b1", "b4"), ("b0",), ("b5",)])
@pytest.mark.parametrize("slots", [1, 2, 3, 4])
def test_what_the_slots_hold_at_a_turn_is_not_copied_again(
    device: StandIn, slots: int, residents: tuple[str, ...]
) -> None:
    into = targets(device)
    with streamer_of(device, page_locked(BLOCKS, device), slots, residents) as streamer:
        sizes = [BLOCKS[name][0].nbytes for name in NAMES if name not in streamer.residents]
        both_ways(streamer, into)
        for _ in range(2):
            before, traffic = device.counters.snapshot(), streamer.traffic
            for order in (NAMES, BACK):
                traverse(streamer, order, into)
            moved, own = device.counters - before, streamer.traffic - traffic
            kept = sum(sizes[-slots:]) + sum(sizes[:slots]) if sizes else 0
            assert moved.host_to_device_bytes == own.bytes_to_device == 2 * sum(sizes) - kept
            assert own.bytes_to_device == 2 * streamer.traversal_bytes
            assert (moved.host_syncs, moved.allocations, moved.pageable_copies) == (0, 0, 0)
            check(into)


def test_the_next_block_is_on_its_way_in_both_directions(device: StandIn) -> None:
    into = targets(device)
    with streamer_of(device, page_locked(BLOCKS, device), 2) as streamer:
        both_ways(streamer, into)
        for name in (*NAMES, *BACK):
            copies = streamer.traffic.copies
            streamer.acquire(name)
            assert streamer.traffic.copies == copies  # it was issued while the one before computed
            streamer.release(name)


@pytest.mark.parametrize("slots", [1, 2, 4])
@pytest.mark.parametrize("kind", SOURCES)
def test_every_source_both_ways_and_interrupted(device: StandIn, kind: str, slots: int) -> None:
    into = targets(device)
    with streamer_of(device, sources(device)[kind], slots, ("b4",)) as streamer:
        both_ways(streamer, into)
        traverse(streamer, NAMES, into, "b3")
        both_ways(streamer, into)
        traverse(streamer, NAMES, into)
        traverse(streamer, BACK, into, "b2")
        for _ in range(2):  # passes without a way back
            traverse(streamer, NAMES, into)
            check(into)
        both_ways(streamer, into)


def test_files_are_read_ahead_in_the_order_of_the_copies() -> None:
    with StandIn() as device:
        file, into = FakeFile(BLOCKS), targets(device)
        source = FileSource(file, device.backend, reader_threads=1)
        with streamer_of(device, source, 2) as streamer:
            both_ways(streamer, into)
            both_ways(streamer, into)
        cycle = ["b2", "b3", "b4", "b5", "b3", "b2", "b1", "b0"]
        wanted = ["b0", "b1", *cycle, *cycle, *cycle]
        assert file.reads[: len(cycle) * 2] == wanted[: len(cycle) * 2]
