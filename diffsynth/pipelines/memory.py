"""The memory manager of a pipeline: networks live packed on the host, a plan brings them phase by phase."""

import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from torch import Tensor

from diffsynth.conditioning.enhance import Chat
from diffsynth.device import Backend
from diffsynth.errors import MemoryBudgetError
from diffsynth.loader import NetworkWeights
from diffsynth.lora import LoraStack
from diffsynth.models.gemma3_writer import head_rows
from diffsynth.pipelines.demand import LoraSize, decoding_phases, demands_for
from diffsynth.pipelines.first_start import planned_parts, with_conversion
from diffsynth.pipelines.nearest import plan_request
from diffsynth.pipelines.packing import SLICE, PackedWeights
from diffsynth.pipelines.parts import Parts
from diffsynth.pipelines.phases import ENHANCE, PhaseRun, StageLoras, parts_of_phase
from diffsynth.pipelines.progress import OnProgress, Progress
from diffsynth.pipelines.sizes import model_sizes
from diffsynth.pipelines.stages import plan_stages
from diffsynth.pipelines.storage import Storage
from diffsynth.request import GenerateRequest
from diffsynth.vram.adapters import Adapter, Adapters
from diffsynth.vram.binding import REST
from diffsynth.vram.cache import PackedCache
from diffsynth.vram.managed import ManagedModule
from diffsynth.vram.plan import PhasePlan, Plan, readable_bytes
from diffsynth.vram.planner import Budget, PhaseDemand, fits, plan
from diffsynth.vram.slices import StreamedSlices, stream_rows
from diffsynth.vram.streamer import Traffic

logger = logging.getLogger(__name__)

STEP_DOWN = 0.85
"""Share of its last plan's memory that a phase may take after the device ran out for no visible reason."""


@dataclass(slots=True)
class PhaseFigures:
    """What a phase took: planned and measured bytes, and what moved."""

    plan: PhasePlan
    peak_vram_bytes: int | None = None
    host_bytes: int = 0
    traffic: Traffic = field(default_factory=Traffic)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {
            "phase": self.plan.name,
            "planned_vram_bytes": self.plan.peak_vram_bytes,
            "peak_vram_bytes": self.peak_vram_bytes,
            "planned_host_bytes": self.plan.peak_host_bytes,
            "weights_host_bytes": self.host_bytes,
            "bytes_to_device": self.traffic.bytes_to_device,
            "bytes_from_disk": self.traffic.bytes_from_disk,
            "copies": self.traffic.copies,
            "stalls": self.traffic.stalls,
            "traversals": self.traffic.traversals,
        }


