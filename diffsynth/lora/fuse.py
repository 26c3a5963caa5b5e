"""LoRA updates put into weights: products and sums in float32, one rounding at the end.

``W' = W + strength * (alpha / rank) * B A`` (Hu et al., arXiv 2106.09685).  The official code rounds the
scaled ``B``, the product and the sum to bf16 one after another; its two versions differ from the exact
result, and from each other, by up to one bf16 step.  Nothing here undoes a fusion: subtracting loses bits, so
keep the base or apply the LoRA unfused (:class:`diffsynth.lora.apply.LoraStack`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

FP8_DTYPES = frozenset({torch.float8_e4m3fn, torch.float8_e5m2})


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class LoraUpdate:
    """What one file does to one linear layer: ``W += scale * up @ down + weight_diff``, ``b += bias_diff``.

    ``down`` (rank, in) and ``up`` (out, rank) come together or not at all; ``weight_diff`` is (out, in),
    ``bias_diff`` (out,).  Tensors keep the dtype of the file.
    """

    down: Tensor | None = None
    up: Tensor | None = None
    scale: float = 1.0
    """``alpha / rank``; 1 when the file states no alpha."""
    weight_diff: Tensor | None = None
    bias_diff: Tensor | None = None

    @property
    def rank(self) -> int:
        """Rank of the product, 0 without one."""
        return 0 if self.down is None else self.down.shape[0]

    @property
    def nbytes(self) -> int:
        """Stored size of all tensors."""
        tensors = (self.down, self.up, self.weight_diff, self.bias_diff)
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)


WeightedUpdates = Sequence[tuple[LoraUpdate, float]]
"""Updates of one layer with their strengths, in the order in which they were added."""


def add_updates_(weight: Tensor, updates: WeightedUpdates) -> Tensor:
    """Add all updates to a float32 weight in place; the factors are moved to its device.

    For callers that hold a dequantised weight anyway, such as a streamed block on its device.

    Args: weight (out, in), float32.
    Returns: ``weight`` itself.
    """
    if weight.dtype != torch.float32:
        raise ValueError(f"updates are added in float32, the weight is {weight.dtype}")
    for update, strength in updates:
        if update.down is not None and update.up is not None:
            up = update.up.to(weight.device, torch.float32)
            down = update.down.to(weight.device, torch.float32)
            weight.addmm_(up, down, alpha=strength * update.scale)
        if update.weight_diff is not None:
            weight.add_(update.weight_diff.to(weight.device, torch.float32), alpha=strength)
    return weight


def fuse(weight: Tensor, updates: WeightedUpdates, *, dtype: torch.dtype | None = None) -> Tensor:
    """The updated weight; ``weight`` itself is not changed.

    Args:
        weight: (out, in), float32, bf16, fp16, or fp8 without a scale.
        updates: see :data:`WeightedUpdates`.
        dtype: of the result; that of ``weight`` by default.

    Returns: (out, in) on the device of ``weight``.  An fp8 result is clamped to the finite range and rounded
    to nearest; differences under half a step are lost, and fp8 steps are wide: prefer unfused LoRAs there.
    """
    if not weight.is_floating_point():
        raise ValueError(f"a weight of {weight.dtype} has to be dequantised before it is fused")
    total = add_updates_(weight.to(torch.float32, copy=True), updates)
    return _round(total, dtype or weight.dtype)


def dequantise(weight: Tensor, weight_scale: Tensor) -> Tensor:
    """``weight * weight_scale`` as a new float32 tensor (out, in); scales as in :func:`fuse_scaled`."""
    return weight.to(torch.float32, copy=True).mul_(weight_scale.to(torch.float32))


def fuse_scaled(
    weight: Tensor, weight_scale: Tensor, updates: WeightedUpdates, *, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """Update an fp8 weight that counts times a scale, and choose the scale anew.

    Args:
        weight: (out, in), e4m3 or e5m2.
        weight_scale: float32, one number for the whole weight (any shape of one element) or (out, 1), one per
            row.
        updates: see :data:`WeightedUpdates`.
        dtype: fp8 dtype of the result; that of ``weight`` by default.

    Returns: weight (out, in) and scale, shaped like ``weight_scale``: the largest magnitude of the whole
    weight, or of each row, becomes the largest number of the dtype (448 for e4m3).
    """
    dtype = dtype or weight.dtype
    if dtype not in FP8_DTYPES:
        raise ValueError(f"a scaled weight is stored in fp8, not {dtype}")
    if weight_scale.numel() != 1 and weight_scale.shape != (weight.shape[0], 1):
        raise ValueError(f"scale {tuple(weight_scale.shape)} for a weight {tuple(weight.shape)}")
    total = add_updates_(dequantise(weight, weight_scale), updates)
    if weight_scale.numel() == 1:
        largest = total.abs().amax().reshape(weight_scale.shape)
    else:
        largest = total.abs().amax(dim=1, keepdim=True)
    # A weight of zeros has no scale of its own; any number serves, and no host synchronisation is needed.
    factor = torch.where(largest > 0, torch.finfo(dtype).max / largest, torch.ones_like(largest))
    return _round(total.mul_(factor), dtype), factor.reciprocal()


def fuse_bias(bias: Tensor | None, updates: WeightedUpdates) -> Tensor | None:
    """The updated bias (out,) in its own dtype, float32 where there was none; None if there is nothing."""
    total = None if bias is None else bias.to(torch.float32, copy=True)
    for update, strength in updates:
        if update.bias_diff is not None:
            difference = update.bias_diff.to(torch.float32)
            if total is None:
                total = difference * strength
            else:
                total.add_(difference.to(total.device), alpha=strength)
    return total if bias is None or total is None else total.to(bias.dtype)


def _round(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast; fp8 casts of torch do not saturate, so values beyond the range would turn into NaN."""
    if dtype in FP8_DTYPES:
        limit = torch.finfo(dtype).max
        value = value.clamp_(-limit, limit)
    return value.to(dtype)
