"""Samplers: whole denoising loops over a video and an audio state.

A loop asks ``denoise`` for the guided x0 of both modalities, before the mask blend; progress, preview, cancel
and resume hang on ``on_step``.  Sigmas are Python floats: no loop waits for the device.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeAlias, TypeVar

import torch
from torch import Tensor

from diffsynth.sampling.conventions import MaskedStep
from diffsynth.sampling.noise import RenewedNoise, SdeNoise, StateT
from diffsynth.sampling.steps import (
    ancestral_step,
    blend,
    euler_step,
    res2s_coefficients,
    sde_step,
    velocity_from_x0,
)

T = TypeVar("T")
Pair: TypeAlias = tuple[T | None, T | None]
"""(video, audio); None where the modality is absent."""
Denoise: TypeAlias = Callable[[StateT | None, StateT | None, float, int], Pair[Tensor]]
"""(video, audio, sigma, step index) -> guided x0 of both, before the mask blend.

The states hold what the model must see.  None for a state that is there means "its tokens are their own x0".
The index is 0 in the second evaluation of a res_2s step, where no modality is skipped.
"""

RES_2S_LAST_SIGMA = 0.0011
"""res_2s cannot step to 0: it ends here, and the last estimate is the result."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Carry:
    """What a loop needs besides the latents to go on after a step.  Euler needs nothing."""

    velocities: Pair[Tensor] = (None, None)
    sde: tuple[Tensor, Tensor] | None = None
    renewed: Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Step(Generic[StateT]):
    """A finished step, as the callback sees it.

    ``video`` and ``audio`` are the states after the step; ``video_x0`` and ``audio_x0`` (B, T, C) the clean
    estimates after guidance and mask blend, good for a preview from the first step on.  To resume, pass the
    states, ``start_step=index + 1`` and ``carry`` to the same loop: the result is bit-equal.
    """

    index: int
    total: int
    sigma: float
    sigma_next: float
    video: StateT | None
    audio: StateT | None
    video_x0: Tensor | None
    audio_x0: Tensor | None
    carry: Carry


OnStep: TypeAlias = Callable[[Step[StateT]], None]


def euler(
    denoise: Denoise[StateT],
    video: StateT | None,
    audio: StateT | None,
    sigmas: Sequence[float] | Tensor,
    *,
    masked_step: MaskedStep = MaskedStep.X0_BLEND,
    on_step: OnStep[StateT] | None = None,
    start_step: int = 0,
) -> Pair[StateT]:
    """First-order loop of every pipeline but the HQ one.

    Args:
        sigmas: falling noise levels, usually ending in 0, where the latents become the last x0.
        masked_step: what partial masks do.  With ``VELOCITY`` the model is shown ``x * m + c * (1 - m)`` and
            no blend follows: its x0, made with per-token timesteps, already is the estimate of that rule.
        start_step: number of steps that were done before; the states are those after them.

    Returns:
        (video, audio) after the last step, latents in the dtype in which they came.
    """
    states: Pair[StateT] = (video, audio)
    for step in _steps(_levels(sigmas), start_step):
        x0s = _evaluate(denoise, states, step.sigma, step.index, masked_step)
        states = _each(_euler, states, x0s, step=step)
        _report(on_step, step, states, x0s, Carry())
    return states


def gradient_estimation(
    denoise: Denoise[StateT],
    video: StateT | None,
    audio: StateT | None,
    sigmas: Sequence[float] | Tensor,
    *,
    gamma: float = 2.0,
    on_step: OnStep[StateT] | None = None,
    start_step: int = 0,
    carry: Carry | None = None,
) -> Pair[StateT]:
    """Euler with the velocity extrapolated from the step before (Permenter and Yuan, 2023).

    Args:
        gamma: weight of the change of velocity; 1 is plain Euler.
        carry: that of the last finished step when resuming.
    """
    states: Pair[StateT] = (video, audio)
    before = (carry or Carry()).velocities
    for step in _steps(_levels(sigmas), start_step):
        x0s = _evaluate(denoise, states, step.sigma, step.index)
        if step.sigma_next == 0:
            states = _each(_euler, states, x0s, step=step)
        else:
            velocities = _each(_velocity, states, x0s, sigma=step.sigma)
            steered = _each(_steered_x0, states, x0s, velocities, before, sigma=step.sigma, gamma=gamma)
            states = _each(_euler, states, steered, step=step)
            before = velocities
        _report(on_step, step, states, x0s, Carry(velocities=before))
    return states


