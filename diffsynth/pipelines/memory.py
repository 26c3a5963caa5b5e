"""The memory manager of a pipeline: networks live packed on the host, a plan brings them phase by phase."""

import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from diffsynth.device import Backend
from diffsynth.errors import MemoryBudgetError
from diffsynth.loader import NetworkWeights
from diffsynth.lora import LoraStack
from diffsynth.pipelines.demand import demands_for
from diffsynth.pipelines.nearest import plan_request
from diffsynth.pipelines.parts import Parts
from diffsynth.pipelines.phases import PhaseRun
from diffsynth.pipelines.sizes import model_sizes
from diffsynth.pipelines.storage import PartLayouts, Storage, part_layouts
from diffsynth.request import GenerateRequest
from diffsynth.vram.adapters import Adapter
from diffsynth.vram.binding import REST
from diffsynth.vram.blocks import BlockLayout, pack_entry
from diffsynth.vram.cache import PackedCache
from diffsynth.vram.file_source import MixedSource
from diffsynth.vram.formats import AS_IS
from diffsynth.vram.identity import identify
from diffsynth.vram.managed import ManagedModule
from diffsynth.vram.packed_file import PackedFile, write_packed
from diffsynth.vram.plan import PhasePlan, Plan
from diffsynth.vram.planner import Budget, PhaseDemand, plan
from diffsynth.vram.slices import StreamedSlices
from diffsynth.vram.source import BlockSource, RamSource
from diffsynth.vram.streamer import Traffic

logger = logging.getLogger(__name__)

GB = 2**30
STEP_DOWN = 0.85
"""Share of the last plan's memory that the next one may take after the device ran out."""

SLICE = "slices.{}"
"""Name of the block with the slice of the text projections for one hidden state."""


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


