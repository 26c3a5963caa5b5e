"""What a training step holds on the device beside the weights of the base, found without doing it.

Legend: T tokens of a stream, S text tokens, D hidden width, H heads, L blocks.

The graph of one block runs forward and backward on tensors without data; the rest of a step is sums over
shapes.  So the figures follow the targets of the adapter and the kind of conditions by themselves.
"""

from collections.abc import Collection
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from diffsynth.loader.meta import without_weights
from diffsynth.models.ltx2.modulation import Modulation
from diffsynth.models.ltx2.rope import RopeLayout, RopeTable
from diffsynth.models.ltx2.streams import Skips
from diffsynth.models.ltx2.transformer import (
    LTX2Transformer,
    PassState,
    StreamState,
    TransformerConfig,
)
from diffsynth.pipelines.costs.transformer import DenoiseSizes, denoise_cost
from diffsynth.training.adapters import TrainableLora
from diffsynth.training.checkpointing import checkpointed_blocks
from diffsynth.vram.dry_run import peak_bytes, without_data

FLOAT32 = 4
_TOKEN_BYTES = 64
"""Positions on three axes, mask, noise levels and their index."""
_BACKWARD = 3
"""Operations of a step in forward passes: forward, the same again, and the gradient of the inputs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepSizes:
    """What one pass works on.

    Attributes:
        batch: samples.
        video, audio, text: tokens per sample, references included; 0 for a stream that is absent.
        distinct: whether the tokens of a sample have different noise levels.
    """

    batch: int
    video: int
    audio: int
    text: int
    distinct: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimiserSizes:
    """What is trained.

    Attributes:
        values: parameters, float32.
        state_bytes: of the optimiser per parameter.
        mean: whether a running mean is kept.
    """

    values: int
    state_bytes: float = 2 * FLOAT32
    mean: bool = False

    @property
    def kept_bytes(self) -> int:
        """Parameters, gradients, the optimiser's state, the mean."""
        copies = 3 if self.mean else 2
        return int(self.values * (copies * FLOAT32 + self.state_bytes))

    @property
    def step_bytes(self) -> int:
        """What a step of the optimiser makes for a moment: two lists of tensors like the parameters."""
        return 2 * self.values * FLOAT32


def hidden_bytes(config: TransformerConfig, sizes: StepSizes, itemsize: int) -> int:
    """What checkpointing keeps of one block."""
    return sizes.batch * (sizes.video * config.width + sizes.audio * config.audio_width) * itemsize


def block_bytes(
    config: TransformerConfig, sizes: StepSizes, layers: Collection[str], rank: int, dtype: torch.dtype
) -> int:
    """Peak of one block that goes forward, and forward and backward once more, inputs included.

    Args:
        config: of the network.
        sizes: of the pass.
        layers: names, within a block, of those that have an adapter.
        rank: of the adapter.
        dtype: of the computation.
    """
    with without_weights():
        network = LTX2Transformer(replace(config, num_layers=1))
    without_data(network.requires_grad_(False), dtype)
    targets = [f"transformer_blocks.0.{layer}" for layer in layers]

    def run(inputs: list[list[Tensor]]) -> None:
        generator = torch.Generator()
        adapter = (
            TrainableLora(network, targets, rank=rank, alpha=1.0, generator=generator) if targets else None
        )
        state = _state(config, sizes, inputs)
        with checkpointed_blocks(network):
            network.transformer_blocks[0]([state])
        ends = [stream.hidden for stream in (state.video, state.audio) if stream is not None]
        torch.autograd.backward(ends, [torch.empty_like(end) for end in ends])
        del adapter

    return peak_bytes(run, _inputs(config, sizes, dtype), gradients=True)