def ancestral(
    denoise: Denoise[StateT],
    video: StateT | None,
    audio: StateT | None,
    sigmas: Sequence[float] | Tensor,
    *,
    noise: RenewedNoise,
    eta: float = 1.0,
    on_step: OnStep[StateT] | None = None,
    start_step: int = 0,
    carry: Carry | None = None,
) -> Pair[StateT]:
    """Euler that renews noise after every step, video first, then audio; kept tokens get none.

    Args:
        noise: where the new noise comes from.
        eta: share of it, 0..1; 0 is plain Euler.
        carry: that of the last finished step when resuming.
    """
    if carry is not None and carry.renewed is not None:
        noise.restore(carry.renewed)

    def move(state: StateT, x0: Tensor, *, step: _Position) -> StateT:
        if step.sigma_next == 0:
            return _euler(state, x0, step=step)
        drawn = noise.draw(state)
        moved = ancestral_step(state.latent, x0, drawn, step.sigma, step.sigma_next, eta)
        return state.with_latent(blend(moved, state.mask, state.clean))

    states: Pair[StateT] = (video, audio)
    for step in _steps(_levels(sigmas), start_step):
        x0s = _evaluate(denoise, states, step.sigma, step.index)
        states = _each(move, states, x0s, step=step)
        _report(on_step, step, states, x0s, Carry(renewed=noise.snapshot()))
    return states


def res_2s(
    denoise: Denoise[StateT],
    video: StateT | None,
    audio: StateT | None,
    sigmas: Sequence[float] | Tensor,
    *,
    sde_noise: SdeNoise | None = None,
    on_step: OnStep[StateT] | None = None,
    start_step: int = 0,
    carry: Carry | None = None,
) -> Pair[StateT]:
    """Second-order exponential loop with SDE noise, the sampler of the HQ pipeline.

    N steps cost 2N + 1 evaluations: a list that ends in 0 gets the extra level 0.0011, whose estimate is the
    result.  That last evaluation counts as a step of its own.  Partial masks follow ``X0_BLEND``.

    Args:
        sde_noise: the two noise streams and the working precision; default seeds -1 and 9999 and float64.
            Give one with ``dtype=torch.float32`` for devices without float64.
        carry: that of the last finished step when resuming.
    """
    states: Pair[StateT] = (video, audio)
    levels = _levels(sigmas)
    if levels[-1] == 0:
        levels = _levels([*levels[:-1], RES_2S_LAST_SIGMA, 0.0])
    sde = sde_noise or SdeNoise()
    if carry is not None and carry.sde is not None:
        sde.restore(carry.sde)
    for step in _steps(levels, start_step):
        x0s = _evaluate(denoise, states, step.sigma, step.index)
        if step.sigma_next == 0:
            states = _each(_euler, states, x0s, step=step)
        else:
            states, x0s = _res_2s_step(denoise, states, x0s, step, sde)
        _report(on_step, step, states, x0s, Carry(sde=sde.snapshot()))
    return states


@dataclass(frozen=True, slots=True)
class _Position:
    index: int
    total: int
    sigma: float
    sigma_next: float


def _levels(sigmas: Sequence[float] | Tensor) -> list[float]:
    """Schedules are float32, whoever wrote them down."""
    return torch.as_tensor(sigmas, dtype=torch.float32).tolist()


def _steps(levels: list[float], start_step: int) -> Iterator[_Position]:
    total = len(levels) - 1
    if total < 1 or not 0 <= start_step <= total:
        raise ValueError(f"start_step={start_step} does not lie in a schedule of {total} steps")
    for index in range(start_step, total):
        yield _Position(index, total, levels[index], levels[index + 1])


def _each(function: Callable[..., T], states: Pair[Any], *others: Pair[Any], **same: Any) -> Pair[T]:
    """``function`` over video, then audio; None for an absent one."""
    video, audio = (
        None if arguments[0] is None else function(*arguments, **same)
        for arguments in zip(states, *others, strict=True)
    )
    return video, audio


