"""The planner: what it accepts fits, more never hurts, and what it refuses it explains."""

import json
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffsynth.errors import MemoryBudgetError
from diffsynth.vram.plan import readable_bytes
from diffsynth.vram.planner import Block, Budget, Choice, PhaseDemand, PhasePlan, fits, plan, spread
from diffsynth.vram.source import RING_BUFFERS

MB = 10**6
HOST_BASE = 100 * MB

quick = settings(max_examples=60, deadline=None)


def blocks(count: int, nbytes: int = 100 * MB, companion: int = 0) -> tuple[Block, ...]:
    return tuple(Block(f"block.{i}", nbytes, companion) for i in range(count))


def demand(**changes: object) -> PhaseDemand:
    given: dict[str, object] = {
        "name": "denoise",
        "part": "dit",
        "blocks": blocks(10),
        "rest_bytes": 50 * MB,
        "scratch_bytes": 10 * MB,
        "traversals": 8,
        "choices": (Choice(activation_bytes=200 * MB, workspace_bytes=20 * MB, flops=1e12),),
        "activation_cause": "height=512",
        "weight_cause": "storage",
    }
    return PhaseDemand(**(given | changes))  # type: ignore[arg-type]


def budget(**changes: object) -> Budget:
    given: dict[str, object] = {
        "vram_bytes": 1000 * MB,
        "host_bytes": 5000 * MB,
        "link_bytes_per_s": 10e9,
        "disk_bytes_per_s": 2e9,
        "tflops": 10.0,
        "efficiency": 0.5,
        "host_base_bytes": HOST_BASE,
        "host_reserve_bytes": 0,
        "gaps": 0.0,
    }
    return Budget(**(given | changes))  # type: ignore[arg-type]


def one(demanded: PhaseDemand, limits: Budget) -> PhasePlan:
    return plan([demanded], limits).phases[0]


def numbers(names: Sequence[str]) -> list[int]:
    return [int(name.rpartition(".")[2]) for name in names]


@st.composite
def demands(draw: st.DrawFn) -> PhaseDemand:
    size = st.integers(1 * MB, 200 * MB)
    count = draw(st.integers(0, 12))
    sizes = [draw(size)] * count if draw(st.booleans()) else [draw(size) for _ in range(count)]
    companion = draw(st.sampled_from([0, 20 * MB]))
    choices = tuple(
        Choice(
            activation_bytes=draw(st.integers(0, 500 * MB)),
            workspace_bytes=draw(st.integers(0, 100 * MB)),
            host_bytes=draw(st.integers(0, 500 * MB)),
            flops=draw(st.floats(1e9, 1e13)),
        )
        for _ in range(draw(st.integers(1, 3)))
    )
    return demand(
        blocks=tuple(Block(f"block.{i}", nbytes, companion) for i, nbytes in enumerate(sizes)),
        on_disk=draw(st.booleans()),
        rest_bytes=draw(st.integers(0, 100 * MB)),
        scratch_bytes=draw(st.integers(0, 50 * MB)),
        traversals=draw(st.integers(1, 20)),
        choices=choices,
    )


@st.composite
def budgets(draw: st.DrawFn) -> Budget:
    limit = st.one_of(st.none(), st.integers(0, 4000 * MB))
    speed = st.floats(1e8, 1e11)
    return budget(
        vram_bytes=draw(limit),
        host_bytes=draw(limit),
        link_bytes_per_s=draw(speed),
        disk_bytes_per_s=draw(speed),
        host_copy_bytes_per_s=draw(speed),
        tflops=draw(st.floats(1, 1000)),
        reserve_bytes=draw(st.integers(0, 200 * MB)),
        pin_limit_bytes=draw(st.integers(0, 2000 * MB)),
        host_reserve_bytes=draw(st.integers(0, 500 * MB)),
    )


@quick
@given(demands(), budgets())
def test_what_is_accepted_fits_and_adds_up(demanded: PhaseDemand, limits: Budget) -> None:
    if not fits([demanded], limits):
        with pytest.raises(MemoryBudgetError):
            plan([demanded], limits)
        return
    found = one(demanded, limits)
    assert limits.vram_bytes is None or found.peak_vram_bytes <= limits.vram_bytes
    assert limits.host_bytes is None or found.peak_host_bytes <= limits.host_bytes
    streamed = [b for b in demanded.blocks if b.name not in found.residents]
    resident = [b for b in demanded.blocks if b.name in found.residents]
    choice = min(
        (c for c in demanded.choices),
        key=lambda c: abs(needed(demanded, c, found, limits) - found.peak_vram_bytes),
    )
    assert needed(demanded, choice, found, limits) == found.peak_vram_bytes
    assert found.bytes_per_traversal == sum(b.moved_bytes for b in streamed)
    assert (found.slots == 0) == (not streamed)
    assert set(found.ram_blocks) <= {b.name for b in streamed}
    from_disk = sum(b.moved_bytes for b in streamed if b.name not in found.ram_blocks)
    assert found.disk_bytes_per_traversal == from_disk
    assert [b.name for b in resident] == list(found.residents), "in the order of use"