class ManagedMemory:
    """Networks live packed on the host; a plan says how each phase brings them to the device."""

    def __init__(
        self,
        parts: Parts,
        weights: Mapping[str, NetworkWeights],
        storage: Storage,
        backend: Backend,
        budget: Budget,
        *,
        cache: PackedCache | None,
        on_disk: Collection[str] = (),
    ) -> None:
        """Take over the networks; nothing is read yet.

        Args:
            parts: networks on the meta device.
            weights: where their tensors lie.
            storage: formats.
            backend: of the device.
            budget: what plans may use.
            cache: of packed files; None packs into host memory.
            on_disk: parts of which no block stays in host memory, as far as ``cache`` has them.
        """
        self._parts = parts
        self._backend = backend
        self._budget = budget
        self._weights = PackedWeights(weights, storage, parts.dtype, backend, cache=cache)
        self._storage = storage
        sizes = model_sizes(parts, storage, on_disk=() if cache is None else on_disk)
        self._sizes = replace(sizes, has_float64=backend.capabilities.float64)
        self._demands: tuple[PhaseDemand, ...] = ()
        self.loras: LoraStack | None = None
        """Books of the LoRAs of the transformer, which travel with its blocks."""
        self._managed: dict[str, ManagedModule] = {}
        self._plan = Plan(phases=())
        self._figures: list[PhaseFigures] = []
        self._stepped_down: list[str] = []
        self._told = ""
        """The last plan in words."""
        self._phase: str | None = None
        """The one that is on, or that an error ended."""

    def prepare(
        self, request: GenerateRequest, *, loras: StageLoras, prompts: Sequence[str], chat: Chat | None = None
    ) -> None:
        """See :class:`~diffsynth.pipelines.phases.Memory`."""
        budget = self._host_budget()
        how: Any = {
            "storage": self._storage,
            "lora": self._lora_sizes(request, loras),
            "parts": self._sizes,
            "text": [self._num_tokens(prompt) for prompt in prompts]
            + ([self._sizes.text_length] if chat else []),
            "chat": chat,
        }
        self._demands = demands_for(request, self._parts.version, **how)
        self._begin(plan_request(request, self._parts.version, budget, **how), budget)

    def prepare_decoding(self, request: GenerateRequest) -> None:
        """See :class:`~diffsynth.pipelines.phases.Memory`."""
        budget = self._host_budget()
        self._demands = tuple(decoding_phases(request, self._sizes))
        self._begin(plan(self._demands, budget), budget)

    def convert(self, parts: Sequence[str], on_progress: OnProgress) -> None:
        """See :class:`~diffsynth.pipelines.phases.Memory`."""
        planned = planned_parts(self._plan)
        for part in parts:
            if part in planned:
                self._weights.convert(part, partial(_tell_conversion, on_progress, part))

    def step_down(self) -> bool:
        """See :class:`~diffsynth.pipelines.phases.Memory`."""
        name = self._phase
        if name is None:
            return False
        used = self._plan.phase(name).peak_vram_bytes
        smaller = self._smaller(name, used)
        phases = tuple(smaller if phase.name == name else phase for phase in self._plan.phases)
        self._plan = replace(self._plan, phases=phases)
        self._stepped_down.append(name)
        logger.warning(
            "%s: the device ran out of memory with a plan of %s; going on with %s",
            name,
            readable_bytes(used),
            readable_bytes(smaller.peak_vram_bytes),
        )
        return True

    @contextmanager
    def phase(self, name: str) -> Iterator[PhaseRun]:
        """See :class:`~diffsynth.pipelines.phases.Memory`.

        Raises:
            CheckpointError, OutputError: weights cannot be read or converted.
            torch.OutOfMemoryError: or what the backend raises; everything is given back.
        """
        phase = self._plan.phase(name)
        figures = PhaseFigures(phase)
        self._phase = name
        self._backend.reset_peak()
        with ExitStack() as stack:
            entered = [
                self._enter(stack, part, phase, leading=part == phase.part)
                for part in parts_of_phase(phase.name)
            ]
            slices = self._enter_slices(stack, phase) if phase.name == "text" else None
            rows = self._enter_head(stack, phase) if phase.name == ENHANCE else None
            head = None if rows is None else partial(_pieces, rows)
            yield PhaseRun(phase.settings, slices, head)
            figures.peak_vram_bytes = self._backend.memory().peak_allocated
            for managed in entered:
                figures.traffic = figures.traffic + managed.traffic
                figures.host_bytes += managed.host_bytes
            if slices is not None:
                figures.traffic = figures.traffic + slices.traffic
            if rows is not None:
                figures.traffic = figures.traffic + replace(rows.traffic, traversals=0)
        self._figures.append(figures)
        self._phase = None

    @property
    def storage(self) -> dict[str, str]:
        """How weights are stored, which shows in the results: part -> policy."""
        return dict(self._weights.policies)

    def report(self) -> dict[str, Any]:
        """See :class:`~diffsynth.pipelines.phases.Memory`."""
        return {
            "managed": True,
            "plan": self._plan.to_dict(),
            "phases": [figures.to_dict() for figures in self._figures],
            "stepped_down": list(self._stepped_down),
        }

    def close(self) -> None:
        """See :class:`~diffsynth.pipelines.phases.Memory`."""
        self._managed.clear()
        self._weights.close()

    # -- inside ---------------------------------------------------------------------------------------

    def _begin(self, found: Plan, budget: Budget) -> None:
        """A new run."""
        packed = frozenset(filter(self._weights.is_packed, planned_parts(found)))
        self._plan = with_conversion(found, self._sizes, budget, packed=packed)
        self._figures, self._stepped_down, self._phase = [], [], None
        summary = _summary(self._plan, budget)
        if summary != self._told:  # it is planned before weights are read, and again for each run
            logger.info("%s", summary)
        self._told = summary

    def _smaller(self, name: str, used: int) -> PhasePlan:
        """A plan of a phase that takes less than ``used``: what is there, or clearly less, or at least less.

        Raises:
            MemoryBudgetError: there is none.
        """
        memory = self._backend.memory()
        there = used - 1
        if memory.free is not None:  # so is what torch keeps for reuse, and a plan counts the context
            there = min(there, memory.free + (memory.reserved or 0) + self._budget.reserve_bytes)
        clearly_less = int(STEP_DOWN * used)
        demand = next(demand for demand in self._demands if demand.name == name)
        budget = replace(self._host_budget(), vram_bytes=there)
        if there == used - 1 and fits([demand], replace(budget, vram_bytes=clearly_less)):
            budget = replace(budget, vram_bytes=clearly_less)
        try:
            return plan([demand], budget).phase(name)
        except MemoryBudgetError as error:
            raise MemoryBudgetError(
                f"the device ran out of memory; {error.message}",
                hint="close what else uses the device, or a smaller size, or fewer frames",
            ) from None

    def _host_budget(self) -> Budget:
        """The budget, less what stays in host memory because no file holds it."""
        kept = self._weights.host_bytes()
        return replace(self._budget, host_base_bytes=self._budget.host_base_bytes + kept)

    def _num_tokens(self, prompt: str) -> int:
        assert self._parts.tokenizer is not None
        return self._parts.tokenizer.count(prompt, self._sizes.text_length)

    def _lora_sizes(self, request: GenerateRequest, loras: StageLoras) -> dict[int, LoraSize]:
        """By stage what travels beside the weights, exactly as it will be packed."""
        sizes: dict[int, LoraSize] = {}
        if self.loras is None:
            return sizes
        for stage in plan_stages(request, self._parts.version):
            with loras(stage):
                adapters = self._adapters()
            layouts = self._weights.layouts("dit")
            blocks = {**layouts.blocks, **({REST: layouts.rest} if layouts.rest else {})}
            places = {
                entry.name.removesuffix(".weight"): (block, entry.dtype)
                for block, layout in blocks.items()
                for entry in layout.entries
            }
            packed = Adapters(adapters, places, tuple(blocks)).layouts
            ranks = (sum(a.down.shape[0] for a in each if a.down is not None) for each in adapters.values())
            sizes[stage.number] = LoraSize(
                rank=max(ranks, default=0), nbytes={name: layout.nbytes for name, layout in packed.items()}
            )
        return sizes

    def _enter(self, stack: ExitStack, part: str, plan: PhasePlan, *, leading: bool) -> ManagedModule:
        """Enter one network; only the leading one of a phase streams blocks in it."""
        managed = self._module(part)
        if part == "dit":
            managed.set_adapters(self._adapters())
        source = self._weights.source(part, plan) if leading else None
        residents = plan.residents if leading else ()
        slots = plan.slots if leading else 0
        stack.callback(managed.exit)
        managed.enter(
            residents=residents,
            slots=slots,
            source=source,
            adapter_residents=residents,
            adapter_slots=max(slots, 1),
        )
        return managed

    def _enter_slices(self, stack: ExitStack, plan: PhasePlan) -> StreamedSlices:
        part = "text_encoder_post_modules"
        layouts = self._weights.layouts(part)
        blocks = [SLICE.format(index) for index in range(len(layouts.slices))]
        return stack.enter_context(
            StreamedSlices(
                self._backend,
                self._weights.source(part, plan),
                blocks,
                num_weights=len(layouts.slices[0].entries),
                slots=plan.slots or 1,
            )
        )

    def _enter_head(self, stack: ExitStack, plan: PhasePlan) -> StreamedSlices:
        """The head of the text model, a chunk beside every layer."""
        model = self._parts.text_encoder
        assert model is not None
        rows, table = head_rows(model.config), model.embed_tokens.weight
        layers = zip(range(len(rows)), self._weights.layouts("text_encoder").blocks, strict=False)
        residents = [number for number, layer in layers if layer in plan.residents]
        return stack.enter_context(
            stream_rows(self._backend, table, rows, slots=plan.slots or 1, residents=residents)
        )

    def _module(self, part: str) -> ManagedModule:
        """The managed form of a part, made when it is first used."""
        if part not in self._managed:
            layouts = self._weights.layouts(part)
            self._managed[part] = ManagedModule(
                getattr(self._parts, part),
                self._weights.source(part, None),
                self._backend,
                blocks=tuple(layouts.blocks),
                host=tuple(layouts.host),
                left_out=layouts.left_out,
            )
        return self._managed[part]

    def _adapters(self) -> dict[str, Sequence[Adapter]]:
        """The LoRAs that are active on the transformer, as the memory manager applies them."""
        if self.loras is None or not len(self.loras):
            return {}
        found: dict[str, list[Adapter]] = {}
        for name, layer in self.loras.module.named_modules():
            for update, strength in self.loras.updates(name) if hasattr(layer, "in_features") else ():
                items = found.setdefault(name, [])
                if update.down is not None:
                    items.append(Adapter(update.down, update.up, strength * update.scale))
                if update.weight_diff is not None or update.bias_diff is not None:
                    items.append(Adapter(None, None, strength, update.weight_diff, update.bias_diff))
        return dict(found)


