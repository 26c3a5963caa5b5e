"""What a training run asks of the memory manager: the largest pass, and what lies beside the weights."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod

from diffsynth.models.ltx2.transformer import LTX2Transformer
from diffsynth.pipelines.parts import Parts
from diffsynth.pipelines.sizes import model_sizes
from diffsynth.pipelines.storage import Storage
from diffsynth.training.adapters import chosen_layers
from diffsynth.training.config import ADAMW_8BIT, DEVICE, HOST, LoraSection, TrainConfig
from diffsynth.training.costs import (
    OptimiserSizes,
    StepSizes,
    block_bytes,
    hidden_bytes,
    pass_flops,
    step_bytes,
)
from diffsynth.training.optimiser import STATE_BYTES
from diffsynth.training.samples import Sample, SampleEntry
from diffsynth.training.strategy import Role
from diffsynth.vram.planner import Block, Choice, PhaseDemand

PART = "dit"
WORKSPACE = 0.15
"""Share of the activations that matrix products and the allocator take besides."""
ON_HOST = "activations_on_host"
_BLOCK = "transformer_blocks."


@dataclass(frozen=True, kw_only=True, slots=True)
class StepDemand:
    """What one training run asks of the device beside the base.

    Attributes:
        passes: of different sizes.
        optimiser: what is trained.
        rank, targets: of the adapter.
        widest: output of the layers that it is on.
        steps: passes there and back of the run.
    """

    passes: tuple[StepSizes, ...]
    optimiser: OptimiserSizes
    rank: int
    targets: tuple[str, ...]
    widest: int
    steps: int

    @classmethod
    def of(
        cls,
        network: LTX2Transformer,
        lora: LoraSection,
        passes: Sequence[StepSizes],
        *,
        steps: int,
        state_bytes: float,
        mean: bool,
    ) -> "StepDemand":
        """
        Args:
            network: may lie on the meta device.
            lora: the adapter.
            passes: sizes.
            steps: of the run.
            state_bytes: of the optimiser per parameter.
            mean: whether a running mean is kept.

        Raises:
            RequestError: a target that no layer answers to.
        """
        layers = chosen_layers(network, lora.targets)
        values = sum(lora.rank * (layer.in_features + layer.out_features) for layer in layers.values())
        optimiser = OptimiserSizes(values=values, state_bytes=state_bytes, mean=mean)
        inside = dict.fromkeys(name.split(".", 2)[2] for name in layers if name.startswith(_BLOCK))
        return cls(
            passes=tuple(dict.fromkeys(passes)),
            optimiser=optimiser,
            rank=lora.rank,
            targets=tuple(inside),
            widest=max(layer.out_features for layer in layers.values()),
            steps=steps,
        )


def pass_sizes(config: TrainConfig, entries: Sequence[SampleEntry]) -> list[StepSizes]:
    """The passes of a run; those that are not larger than another in anything are left out.

    Raises:
        CheckpointError: a sample cannot be read.
    """
    strategy = config.strategy
    text = Sample.load(config.data.folder / entries[0].file).context.video.shape[1]
    references = strategy.reference_probability or strategy.audio_reference_probability
    distinct = bool(strategy.conditions or references)
    found = set[StepSizes]()
    for entry in entries:
        video = prod(entry.video_shape[1:]) if entry.video_shape and strategy.video != Role.NONE else 0
        if video and strategy.reference_probability and entry.reference_shape:
            video += prod(entry.reference_shape[1:])
        audio = entry.audio_shape[1] if entry.audio_shape and strategy.audio != Role.NONE else 0
        if audio and strategy.audio_reference_probability and entry.audio_reference_shape:
            audio += entry.audio_reference_shape[1]
        batch = config.training.batch_size
        found.add(StepSizes(batch=batch, video=video, audio=audio, text=text, distinct=distinct))
    return [s for s in found if not any(s != o and s.video <= o.video and s.audio <= o.audio for o in found)]


class Demands:
    """From a :class:`StepDemand` to what the planner wants to know, and to smaller ones."""

    def __init__(self, parts: Parts, storage: Storage, activations: str | None) -> None:
        assert parts.dit is not None
        self.storage = storage
        self._parts = parts
        self._activations = activations
        self._config = parts.dit.config
        self._sizes = model_sizes(parts, storage).parts[PART]
        self._blocks: dict[tuple[StepSizes, int], int] = {}
        self.blocks = tuple(Block(block.name, block.nbytes) for block in self._sizes.blocks)

    def of(self, demand: StepDemand) -> PhaseDemand:
        """One phase of as many traversals as the run has."""
        places = {None: (False, True), DEVICE: (False,), HOST: (True,)}[self._activations]
        return PhaseDemand(
            name="training",
            part=PART,
            choices=tuple(self._choice(demand, on_host) for on_host in places),
            blocks=self.blocks,
            rest_bytes=self._sizes.rest_bytes,
            scratch_bytes=self._sizes.scratch_bytes,
            traversals=2 * demand.steps,
            activation_cause=_words(demand),
            weight_cause="the storage format of the base",
        )

    def _choice(self, demand: StepDemand, on_host: bool) -> Choice:
        config, dtype = self._config, self._parts.dtype
        peak, kept, flops = 0, 0, 0.0
        for sizes in demand.passes:
            key = sizes, demand.rank
            if key not in self._blocks:
                self._blocks[key] = block_bytes(config, sizes, demand.targets, demand.rank, dtype)
            block = self._blocks[key]
            step = step_bytes(config, sizes, demand.optimiser, block, dtype.itemsize, on_host=on_host)
            peak = max(peak, step)
            kept = max(kept, config.num_layers * hidden_bytes(config, sizes, dtype.itemsize))
            flops = max(flops, pass_flops(config, sizes))
        return Choice(
            activation_bytes=peak,
            workspace_bytes=int(WORKSPACE * (peak - demand.optimiser.kept_bytes)),
            flops=flops / 2,
            settings={ON_HOST: int(on_host)},
            host_bytes=kept if on_host else 0,
        )

    def smaller(self, demand: StepDemand) -> Iterator[tuple[str, Sequence[PhaseDemand]]]:
        """Nearer ones first: fewer bits, a lower rank, one sample at a time, fewer tokens."""
        four = Storage.named("int4")
        if four != self.storage:
            yield 'storage = "int4"', [Demands(self._parts, four, self._activations).of(demand)]
        if self._activations == DEVICE:
            yield 'activations = "host"', [Demands(self._parts, self.storage, HOST).of(demand)]
        eight_bits = STATE_BYTES[ADAMW_8BIT]
        if demand.optimiser.state_bytes > eight_bits:
            optimiser = replace(demand.optimiser, state_bytes=eight_bits)
            yield f'optimizer = "{ADAMW_8BIT}"', [self.of(replace(demand, optimiser=optimiser))]
        rank = demand.rank
        while rank > 1:
            rank //= 2
            optimiser = replace(demand.optimiser, values=demand.optimiser.values * rank // demand.rank)
            yield f"rank = {rank}", [self.of(replace(demand, rank=rank, optimiser=optimiser))]
        if any(sizes.batch > 1 for sizes in demand.passes):
            demand = replace(demand, passes=tuple(replace(sizes, batch=1) for sizes in demand.passes))
            yield "batch_size = 1", [self.of(demand)]
        for share in (2, 4, 8):
            passes = tuple(replace(s, video=s.video // share, audio=s.audio // share) for s in demand.passes)
            text = f"samples of 1/{share} of the frames, preprocessed anew"
            yield text, [self.of(replace(demand, passes=passes))]


def _words(demand: StepDemand) -> str:
    sizes = max(demand.passes, key=lambda s: s.batch * (s.video + s.audio))
    return f"{sizes.batch} x ({sizes.video} + {sizes.audio}) tokens with rank={demand.rank}"
