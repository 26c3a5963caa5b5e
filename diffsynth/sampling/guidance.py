"""Guidance: how several estimates of x0 become one.  All inputs are x0 predictions before the mask blend."""

from collections.abc import Mapping
from enum import StrEnum
from typing import TypeVar

import torch
from torch import Tensor

from diffsynth.request import GuidanceParams

__all__ = [
    "GuidanceParams",
    "PassKind",
    "StatefulApg",
    "apg_delta",
    "at_sigma",
    "cfg_delta",
    "cfg_star_delta",
    "combine",
    "guidance_passes",
    "skips_step",
    "stg_delta",
]

ValueT = TypeVar("ValueT")


class PassKind(StrEnum):
    """One run of the network over video and audio together, in the order in which they run."""

    COND = "cond"
    """Positive contexts."""
    UNCOND = "uncond"
    """Negative contexts; a modality without a negative context uses the positive one."""
    PERTURBED = "perturbed"
    """Positive contexts; self-attention of the modalities with ``stg_scale != 0`` skipped in their blocks."""
    ISOLATED = "isolated"
    """Positive contexts; no audio-video cross attention in any block."""


_NEUTRAL = GuidanceParams()


def guidance_passes(video: GuidanceParams | None, audio: GuidanceParams | None) -> tuple[PassKind, ...]:
    """The passes that one step needs, in order: one is needed as soon as either modality asks for it.

    Args:
        video, audio: None for a modality without guidance.
    """
    both = [params or _NEUTRAL for params in (video, audio)]
    passes = [PassKind.COND]
    if any(p.cfg_scale != 1 for p in both):
        passes.append(PassKind.UNCOND)
    if any(p.stg_scale != 0 for p in both):
        passes.append(PassKind.PERTURBED)
    if any(p.modality_scale != 1 for p in both):
        passes.append(PassKind.ISOLATED)
    return tuple(passes)


def combine(params: GuidanceParams | None, predictions: Mapping[PassKind, Tensor]) -> Tensor:
    """Guided x0 of one modality.

    ``cond + (cfg - 1)(cond - uncond) + stg (cond - perturbed) + (modality - 1)(cond - isolated)``, then
    scaled by ``rescale * std(cond) / std(pred) + 1 - rescale``.  The deviation runs over the whole tensor,
    appended conditioning tokens included.  ``cfg_kind`` replaces the first term by :func:`cfg_star_delta` or
    :func:`apg_delta`.  Computed in float32.

    Args:
        predictions: (B, T, C) per pass; those with a zero coefficient may be missing.

    Returns:
        (B, T, C) in the dtype of the conditional prediction.
    """
    params = params or _NEUTRAL
    terms = (
        (PassKind.UNCOND, params.cfg_scale - 1),
        (PassKind.PERTURBED, params.stg_scale),
        (PassKind.ISOLATED, params.modality_scale - 1),
    )
    given = predictions[PassKind.COND]
    cond = given.float()
    guided = cond
    for kind, scale in terms:
        if scale == 0:
            continue
        other = predictions[kind].float()
        if kind is PassKind.UNCOND and params.cfg_kind != "cfg":
            guided = guided + _projected_delta(params, cond, other)
        else:
            guided = guided + scale * (cond - other)
    if params.rescale_scale != 0:
        factor = cond.std() / guided.std()
        guided = guided * (params.rescale_scale * factor + (1 - params.rescale_scale))
    return guided.to(given.dtype)


def _projected_delta(params: GuidanceParams, cond: Tensor, uncond: Tensor) -> Tensor:
    if params.cfg_kind == "cfg_star":
        return cfg_star_delta(cond, uncond, params.cfg_scale)
    return apg_delta(
        cond, uncond, params.cfg_scale, eta=params.apg_eta, norm_threshold=params.apg_norm_threshold
    )


def skips_step(step: int, skip_step: int) -> bool:
    """Whether a modality sits this step out: it is denoised only where ``step % (skip_step + 1) == 0``."""
    return step % (skip_step + 1) != 0


def at_sigma(table: Mapping[float, ValueT], sigma: float) -> ValueT:
    """Entry of a table by noise level: the smallest key >= sigma holds; above all keys, the largest.

    Raises:
        ValueError: the table is empty.
    """
    if not table:
        raise ValueError("a table by sigma needs at least one entry")
    return table[min((key for key in table if key >= sigma), default=max(table))]


def cfg_delta(cond: Tensor, uncond: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance (Ho and Salimans 2022), to be added to ``cond``; zero at scale 1."""
    return (scale - 1) * (cond - uncond)


def cfg_star_delta(cond: Tensor, uncond: Tensor, scale: float) -> Tensor:
    """CFG with the unconditional part projected onto ``cond`` per batch item (CFG-Zero*, Fan et al. 2025)."""
    return (scale - 1) * (cond - _projection(cond, uncond) * uncond)


def stg_delta(cond: Tensor, perturbed: Tensor, scale: float) -> Tensor:
    """Spatio-temporal skip guidance (Hyung et al. 2024), to be added to ``cond``; zero at scale 0."""
    return scale * (cond - perturbed)


def apg_delta(
    cond: Tensor, uncond: Tensor, scale: float, *, eta: float = 1.0, norm_threshold: float = 0.0
) -> Tensor:
    """Adaptive projected guidance (Sadat et al. 2024), to be added to ``cond``; zero at scale 1.

    Args:
        eta: weight of the part of the guidance that is parallel to ``cond``.
        norm_threshold: cap on the L2 norm over the last three axes; 0 is no cap.
    """
    return _apg(cond, cond - uncond, eta, norm_threshold) * (scale - 1)


class StatefulApg:
    """APG with momentum over the steps, the older form: scaled by ``scale`` and off at scale 0."""

    def __init__(
        self, scale: float, *, eta: float = 1.0, norm_threshold: float = 5.0, momentum: float = 0.0
    ) -> None:
        self.scale = scale
        self.eta = eta
        self.norm_threshold = norm_threshold
        self.momentum = momentum
        self._average: Tensor | None = None

    def delta(self, cond: Tensor, uncond: Tensor) -> Tensor:
        """What to add to ``cond`` in this step; call it once per step, in order."""
        guidance = cond - uncond
        if self.momentum != 0:
            if self._average is not None:
                guidance = self.momentum * self._average + guidance
            self._average = guidance
        return _apg(cond, guidance, self.eta, self.norm_threshold) * self.scale


def _apg(cond: Tensor, guidance: Tensor, eta: float, norm_threshold: float) -> Tensor:
    if norm_threshold > 0:
        norm = torch.linalg.vector_norm(guidance, dim=(-3, -2, -1), keepdim=True)
        guidance = guidance * (norm_threshold / norm).clamp(max=1)
    parallel = _projection(guidance, cond) * cond
    return eta * parallel + (guidance - parallel)


def _projection(x: Tensor, onto: Tensor) -> Tensor:
    """``<x, onto> / <onto, onto>`` per batch item, over all other axes; shape (B, 1, ...)."""
    axes = tuple(range(1, x.ndim))
    return (x * onto).sum(axes, keepdim=True) / ((onto * onto).sum(axes, keepdim=True) + 1e-8)