def needed(demanded: PhaseDemand, choice: Choice, found: PhasePlan, limits: Budget) -> int:
    """Device memory of a placement, added up anew."""
    streamed = [b for b in demanded.blocks if b.name not in found.residents]
    total = limits.reserve_bytes + demanded.rest_bytes + demanded.scratch_bytes
    total += choice.activation_bytes + choice.workspace_bytes
    total += sum(b.nbytes + b.companion_bytes for b in demanded.blocks if b.name in found.residents)
    if streamed:
        total += found.slots * (max(b.nbytes for b in streamed) + max(b.companion_bytes for b in streamed))
    return total


@quick
@given(demands(), budgets(), st.data())
def test_more_of_anything_never_gives_a_slower_plan(
    demanded: PhaseDemand, limits: Budget, data: st.DataObject
) -> None:
    if not fits([demanded], limits):
        return
    more: dict[str, object] = {}
    for name in ("vram_bytes", "host_bytes"):
        value = getattr(limits, name)
        if value is not None:
            more[name] = data.draw(st.one_of(st.none(), st.integers(value, 2 * value + MB)))
    for name in ("link_bytes_per_s", "disk_bytes_per_s", "tflops", "host_copy_bytes_per_s"):
        more[name] = getattr(limits, name) * data.draw(st.floats(1, 10))
    more["pin_limit_bytes"] = limits.pin_limit_bytes + data.draw(st.integers(0, 2000 * MB))
    before = plan([demanded], limits).seconds
    after = plan([demanded], replace(limits, **more)).seconds  # type: ignore[arg-type]
    assert after <= before * (1 + 1e-9)


@quick
@given(st.integers(1, 60), st.data())
def test_a_spread_is_even(total: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, total))
    chosen = spread(count, total)
    assert len(set(chosen)) == count
    gaps = [b - a for a, b in zip(chosen, (*chosen[1:], chosen[0] + total), strict=True)]
    assert max(gaps) - min(gaps) <= 1
    assert chosen[0] == 0 and chosen[-1] < total


@pytest.mark.parametrize("vram", range(500, 1500, 125))
def test_residents_of_equal_blocks_are_spread(vram: int) -> None:
    found = one(demand(blocks=blocks(48, 10 * MB)), budget(vram_bytes=vram * MB))
    chosen = numbers(found.residents)
    assert chosen == list(spread(len(chosen), 48))
    # Another resident would not have fitted.
    assert len(chosen) == 48 or found.peak_vram_bytes + 10 * MB > vram * MB


def test_without_limits_everything_is_resident() -> None:
    found = one(demand(), budget(vram_bytes=None, host_bytes=None))
    assert len(found.residents) == 10
    assert (found.slots, found.bytes_per_traversal, found.ram_blocks) == (0, 0, ())


def test_one_slot_is_the_last_resort_and_costs_time() -> None:
    # 50 + 10 + 220 and two slots are 480; one slot is 380.
    two = one(demand(), budget(vram_bytes=480 * MB))
    assert (two.slots, two.residents) == (2, ())
    alone = one(demand(), budget(vram_bytes=479 * MB))
    assert (alone.slots, alone.residents) == (1, ())
    assert alone.traversal_s == pytest.approx(alone.compute_s + alone.transfer_s)
    with pytest.raises(MemoryBudgetError):
        one(demand(), budget(vram_bytes=379 * MB))


def test_a_single_traversal_keeps_nothing() -> None:
    found = one(demand(traversals=1), budget(vram_bytes=None, host_bytes=None))
    assert (found.residents, found.ram_blocks, found.slots) == ((), (), 2)
    assert found.disk_bytes_per_traversal == 1000 * MB


