"""The stand-in's copy streams: late bytes, and every missing guard found."""

import gc
from collections.abc import Callable, Iterator
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from diffsynth.device import Backend, Stream, backend_for
from tests.standin import HazardError, StandIn
from tests.standin.streams import PendingCopy
from tests.standin.tensor import StandInTensor


@pytest.fixture
def device() -> Iterator[StandIn]:
    with StandIn(seed=3) as opened:
        yield opened


@pytest.fixture
def backend(device: StandIn) -> Backend:
    assert backend_for("standin") is device.backend
    return device.backend


def host(backend: Backend, value: int, nbytes: int = 16) -> Tensor:
    return backend.host_buffer(nbytes).fill_(value)


def slot_for(backend: Backend, copy: Stream, nbytes: int = 16, label: str = "slot 0") -> Tensor:
    """A device buffer that the copy stream may write."""
    slot = backend.empty(nbytes, label=label)
    order(backend, backend.compute_stream(), copy)
    return slot


def order(backend: Backend, first: Stream, then: Stream) -> None:
    event = backend.event()
    backend.record(event, first)
    backend.wait(then, event)


def raw(tensor: Tensor) -> list[int]:
    """What the memory holds now, past all checks."""
    assert isinstance(tensor, StandInTensor)
    return tensor.inside.tolist()


# -- arrival ----------------------------------------------------------------------------------------------


def test_bytes_arrive_only_when_somebody_waits(device: StandIn, backend: Backend) -> None:
    copy = backend.copy_stream()
    first, second = slot_for(backend, copy), slot_for(backend, copy, label="slot 1")
    filled = backend.event()
    backend.copy_async(first, host(backend, 1), copy)
    backend.record(filled, copy)
    backend.copy_async(second, host(backend, 2), copy)
    torch.zeros(3, device="standin").add_(1)
    assert raw(first) == raw(second) == [255] * 16
    backend.wait(backend.compute_stream(), filled)
    assert raw(first) == [1] * 16
    assert raw(second) == [255] * 16
    backend.synchronize()
    assert (first + second).tolist() == [3] * 16
    assert device.scheduler.num_pending == 0


def test_a_copy_to_the_host_arrives_when_the_host_waits(backend: Backend) -> None:
    copy, event = backend.copy_stream(), backend.event()
    source = torch.arange(4.0, device="standin")
    target = torch.zeros(4)
    order(backend, backend.compute_stream(), copy)
    backend.copy_async(target, source, copy)
    backend.record(event, copy)
    assert target.isnan().all()
    event.synchronize()
    assert target.tolist() == [0, 1, 2, 3]


def test_a_query_is_false_at_times_and_true_at_last() -> None:
    answers = set()
    for seed in range(20):
        with StandIn(seed=seed) as device:
            backend = device.backend
            copy, event = backend.copy_stream(), backend.event()
            slot = slot_for(backend, copy)
            backend.copy_async(slot, host(backend, 5), copy)
            backend.record(event, copy)
            polls = 0
            while not event.query():
                polls += 1
            answers.add(polls)
            assert slot.tolist() == [5] * 16  # the host knows, so nothing else need wait
    assert answers == {0, 1, 2}


