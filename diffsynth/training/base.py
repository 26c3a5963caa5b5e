"""The frozen base of an adapter in the hands of the memory manager: planned, then brought block by block."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any, ClassVar, Protocol

import torch

from diffsynth.device import Backend, backend_for, resolve_device
from diffsynth.models.ltx2.transformer import LTX2Transformer
from diffsynth.pipelines.assemble import PART_OF, OpenedModels
from diffsynth.pipelines.packing import PackedWeights
from diffsynth.pipelines.parts import Parts
from diffsynth.training.adapters import chosen_layers
from diffsynth.training.checkpointing import no_hold
from diffsynth.training.clip_plans import Room
from diffsynth.training.config import HOST, LORA, MemorySection, TrainConfig
from diffsynth.training.demand import ON_HOST, PART, Demands, StepDemand, pass_sizes
from diffsynth.training.optimiser import STATE_BYTES
from diffsynth.training.samples import SampleEntry
from diffsynth.training.stash import HostStash, Stash
from diffsynth.training.workers import processes_here
from diffsynth.vram.cache import PackedCache
from diffsynth.vram.formats import as_is
from diffsynth.vram.managed import ManagedModule
from diffsynth.vram.plan import PhasePlan, readable_bytes
from diffsynth.vram.planner import Budget, plan
from diffsynth.vram.streamer import Traffic

logger = logging.getLogger(__name__)


class Base(Protocol):
    """The network that is trained, or that an adapter is trained on."""

    @property
    def storage(self) -> str:
        """Format of its weights: equal ones of equal files have equal bits."""
        ...

    @property
    def stash(self) -> Stash | None:
        """Where hidden states wait; None: on the device."""
        ...

    @property
    def traffic(self) -> Traffic | None:
        """What moved so far; None where nothing moves."""
        ...

    def hold(self, name: str) -> AbstractContextManager[None]:
        """See :data:`~diffsynth.training.checkpointing.Hold`."""
        ...

    def entered(self) -> AbstractContextManager[LTX2Transformer]:
        """Within the ``with`` block the network computes."""
        ...

    def aside(self, placed: PhasePlan | None = None) -> AbstractContextManager[None]:
        """Inside of :meth:`entered`: a memory manager gives its device memory back for the ``with`` block, in
        which the network cannot compute; or, with a plan, computes forward, its blocks where that says."""
        ...

    @property
    def room(self) -> Room | None:
        """What a round of clips has to share the device with; None: nothing is planned."""
        ...


def open_base(config: TrainConfig, opened: OpenedModels, entries: Sequence[SampleEntry]) -> Base:
    """What a configuration asks for: all weights on the device, or a memory manager that brings them.

    Args:
        config: checked.
        opened: with the transformer alone.
        entries: the samples, whose largest decides what a step takes.

    Raises:
        CheckpointError: a sample cannot be read, or there is no transformer.
        RequestError: a target that no layer answers to.
        MemoryBudgetError: it does not fit; the hint names what would.
    """
    device, dtype, memory = resolve_device(config.model.device), config.model.torch_dtype, config.memory
    parts = opened.outline(device, dtype).parts
    parts.require([PART])
    assert parts.dit is not None
    training = config.training
    if training.mode == LORA:
        chosen_layers(parts.dit, config.lora.targets)
    if not memory.managed:
        return ResidentBase(opened, device, dtype, memory)
    demand = StepDemand.of(
        parts.dit,
        config.lora,
        pass_sizes(config, entries),
        steps=training.steps * training.gradient_accumulation,
        state_bytes=STATE_BYTES[training.optimizer],
        mean=bool(training.ema_decay),
    )
    backend = backend_for(device)
    budget = memory.limits.budget(backend)
    if memory.host_limit is None and budget.host_bytes is not None:
        budget = replace(budget, host_bytes=budget.host_bytes // processes_here())
    return StreamedBase(opened, parts, memory, budget, backend, demand)


class ResidentBase:
    """All weights on the device, as they come."""

    traffic: ClassVar[None] = None
    room: ClassVar[None] = None

    def __init__(
        self, opened: OpenedModels, device: torch.device, dtype: torch.dtype, memory: MemorySection
    ) -> None:
        """Nothing is read yet."""
        self._opened = opened
        self._device = device
        self._dtype = dtype
        self.storage = str(as_is(dtype))
        self.stash = HostStash(backend_for(device)) if memory.activations == HOST else None

    def hold(self, name: str) -> AbstractContextManager[None]:
        """See :class:`Base`."""
        return no_hold(name)

    def aside(self, placed: PhasePlan | None = None) -> AbstractContextManager[None]:
        """See :class:`Base`: the weights stay."""
        return nullcontext()

    @contextmanager
    def entered(self) -> Iterator[LTX2Transformer]:
        """See :class:`Base`.

        Raises:
            CheckpointError: there is no transformer, or it cannot be read.
        """
        parts = self._opened.load(self._device, self._dtype).parts
        parts.require([PART])
        assert parts.dit is not None
        try:
            yield parts.dit
        finally:
            if self.stash is not None:
                self.stash.close()


class StreamedBase:
    """A frozen transformer of which some blocks stay on the device and the others come there and back.

    :attr:`network` has no weights outside of :meth:`entered`.
    """

    def __init__(
        self,
        opened: OpenedModels,
        parts: Parts,
        memory: MemorySection,
        budget: Budget,
        backend: Backend,
        demand: StepDemand,
    ) -> None:
        """Plan; no weight is read.

        Args:
            opened: the files.
            parts: with the transformer on the meta device.
            memory: what the user asks for.
            budget: of its limits on this machine.
            backend: of the device.
            demand: of the run.

        Raises:
            MemoryBudgetError: it does not fit; the hint names what would.
        """
        assert parts.dit is not None
        self.network = parts.dit
        self._backend = backend
        weights = {PART_OF[kind]: network for kind, network in opened.networks.items()}
        storage = memory.limits.storage_policy(opened.configs, opened.networks)
        self.storage = storage.policy_of(PART, weights[PART], parts.dtype)
        cache = PackedCache() if memory.cache else None
        self._weights = PackedWeights(weights, storage, parts.dtype, backend, cache=cache)
        kept = self._weights.host_bytes()
        self.budget = replace(budget, host_base_bytes=budget.host_base_bytes + kept)
        self._demands = Demands(parts, storage, memory.activations)
        self._asked = demand
        self.demand = self._demands.of(demand)
        """What was asked of the planner."""
        self.plan: PhasePlan = plan(
            [self.demand], self.budget, smaller=lambda: self._demands.smaller(demand)
        ).phases[0]
        """Of one pass there or back."""
        self.stash = HostStash(backend) if self.plan.settings[ON_HOST] else None
        self._managed: ManagedModule | None = None

    @contextmanager
    def entered(self) -> Iterator[LTX2Transformer]:
        """Within the ``with`` block the network computes.  Weights are converted first, once.

        Raises:
            CheckpointError, OutputError: weights cannot be read or converted.
            torch.OutOfMemoryError: or what the backend raises; everything is given back.
        """
        logger.info("%s", self.summary)
        self._backend.reset_peak()
        if not self._weights.is_packed(PART):
            logger.info("weights are converted to %s, once", self._demands.storage.transformer)
        layouts = self._weights.layouts(PART)
        source = self._weights.source(PART, self.plan)
        blocks = tuple(layouts.blocks)
        self._managed = ManagedModule(self.network, source, self._backend, blocks=blocks)
        try:
            with self._managed.active(**self._phase):
                yield self.network
        finally:
            self._told_peak()
            if self.stash is not None:
                self.stash.close()
            self._weights.close()

    @property
    def _phase(self) -> dict[str, Any]:
        return {"residents": self.plan.residents, "slots": self.plan.slots, "back": True}

    @property
    def room(self) -> Room:
        """See :class:`Base`."""
        sizes = {block.name: block.nbytes for block in self._demands.blocks}
        moving = [nbytes for name, nbytes in sizes.items() if name not in self.plan.residents]
        placed = sum(sizes[name] for name in self.plan.residents) + self.plan.slots * max(moving, default=0)
        return Room(
            budget=self.budget,
            storage=self._demands.storage,
            placed_bytes=self.demand.rest_bytes + placed,
            kept_bytes=self._asked.optimiser.kept_bytes,
            rank=self._asked.rank,
            widest=self._asked.widest,
        )

    @contextmanager
    def aside(self, placed: PhasePlan | None = None) -> Iterator[None]:
        """See :class:`Base`.

        Raises:
            torch.OutOfMemoryError: or what the backend raises when the memory is not to be had again.
        """
        assert self._managed is not None
        self._managed.exit()
        self._backend.empty_cache()
        try:
            if placed is not None:
                with torch.inference_mode(False):
                    self._managed.enter(residents=placed.residents, slots=placed.slots)
            yield
        finally:
            self._managed.exit()
            self._backend.empty_cache()
            with torch.inference_mode(False):  # the next step records through these weights
                self._managed.enter(**self._phase)

    def hold(self, name: str) -> AbstractContextManager[None]:
        """See :data:`~diffsynth.training.checkpointing.Hold`."""
        assert self._managed is not None
        return self._managed.hold(name)

    def _told_peak(self) -> None:
        peak = self._backend.memory().peak_allocated
        if peak is not None:
            took = peak + self.budget.reserve_bytes
            logger.info("memory: %s VRAM were used at most", readable_bytes(took))

    @property
    def traffic(self) -> Traffic:
        """What moved so far, since the base was set aside last."""
        return Traffic() if self._managed is None else self._managed.traffic

    @property
    def host_bytes(self) -> int:
        """Host memory that blocks and hidden states hold now."""
        held = 0 if self._managed is None else self._managed.host_bytes
        return held + (0 if self.stash is None else self.stash.host_bytes)

    @property
    def summary(self) -> str:
        """What was decided, in one line."""
        found, limit = self.plan, self.budget.vram_bytes
        text = f"memory plan: {readable_bytes(found.peak_vram_bytes)}"
        text += "" if limit is None else f" of {readable_bytes(limit)}"
        text += f" VRAM, {readable_bytes(found.peak_host_bytes)} RAM; "
        text += f"{len(found.residents)} of {found.num_blocks} blocks stay on the device, "
        text += f"{readable_bytes(self.bytes_per_pass)} stream per pass there and back; "
        return text + f"activations wait {'in RAM' if self.stash is not None else 'on the device'}"

    @property
    def bytes_per_pass(self) -> int:
        """To the device in a pass there and back: every streamed block twice, less what a turn keeps."""
        sizes = {block.name: block.nbytes for block in self._demands.blocks}
        moving = [sizes[name] for name in sizes if name not in self.plan.residents]
        slots = self.plan.slots
        return 2 * sum(moving) - sum(moving[:slots]) - sum(moving[len(moving) - slots :]) if moving else 0
