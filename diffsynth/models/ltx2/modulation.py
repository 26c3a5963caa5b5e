"""Timestep embedding, AdaLN-single, and modulation kept once per distinct timestep.

Legend: B batch, T tokens, N distinct timesteps, K rows of a modulation, D hidden width.
Source: official ltx-core 1.0.0; AdaLN-single after PixArt-alpha (arXiv 2310.00426).

With per-token timesteps the plain form of a modulation is (B, T, K*D): nine times the hidden state of
LTX-2.3.  Tokens share few distinct values (1 for text-to-video, 2 for image-to-video), so the networks run
once per distinct value and one row at a time is gathered where it is used.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

SINUSOID_WIDTH = 256


def sinusoid(timesteps: Tensor, width: int = SINUSOID_WIDTH) -> Tensor:
    """``[cos(s*w_0) ..., sin(s*w_0) ...]`` with ``w_i = 10000^(-i/(width/2))``.

    Args: timesteps (N,) float32, already scaled to 0..1000.  Returns: (N, width) float32.
    """
    half = width // 2
    exponents = torch.arange(half, dtype=torch.float32, device=timesteps.device) * -math.log(10000.0) / half
    angles = timesteps.float()[:, None] * exponents.exp()[None, :]
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class TimestepEmbedder(nn.Module):
    """``linear_2(silu(linear_1(sinusoid)))``."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(SINUSOID_WIDTH, dim)
        self.linear_2 = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Args: x (N, 256) sinusoid in the compute dtype.  Returns: (N, D)."""
        return self.linear_2(functional.silu(self.linear_1(x)))


class _Embedding(nn.Module):
    """Holds the embedder under the checkpoint's name ``emb.timestep_embedder``."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.timestep_embedder = TimestepEmbedder(dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.timestep_embedder(x)


class AdaLNSingle(nn.Module):
    """Maps scaled timesteps to K rows of modulation and to the embedding that the output head uses."""

    def __init__(self, dim: int, rows: int) -> None:
        super().__init__()
        self.rows = rows
        self.emb = _Embedding(dim)
        self.linear = nn.Linear(dim, rows * dim)

    def forward(self, timesteps: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Run once per distinct timestep.

        Args: timesteps (N,) float32, 0..1000 (float32 until after the sinusoid: in bf16 the highest values
            would be off by 2); dtype: of the computation, the dtype of the latent tokens.
        Returns: modulation (N, K, D) and embedding (N, D), in ``dtype``.
        """
        embedded = self.emb(sinusoid(timesteps).to(dtype))
        modulation = self.linear(functional.silu(embedded))
        return modulation.view(modulation.shape[0], self.rows, -1), embedded


@dataclass(frozen=True, slots=True)
class DistinctTimesteps:
    """The different timesteps of a stream and where each is used.

    ``values`` (N,) float32.  ``index`` (B, T) int64 into ``values``; None when the tokens of a sample all
    agree, then N is B, or 1 for the whole batch.
    """

    values: Tensor
    index: Tensor | None = None


def distinct_timesteps(timesteps: Tensor) -> DistinctTimesteps:
    """Find the distinct values of per-token timesteps.

    On an accelerator ``torch.unique`` waits for the device once, because the size of its result is data.  A
    caller with one value per sample avoids the wait by passing it as (B, 1, 1), or expanded to (B, T, 1): an
    expanded tensor shows by its strides that it holds one value per sample.

    Args: timesteps (B, T, 1) or (B, T), 0..1.  No gradient flows into them.
    """
    timesteps_BT = (timesteps[..., 0] if timesteps.ndim == 3 else timesteps).detach().float()
    if timesteps_BT.shape[1] == 1 or timesteps_BT.stride(1) == 0:
        values = timesteps_BT[:, 0]
        same = values.shape[0] == 1 or values.stride(0) == 0
        return DistinctTimesteps(values[:1] if same else values)
    values, index = torch.unique(timesteps_BT, return_inverse=True)
    return DistinctTimesteps(values, index if values.shape[0] > 1 else None)


@dataclass(frozen=True, slots=True)
class Modulation:
    """K rows of D per distinct timestep: ``values`` (N, K, D), ``index`` as in :class:`DistinctTimesteps`."""

    values: Tensor
    index: Tensor | None = None

    def row(self, number: int, table_row: Tensor, *, one_plus: bool = False) -> Tensor:
        """Row ``number`` plus its learned offset, for all tokens.

        Args: table_row (D,), any float dtype: cast to the dtype of the modulation, or a table that stayed
            float32 would turn the hidden state into float32; one_plus: add 1, as a scale needs.
        Returns: (B, T, D) when tokens differ, otherwise (B or 1, 1, D).
        """
        row_ND = self.values[:, number] + table_row.to(self.values.dtype)
        if one_plus:
            row_ND = row_ND + 1.0
        if self.index is None:
            return row_ND.unsqueeze(1)
        return functional.embedding(self.index, row_ND)

    def expand(self) -> Tensor:
        """The plain form (B or 1, T or 1, K*D), for comparisons: it is the tensor that this class avoids."""
        flat = self.values.flatten(1)
        return flat.unsqueeze(1) if self.index is None else functional.embedding(self.index, flat)


def modulate(x: Tensor, scale_plus_one: Tensor, shift: Tensor) -> Tensor:
    """``x * (1 + scale) + shift`` in one pass; ``x`` (B, T, D) is not changed."""
    return torch.addcmul(shift, x, scale_plus_one)


def add_residual(x: Tensor, update: Tensor, gate: Tensor | None = None) -> Tensor:
    """``x + update * gate``.  Without grad ``x`` itself is updated: the hidden state exists once per pass."""
    if torch.is_grad_enabled():
        return x + update if gate is None else torch.addcmul(x, update, gate)
    return x.add_(update) if gate is None else x.addcmul_(update, gate)