PHASE_PARTS: Mapping[str, tuple[str, ...]] = {
    "text": ("text_encoder", "text_encoder_post_modules"),
    "connectors": ("text_encoder_post_modules",),
    "encode audio": ("audio_vae_encoder",),
    "encode inputs": ("video_vae_encoder",),
    "denoise": ("dit",),
    "upsample": ("upsampler",),
    "decode video": ("video_vae_decoder",),
    "decode audio": ("audio_vae_decoder", "audio_vocoder"),
}
"""Phase, without its number -> the networks that compute in it."""


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
            on_disk: parts of which no block stays in host memory.
        """
        self._parts = parts
        self._weights = weights
        self._storage = storage
        self._backend = backend
        self._budget = budget
        self._cache = cache
        self._on_disk = frozenset(on_disk)
        self._sizes = model_sizes(parts, storage)
        self._demands: tuple[PhaseDemand, ...] = ()
        self.loras: LoraStack | None = None
        """Books of the LoRAs of the transformer, which travel with its blocks."""
        self._managed: dict[str, ManagedModule] = {}
        self._layouts: dict[str, PartLayouts] = {}
        self._files: dict[str, PackedFile] = {}
        self._plan = Plan(phases=())
        self._figures: list[PhaseFigures] = []

    def prepare(self, request: GenerateRequest, *, lora_rank: int, text: bool) -> None:
        """See :class:`~diffsynth.pipelines.phases.Memory`."""
        how: Any = {"storage": self._storage, "lora": lora_rank, "parts": self._sizes, "text": text}
        self._demands = demands_for(request, self._parts.version, **how)
        self._plan = plan_request(request, self._parts.version, self._budget, **how)
        self._figures = []
        logger.info("%s", _summary(self._plan, self._budget))

    def step_down(self) -> bool:
        """See :class:`~diffsynth.pipelines.phases.Memory`."""
        used = self._plan.peak_vram_bytes
        smaller = replace(self._budget, vram_bytes=int(STEP_DOWN * used))
        try:
            self._plan = plan(self._demands, smaller)
        except MemoryBudgetError:
            return False
        self._budget = smaller
        logger.warning(
            "the device ran out of memory with a plan of %.2f GB; going on with %.2f GB",
            used / GB,
            self._plan.peak_vram_bytes / GB,
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
        self._backend.reset_peak()
        with ExitStack() as stack:
            entered = [
                self._enter(stack, part, phase, leading=part == phase.part) for part in _parts_of(phase.name)
            ]
            slices = self._enter_slices(stack, phase) if phase.name == "text" else None
            try:
                yield PhaseRun(phase.settings, slices)
            finally:
                figures.peak_vram_bytes = self._backend.memory().peak_allocated
                for managed in entered:
                    figures.traffic = figures.traffic + managed.traffic
                    figures.host_bytes += managed.host_bytes
                if slices is not None:
                    figures.traffic = figures.traffic + slices.traffic
                self._figures.append(figures)

    def report(self) -> dict[str, Any]:
        """See :class:`~diffsynth.pipelines.phases.Memory`."""
        return {
            "managed": True,
            "plan": self._plan.to_dict(),
            "phases": [figures.to_dict() for figures in self._figures],
        }

    def close(self) -> None:
        """Close the packed files."""
        for file in self._files.values():
            file.close()
        self._files.clear()
        self._managed.clear()

    # -- inside ---------------------------------------------------------------------------------------

    def _enter(self, stack: ExitStack, part: str, plan: PhasePlan, *, leading: bool) -> ManagedModule:
        """Enter one network; only the leading one of a phase streams blocks in it."""
        managed = self._module(part)
        if part == "dit":
            managed.set_adapters(self._adapters(part))
        source = self._source(part, plan) if leading else None
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
        layouts = self._layouts_of(part)
        blocks = [SLICE.format(index) for index in range(len(layouts.slices))]
        return stack.enter_context(
            StreamedSlices(
                self._backend,
                self._source(part, plan),
                blocks,
                num_weights=len(layouts.slices[0].entries),
                slots=plan.slots or 1,
            )
        )

    def _module(self, part: str) -> ManagedModule:
        """The managed form of a part, made when it is first used."""
        if part not in self._managed:
            layouts = self._layouts_of(part)
            self._managed[part] = ManagedModule(
                getattr(self._parts, part),
                self._source(part, None),
                self._backend,
                blocks=tuple(layouts.blocks),
                host=tuple(layouts.host),
                left_out=layouts.left_out,
            )
        return self._managed[part]

    def _layouts_of(self, part: str) -> PartLayouts:
        if part not in self._layouts:
            module = self._weights[part].build()
            self._layouts[part] = part_layouts(part, module, self._storage, self._parts.dtype)
        return self._layouts[part]

    def _source(self, part: str, plan: PhasePlan | None) -> BlockSource:
        """The blocks of a part, as a plan wants them kept."""
        if self._cache is None or not self._weights[part].files.paths:
            return self._packed_in_ram(part)
        if part not in self._files:
            self._files[part] = self._packed_file(part, self._cache)
        return MixedSource(
            self._files[part],
            self._backend,
            in_ram=() if plan is None or part in self._on_disk else plan.ram_blocks,
            page_locked=plan is not None and plan.pinned,
        )

    def _packed_file(self, part: str, cache: PackedCache) -> PackedFile:
        weights, blocks = self._weights[part], self._blocks(part)
        policy = self._storage.policy_of(part, self._parts.dtype)
        identity = identify(part, policy, weights.files.paths, blocks)
        reader = _Reader(weights, blocks, self._parts.dtype)
        return cache.get_or_build(identity, lambda path: write_packed(path, blocks, identity, reader))

    def _packed_in_ram(self, part: str) -> RamSource:
        blocks = self._blocks(part)
        reader = _Reader(self._weights[part], blocks, self._parts.dtype)
        packed: dict[str, tuple[BlockLayout, Tensor]] = {}
        with torch.inference_mode(False):
            for name, layout in blocks.items():
                memory = self._backend.host_buffer(layout.nbytes, pinned=False)
                for entry in layout.entries:
                    pack_entry(layout, entry.name, reader(entry.name), memory)
                packed[name] = (layout, memory)
        return RamSource(packed, self._backend)

    def _blocks(self, part: str) -> dict[str, BlockLayout]:
        """All blocks of a part in the order of the packed file."""
        layouts = self._layouts_of(part)
        blocks = {**layouts.host, **({REST: layouts.rest} if layouts.rest else {})}
        blocks |= {SLICE.format(index): layout for index, layout in enumerate(layouts.slices)}
        return {**blocks, **layouts.blocks}

    def _adapters(self, part: str) -> dict[str, Sequence[Adapter]]:
        """The LoRAs of a part as the memory manager applies them."""
        if self.loras is None or not len(self.loras):
            return {}
        found: dict[str, list[Adapter]] = {}
        for name, layer in getattr(self._parts, part).named_modules():
            for update, strength in self.loras.updates(name) if hasattr(layer, "in_features") else ():
                items = found.setdefault(name, [])
                if update.down is not None:
                    items.append(Adapter(update.down, update.up, strength * update.scale))
                if update.weight_diff is not None or update.bias_diff is not None:
                    items.append(Adapter(None, None, strength, update.weight_diff, update.bias_diff))
        return dict(found)


class _Reader:
    """Reads the tensors of packed blocks from a checkpoint, one at a time.

    Weights that will be quantised are read in float32, which every stored dtype fits into exactly.  Slices
    are cut from their projections, which are kept until the next tensor that is none.
    """

    def __init__(
        self, weights: NetworkWeights, blocks: Mapping[str, BlockLayout], dtype: torch.dtype
    ) -> None:
        self._weights = weights
        self._dtype = dtype
        self._formats = {e.name: e.format for layout in blocks.values() for e in layout.entries}
        self._states = sum(name.startswith("slices.") for name in blocks)
        self._projections: dict[str, Tensor] = {}

    def __call__(self, name: str) -> Tensor:
        projection, colon, index = name.partition(":")
        if colon:
            if projection not in self._projections:
                self._projections[projection] = self._weights.read(projection, dtype=self._dtype)
            return self._projections[projection][:, int(index) :: self._states].contiguous()
        self._projections.clear()
        as_is = self._formats[name] in AS_IS
        return self._weights.read(name, dtype=self._dtype if as_is else torch.float32)


def _summary(plan: Plan, budget: Budget) -> str:
    """What was decided, in one line."""
    limit = "" if budget.vram_bytes is None else f" of {budget.vram_bytes / GB:.1f}"
    peak, host = plan.peak_vram_bytes / GB, plan.peak_host_bytes / GB
    text = f"memory plan: {peak:.2f}{limit} GB VRAM, {host:.1f} GB RAM"
    for phase in plan.phases:
        if phase.bytes_per_traversal and phase.name.startswith("denoise"):
            streamed = phase.bytes_per_traversal / GB
            text += f"; {phase.name}: {len(phase.residents)} blocks resident, "
            text += f"{streamed:.2f} GB streamed per step, {len(phase.ram_blocks)} blocks in RAM"
    return text


def _parts_of(phase: str) -> tuple[str, ...]:
    name = phase.rstrip("0123456789").rstrip()
    return PHASE_PARTS[name]
