"""Rotary position embedding with fractional positions on one or more axes.

Legend: B batch, T tokens, n axes, W rotary width, N = W // (2n) frequencies, H heads, d = W/H head size.
Source: official ltx-core 1.0.0; Su et al., RoFormer (arXiv 2104.09864).

Angles reach ``theta * pi/2`` = 15708 rad, where one float32 ulp is about 1e-3: the order of the operations
below is part of the model, and positions must be float32.

Both layouts use one table.  They differ only in which two elements of a head form a pair: ``split`` pairs
element i of the first half with element i of the second, ``interleaved`` pairs neighbours.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor


class RopeLayout(StrEnum):
    """Which elements of a head form a pair; the values are those of the metadata key ``rope_type``."""

    SPLIT = "split"
    INTERLEAVED = "interleaved"


class GridPrecision(StrEnum):
    """Precision of the frequency grid; the values of the metadata key ``frequencies_precision``."""

    FLOAT64 = "float64"
    FLOAT32 = "float32"


@dataclass(frozen=True, slots=True)
class RopeTable:
    """Cosines and sines, each (B or 1, H, T, d/2), float32 or the compute dtype."""

    cos: Tensor
    sin: Tensor
    layout: RopeLayout = RopeLayout.SPLIT


def frequency_grid(
    width: int, axes: int, *, theta: float = 10000.0, precision: GridPrecision = GridPrecision.FLOAT64
) -> Tensor:
    """``theta^(j/(N-1)) * pi/2`` for j = 0..N-1.  Returns: (N,) float32 on the CPU.

    It runs on the CPU because some devices have no float64; N is at most a few thousand.
    """
    dtype = torch.float64 if precision is GridPrecision.FLOAT64 else torch.float32
    exponents = torch.linspace(0.0, 1.0, width // (2 * axes), dtype=dtype, device="cpu")
    return (torch.pow(theta, exponents) * (math.pi / 2)).to(torch.float32)


def interval_fractions(positions: Tensor, max_pos: Sequence[float]) -> Tensor:
    """Midpoints of intervals as fractions of the largest position of each axis.

    Args: positions (B, n, T, 2) float32, ``[start, end)`` of every token; max_pos: one value per axis.
    Returns: (B, T, n) float32, 0..1 inside the trained range.
    """
    midpoints_BnT = (positions[..., 0] + positions[..., 1]) / 2.0
    axes = [midpoints_BnT[:, axis] / limit for axis, limit in enumerate(max_pos)]
    return torch.stack(axes, dim=-1)


def rope_angles(fractions: Tensor, grid: Tensor) -> Tensor:
    """Angles ``grid * (2*fraction - 1)``, flattened frequency-major and axis-minor.

    Args: fractions (B, T, n) float32; grid (N,) float32, on the same device.
    Returns: (B, T, N*n) float32: (g0 of axis 0, g0 of axis 1, ..., g1 of axis 0, ...).
    """
    return (grid[:, None] * (fractions * 2.0 - 1.0)[..., None, :]).flatten(-2)


def rope_table(
    fractions: Tensor,
    *,
    width: int,
    heads: int,
    theta: float = 10000.0,
    precision: GridPrecision = GridPrecision.FLOAT64,
    layout: RopeLayout = RopeLayout.SPLIT,
    dtype: torch.dtype = torch.float32,
) -> RopeTable:
    """The rotation of every token and head.

    Args:
        fractions: (B or 1, T, n) float32, positions as fractions of their maximum; for running indices p of a
            text sequence, n = 1 and the fraction is ``p / max_pos``.
        width: W, the width of the rotated queries over all heads.
        heads: H; head h takes the h-th contiguous slice of the frequency list, so low heads turn slowly.
        theta: ratio of the highest to the lowest frequency.
        precision: of the frequency grid.
        layout: of the pairs.
        dtype: of the table.  The transformer asks for its compute dtype, as the official code does: in bf16
            that halves the largest constant of a forward pass and stays within the rounding of bf16.
    """
    grid = frequency_grid(width, fractions.shape[-1], theta=theta, precision=precision)
    angles = rope_angles(fractions.float(), grid.to(fractions.device))
    missing = width // 2 - angles.shape[-1]  # the width need not divide by the number of axes
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    if missing:
        cos = torch.cat([cos.new_ones(*cos.shape[:-1], missing), cos], dim=-1)
        sin = torch.cat([sin.new_zeros(*sin.shape[:-1], missing), sin], dim=-1)
    return RopeTable(_per_head(cos, heads), _per_head(sin, heads), layout)


def _per_head(table: Tensor, heads: int) -> Tensor:
    """(B, T, W/2) -> (B, H, T, d/2), a view that lies in memory as queries and keys do."""
    return table.view(*table.shape[:-1], heads, -1).transpose(1, 2)


def rotate(x: Tensor, table: RopeTable) -> Tensor:
    """Turn the pairs (u, v) of every head into ``(u cos - v sin, v cos + u sin)``.

    Args: x (B, H, T, d) queries or keys, any float dtype.
    Returns: the same shape, memory layout and dtype; ``x`` is not changed.
    """
    u, v = _pairs(x, table.layout)
    if torch.is_grad_enabled():
        rotated = (
            torch.addcmul(u * table.cos, v, table.sin, value=-1.0),
            torch.addcmul(v * table.cos, u, table.sin),
        )
        out = (
            torch.cat(rotated, -1)
            if table.layout is RopeLayout.SPLIT
            else torch.stack(rotated, -1).flatten(-2)
        )
        return out.to(x.dtype)
    # Written in place into one new tensor: no float32 copy and no temporary of the size of x.
    out = torch.empty_like(x)
    out_u, out_v = _pairs(out, table.layout)
    torch.mul(u, table.cos, out=out_u).addcmul_(v, table.sin, value=-1.0)
    torch.mul(v, table.cos, out=out_v).addcmul_(u, table.sin)
    return out


def _pairs(x: Tensor, layout: RopeLayout) -> tuple[Tensor, Tensor]:
    """Views of the first and the second element of every pair, (..., d/2) each."""
    if layout is RopeLayout.SPLIT:
        u, v = x.chunk(2, dim=-1)
        return u, v
    return x[..., 0::2], x[..., 1::2]