def test_larger_blocks_become_residents_where_their_slots_would_not_fit() -> None:
    mixed = tuple(Block(f"block.{i}", (300 if i in (0, 9) else 50) * MB) for i in range(10))
    # Two slots of 300 and the rest are 880; both large ones and two slots of 50 are 980, and move less.
    found = one(demand(blocks=mixed), budget(vram_bytes=980 * MB))
    assert {"block.0", "block.9"} <= set(found.residents)
    assert found.peak_vram_bytes <= 980 * MB


def test_time_is_the_longest_of_computation_copies_and_reads() -> None:
    # Nothing fits beside two slots, so 10 blocks of 0.1 GB move in each of 8 traversals.
    slow = budget(vram_bytes=480 * MB)
    compute = one(demand(choices=(Choice(activation_bytes=220 * MB, flops=5e12),)), slow)
    assert compute.bound == "compute"
    assert compute.traversal_s == pytest.approx(1.0)
    copies = one(demand(choices=(Choice(activation_bytes=220 * MB, flops=1e11),)), slow)
    assert copies.bound == "transfer"
    assert copies.traversal_s == pytest.approx(0.1, rel=0.01)
    # A single slot, and 5 of 10 blocks in memory: 0.5 GB come from the disk each time, 1 GB the first time.
    reads = one(
        demand(choices=(Choice(activation_bytes=220 * MB, flops=1e9),)),
        replace(slow, vram_bytes=380 * MB, host_bytes=HOST_BASE + (RING_BUFFERS + 5) * 100 * MB),
    )
    assert reads.bound == "disk"
    assert reads.traversal_s == pytest.approx(0.25)
    assert reads.seconds == pytest.approx(0.05 / 2 + 0.5 + 7 * 0.25)
    assert reads.load_s == pytest.approx(0.025 + 0.25)


def test_what_host_memory_does_not_hold_comes_from_the_disk() -> None:
    limits = budget(vram_bytes=380 * MB, host_bytes=HOST_BASE + (RING_BUFFERS + 4) * 100 * MB)
    found = one(demand(), limits)
    assert found.residents == ()
    assert numbers(found.ram_blocks) == list(spread(4, 10))
    assert found.disk_bytes_per_traversal == 600 * MB
    assert found.peak_host_bytes == limits.host_bytes
    for missing, kept in ((1, 3), (400 * MB, 0)):
        less = one(demand(), replace(limits, host_bytes=found.peak_host_bytes - missing))
        assert len(less.ram_blocks) == kept


def test_what_stays_on_the_disk_is_read_every_time_and_takes_no_host_memory() -> None:
    limits = budget(vram_bytes=380 * MB, host_bytes=None, pin_limit_bytes=100_000 * MB)
    kept, read = one(demand(), limits), one(demand(on_disk=True), limits)
    assert (kept.disk_bytes_per_traversal, len(kept.ram_blocks)) == (0, 10)
    assert (read.disk_bytes_per_traversal, read.ram_blocks, read.pinned) == (1000 * MB, (), False)
    assert read.peak_host_bytes == HOST_BASE + RING_BUFFERS * 100 * MB
    assert read.peak_host_bytes == kept.peak_host_bytes - 1000 * MB
    assert read.traversal_s == pytest.approx(0.5)
    assert read.peak_vram_bytes == kept.peak_vram_bytes


def test_residents_need_no_host_memory() -> None:
    # Five residents on the device leave five blocks for the host.
    limits = budget(vram_bytes=980 * MB, host_bytes=HOST_BASE + (RING_BUFFERS + 5) * 100 * MB)
    found = one(demand(), limits)
    assert len(found.residents) == 5
    assert found.disk_bytes_per_traversal == 0


def test_the_whole_model_is_page_locked_only_where_that_is_allowed() -> None:
    everything = (RING_BUFFERS + 10) * 100 * MB
    limits = budget(vram_bytes=480 * MB, pin_limit_bytes=everything, host_copy_bytes_per_s=5e9)
    locked = one(demand(), limits)
    assert locked.pinned
    for less in (
        {"pin_limit_bytes": everything - 1},
        {"host_bytes": HOST_BASE + everything + 99 * MB, "host_reserve_bytes": 100 * MB},
    ):
        pageable = one(demand(), replace(limits, **less))  # type: ignore[arg-type]
        assert not pageable.pinned
        assert len(pageable.ram_blocks) == 10
        assert pageable.transfer_s > locked.transfer_s, "it goes through the ring"


def test_adapters_travel_with_their_blocks() -> None:
    found = one(demand(blocks=blocks(10, companion=30 * MB)), budget(vram_bytes=540 * MB))
    assert (found.slots, found.residents) == (2, ())
    assert found.bytes_per_traversal == 10 * 130 * MB