def _tell_conversion(on_progress: OnProgress, part: str, done: int, total: int) -> None:
    on_progress(Progress(phase=f"convert {part}", done=done, total=total, unit="byte"))


def _pieces(rows: StreamedSlices) -> Iterator[Tensor]:
    """A table, piece by piece."""
    for (piece,) in rows.traverse():
        yield piece


def _summary(plan: Plan, budget: Budget) -> str:
    """What was decided, in one line."""
    limit = "" if budget.vram_bytes is None else f" of {readable_bytes(budget.vram_bytes)}"
    text = f"memory plan: {readable_bytes(plan.peak_vram_bytes)}{limit} VRAM"
    if budget.reserve_bytes:
        text += f" ({readable_bytes(budget.reserve_bytes)} of it for the device's context)"
    text += f", {readable_bytes(plan.peak_host_bytes)} RAM"
    if plan.conversion_host_bytes:
        text += f", of which converting weights needs {readable_bytes(plan.conversion_host_bytes)}"
    for phase in plan.phases:
        if phase.bytes_per_traversal and phase.name.startswith("denoise"):
            text += f"; {phase.name}: {len(phase.residents)} blocks resident, "
            text += f"{readable_bytes(phase.bytes_per_traversal)} streamed per step, "
            text += f"{len(phase.ram_blocks)} blocks in RAM"
    return text
