"""The denoising stages of a request: sizes, sigmas and guidance, decided before any weight is touched."""

from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor

from diffsynth.conditioning.tokens import video_latent_shape
from diffsynth.pipelines.presets import OFFICIAL_PRESETS
from diffsynth.request import GenerateRequest, GuidanceParams
from diffsynth.sampling.conventions import Conventions
from diffsynth.sampling.loops import RES_2S_LAST_SIGMA
from diffsynth.sampling.schedules import DEFAULT_TOKENS, DISTILLED_STAGE_1, DISTILLED_STAGE_2, ltx2_schedule

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
    sampler: str = "euler"

    @property
    def levels(self) -> tuple[float, ...]:
        """Noise level at which each step begins; res_2s makes one more for its last estimate."""
        begins = tuple(self.sigmas[:-1].tolist())
        return (*begins, RES_2S_LAST_SIGMA) if self.sampler == "res_2s" else begins

    @property
    def steps(self) -> int:
        """Number of steps that are reported."""
        return len(self.levels)

    @property
    def evaluations(self) -> int:
        """How often the network is traversed: twice per step with res_2s, but once in its last one."""
        return 2 * self.steps - 1 if self.sampler == "res_2s" else self.steps


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
        sampler=request.sampler,
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
        sampler=request.sampler,
    )


def guided(request: GenerateRequest) -> bool:
    """Whether any pass besides the conditional one runs, so that the negative prompt can matter."""
    return any(params != GuidanceParams() for params in _guidance(request))


def keeps_video(request: GenerateRequest) -> bool:
    """Whether a given clip stays as it is, so that only sound is made for it."""
    return request.retake_video is not None and not request.retake_video_regions


def keeps_audio(request: GenerateRequest) -> bool:
    """Whether a given sound stays as it is, so that only pictures are made for it."""
    return request.retake_audio is not None and not request.retake_audio_regions


def positive_only(request: GenerateRequest, conventions: Conventions) -> frozenset[str]:
    """Streams that lack a negative context while they are kept: sound of audio-to-video, not of a retake."""
    a2v = request.retake_video is None and not conventions.given_sound_has_negative
    return frozenset({"audio"} if a2v else ())


def _guidance(request: GenerateRequest) -> tuple[GuidanceParams, GuidanceParams]:
    """Of video and audio.  A scale for both means nothing for what is kept, guidance of its own does.

    Sound alone has no other modality to be isolated from.
    """
    neutral = GuidanceParams()
    if request.use_distilled_pipeline:
        return neutral, neutral
    if request.video_guidance is None and request.audio_guidance is None:
        scale = DEFAULT_CFG_SCALE if request.cfg_scale is None else request.cfg_scale
        both = GuidanceParams(cfg_scale=scale)
        video = neutral if keeps_video(request) or request.audio_only else both
        return video, neutral if keeps_audio(request) else both
    audio = request.audio_guidance or neutral
    if request.audio_only:
        return neutral, replace(audio, modality_scale=1.0)
    return request.video_guidance or neutral, audio


def _first_sigmas(request: GenerateRequest, version: str) -> Tensor:
    if request.use_distilled_pipeline:
        return torch.tensor(DISTILLED_STAGE_1, dtype=torch.float32)
    steps = request.num_inference_steps or OFFICIAL_PRESETS[version].num_inference_steps
    tokens = DEFAULT_TOKENS
    if request.dynamic_shift:
        tokens = prod(video_latent_shape(request.num_frames, *request.stage_1_size))
    return ltx2_schedule(steps, tokens, start=request.denoising_strength)