def step_bytes(
    config: TransformerConfig,
    sizes: StepSizes,
    optimiser: OptimiserSizes,
    block: int,
    itemsize: int,
    *,
    on_host: bool,
) -> int:
    """Peak of a whole step beside the weights of the base.

    Args:
        config: of the network.
        sizes: of its largest pass.
        optimiser: what is trained.
        block: :func:`block_bytes`.
        itemsize: bytes per value of the computation.
        on_host: whether hidden states wait in host memory; those of two blocks are then on their way.
    """
    waiting = min(2, config.num_layers) if on_host else config.num_layers - 1
    activations = (
        block + waiting * hidden_bytes(config, sizes, itemsize) + _given_bytes(config, sizes, itemsize)
    )
    return optimiser.kept_bytes + max(activations, optimiser.step_bytes)


def pass_flops(config: TransformerConfig, sizes: StepSizes) -> float:
    """Operations of one pass there and back, in all its blocks."""
    step = DenoiseSizes(video=sizes.video, audio=sizes.audio, text=sizes.text)
    return _BACKWARD * sizes.batch * denoise_cost(config, step).flops


def _given_bytes(config: TransformerConfig, sizes: StepSizes, itemsize: int) -> int:
    """Latents in the dtype of the computation; targets, velocities and differences in float32; positions,
    noise levels; texts as they come."""
    total = 0
    for tokens, channels in ((sizes.video, config.in_channels), (sizes.audio, config.audio_in_channels)):
        per_token = channels * (itemsize + 4 * FLOAT32) + _TOKEN_BYTES
        total += sizes.batch * (tokens * per_token + sizes.text * config.caption_channels * itemsize)
    return total


def _inputs(config: TransformerConfig, sizes: StepSizes, dtype: torch.dtype) -> list[list[Tensor]]:
    """Per stream that is there the tensors of :func:`_state`, on the meta device."""
    rows = (2 if sizes.distinct else 1) * sizes.batch

    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def stream(tokens: int, width: int, text_width: int) -> list[Tensor]:
        table = (sizes.batch, config.num_attention_heads, tokens)
        half, cross_half = (w // (2 * config.num_attention_heads) for w in (width, config.audio_width))
        return [
            empty(sizes.batch, tokens, width),
            empty(rows, config.modulation_rows, width),
            empty(sizes.batch, 2, width),
            empty(rows, 4, width),
            empty(sizes.batch, 1, width),
            empty(sizes.batch, sizes.text, text_width),
            *(empty(*table, half), empty(*table, half), empty(*table, cross_half), empty(*table, cross_half)),
            empty(sizes.batch, tokens, dtype=torch.int64),
        ]

    video = stream(sizes.video, config.width, config.cross_attention_dim)
    audio = stream(sizes.audio, config.audio_width, config.audio_cross_attention_dim)
    return [stream for stream, tokens in ((video, sizes.video), (audio, sizes.audio)) if tokens]


def _state(config: TransformerConfig, sizes: StepSizes, inputs: list[list[Tensor]]) -> PassState:
    """What a block in the middle of the network is given."""
    layout, both = RopeLayout(config.rope_type), len(inputs) > 1

    def stream(tensors: list[Tensor]) -> StreamState:
        hidden, rows, prompt, cross, gate, context, cos, sin, cross_cos, cross_sin, index = tensors
        where = index if sizes.distinct else None
        return StreamState(
            hidden=hidden.requires_grad_(),
            modulation=Modulation(rows, where),
            embedded=Modulation(rows, where),
            prompt=Modulation(prompt) if config.cross_attention_adaln else None,
            cross_scale_shift=Modulation(cross, where) if both else None,
            cross_gate=Modulation(gate) if both else None,
            context=context,
            context_bias=None,
            attention_bias=None,
            rope=RopeTable(cos, sin, layout),
            cross_rope=RopeTable(cross_cos, cross_sin, layout) if both else None,
        )

    remaining = [stream(tensors) for tensors in inputs]
    video = remaining.pop(0) if sizes.video else None
    audio = remaining.pop(0) if remaining else None
    return PassState(video=video, audio=audio, skips=Skips(None, sizes.batch, torch.device("cpu")))
