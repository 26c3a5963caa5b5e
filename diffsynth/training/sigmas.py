"""Which noise levels are trained.

Source: Esser et al., Scaling Rectified Flow Transformers (arXiv 2403.03206) for the logit-normal density;
shift by length, stretch, reflection and uniform share from the official LTX-2 trainer.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from diffsynth.errors import RequestError

# The shift is a line through two lengths, not clamped beyond them.
_TOKENS_LOW, _SHIFT_LOW = 1024, 0.95
_TOKENS_HIGH, _SHIFT_HIGH = 4096, 2.05
# Quantiles 0.5 % and 99.9 % of the standard normal: they become 0 and 1.
_LOW_Z, _HIGH_Z = -2.5758, 3.0902

SigmaSampler = Callable[[int, int, torch.Generator], Tensor]
"""(batch, tokens of the modality, generator on the CPU) -> (batch,) float32 noise levels in [0, 1]."""


def length_shift(num_tokens: int) -> float:
    """Mean of the logits: longer sequences need more noise; 0.95 for 1024 tokens, 2.05 for 4096."""
    slope = (_SHIFT_HIGH - _SHIFT_LOW) / (_TOKENS_HIGH - _TOKENS_LOW)
    return _SHIFT_LOW + (num_tokens - _TOKENS_LOW) * slope


def stretched_sigmoid(normals: Tensor, num_tokens: int, *, eps: float = 1e-3, std: float = 1.0) -> Tensor:
    """Normal draws as noise levels that reach both ends of [0, 1].

    The sigmoid of the shifted draw is stretched so that its 0.5 and 99.9 percentiles become 0 and 1; what
    falls below ``eps`` is reflected there, which sends one draw in 200 far back up, and the result is
    clamped.

    Args:
        normals: any shape, float32.
        num_tokens: tokens of this modality, whatever the other has.
        eps: in [0, 1).
        std: spread of the logits, above 0.
    """
    shift = length_shift(num_tokens)
    low, high = torch.sigmoid(torch.tensor([shift + _LOW_Z * std, shift + _HIGH_Z * std])).unbind()
    stretched = (torch.sigmoid(normals * std + shift) - low) / (high - low)
    return torch.where(stretched < eps, 2 * eps - stretched, stretched).clamp(0, 1)


def shifted_logit_normal(
    batch: int,
    num_tokens: int,
    generator: torch.Generator,
    *,
    std: float = 1.0,
    eps: float = 1e-3,
    uniform_share: float = 0.1,
) -> Tensor:
    """Noise levels by :func:`stretched_sigmoid`; a share of them uniform in [eps, 1] instead.

    All normals are drawn first, then all uniforms, then which of them count: (batch,) float32 each.
    """
    levels = stretched_sigmoid(torch.randn(batch, generator=generator), num_tokens, eps=eps, std=std)
    uniform = eps + (1 - eps) * torch.rand(batch, generator=generator)
    return torch.where(torch.rand(batch, generator=generator) < uniform_share, uniform, levels)


def uniform(
    batch: int, num_tokens: int, generator: torch.Generator, *, low: float = 0.0, high: float = 1.0
) -> Tensor:
    """Noise levels uniform in [low, high], whatever the length; (batch,) float32."""
    return low + (high - low) * torch.rand(batch, generator=generator)


@dataclass(frozen=True, kw_only=True, slots=True)
class SigmaConfig:
    """How noise levels are drawn.

    Attributes:
        sampler: ``shifted_logit_normal`` or ``uniform``.
        std, eps, uniform_share: of the first.
        low, high: of the second.
        shared: one level per sample for video and audio, drawn for the length of the video; otherwise each
            has its own.
    """

    sampler: str = "shifted_logit_normal"
    std: float = 1.0
    eps: float = 1e-3
    uniform_share: float = 0.1
    low: float = 0.0
    high: float = 1.0
    shared: bool = False

    def make(self) -> SigmaSampler:
        """The function that draws.

        Raises:
            RequestError: an unknown sampler or a number out of its range.
        """
        if not (self.std > 0 and 0 <= self.eps < 1 and 0 <= self.uniform_share <= 1):
            raise RequestError(
                f"std={self.std}, eps={self.eps}, uniform_share={self.uniform_share} is no distribution",
                hint="std above 0, eps from 0 to below 1, uniform_share from 0 to 1",
            )
        if not 0 <= self.low < self.high <= 1:
            raise RequestError(f"low={self.low}, high={self.high}", hint="0 <= low < high <= 1")
        if self.sampler == "shifted_logit_normal":
            share = self.uniform_share
            return partial(shifted_logit_normal, std=self.std, eps=self.eps, uniform_share=share)
        if self.sampler == "uniform":
            return partial(uniform, low=self.low, high=self.high)
        raise RequestError(f"sampler={self.sampler!r} is not known", hint="shifted_logit_normal, uniform")