def arrivals(seed: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Order in which copies 0-3 of one stream and 4-7 of another arrive."""
    seen: list[int] = []
    arrive = PendingCopy.arrive

    def note(copy: PendingCopy) -> None:
        seen.append(int(copy.src[0]))
        arrive(copy)

    with StandIn(seed=seed) as device, monkeypatch.context() as patch:
        patch.setattr(PendingCopy, "arrive", note)
        backend = device.backend
        streams = [backend.copy_stream(), backend.copy_stream()]
        slots = [backend.empty(4) for _ in range(8)]
        backend.synchronize()
        for i, slot in enumerate(slots):
            backend.copy_async(slot, host(backend, i, 4), streams[i // 4])
        backend.synchronize()
        assert [slot.tolist()[0] for slot in slots] == list(range(8))
    return seen


def test_streams_interleave_by_seed_and_keep_their_own_order(monkeypatch: pytest.MonkeyPatch) -> None:
    orders = [arrivals(seed, monkeypatch) for seed in range(6)]
    assert orders[0] == arrivals(0, monkeypatch)
    assert len({tuple(one) for one in orders}) > 3
    for one in orders:
        for stream in (range(4), range(4, 8)):
            assert [i for i in one if i in stream] == list(stream)


@pytest.mark.parametrize("seed", range(6))
def test_a_stream_that_waits_for_another_comes_after_it(seed: int) -> None:
    with StandIn(seed=seed) as device:
        backend = device.backend
        first, second = backend.copy_stream(), backend.copy_stream()
        slot, other = slot_for(backend, first), backend.empty(16)
        order(backend, backend.compute_stream(), second)
        backend.copy_async(slot, host(backend, 9), first)
        order(backend, first, second)
        backend.copy_async(other, slot, second)
        order(backend, second, backend.compute_stream())
        assert other.tolist() == slot.tolist() == [9] * 16


# -- hazards ----------------------------------------------------------------------------------------------

READS: dict[str, Callable[[Tensor], object]] = {
    "arithmetic": lambda x: x + 1,
    "a view of it": lambda x: x.view(torch.float32)[1:].sum(),
    "to the host": lambda x: x.cpu(),
    "item": lambda x: x[0].item(),
    "copy": lambda x: torch.empty(16, dtype=torch.uint8, device="standin").copy_(x),
    "clone": lambda x: x.clone(),
    "weight": lambda x: nn.functional.linear(
        torch.ones(1, 2, device="standin"), x.view(torch.float32).view(2, 2)
    ),
}


@pytest.mark.parametrize("name", READS)
def test_reading_before_the_wait_names_the_buffer(backend: Backend, name: str) -> None:
    copy = backend.copy_stream()
    slot = slot_for(backend, copy)
    stale = backend.event()
    backend.record(stale, copy)
    backend.copy_async(slot, torch.ones(4).view(torch.uint8), copy)
    backend.wait(backend.compute_stream(), stale)  # recorded before the copy: orders nothing
    with pytest.raises(HazardError, match=r"reads slot 0 \(bytes .*no event orders"):
        READS[name](slot)
    order(backend, copy, backend.compute_stream())
    READS[name](slot)


def test_overwriting_what_is_still_read_is_found(backend: Backend) -> None:
    copy, compute = backend.copy_stream(), backend.compute_stream()
    slot = slot_for(backend, copy)
    backend.copy_async(slot, host(backend, 1), copy)
    order(backend, copy, compute)
    slot.sum()
    with pytest.raises(HazardError, match=r"overwrites slot 0 .*was read by sum"):
        backend.copy_async(slot, host(backend, 2), copy)
    order(backend, compute, copy)
    backend.copy_async(slot, host(backend, 2), copy)
    order(backend, copy, compute)
    assert slot.tolist() == [2] * 16


def test_computing_into_a_pending_destination_is_found(backend: Backend) -> None:
    copy = backend.copy_stream()
    slot = slot_for(backend, copy)
    backend.copy_async(slot, host(backend, 1), copy)
    with pytest.raises(HazardError, match="overwrites slot 0"):
        slot.zero_()
    backend.synchronize()


def test_two_streams_may_not_write_one_buffer(backend: Backend) -> None:
    first, second = backend.copy_stream(), backend.copy_stream()
    slot = slot_for(backend, first)
    order(backend, backend.compute_stream(), second)
    backend.copy_async(slot, host(backend, 1), first)
    with pytest.raises(HazardError, match="copy stream 2 overwrites slot 0"):
        backend.copy_async(slot, host(backend, 2), second)
    backend.synchronize()


def test_parts_of_one_buffer_are_apart(backend: Backend) -> None:
    copy = backend.copy_stream()
    ring = slot_for(backend, copy, 32, "ring")
    backend.copy_async(ring[:16], host(backend, 1), copy)
    ring[16:].fill_(7)
    with pytest.raises(HazardError, match=r"ring \(bytes 15 to 17\)"):
        ring[15:17].sum()
    order(backend, copy, backend.compute_stream())
    assert ring.tolist() == [1] * 16 + [7] * 16


def test_fresh_memory_is_guarded_too(backend: Backend) -> None:
    copy = backend.copy_stream()
    slot = backend.empty(16, label="slot 0")
    with pytest.raises(HazardError, match="its allocation"):
        backend.copy_async(slot, host(backend, 1), copy)
    backend.synchronize()
    backend.copy_async(slot, host(backend, 1), copy)
    backend.synchronize()


def test_freeing_under_a_copy_is_found_at_the_next_operation(backend: Backend) -> None:
    copy = backend.copy_stream()
    slot = slot_for(backend, copy)
    backend.copy_async(slot, host(backend, 1), copy)
    del slot
    gc.collect()
    with pytest.raises(HazardError, match="slot 0 was freed while the copy of host"):
        torch.zeros(1, device="standin")


def test_freeing_under_a_copy_is_found_at_the_end() -> None:
    with pytest.raises(HazardError, match="was freed"), StandIn() as device:
        copy = device.backend.copy_stream()
        slot = slot_for(device.backend, copy)
        device.backend.copy_async(slot, torch.zeros(16, dtype=torch.uint8), copy)
        del slot


def test_an_error_of_the_program_is_not_hidden_by_what_it_left_behind() -> None:
    with pytest.raises(KeyError), StandIn() as device:
        copy = device.backend.copy_stream()
        slot = slot_for(device.backend, copy)
        device.backend.copy_async(slot, torch.zeros(16, dtype=torch.uint8), copy)
        raise KeyError("the program's own")


def test_a_source_that_changes_under_way_is_found(backend: Backend) -> None:
    copy, event = backend.copy_stream(), backend.event()
    slot = slot_for(backend, copy)
    source = host(backend, 1)
    backend.copy_async(slot, source, copy)
    backend.record(event, copy)
    source[3] = 2
    with pytest.raises(HazardError, match=r"host source of .* to slot 0 was overwritten"):
        event.synchronize()
    backend.synchronize()


def test_that_the_device_waited_does_not_free_a_source(backend: Backend) -> None:
    copy, event = backend.copy_stream(), backend.event()
    slot = slot_for(backend, copy)
    source = host(backend, 1)
    backend.copy_async(slot, source, copy)
    backend.record(event, copy)
    backend.wait(backend.compute_stream(), event)
    source.fill_(2)
    with pytest.raises(HazardError, match="before the host knew"):
        event.synchronize()


def test_a_round_trip_over_one_stream_needs_no_host(backend: Backend) -> None:
    copy = backend.copy_stream()
    slot, other = slot_for(backend, copy), backend.empty(16)
    order(backend, backend.compute_stream(), copy)
    between = backend.host_buffer(16)
    for dst, src in ((slot, host(backend, 6)), (between, slot), (other, between), (slot, host(backend, 8))):
        backend.copy_async(dst, src, copy)
    order(backend, copy, backend.compute_stream())
    assert (slot.tolist(), other.tolist()) == ([8] * 16, [6] * 16)


def test_a_slot_is_saved_before_it_is_filled_anew(backend: Backend) -> None:
    copy = backend.copy_stream()
    slot, saved = slot_for(backend, copy).fill_(6), backend.host_buffer(16)
    order(backend, backend.compute_stream(), copy)
    for dst, src in ((saved, slot), (slot, host(backend, 8))):
        backend.copy_async(dst, src, copy)
    backend.synchronize()
    assert (slot.tolist(), saved.tolist()) == ([8] * 16, [6] * 16)


def test_an_unchanged_source_may_be_sent_again(device: StandIn, backend: Backend) -> None:
    copy, compute = backend.copy_stream(), backend.compute_stream()
    slot, source = slot_for(backend, copy), host(backend, 4)
    for _ in range(3):
        backend.copy_async(slot, source, copy)
        order(backend, copy, compute)
        slot.sum()
        order(backend, compute, copy)
    assert device.counters.host_syncs == 0
    source.fill_(5)  # the device has waited for the copies, the host has not
    with pytest.raises(HazardError, match="host source"):
        backend.copy_async(slot, source, copy)


def test_a_source_may_change_once_the_copy_is_done(backend: Backend) -> None:
    copy, event = backend.copy_stream(), backend.event()
    slot = slot_for(backend, copy)
    source = host(backend, 1)
    backend.copy_async(slot, source, copy)
    backend.record(event, copy)
    event.synchronize()
    source.fill_(2)
    assert slot.tolist() == [1] * 16


# -- a streamer, and the same with one guard left out -----------------------------------------------------

GUARDS = ("first use", "filled", "free", "source")


def stream_blocks(device: StandIn, values: list[int], without: str = "") -> list[int]:
    """Sums of blocks that pass through two slots, each block copied while the one before computes."""
    backend = device.backend
    copy, compute = backend.copy_stream(), backend.compute_stream()
    slots = [backend.empty(16, label=f"slot {i}") for i in range(2)]
    staging = [backend.host_buffer(16) for _ in range(2)]
    filled, free = [[backend.event() for _ in range(2)] for _ in range(2)]
    if without != "first use":
        order(backend, compute, copy)

    def prefetch(i: int) -> None:
        s = i % 2
        if without != "source":
            filled[s].synchronize()  # the staging buffer is read until then
        staging[s].fill_(values[i])
        if without != "free":
            backend.wait(copy, free[s])
        backend.copy_async(slots[s], staging[s], copy)
        backend.record(filled[s], copy)

    sums = []
    prefetch(0)
    for i, following in pairwise([*range(len(values)), None]):
        if following is not None:
            prefetch(following)
        if without != "filled":
            backend.wait(compute, filled[i % 2])
        sums.append(slots[i % 2].sum())
        backend.record(free[i % 2], compute)
    return [int(total) for total in sums]


@pytest.mark.parametrize("seed", range(5))
def test_a_guarded_streamer_is_right_and_counted(seed: int) -> None:
    values = list(range(1, 8))
    with StandIn(seed=seed) as device:
        assert stream_blocks(device, values) == [16 * value for value in values]
        assert device.counters.host_to_device_bytes == 7 * 16
        assert device.counters.host_to_device_copies == 7
        assert device.counters.pageable_copies == 0
        assert device.counters.allocations == 2 + 7
        assert device.peak_bytes == 2 * 16 + 7 * 8
        assert device.counters.host_syncs == 7 + 7
        assert device.pinned.used == 0


@pytest.mark.parametrize("guard", GUARDS)
@pytest.mark.parametrize("seed", range(3))
def test_a_streamer_without_one_guard_is_caught(seed: int, guard: str) -> None:
    with pytest.raises(HazardError), StandIn(seed=seed) as device:
        stream_blocks(device, list(range(1, 8)), without=guard)


# -- page-locking -----------------------------------------------------------------------------------------


def test_copies_from_pageable_memory_are_counted(
    device: StandIn, backend: Backend, caplog: pytest.LogCaptureFixture
) -> None:
    copy = backend.copy_stream()
    slot = slot_for(backend, copy)
    backend.copy_async(slot, host(backend, 1), copy)
    assert (device.counters.pageable_copies, device.pinned.used) == (0, 16)
    device.pinned.limit = 0
    backend.copy_async(slot, host(backend, 1), copy)
    assert device.counters.pageable_copies == 1
    assert "cap on page-locked memory" in caplog.text
    backend.copy_async(slot, backend.host_buffer(16, pinned=False).fill_(1), copy)
    backend.copy_async(slot, torch.ones(16, dtype=torch.uint8), copy)
    assert device.counters.pageable_copies == 3
    backend.synchronize()


@pytest.mark.parametrize("ordered", [True, False])
def test_a_device_may_overwrite_what_it_has_read_in_the_order_of_its_streams(
    backend: Backend, ordered: bool
) -> None:
    copy, other = backend.copy_stream(), backend.copy_stream()
    memory, target = host(backend, 1), slot_for(backend, copy)
    source = backend.empty(16).fill_(2)
    order(backend, backend.compute_stream(), copy)
    order(backend, backend.compute_stream(), other)
    backend.copy_async(target, memory, copy)
    if ordered:
        backend.copy_async(memory, source, copy)
        backend.synchronize()
        assert memory.tolist() == [2] * 16
    else:
        with pytest.raises(HazardError, match="overwrites the source"):
            backend.copy_async(memory, source, other)
        backend.synchronize()
