"""The planner: what lies where, and how a phase runs, decided before anything is loaded.

A pure function of what each phase needs and of what the machine has.  For every phase it looks at all ways to
run it (tile sizes, chunk sizes), all numbers of resident blocks and of slots, drops what does not fit, and
takes the fastest.  So a larger budget can never give a slower plan: whatever fitted still does.

Time is a roofline: a traversal of the blocks takes as long as the longest of its computation, its copies to
the device and its reads from the disk, which overlap; with a single slot, computation and copies take turns.
The first traversal reads everything from the disk, the later ones only what stays there.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from diffsynth.errors import MemoryBudgetError
from diffsynth.vram.plan import PhasePlan, Plan, readable_bytes
from diffsynth.vram.source import RING_BUFFERS

__all__ = [
    "Block",
    "Budget",
    "Choice",
    "PhaseDemand",
    "PhasePlan",
    "Plan",
    "Smaller",
    "fits",
    "plan",
    "spread",
]

COPY_LATENCY_S = 20e-6
"""Issuing one copy and its two marks."""
SLOTS = 2
"""One block computes while the next arrives: with copies that are shorter than the computation, a third slot
gains nothing."""
GAPS = 0.02
"""Share of the tensors' memory that a caching allocator holds beside them: 1.2 % were measured on an H200."""
HOST_BASE_BYTES = 2_750_000_000
"""What a process holds besides weights: interpreter, torch, device libraries."""
HOST_RESERVE_BYTES = 4_000_000_000
"""Left to the rest of the machine before a whole model is page-locked."""
EFFICIENCY = 0.55
"""Share of the peak that long matrix products reach, as published runs of LTX-2 show (45 to 55 %)."""
HOST_COPY_BYTES_PER_S = 25_000_000_000
"""Two threads that fill page-locked buffers from pageable memory or from the system's file cache."""


class Block(NamedTuple):
    """A block and what travels with it in slots of its own: factors of a LoRA, a slice of a projection."""

    name: str
    nbytes: int
    companion_bytes: int = 0

    @property
    def moved_bytes(self) -> int:
        """Both."""
        return self.nbytes + self.companion_bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """One way to run a phase.

    Attributes:
        settings: what the phase is told, such as ``{"tile_size_in_pixels": 512}``.
        activation_bytes: live tensors on the device at the worst moment, weights not counted.
        workspace_bytes: allowance for what the device's libraries and allocator take beside them.
        host_bytes: tensors on the host.
        flops: of one traversal.
    """

    activation_bytes: int
    flops: float
    settings: Mapping[str, int | None] = field(default_factory=dict)
    workspace_bytes: int = 0
    host_bytes: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class PhaseDemand:
    """What one phase needs.

    Attributes:
        name: of the phase.
        part: of the network that works in it.
        blocks: in the order of use; empty for a network that comes and goes as a whole.
        rest_bytes: weights that are on the device for the whole phase.
        scratch_bytes: for weights on their way to the compute dtype.
        choices: ways to run it, the preferred one first.
        traversals: of the blocks.
        on_disk: whether no block may stay in host memory.
        activation_cause, weight_cause: the arguments behind the two kinds of memory, for a refusal.
    """

    name: str
    part: str
    choices: tuple[Choice, ...]
    blocks: tuple[Block, ...] = ()
    rest_bytes: int = 0
    scratch_bytes: int = 0
    traversals: int = 1
    on_disk: bool = False
    activation_cause: str = "the request"
    weight_cause: str = "the weights"


@dataclass(frozen=True, kw_only=True, slots=True)
class Budget:
    """What a machine has.  None: no limit.

    Attributes:
        vram_bytes: device memory of this process, everything included.
        host_bytes: host memory of this process, file-backed pages not counted.
        link_bytes_per_s: host to device, from page-locked memory.
        disk_bytes_per_s: large reads.
        tflops: dense peak of the compute dtype, in 10**12 operations per second.
        reserve_bytes: device memory that no tensor gets: context and library handles.
        workspaces: whether the device's libraries take memory beside tensors; plain host code does not.
        slots: blocks that shall be on the device at a time beside residents, where they fit: one computes,
            the others arrive.  None: as many as are of use.
        gaps: share of the tensors' memory that the allocator of such a device holds beside them.
        pin_limit_bytes: host memory that may be page-locked at one time.
        efficiency: share of the peak that is reached.
        host_base_bytes: what the process holds before it loads a weight.
        host_reserve_bytes: see ``HOST_RESERVE_BYTES``.
        host_copy_bytes_per_s: from pageable memory into page-locked buffers.
    """

    vram_bytes: int | None
    host_bytes: int | None
    link_bytes_per_s: float
    disk_bytes_per_s: float
    tflops: float
    reserve_bytes: int = 0
    workspaces: bool = True
    slots: int | None = None
    gaps: float = GAPS
    pin_limit_bytes: int = 0
    efficiency: float = EFFICIENCY
    host_base_bytes: int = HOST_BASE_BYTES
    host_reserve_bytes: int = HOST_RESERVE_BYTES
    host_copy_bytes_per_s: float = HOST_COPY_BYTES_PER_S


