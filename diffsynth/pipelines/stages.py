"""The denoising stages of a request: sizes, sigmas and guidance, decided before any weight is touched."""

from dataclasses import dataclass

import torch
from torch import Tensor

from diffsynth.request import GenerateRequest, GuidanceParams
from diffsynth.sampling.schedules import DISTILLED_STAGE_1, DISTILLED_STAGE_2, ltx2_schedule

DEFAULT_STEPS = {"2.0": 40, "2.3": 30}
DEFAULT_CFG_SCALE = 3.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """One denoising loop over the whole clip.

    ``sigmas`` is float32, falls to a trailing 0 and starts at ``noise_scale``, the noise level of the
    initial latent.
    """

    number: int
    height: int
    width: int
    sigmas: Tensor
    noise_scale: float
    video_guidance: GuidanceParams
    audio_guidance: GuidanceParams

    @property
    def steps(self) -> int:
        """Number of denoising steps."""
        return len(self.sigmas) - 1


def plan_stages(request: GenerateRequest, version: str) -> tuple[Stage, ...]:
    """The stages of a request: one at full size, or half size and then full size.

    Args:
        version: of the model, "2.0" or "2.3"; it decides the default number of steps.
    """
    video, audio = _guidance(request)
    height, width = request.stage_1_size
    sigmas = _first_sigmas(request, version)
    first = Stage(
        number=1,
        height=height,
        width=width,
        sigmas=sigmas,
        noise_scale=1.0 if request.denoising_strength == 1 else float(sigmas[0]),
        video_guidance=video,
        audio_guidance=audio,
    )
    if not request.use_two_stage_pipeline:
        return (first,)
    second = torch.tensor(DISTILLED_STAGE_2, dtype=torch.float32)
    return first, Stage(
        number=2,
        height=request.height,
        width=request.width,
        sigmas=second,
        noise_scale=float(second[0]),
        video_guidance=GuidanceParams(),
        audio_guidance=GuidanceParams(),
    )


def guided(request: GenerateRequest) -> bool:
    """Whether any pass besides the conditional one runs, so that the negative prompt can matter."""
    return any(params != GuidanceParams() for params in _guidance(request))


def _guidance(request: GenerateRequest) -> tuple[GuidanceParams, GuidanceParams]:
    if request.use_distilled_pipeline:
        return GuidanceParams(), GuidanceParams()
    if request.video_guidance is not None or request.audio_guidance is not None:
        return request.video_guidance or GuidanceParams(), request.audio_guidance or GuidanceParams()
    scale = DEFAULT_CFG_SCALE if request.cfg_scale is None else request.cfg_scale
    return GuidanceParams(cfg_scale=scale), GuidanceParams(cfg_scale=scale)


def _first_sigmas(request: GenerateRequest, version: str) -> Tensor:
    if request.use_distilled_pipeline:
        return torch.tensor(DISTILLED_STAGE_1, dtype=torch.float32)
    steps = request.num_inference_steps or DEFAULT_STEPS[version]
    return ltx2_schedule(steps, start=request.denoising_strength)
