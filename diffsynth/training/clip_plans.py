"""What a round of clips asks of the device beside a run under a memory limit, planned before the first step.

The networks of a round come whole, each for its own phase, while the base is set aside; tiles are as small as
the limit asks for.  The denoising goes through the base: as its blocks lie in training where that leaves
room, otherwise with more of them on the host.  What is trained never leaves the device.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from diffsynth.errors import MemoryBudgetError
from diffsynth.pipelines.demand import LoraSize, phases
from diffsynth.pipelines.parts import Parts
from diffsynth.pipelines.sizes import ModelSizes, model_sizes
from diffsynth.pipelines.stages import plan_stages
from diffsynth.pipelines.storage import Storage
from diffsynth.pipelines.workload import audio_frames, video_tokens
from diffsynth.request import SPATIAL_STEP_PX, TEMPORAL_STEP, GenerateRequest
from diffsynth.vram.plan import PhasePlan
from diffsynth.vram.planner import Budget, PhaseDemand, fits, plan

_DENOISE = "denoise"
_SHARES = (0.75, 0.5, 0.375, 0.25)
_OUTPUTS = 2
"""Of a layer with an adapter: what is added, and the sum."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Room:
    """A managed base as a round of clips finds it.

    Attributes:
        budget: of the run.
        storage: of the base.
        placed_bytes: of the base where it lies in training, everything but activations.
        kept_bytes: of the adapter, its gradients, the state of the optimiser and the mean.
        rank: of the adapter.
        widest: output of the layers that it is on.
    """

    budget: Budget
    storage: Storage
    placed_bytes: int
    kept_bytes: int
    rank: int
    widest: int


def plan_clip(request: GenerateRequest, parts: Parts, room: Room) -> dict[str, PhasePlan]:
    """How the phases of a clip run, by name.

    Args:
        request: of one clip.
        parts: the networks, on the meta device.
        room: what there is.

    Returns: without the denoising where the base stays as it lies; empty without a limit of device memory.

    Raises:
        MemoryBudgetError: a phase does not fit; the hint names what would, in the words of ``[validation]``.
    """
    if room.budget.vram_bytes is None:
        return {}
    sizes = model_sizes(parts, room.storage)
    # The networks of a round wait on the host whatever is planned.
    room = replace(room, budget=replace(room.budget, host_bytes=None))
    try:
        found = plan(
            _demands(request, sizes, room), room.budget, smaller=lambda: _smaller(request, sizes, room)
        )
    except MemoryBudgetError as error:
        raise MemoryBudgetError(f"[validation] {error.message}", hint=error.hint) from error
    return {p.name: p for p in found.phases if p.num_blocks or not p.name.startswith(_DENOISE)}


def _demands(request: GenerateRequest, sizes: ModelSizes, room: Room) -> list[PhaseDemand]:
    lora = {1: LoraSize(rank=room.rank)}
    found = []
    for demand in phases(request, sizes, lora=lora, text=False):
        demand = replace(demand, rest_bytes=demand.rest_bytes + room.kept_bytes)
        if demand.name.startswith(_DENOISE):
            demand = _denoising(demand, _adapter_bytes(request, sizes, room), room)
        found.append(demand)
    return found


def _denoising(demand: PhaseDemand, adapter_bytes: int, room: Room) -> PhaseDemand:
    """Through the base as it lies, or, where that does not fit, with its blocks to place."""
    choices = tuple(replace(c, activation_bytes=c.activation_bytes + adapter_bytes) for c in demand.choices)
    demand = replace(demand, choices=choices)
    as_placed = replace(demand, blocks=(), rest_bytes=room.placed_bytes + room.kept_bytes)
    return as_placed if fits([as_placed], room.budget) else demand


def _adapter_bytes(request: GenerateRequest, sizes: ModelSizes, room: Room) -> int:
    """What the factors of a layer take while they are applied to a stream or to its text."""
    (stage,) = plan_stages(request, sizes.version)
    video = 0 if request.audio_only else video_tokens(request, stage)
    tokens = max(video, audio_frames(request), sizes.text_length)
    return sizes.itemsize * room.widest * (_OUTPUTS * tokens + 2 * room.rank)


def _smaller(
    request: GenerateRequest, sizes: ModelSizes, room: Room
) -> Iterator[tuple[str, Sequence[PhaseDemand]]]:
    """Fewer frames, then smaller pictures, then both."""
    shorter = [
        replace(request, num_frames=n) for n in range(request.num_frames - TEMPORAL_STEP, 0, -TEMPORAL_STEP)
    ]
    narrower = [] if request.audio_only else list(_narrower(request))
    for each in (*shorter, *narrower, *(replace(each, num_frames=9) for each in narrower)):
        names = {"num_frames": "frames", "width": "width", "height": "height"}
        changed = [
            f"{shown} = {getattr(each, name)}"
            for name, shown in names.items()
            if getattr(each, name) != getattr(request, name)
        ]
        yield " and ".join(changed), _demands(each, sizes, room)


def _narrower(request: GenerateRequest) -> Iterator[GenerateRequest]:
    step = SPATIAL_STEP_PX * (request.reference_factor if request.in_context_videos else 1)
    for share in _SHARES:
        height, width = (max(step, int(n * share) // step * step) for n in (request.height, request.width))
        if (height, width) != (request.height, request.width):
            yield replace(request, height=height, width=width)
