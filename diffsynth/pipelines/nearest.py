"""Plans for requests, and the nearest request that fits when one does not."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TypeVar

from diffsynth.conditioning.enhance import Chat
from diffsynth.errors import RequestError
from diffsynth.pipelines.demand import Loras, Prompts, measured, phases
from diffsynth.pipelines.parts import ModelVersion, Parts
from diffsynth.pipelines.sizes import ModelSizes
from diffsynth.pipelines.storage import Storage
from diffsynth.request import SPATIAL_STEP_PX, STAGE_1_DIVISOR, TEMPORAL_STEP, GenerateRequest
from diffsynth.vram.planner import Budget, PhaseDemand, Plan, fits, plan

T = TypeVar("T")


def plan_request(
    request: GenerateRequest,
    version: ModelVersion,
    budget: Budget,
    *,
    storage: Storage | str,
    lora: Loras = False,
    parts: Parts | ModelSizes | None = None,
    text: Prompts = True,
    chat: Chat | None = None,
) -> Plan:
    """Plan a request; arguments as :func:`~diffsynth.pipelines.demand.demands_for` takes them.

    Raises:
        MemoryBudgetError: it does not fit; the hint says what would.
        RequestError: see ``demands_for``.
    """
    search = _Search(request, budget, measured(version, storage, parts), lora, text, chat)
    return plan(tuple(search.demands(request)), budget, smaller=search.smaller)


def nearest_fitting(
    request: GenerateRequest,
    version: ModelVersion,
    budget: Budget,
    *,
    storage: Storage | str,
    lora: Loras = False,
    parts: Parts | ModelSizes | None = None,
    text: Prompts = True,
    chat: Chat | None = None,
) -> GenerateRequest | None:
    """The request itself if it fits, else of those with other tiles, length or size the one with most pixels.

    None when nothing smaller fits either.
    """
    search = _Search(request, budget, measured(version, storage, parts), lora, text, chat)
    if search.accepts(request):
        return request
    return max(search.nearest(), key=_pixel_frames, default=None)


class _Search:
    """Asks about requests like one given."""

    def __init__(
        self,
        request: GenerateRequest,
        budget: Budget,
        sizes: ModelSizes,
        lora: Loras,
        text: Prompts,
        chat: Chat | None,
    ) -> None:
        self._request = request
        self._budget = budget
        self._sizes = sizes
        self._lora = lora
        self._text = text
        self._chat = chat

    def demands(self, request: GenerateRequest) -> Iterator[PhaseDemand]:
        """Of one request."""
        return phases(request, self._sizes, lora=self._lora, text=self._text, chat=self._chat)

    def accepts(self, request: GenerateRequest) -> bool:
        """Whether a request is legal and fits."""
        try:
            return fits(self.demands(request.validate()), self._budget)
        except RequestError:
            return False

    def smaller(self) -> Iterator[tuple[str, tuple[PhaseDemand, ...]]]:
        """One hint that names all nearest requests, with the demands of the nearest one."""
        found = sorted(self.nearest(), key=_pixel_frames, reverse=True)
        if found:
            yield ", or ".join(self._difference(request) for request in found), tuple(self.demands(found[0]))

    def nearest(self) -> Iterator[GenerateRequest]:
        """The largest that fits in each way of being smaller, or in both ways if neither is enough."""
        request = self._request
        tiled = replace(request, tiled=True)
        if not request.tiled and self.accepts(tiled):
            yield tiled
            return
        shorter = self._largest(lambda count: replace(tiled, num_frames=count), self._lengths())
        sizes = self._sizes_px()
        narrower = self._largest(lambda size: replace(tiled, height=size[0], width=size[1]), sizes)
        found = [each for each in (shorter, narrower) if each is not None]
        if not found and self._lengths():
            shortest = replace(tiled, num_frames=self._lengths()[-1])
            both = self._largest(lambda size: replace(shortest, height=size[0], width=size[1]), sizes)
            found = [both] if both is not None else []
        yield from found

    def _largest(self, make: Callable[[T], GenerateRequest], steps: Sequence[T]) -> GenerateRequest | None:
        """The first of ``steps``, which shrink, whose request fits; memory grows with each of them."""
        low, high = 0, len(steps)
        while low < high:
            middle = (low + high) // 2
            if self.accepts(make(steps[middle])):
                high = middle
            else:
                low = middle + 1
        return make(steps[low]) if low < len(steps) else None

    def _lengths(self) -> list[int]:
        """Fewer frames, longest first; a clip that is retaken keeps its length."""
        request = self._request
        if request.retake_video is not None:
            return []
        shortest = max((1 + frame for frame in request.image_frames()), default=1)
        step = TEMPORAL_STEP * (request.temporal_factor if request.in_context_videos else 1)
        start = (request.num_frames - 1) // step * step + 1 - step
        return list(range(start, shortest - 1, -step))

    def _sizes_px(self) -> list[tuple[int, int]]:
        """Smaller pictures of about the same shape, largest first."""
        request = self._request
        step = SPATIAL_STEP_PX * (STAGE_1_DIVISOR if request.use_two_stage_pipeline else 1)
        if request.in_context_videos:
            step *= request.reference_factor
        height, width = request.height, request.width
        longer = max(height, width)
        found = []
        for side in range((longer - 1) // step * step, 0, -step):
            scaled = tuple(max(step, round(each * side / longer / step) * step) for each in (height, width))
            found.append((scaled[0], scaled[1]))
        return [] if request.audio_only else list(dict.fromkeys(found))

    def _difference(self, request: GenerateRequest) -> str:
        names = ("tiled", "height", "width", "num_frames")
        changed = [n for n in names if getattr(request, n) != getattr(self._request, n)]
        return " and ".join(f"{name}={getattr(request, name)}" for name in changed)


def _pixel_frames(request: GenerateRequest) -> int:
    return request.height * request.width * request.num_frames
