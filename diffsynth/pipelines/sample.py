"""The sampler that a request names, ready to run a stage or to go on with one."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from diffsynth.conditioning.state import ModalityState
from diffsynth.device import capabilities
from diffsynth.pipelines.denoiser import Denoiser
from diffsynth.pipelines.stages import Stage
from diffsynth.pipelines.state import GenerationState, Unfinished
from diffsynth.sampling.loops import OnStep, Pair, ancestral, euler, gradient_estimation, res_2s
from diffsynth.sampling.noise import RenewedNoise, SdeNoise

logger = logging.getLogger(__name__)

STAGE_SEEDS = 10000
"""Distance between the seeds of the noise that is renewed in one stage and in the next."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Run:
    """What samplers are made of."""

    stage: Stage
    state: GenerationState
    device: torch.device
    start: Unfinished


def sample(
    stage: Stage,
    state: GenerationState,
    denoiser: Denoiser,
    start: Unfinished,
    *,
    device: torch.device,
    on_step: OnStep[ModalityState],
) -> Pair[ModalityState]:
    """Run the loop of a stage from where ``start`` stands.

    Args:
        device: of the states; res_2s works in float64 where it has that, otherwise in float32, which
            departs from it by about 1e-5 of the values.
        on_step: called after every step.

    Returns: (video, audio) after the last step.
    """
    loop = _LOOPS[stage.sampler](_Run(stage=stage, state=state, device=device, start=start))
    return loop(denoiser, start.video, start.audio, stage.sigmas, on_step=on_step, start_step=start.next_step)


Loop = Callable[..., Pair[ModalityState]]


def _euler(run: _Run) -> Loop:
    return partial(euler, masked_step=run.state.conventions.masked_step)


def _res_2s(run: _Run) -> Loop:
    exact = capabilities(run.device).float64
    if not exact:
        logger.info("res_2s: %s has no float64, the sampler works in float32", run.device)
    noise = SdeNoise(dtype=torch.float64 if exact else torch.float32)
    return partial(res_2s, sde_noise=noise, carry=run.start.carry)


def _gradient_estimation(run: _Run) -> Loop:
    return partial(gradient_estimation, carry=run.start.carry)


def _ancestral(run: _Run) -> Loop:
    request = run.state.request
    seed = run.state.noise.seed + STAGE_SEEDS * (run.stage.number - 1)
    noise = RenewedNoise(seed, request.rand_device)
    return partial(ancestral, noise=noise, eta=request.ancestral_eta, carry=run.start.carry)


_LOOPS: Mapping[str, Callable[[_Run], Any]] = {
    "euler": _euler,
    "res_2s": _res_2s,
    "gradient_estimation": _gradient_estimation,
    "ancestral": _ancestral,
}
