"""Single steps and conversions.  x noisy latent, x0 clean estimate, v velocity, m mask, c clean latent.

``x = (1 - sigma) * x0 + sigma * noise`` and ``v = noise - x0``.  Everything is computed in float32 and cast
back to the dtype of x, unless a function says otherwise.  Sigmas are Python floats, so no step ever waits
for the device.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

_EPS = torch.finfo(torch.float32).eps


def x0_from_velocity(x: Tensor, velocity: Tensor, timesteps: Tensor | float) -> Tensor:
    """``x - v * t`` with t per token: a token with t = 0 returns its input unchanged.

    Args:
        x, velocity: (B, T, C), or any shapes that broadcast.
        timesteps: (B, T, 1) float32 ``mask * sigma``, or one value for all.
    """
    return (x.float() - velocity.float() * timesteps).to(x.dtype)


def velocity_from_x0(x: Tensor, x0: Tensor, sigma: float) -> Tensor:
    """``(x - x0) / sigma``.

    Raises:
        ValueError: sigma is 0, where the velocity is not defined.
    """
    if sigma == 0:
        raise ValueError("the velocity is not defined at sigma 0")
    return ((x.float() - x0.float()) / sigma).to(x.dtype)


def blend(x0: Tensor, mask: Tensor, clean: Tensor) -> Tensor:
    """``x0 * m + c * (1 - m)`` in the dtype of ``x0``; mask (B, T, 1), 1 = generate, 0 = keep."""
    return (x0.float() * mask + clean.float() * (1 - mask)).to(x0.dtype)


def euler_step(x: Tensor, x0: Tensor, sigma: float, sigma_next: float) -> Tensor:
    """``x + (x - x0) / sigma * (sigma_next - sigma)``; the velocity is rounded to the dtype of x first."""
    velocity = velocity_from_x0(x, x0, sigma)
    return (x.float() + velocity.float() * (sigma_next - sigma)).to(x.dtype)


def ancestral_step(
    x: Tensor, x0: Tensor, noise: Tensor, sigma: float, sigma_next: float, eta: float
) -> Tensor:
    """Ancestral Euler for rectified flow; ``eta`` 0 is plain Euler, 1 renews all the noise it can.

    Args:
        noise: unit Gaussian noise of the shape of x.
    """
    if sigma_next == 0:
        return x0.to(x.dtype)
    down = sigma_next * (1 + (sigma_next / sigma - 1) * eta)
    ratio = down / sigma
    result = ratio * x.float() + (1 - ratio) * x0.float()
    if eta > 0:
        scale = (1 - sigma_next) / (1 - down)
        renewed = math.sqrt(max(sigma_next**2 - (down * scale) ** 2, 0.0))
        result = scale * result + noise.float() * renewed
    return result.to(x.dtype)


def cfg_pp_step(
    x: Tensor, x0: Tensor, uncond_x0: Tensor, noise: Tensor, sigma: float, sigma_next: float, eta: float
) -> Tensor:
    """CFG++ Euler step: the direction comes from the unconditional estimate, the target from the guided one.

    Args:
        noise: unit Gaussian noise of the shape of x; used when ``eta`` > 0.
    """
    alpha, alpha_next = max(1 - sigma, _EPS), max(1 - sigma_next, _EPS)
    direction = (x.float() - alpha * uncond_x0.float()) / sigma
    p, q = sigma / alpha, sigma_next / alpha_next
    up = min(eta * math.sqrt(max(q**2 * (p**2 - q**2) / p**2, 0.0)), q)
    down = math.sqrt(q**2 - up**2)
    result = alpha_next * (x0.float() + down * direction)
    if up > 0:
        result = result + alpha_next * up * noise.float()
    return result.to(x.dtype)


class Res2sCoefficients(NamedTuple):
    """Weights of the second-order exponential step of length ``h = -ln(sigma_next / sigma)``."""

    a21: float
    b1: float
    b2: float


def phi1(z: float) -> float:
    """``(e^z - 1) / z``, 1 at zero."""
    return 1.0 if abs(z) < 1e-10 else (math.exp(z) - 1) / z


def phi2(z: float) -> float:
    """``(e^z - 1 - z) / z^2``, 1/2 at zero."""
    return 0.5 if abs(z) < 1e-10 else (math.exp(z) - 1 - z) / z**2


def res2s_coefficients(h: float, c2: float = 0.5) -> Res2sCoefficients:
    """Coefficients of res_2s with the substep at ``c2`` of the step (in log sigma)."""
    b2 = phi2(-h) / c2
    return Res2sCoefficients(a21=c2 * phi1(-h * c2), b1=phi1(-h) - b2, b2=b2)


class SdeCoefficients(NamedTuple):
    """``result = alpha * (x0 + down * eps) + up * noise``."""

    alpha: float
    down: float
    up: float


def sde_coefficients(sigma_next: float, eta: float = 0.5) -> SdeCoefficients:
    """Split the noise at ``sigma_next`` > 0 into an old part and a new one of level ``eta * sigma_next``."""
    up = min(sigma_next * eta, sigma_next * 0.9999)
    kept = math.sqrt(max(sigma_next**2 - up**2, 0.0))
    alpha = 1 - sigma_next + kept
    return SdeCoefficients(alpha=alpha, down=kept / alpha, up=up)


def sde_step(
    sample: Tensor,
    following: Tensor,
    sigma: float,
    sigma_next: float,
    noise: Tensor,
    *,
    eta: float = 0.5,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Replace part of the noise of ``following``, which lies at ``sigma_next``, by new noise.

    Args:
        sample: the state at ``sigma`` from which the step started.
        following: the deterministic result at ``sigma_next``.
        noise: normalised noise (:func:`normalised_noise`).
        dtype: precision of the arithmetic; float32 where the device has no float64.

    Returns:
        the shape of ``sample``, in ``dtype``; ``following`` itself when there is no noise to add.
    """
    following = following.to(dtype)
    if sigma_next == 0 or eta == 0:
        return following
    alpha, down, up = sde_coefficients(sigma_next, eta)
    sample = sample.to(dtype)
    eps = (sample - following) / (sigma - sigma_next)
    x0 = sample - sigma * eps
    return alpha * (x0 + down * eps) + up * noise.to(dtype)


def normalised_noise(noise: Tensor) -> Tensor:
    """Noise of exact mean 0 and deviation 1: over the whole tensor first, then per batch item.

    Args:
        noise: (B, T, C) Gaussian noise, float64 by preference.
    """
    noise = (noise - noise.mean()) / noise.std()
    return (noise - noise.mean(dim=(-2, -1), keepdim=True)) / noise.std(dim=(-2, -1), keepdim=True)
