"""From the passes of a step to the states that the blocks work on.

Legend: B batch, T tokens of a stream, N distinct timesteps, D hidden width.
Source: official ltx-core 1.0.0 and the official monorepo 1.2.0 (cross-modal timesteps).
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from diffsynth.errors import RequestError
from diffsynth.models.ltx2.modulation import (
    AdaLNSingle,
    Modulation,
    distinct_timesteps,
)
from diffsynth.models.ltx2.rope import (
    GridPrecision,
    RopeLayout,
    RopeTable,
    interval_fractions,
    rope_table,
)
from diffsynth.models.ltx2.streams import (
    CrossTimestep,
    Modality,
    Pass,
    PassState,
    Skips,
    StreamState,
    attention_bias,
    context_bias,
)
from diffsynth.models.ltx2.transformer_config import TransformerConfig

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamNetworks:
    """The modules of one stream outside the blocks (None where the variant has none), and its sizes."""

    width: int
    max_pos: tuple[int, ...]
    patchify: nn.Module
    adaln: AdaLNSingle
    prompt_adaln: AdaLNSingle | None
    text: nn.Module | None
    cross_scale_shift: AdaLNSingle | None
    cross_gate: AdaLNSingle | None


class Preparation:
    """Makes the states of one call; what passes share by tensor identity is computed once.

    It must not outlive the call: identity is only meaningful while the passes hold their tensors.
    """

    def __init__(
        self,
        config: TransformerConfig,
        video: StreamNetworks,
        audio: StreamNetworks | None,
        cross_timestep: CrossTimestep,
        chunk_tokens: int | None,
    ) -> None:
        self.config = config
        self.video = video
        self.audio = audio
        self.cross_timestep = cross_timestep
        self.chunk_tokens = chunk_tokens
        self._made: dict[Hashable, Any] = {}

    def state(self, item: Pass) -> PassState:
        """The state of one pass before the first block.

        Raises: RequestError, see ``LTX2Transformer.forward_passes``.
        """
        video, audio = _present(item.video), _present(item.audio)
        if audio is not None and self.audio is None:
            raise RequestError("audio tokens for a network without audio", hint="pass audio=None")
        first = video or audio
        if first is None:
            return PassState(video=None, audio=None, skips=Skips(None, 0, torch.device("cpu")))
        skips = Skips(item.perturbations, first.latent.shape[0], first.latent.device)
        for blocks in (p.blocks for p in skips if p.blocks is not None):
            if not all(0 <= block < self.config.num_layers for block in blocks):
                raise RequestError(
                    f"perturbation of blocks {list(blocks)}, but the network has {self.config.num_layers}",
                    hint=f"block numbers 0 to {self.config.num_layers - 1}",
                )
        return PassState(
            video=None if video is None else self._stream(video, audio, self.video),
            audio=None if audio is None or self.audio is None else self._stream(audio, video, self.audio),
            skips=skips,
            chunk_tokens=self.chunk_tokens,
        )

    def _stream(self, own: Modality, other: Modality | None, networks: StreamNetworks) -> StreamState:
        modulation, embedded = self._by_token(networks.adaln, own)
        cross_scale_shift, cross_gate = self._cross_modulation(own, other, networks)
        prompt = networks.prompt_adaln
        return StreamState(
            hidden=networks.patchify(own.latent),
            modulation=modulation,
            embedded=embedded,
            prompt=None if prompt is None else self._by_sample(prompt, own.sigma, own.latent.dtype),
            cross_scale_shift=cross_scale_shift,
            cross_gate=cross_gate,
            context=self._context(own, networks.text),
            context_bias=self._bias(own.context_mask, context_bias, own.latent.dtype),
            attention_bias=self._bias(own.attention_mask, attention_bias, own.latent.dtype),
            rope=self._rope(own, networks.width, networks.max_pos),
            cross_rope=None if other is None else self._cross_rope(own),
            enabled=own.enabled,
        )

    def _cross_modulation(
        self, own: Modality, other: Modality | None, networks: StreamNetworks
    ) -> tuple[Modulation | None, Modulation | None]:
        """Scale and shift rows, and the gate row, by the rule of :class:`CrossTimestep`."""
        scale_shift, gate = networks.cross_scale_shift, networks.cross_gate
        if other is None or scale_shift is None or gate is None:
            return None, None
        dtype = own.latent.dtype
        factor = self.config.av_ca_timestep_scale_multiplier / self.config.timestep_scale_multiplier
        if self.cross_timestep is CrossTimestep.OWN:
            return self._by_token(scale_shift, own)[0], self._by_token(gate, own, factor)[0]
        gates = self._by_sample(gate, other.sigma, dtype, factor)
        if self.cross_timestep is CrossTimestep.CROSS:
            return self._by_sample(scale_shift, other.sigma, dtype), gates
        return self._by_token(scale_shift, own)[0], gates

    def _by_token(
        self, network: AdaLNSingle, stream: Modality, factor: float = 1.0
    ) -> tuple[Modulation, Modulation]:
        """Modulation and embedding (as two equal rows) by the per-token timesteps of a stream."""
        timesteps, dtype = stream.timesteps, stream.latent.dtype
        distinct = self._once(("distinct", id(timesteps)), lambda: distinct_timesteps(timesteps))

        def make() -> tuple[Modulation, Modulation]:
            rows, embedded = network(self._scaled(distinct.values, factor), dtype)
            twice = embedded[:, None].expand(-1, 2, -1)
            return Modulation(rows, distinct.index), Modulation(twice, distinct.index)

        return self._once((id(network), id(timesteps), factor, dtype), make)

    def _by_sample(
        self, network: AdaLNSingle, sigma: Tensor, dtype: torch.dtype, factor: float = 1.0
    ) -> Modulation:
        """Modulation by the sigma of every sample, the same for all tokens."""

        def make() -> Modulation:
            rows, _ = network(self._scaled(sigma.detach().reshape(-1).float(), factor), dtype)
            return Modulation(rows)

        return self._once((id(network), id(sigma), factor, dtype), make)

    def _scaled(self, values: Tensor, factor: float) -> Tensor:
        return values * self.config.timestep_scale_multiplier * factor

    def _context(self, stream: Modality, network: nn.Module | None) -> Tensor:
        context, dtype = stream.context, stream.latent.dtype
        if network is None:
            return context.to(dtype)
        return self._once((id(network), id(context), dtype), lambda: network(context.to(dtype)))

    def _bias(
        self, mask: Tensor | None, make: Callable[[Tensor, torch.dtype], Tensor], dtype: torch.dtype
    ) -> Tensor | None:
        return None if mask is None else self._once((make, id(mask), dtype), lambda: make(mask, dtype))

    def _cross_rope(self, stream: Modality) -> RopeTable:
        """Time only, in the head geometry of audio, with one maximum for both streams."""
        config = self.config
        latest = max(config.positional_embedding_max_pos[0], config.audio_positional_embedding_max_pos[0])
        return self._rope(stream, config.audio_cross_attention_dim, (latest,))

    def _rope(self, stream: Modality, width: int, max_pos: tuple[int, ...]) -> RopeTable:
        """The table of the first ``len(max_pos)`` axes of the positions of a stream."""
        config, positions, dtype = self.config, stream.positions, stream.latent.dtype

        def make() -> RopeTable:
            return rope_table(
                interval_fractions(positions.float(), max_pos),
                width=width,
                heads=config.num_attention_heads,
                theta=config.positional_embedding_theta,
                precision=GridPrecision(config.frequencies_precision),
                layout=RopeLayout(config.rope_type),
                dtype=dtype,
            )

        return self._once(("rope", id(positions), width, max_pos, dtype), make)

    def _once(self, key: Hashable, make: Callable[[], T]) -> T:
        if key not in self._made:
            self._made[key] = make()
        made: T = self._made[key]
        return made


def _present(stream: Modality | None) -> Modality | None:
    """A stream without tokens counts as missing."""
    return None if stream is None or stream.latent.shape[1] == 0 else stream
