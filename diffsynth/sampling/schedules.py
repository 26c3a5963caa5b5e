"""Noise schedules: float32 lists of ``steps + 1`` noise levels that fall from 1 to 0.

Step i goes from ``sigmas[i]`` to ``sigmas[i + 1]``.  A sigma is unitless, 1 is pure noise.
"""

import math

import torch
from torch import Tensor

from diffsynth.errors import RequestError

Sigmas = tuple[float, ...]

DISTILLED_STAGE_1: Sigmas = (1.0, 0.99375, 0.9875, 0.98125, 0.975, 0.909375, 0.725, 0.421875, 0.0)
"""Eight steps of the distilled checkpoints: constants of the distillation."""
DISTILLED_STAGE_2: Sigmas = (0.909375, 0.725, 0.421875, 0.0)
"""Three steps after the latent upsampler; the first value is also the scale of the added noise."""

DEFAULT_TOKENS = 4096
_BASE_TOKENS = 1024
_TIMESTEPS = 1000.0
_MAX_SHIFT = 700.0  # e^709 is the largest power that a double holds


def ltx2_schedule(
    steps: int,
    tokens: int = DEFAULT_TOKENS,
    *,
    max_shift: float = 2.05,
    base_shift: float = 0.95,
    stretch: bool = True,
    terminal: float = 0.1,
    start: float = 1.0,
) -> Tensor:
    """The schedule of the dev checkpoints (official LTX2 scheduler).

    Args:
        steps: number of denoising steps, at least 1; one step gives [1, 0].
        tokens: decides the shift.  All pipelines use 4096 whatever the size, except the HQ two-stage one,
            which passes the token count of its stage-1 latent.
        max_shift, base_shift: shift at 4096 and at 1024 tokens; a line through both, not clamped.
        stretch: move the last non-zero value to ``terminal``.
        start: first value before the shift, in (0, 1]; below 1 only when there is a video to start from.

    Returns:
        (steps + 1,) float32 on the CPU, last value 0.  The first is 1 up to float32 rounding, never compare
        it with ``==``.

    Raises:
        RequestError: ``steps`` or ``start`` out of range.
    """
    _check_steps(steps)
    if not 0 < start <= 1:
        raise RequestError(f"denoising_strength={start} is outside (0, 1]", hint="denoising_strength=1.0")
    if steps == 1 and start == 1:
        return torch.tensor([1.0, 0.0])
    slope = (max_shift - base_shift) / (DEFAULT_TOKENS - _BASE_TOKENS)
    shift = tokens * slope + (base_shift - slope * _BASE_TOKENS)
    factor = math.exp(min(shift, _MAX_SHIFT))
    u = torch.linspace(start, 0, steps + 1)[:-1]
    sigmas = factor / (factor + (1 / u - 1))
    if stretch:
        one_minus = 1 - sigmas
        sigmas = 1 - one_minus * ((1 - terminal) / one_minus[-1])
        if not bool((sigmas.diff() < 0).all()):
            sigmas = _stretched_exactly(u, factor, terminal)
    return torch.cat([sigmas, sigmas.new_zeros(1)])


def _stretched_exactly(u: Tensor, factor: float, terminal: float) -> Tensor:
    """The same curve where ``1 - sigma`` vanishes in float32 (many tokens) and the list would repeat."""
    odds = 1 / u.double() - 1
    ratio = (odds / odds[-1]) * ((factor + odds[-1]) / (factor + odds))
    return (1 - (1 - terminal) * ratio).float()


def linear_quadratic_schedule(
    steps: int, threshold_noise: float = 0.025, linear_steps: int | None = None
) -> Tensor:
    """Linear for the first ``linear_steps`` (default half of them), then quadratic; no pipeline uses it.

    Args:
        steps: at least 1.
        threshold_noise: share of the noise that the linear part removes.

    Returns:
        (steps + 1,) float32 on the CPU, from 1 to 0, computed in double precision.
    """
    _check_steps(steps)
    if steps == 1:
        return torch.tensor([1.0, 0.0])
    linear = steps // 2 if linear_steps is None else linear_steps
    if not 0 < linear < steps:
        raise RequestError(f"linear_steps={linear} is outside 1..{steps - 1}", hint=f"{steps // 2}")
    quadratic = steps - linear
    excess = linear - threshold_noise * steps
    a = excess / (linear * quadratic**2)
    b = threshold_noise / linear - 2 * excess / quadratic**2
    c = a * linear**2
    removed = [i * threshold_noise / linear for i in range(linear)]
    removed += [a * i**2 + b * i + c for i in range(linear, steps)]
    return torch.tensor([1 - r for r in removed] + [0.0])


def beta_schedule(steps: int, *, shift: float = 2.37, alpha: float = 0.6, beta: float = 0.6) -> Tensor:
    """Quantiles of a Beta distribution on a shifted table of 10000 entries; no pipeline uses it.

    Returns:
        float32 on the CPU, ending in 0; shorter than ``steps + 1`` where quantiles coincide.
    """
    _check_steps(steps)
    last = 9999
    indices = [round(_beta_quantile(1 - j / steps, alpha, beta) * last) for j in range(steps)]
    factor = math.exp(shift)
    values = [factor / (factor + ((last + 1) / (k + 1) - 1)) for k in dict.fromkeys(indices)]
    return torch.tensor([*values, 0.0])


def diffsynth_schedule(
    steps: int, *, denoising_strength: float = 1.0, dynamic_shift_len: int | None = None
) -> Tensor:
    """DiffSynth's packaging of :func:`ltx2_schedule`, with the trailing 0 that its own lists leave out.

    Args:
        denoising_strength: where the curve starts, in (0, 1].
        dynamic_shift_len: token count for the shift; None is 4096, as its pipeline always has it.
    """
    tokens = DEFAULT_TOKENS if dynamic_shift_len is None else dynamic_shift_len
    return ltx2_schedule(steps, tokens, start=denoising_strength)


def rounded_timesteps(sigmas: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """``1000 * sigma`` as DiffSynth hands it to the model, rounded to the pipeline dtype; float32.

    Only for comparisons: official code feeds exact float32 sigmas, and so does this package.
    """
    return (sigmas * _TIMESTEPS).to(dtype).float()


def _check_steps(steps: int) -> None:
    if steps < 1:
        raise RequestError(f"num_inference_steps={steps} is below 1", hint="num_inference_steps=40")


def _beta_quantile(p: float, a: float, b: float) -> float:
    """Inverse of the Beta(a, b) distribution function, by bisection to double precision."""
    low, high = 0.0, 1.0
    if p >= 1:
        return 1.0
    for _ in range(60):
        middle = (low + high) / 2
        if _beta_cdf(middle, a, b) < p:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def _beta_cdf(x: float, a: float, b: float) -> float:
    """Regularised incomplete beta function, 0 < x < 1 (Press et al., Numerical Recipes, section 6.4)."""
    if x > (a + 1) / (a + b + 2):
        return 1 - _beta_cdf(1 - x, b, a)
    log_front = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    c, d = 1.0, 1 / (1 - (a + b) * x / (a + 1))
    fraction = d
    for m in range(1, 200):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        for term in (even, odd):
            d = 1 / (1 + term * d)
            c = 1 + term / c
            fraction *= c * d
        if abs(c * d - 1) < 1e-15:
            break
    return math.exp(log_front) * fraction / a
