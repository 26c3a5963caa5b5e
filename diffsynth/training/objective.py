"""The objective: rectified flow on normalised latents.

B batch, T tokens, C channels.  ``x_sigma = (1 - sigma) x0 + sigma n``, target ``v = n - x0``.
Source: Liu et al., Flow Straight and Fast (arXiv 2209.03003); the official LTX-2 trainer.
"""

from torch import Tensor

_SMALLEST_SHARE = 1e-8
"""Stands for the share of generated tokens where nothing is generated."""


def noisy(clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """Clean tokens at their noise levels.

    Args:
        clean, noise: (B, T, C) float32.
        timesteps: noise level of every token, (B, T, 1) or broadcastable, 0..1.  A token at 0 comes out
            with every bit as it was.

    Returns:
        (B, T, C) float32.
    """
    return (1 - timesteps) * clean + timesteps * noise


def velocity(clean: Tensor, noise: Tensor) -> Tensor:
    """What the network is to predict, ``noise - clean``; (B, T, C)."""
    return noise - clean


def masked_loss(predicted: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Squared error of the generated tokens, of every sample for itself.

    ``mean(mask (predicted - target)^2) / max(mean(mask), 1e-8)``: the mean over the generated tokens, so
    that a sample with more given tokens does not count less.

    Args:
        predicted, target: (B, T, C), any float dtype; the error is taken in float32.
        mask: (B, T, 1) float32, 1 = generated, 0 = given.

    Returns:
        (B,) float32; 0 where nothing is generated.
    """
    errors_BT = (predicted.float() - target.float()).square().mean(dim=-1)
    mask_BT = mask.squeeze(-1)
    return (mask_BT * errors_BT).mean(dim=1) / mask_BT.mean(dim=1).clamp(min=_SMALLEST_SHARE)