def _evaluate(
    denoise: Denoise[StateT],
    states: Pair[StateT],
    sigma: float,
    index: int,
    masked_step: MaskedStep = MaskedStep.X0_BLEND,
) -> Pair[Tensor]:
    """Guided estimates after the mask rule; absent exactly where the state is."""
    if masked_step is MaskedStep.VELOCITY:
        shown = _each(lambda s: s.with_latent(blend(s.latent, s.mask, s.clean)), states)
        return _each(lambda s, x0: s.latent if x0 is None else x0, shown, denoise(*shown, sigma, index))
    guided = denoise(*states, sigma, index)
    return _each(lambda s, x0: blend(s.latent if x0 is None else x0, s.mask, s.clean), states, guided)


def _euler(state: StateT, x0: Tensor, *, step: _Position) -> StateT:
    """At the end the latent is the estimate itself, without a step's rounding: kept tokens stay exact."""
    x = state.latent
    if step.sigma_next == 0:
        return state.with_latent(x0.to(x.dtype))
    return state.with_latent(euler_step(x, x0, step.sigma, step.sigma_next))


def _velocity(state: StateT, x0: Tensor, *, sigma: float) -> Tensor:
    return velocity_from_x0(state.latent, x0, sigma)


def _steered_x0(
    state: StateT, x0: Tensor, velocity: Tensor, before: Tensor | None, *, sigma: float, gamma: float
) -> Tensor:
    if before is None:
        return x0
    total = gamma * (velocity.float() - before.float()) + before.float()
    return (state.latent.float() - sigma * total).to(x0.dtype)


def _res_2s_step(
    denoise: Denoise[StateT], states: Pair[StateT], x0s: Pair[Tensor], step: _Position, sde: SdeNoise
) -> tuple[Pair[StateT], Pair[Tensor]]:
    """One step from its first estimates; the second ones are taken at the geometric mean of both levels."""
    sigma, following = step.sigma, step.sigma_next
    h = -math.log(following / sigma)
    a21, b1, b2 = res2s_coefficients(h)
    middle = math.sqrt(sigma * following)

    def to_middle(state: StateT, x0: Tensor) -> tuple[Tensor, Tensor]:
        """(anchor, latent at the middle)."""
        anchor, d1 = state.latent.to(sde.dtype), x0.to(sde.dtype)
        y = _inject(state, anchor, anchor + h * a21 * (d1 - anchor), sigma, middle, sde, sde.substep)
        if h < 0.5 and sigma > 0.03:
            # The anchor settles on the noisy midpoint: fixed point of a = y - h a21 (d1 - a).
            anchor = (y - h * a21 * d1) / (1 - h * a21)
        return anchor, y

    def to_end(state: StateT, x0: Tensor, at_middle: tuple[Tensor, Tensor], second: Tensor) -> StateT:
        anchor, d1, d2 = at_middle[0], x0.to(sde.dtype), second.to(sde.dtype)
        x = anchor + h * (b1 * (d1 - anchor) + b2 * (d2 - anchor))
        x = _inject(state, anchor, x, sigma, following, sde, sde.step)
        return state.with_latent(x.to(state.latent.dtype))

    middles = _each(to_middle, states, x0s)
    halfway = _each(lambda s, m: s.with_latent(m[1].to(s.latent.dtype)), states, middles)
    seconds = _evaluate(denoise, halfway, middle, 0)
    return _each(to_end, states, x0s, middles, seconds), seconds


def _inject(
    state: StateT,
    sample: Tensor,
    following: Tensor,
    sigma: float,
    sigma_next: float,
    sde: SdeNoise,
    generator: torch.Generator,
) -> Tensor:
    """SDE noise, then the mask blend, so that kept tokens get none; in the precision of ``sde``."""
    noise = sde.draw(generator, sample)
    noisy = sde_step(sample, following, sigma, sigma_next, noise, dtype=sde.dtype)
    return noisy * state.mask + state.clean.to(sde.dtype) * (1 - state.mask)


def _report(
    on_step: OnStep[StateT] | None,
    step: _Position,
    states: Pair[StateT],
    x0s: Pair[Tensor],
    carry: Carry,
) -> None:
    if on_step is None:
        return
    on_step(
        Step(
            index=step.index,
            total=step.total,
            sigma=step.sigma,
            sigma_next=step.sigma_next,
            video=states[0],
            audio=states[1],
            video_x0=x0s[0],
            audio_x0=x0s[1],
            carry=carry,
        )
    )