def test_workspaces_count_only_where_libraries_take_them() -> None:
    with_them = one(demand(), budget(vram_bytes=None))
    without = one(demand(), budget(vram_bytes=None, workspaces=False))
    assert with_them.peak_vram_bytes - without.peak_vram_bytes == 20 * MB


def test_slots_that_are_asked_for_are_had_where_they_fit() -> None:
    asked = [one(demand(), budget(vram_bytes=limit * MB, slots=4)) for limit in (700, 500, 400, 1300)]
    assert [placed.slots for placed in asked] == [4, 2, 1, 0]
    assert asked[0].peak_vram_bytes <= 700 * MB
    assert one(demand(), budget(vram_bytes=700 * MB)).slots == 2


def test_gaps_count_on_top_of_all_tensors_and_not_of_the_context() -> None:
    tight = one(demand(), budget(vram_bytes=None, reserve_bytes=100 * MB)).peak_vram_bytes
    loose = one(demand(), budget(vram_bytes=None, reserve_bytes=100 * MB, gaps=0.5)).peak_vram_bytes
    assert loose - 100 * MB == 1.5 * (tight - 100 * MB)
    plain = budget(vram_bytes=None, reserve_bytes=100 * MB, gaps=0.5, workspaces=False)
    assert one(demand(), plain).peak_vram_bytes == tight - 20 * MB


def test_the_first_of_equally_fast_choices_is_taken() -> None:
    choices = tuple(
        Choice(activation_bytes=size * MB, flops=1e13, settings={"tile": size}) for size in (200, 100, 300)
    )
    assert one(demand(choices=choices), budget(vram_bytes=None)).settings == {"tile": 200}
    # With 160 MB of blocks streamed either way, only the smaller one fits.
    assert one(demand(choices=choices), budget(vram_bytes=360 * MB)).settings == {"tile": 100}


def test_a_refusal_names_the_cause_and_the_nearest_that_fits() -> None:
    large = demand(choices=(Choice(activation_bytes=900 * MB, flops=1e12),))
    asked = []

    def smaller() -> list[tuple[str, list[PhaseDemand]]]:
        asked.append(1)
        return [("height=480", [large]), ("height=448", [demand()]), ("height=64", [demand()])]

    with pytest.raises(MemoryBudgetError) as refused:
        plan([demand(), large], budget(), smaller=smaller)
    assert refused.value.message.startswith("height=512: denoise needs 0.99 GB of device memory, 0.93 GB are")
    assert refused.value.hint == "height=448"
    assert len(asked) == 1
    plan([demand()], budget(), smaller=smaller)
    assert len(asked) == 1, "what fits needs no other request"


def test_a_refusal_blames_the_weights_when_they_alone_are_too_large() -> None:
    with pytest.raises(MemoryBudgetError, match="storage: denoise needs") as refused:
        plan([demand(rest_bytes=1000 * MB)], budget())
    assert "storage format" in refused.value.hint


def test_a_refusal_for_host_memory_says_so() -> None:
    large = demand(choices=(Choice(activation_bytes=0, flops=1.0, host_bytes=6000 * MB),))
    with pytest.raises(MemoryBudgetError, match=r"height=512: denoise needs 5\.96 GB of host memory"):
        plan([large], budget())
    with pytest.raises(MemoryBudgetError, match=r"storage: denoise needs .* of host memory"):
        plan([demand()], budget(host_bytes=HOST_BASE))


def test_a_plan_is_the_sum_of_its_phases_and_becomes_json() -> None:
    found = plan([demand(), demand(name="decode", blocks=(), traversals=1)], budget())
    first, second = found.phases
    assert found.seconds == pytest.approx(first.seconds + second.seconds)
    assert found.peak_vram_bytes == max(first.peak_vram_bytes, second.peak_vram_bytes)
    assert found.phase("decode") is second
    values = json.loads(json.dumps(found.to_dict()))
    assert values["phases"][0]["residents"] == list(first.residents)
    assert values["phases"][1]["num_blocks"] == 0


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0.00 KB"),
        (9_999, "9.76 KB"),
        (100_000, "0.10 MB"),
        (150_000_000, "0.14 GB"),
        (2**20, "1.00 MB"),
        (2**33, "8.00 GB"),
    ],
)
def test_bytes_are_said_in_a_unit_that_fits(nbytes: int, text: str) -> None:
    assert readable_bytes(nbytes) == text
