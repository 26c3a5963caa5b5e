"""What goes into a forward pass of the transformer, and the state that its blocks work on.

Legend: B batch, T tokens of a stream, S text tokens, D hidden width, H heads.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

from diffsynth.errors import RequestError
from diffsynth.models.ltx2.modulation import Modulation
from diffsynth.models.ltx2.rope import RopeTable


class CrossTimestep(StrEnum):
    """Which timestep drives the modulation of cross-modal attention.

    All three agree when every token of both streams has one common sigma.
    """

    TOKENWISE = "tokenwise"
    """Scale and shift from the stream's own per-token timesteps, gate from the other stream's sigma."""

    CROSS = "cross"
    """Both from the other stream's sigma (ltx-core 1.0.0)."""

    OWN = "own"
    """Both from the stream's own per-token timesteps (first release)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Modality:
    """One stream of a pass.  No tensor of it is ever changed.

    Attributes:
        latent: (B, T, C) patchified noisy tokens; its dtype is the compute dtype.
        sigma: (B,) float32 noise level of the stream, 0..1; a scalar when B = 1.
        timesteps: (B, T, 1) float32 noise level per token, denoise mask times sigma, 0..1; (B, 1, 1) or an
            expanded tensor when the tokens agree (see ``distinct_timesteps``).
        positions: (B or 1, n, T, 2) float32 intervals; video n = 3 (seconds, y pixels, x pixels), audio n = 1
            (seconds).
        context: (B, S, text width) text embedding of the stream.
        context_mask: None, or integer (B, S) or (B, T, S) with 1 keep and 0 pad, or an additive float mask
            that broadcasts to (B, H, T, S); with three axes it is (B, T or 1, S).
        attention_mask: None, or (B, T, T) strengths 0..1 between the tokens of the stream.
        enabled: False keeps the hidden state as it comes; it still feeds the other stream.
    """

    latent: Tensor
    sigma: Tensor
    timesteps: Tensor
    positions: Tensor
    context: Tensor
    context_mask: Tensor | None = None
    attention_mask: Tensor | None = None
    enabled: bool = True


class SkipKind(StrEnum):
    """What a perturbation leaves out."""

    VIDEO_SELF_ATTN = "video_self_attn"
    AUDIO_SELF_ATTN = "audio_self_attn"
    A2V_CROSS_ATTN = "a2v_cross_attn"
    V2A_CROSS_ATTN = "v2a_cross_attn"


@dataclass(frozen=True, slots=True)
class Perturbation:
    """One part left out in some blocks (None: in all).

    A skipped self-attention passes its values on instead of the attention result; a skipped cross-modal
    attention adds nothing.
    """

    type: SkipKind
    blocks: tuple[int, ...] | None = None


Perturbations = tuple[tuple[Perturbation, ...], ...]
"""Per sample of the batch the perturbations of that sample."""


@dataclass(kw_only=True, slots=True)
class Pass:
    """One forward pass, for instance the conditional one of a guided step.

    Passes that share a tensor *object* (positions, timesteps, sigma, context, masks) share what is computed
    from it.
    """

    video: Modality | None
    audio: Modality | None
    perturbations: Perturbations | None = None


class Skips:
    """Answers, per block, which samples of a batch leave a part out."""

    def __init__(self, perturbations: Perturbations | None, batch: int, device: torch.device) -> None:
        if perturbations and len(perturbations) != batch:
            raise RequestError(
                f"perturbations for {len(perturbations)} samples, but the batch has {batch}",
                hint="one tuple per sample; an empty tuple for a plain sample",
            )
        self.perturbations = perturbations or ()
        self._device = device
        self._masks: dict[tuple[bool, ...], Tensor] = {}

    def __iter__(self) -> Iterator[Perturbation]:
        return (item for sample in self.perturbations for item in sample)

    def at(self, kind: SkipKind, block: int) -> Tensor | bool:
        """False: no sample skips; True: all do; otherwise bool (B,), True where skipped."""
        flags = tuple(
            any(p.type is kind and (p.blocks is None or block in p.blocks) for p in sample)
            for sample in self.perturbations
        )
        if not any(flags):
            return False
        if all(flags):
            return True
        if flags not in self._masks:  # one small copy to the device per pattern, not per block
            self._masks[flags] = torch.tensor(flags, device=self._device)
        return self._masks[flags]


@dataclass(kw_only=True, slots=True)
class StreamState:
    """A stream on its way through the blocks.  ``hidden`` changes, the rest is constant and may be shared.

    Attributes:
        hidden: (B, T, D), owned by the state and updated in place when no gradient is recorded.
        modulation: 6 or 9 rows of D, by per-token timestep.
        embedded: the timestep embedding as 2 equal rows, for the output head.
        prompt: 2 rows for the text context (LTX-2.3), by sigma; None in LTX-2.
        cross_scale_shift: 4 rows for cross-modal attention; None without the other stream.
        cross_gate: 1 row; None without the other stream.
        context: (B, S, D) projected text.
        context_bias: None or additive, broadcastable to (B, H, T, S).
        attention_bias: None or additive (B, 1, T, T).
        rope: self-attention table.
        cross_rope: cross-modal table; None without the other stream.
    """

    hidden: Tensor
    modulation: Modulation
    embedded: Modulation
    prompt: Modulation | None
    cross_scale_shift: Modulation | None
    cross_gate: Modulation | None
    context: Tensor
    context_bias: Tensor | None
    attention_bias: Tensor | None
    rope: RopeTable
    cross_rope: RopeTable | None
    enabled: bool = True


@dataclass(kw_only=True, slots=True)
class PassState:
    """What a block receives per pass.  ``chunk_tokens``: see ``FeedForward.forward``."""

    video: StreamState | None
    audio: StreamState | None
    skips: Skips
    chunk_tokens: int | None = None


def context_bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Additive mask of the text context.

    Args: mask: integer or bool (B, S) or (B, T, S), 1 keep, 0 pad; or additive float (T, S), (B, T, S) or
        (B, H, T, S), each axis but S may be 1.
    Returns: (B, 1, 1 or T, S), or the four (or two) axes of a float mask; in ``dtype``.
    """
    if mask.is_floating_point():
        # Attention aligns axes from the right: the samples of a mask without heads would count as heads.
        return (mask.unsqueeze(1) if mask.ndim == 3 else mask).to(dtype)
    bias = (mask.to(torch.int64) - 1).to(dtype) * torch.finfo(dtype).max
    return bias.reshape(mask.shape[0], 1, -1, mask.shape[-1])


def attention_bias(strength: Tensor, dtype: torch.dtype) -> Tensor:
    """Additive mask of self-attention: the logarithm of the strength, so that 0.5 halves a weight.

    Args: strength (B, T, T), 0..1.
    Returns: (B, 1, T, T) in ``dtype``; strength <= 0 gives the lowest finite value.
    """
    limits = torch.finfo(dtype)
    # In place after the first step: with many tokens this is the largest tensor of the pass.
    bias = strength.float().clamp(min=limits.tiny).log_().to(dtype)
    return bias.masked_fill_(strength <= 0, limits.min).unsqueeze(1)