Smaller = Callable[[], Iterable[tuple[str, Sequence[PhaseDemand]]]]
"""Smaller requests, the nearest first: how to say them, and what they need."""


def plan(demands: Sequence[PhaseDemand], budget: Budget, *, smaller: Smaller | None = None) -> Plan:
    """Place every phase.

    Args:
        demands: the phases in their order.
        budget: what there is.
        smaller: asked for smaller requests when the phases do not fit; the first that fits is the hint.

    Raises:
        MemoryBudgetError: a phase does not fit.  The message names the phase, the memory and the argument
            that is too large, the hint the nearest request that fits.
    """
    phases = []
    for demand in demands:
        found = _best(demand, budget)
        if found is None:
            raise _refusal(demand, budget, smaller)
        phases.append(found)
    return Plan(phases=tuple(phases))


def fits(demands: Iterable[PhaseDemand], budget: Budget) -> bool:
    """Whether :func:`plan` would accept."""
    return all(_fits(demand, budget) for demand in demands)


def spread(count: int, total: int) -> tuple[int, ...]:
    """``count`` of ``total`` numbers 0..total-1, evenly: cyclic gaps differ by one at most.

    The first is 0: what a traversal begins with is there.
    """
    return tuple(i * total // count for i in range(count))


class _Placement(NamedTuple):
    """Residents, what the other blocks need on the device, and what of them moves."""

    residents: tuple[Block, ...]
    streamed: tuple[Block, ...]
    slots: int
    device_bytes: int
    moved_bytes: int


def _fits(demand: PhaseDemand, budget: Budget) -> bool:
    """The leanest ways are tried first: the last choices, without residents."""
    leanest = list(reversed(_placements(demand, budget.slots)))
    return any(
        _place(demand, choice, placement, budget) is not None
        for choice in reversed(demand.choices)
        for placement in leanest
    )


def _best(demand: PhaseDemand, budget: Budget) -> PhasePlan | None:
    """The fastest; of those that take as long the preferred choice, and there what moves least."""
    placements = _placements(demand, budget.slots)
    found: list[tuple[bool, float, int, int, PhasePlan]] = []
    for number, choice in enumerate(demand.choices):
        for placement in placements:
            placed = _place(demand, choice, placement, budget)
            if placed is not None:
                unwanted = budget.slots is not None and placed.slots not in (0, budget.slots)
                found.append((unwanted, placed.seconds, number, placed.bytes_per_traversal, placed))
    return min(found, key=lambda ranked: ranked[:4])[4] if found else None


def _placements(demand: PhaseDemand, wanted_slots: int | None) -> list[_Placement]:
    """All numbers of residents and of slots.

    In a single traversal nothing is used twice, so nothing is made resident.  Where blocks differ in size,
    the larger ones may all be residents, which keeps slots small.
    """
    found = []
    blocks = demand.blocks
    slot_numbers = sorted({wanted_slots or SLOTS, SLOTS, 1}, reverse=True)
    smallest = min((block.nbytes for block in blocks), default=0)
    for fixed in dict.fromkeys((frozenset[str](), frozenset(b.name for b in blocks if b.nbytes > smallest))):
        free = [block for block in blocks if block.name not in fixed]
        most = len(free) if demand.traversals > 1 else 0
        for count in range(most, -1, -1):
            names = fixed | {free[i].name for i in spread(count, len(free))}
            residents = tuple(block for block in blocks if block.name in names)
            streamed = tuple(block for block in blocks if block.name not in names)
            kept = sum(block.moved_bytes for block in residents)
            moved = sum(block.moved_bytes for block in streamed)
            slot = max((block.nbytes for block in streamed), default=0)
            slot += max((block.companion_bytes for block in streamed), default=0)
            for slots in slot_numbers if streamed else (0,):
                found.append(_Placement(residents, streamed, slots, kept + slots * slot, moved))
    return found


def _place(demand: PhaseDemand, choice: Choice, placement: _Placement, budget: Budget) -> PhasePlan | None:
    """One way to run a phase in one placement, or None where it does not fit."""
    vram = _vram_bytes(demand, choice, placement, budget)
    if budget.vram_bytes is not None and vram > budget.vram_bytes:
        return None
    share = _host_share(demand, choice, placement, budget)
    if share is None:
        return None
    ram_blocks, pinned, host = share
    moved = placement.moved_bytes
    from_disk = moved - sum(block.moved_bytes for block in ram_blocks)
    link = budget.link_bytes_per_s
    if not pinned:
        link = min(link, budget.host_copy_bytes_per_s)
    compute = choice.flops / (budget.tflops * 1e12 * budget.efficiency)
    transfer = moved / link + COPY_LATENCY_S * len(placement.streamed)
    disk = from_disk / budget.disk_bytes_per_s
    alone = placement.slots == 1
    every = max(compute + transfer if alone else max(compute, transfer), disk)
    everything = sum(block.moved_bytes for block in demand.blocks)
    first = max(every, everything / budget.disk_bytes_per_s, everything / link)
    load = demand.rest_bytes / min(budget.disk_bytes_per_s, budget.link_bytes_per_s)
    return PhasePlan(
        name=demand.name,
        part=demand.part,
        traversals=demand.traversals,
        num_blocks=len(demand.blocks),
        residents=tuple(block.name for block in placement.residents),
        slots=placement.slots,
        ram_blocks=tuple(block.name for block in ram_blocks),
        pinned=pinned,
        settings=choice.settings,
        peak_vram_bytes=vram,
        peak_host_bytes=host,
        bytes_per_traversal=moved,
        disk_bytes_per_traversal=from_disk,
        compute_s=compute,
        transfer_s=transfer,
        disk_s=disk,
        traversal_s=every,
        seconds=load + first + (demand.traversals - 1) * every,
    )


def _vram_bytes(demand: PhaseDemand, choice: Choice, placement: _Placement, budget: Budget) -> int:
    weights = demand.rest_bytes + demand.scratch_bytes + placement.device_bytes
    needed = weights + choice.activation_bytes
    if budget.workspaces:
        needed += choice.workspace_bytes
        needed += int(budget.gaps * needed)
    return budget.reserve_bytes + needed


def _host_share(
    demand: PhaseDemand, choice: Choice, placement: _Placement, budget: Budget
) -> tuple[tuple[Block, ...], bool, int] | None:
    """Blocks kept in host memory, whether page-locked, and the peak; None where not even the ring fits.

    A phase of one traversal keeps nothing: every block comes from the disk once in any case.
    """
    streamed = placement.streamed if demand.traversals > 1 and not demand.on_disk else ()
    ring = max(_ring_bytes(demand.blocks), demand.rest_bytes)
    fixed = budget.host_base_bytes + choice.host_bytes
    everything = placement.moved_bytes if streamed else 0
    limit = budget.host_bytes
    # Page-locked as a whole: the ring that brought the blocks from the disk goes when they are all there.
    if streamed and everything + ring <= budget.pin_limit_bytes:
        total = fixed + everything + ring
        if limit is None or total + budget.host_reserve_bytes <= limit:
            return streamed, True, total
    if limit is None:
        return streamed, False, fixed + ring + everything
    for count in range(len(streamed), -1, -1):
        kept = tuple(streamed[i] for i in spread(count, len(streamed)))
        total = fixed + ring + sum(block.moved_bytes for block in kept)
        if total <= limit:
            return kept, False, total
    return None


def _ring_bytes(blocks: Sequence[Block]) -> int:
    """Page-locked buffers that blocks pass through on their way to the device."""
    return RING_BUFFERS * max((block.moved_bytes for block in blocks), default=0)


def _refusal(demand: PhaseDemand, budget: Budget, smaller: Smaller | None) -> MemoryBudgetError:
    """Say which memory is too small, what needs it, and what would fit."""
    hint = next(_hints(budget, smaller), "a larger limit, or a storage format of fewer bits")
    placements = _placements(demand, budget.slots)
    needs = [
        (min(_vram_bytes(demand, choice, placement, budget) for placement in placements), choice)
        for choice in demand.choices
    ]
    limit = budget.vram_bytes
    fitting = [choice for needed, choice in needs if limit is None or needed <= limit]
    if not fitting:
        needed, leanest = min(needs, key=lambda pair: pair[0])
        working = leanest.activation_bytes + (leanest.workspace_bytes if budget.workspaces else 0)
        return _too_small(demand, "device", needed, working, limit, hint)
    working = min(choice.host_bytes for choice in fitting)
    needed = budget.host_base_bytes + max(_ring_bytes(demand.blocks), demand.rest_bytes) + working
    return _too_small(demand, "host", needed, working, budget.host_bytes, hint)


def _too_small(
    demand: PhaseDemand, memory: str, needed: int, working: int, limit: int | None, hint: str
) -> MemoryBudgetError:
    """``working``: what of ``needed`` depends on the size of the request."""
    assert limit is not None, "only a limit refuses"
    cause = demand.weight_cause if needed - working > limit else demand.activation_cause
    return MemoryBudgetError(
        f"{cause}: {demand.name} needs {readable_bytes(needed)} of {memory} memory, "
        f"{readable_bytes(limit)} are allowed",
        hint=hint,
    )


def _hints(budget: Budget, smaller: Smaller | None) -> Iterator[str]:
    if smaller is not None:
        for text, demands in smaller():
            if fits(demands, budget):
                yield text
