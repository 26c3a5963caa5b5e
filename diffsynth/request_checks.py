"""What a request can be refused for by itself, before any file is opened; nothing here imports torch."""

import math
from collections.abc import Mapping
from itertools import product
from typing import TYPE_CHECKING

from diffsynth.errors import RequestError
from diffsynth.validation import below_and_above, check_finite, check_strengths

if TYPE_CHECKING:
    from diffsynth.guidance_params import GuidanceParams
    from diffsynth.request import GenerateRequest, Region

SPATIAL_STEP_PX = 32
"""One latent cell covers 32 x 32 pixels."""
TEMPORAL_STEP = 8
"""One latent frame covers 8 pixel frames; the first one covers a single frame."""
MAX_FRAME_RATE = 1000
"""The largest that an mp4 is written with."""
STAGE_1_DIVISOR = 2
"""Two-stage generation runs its first stage at half height and half width."""
SAMPLERS = ("euler", "res_2s", "gradient_estimation", "ancestral")

_EXAMPLES: Mapping[str, str] = {
    "height": "512",
    "width": "768",
    "num_frames": "121",
    "num_inference_steps": "40",
    "in_context_downsample_factor": "2",
    "in_context_temporal_factor": "1",
}


def check_request(request: "GenerateRequest") -> None:
    """Check every argument of the right type by itself and against the others.

    Raises:
        RequestError: it names the argument and what to pass instead.
    """
    _check_text(request)
    _check_numbers(request)
    _check_size(request)
    _check_images(request)
    _check_references(request)
    _check_regions(request)
    _check_sound(request)
    _check_sampling(request)
    _check_guidance(request)


def size_step(request: "GenerateRequest") -> int:
    """What height and width are multiples of."""
    return SPATIAL_STEP_PX * (STAGE_1_DIVISOR if request.use_two_stage_pipeline else 1)


def _check_text(request: "GenerateRequest") -> None:
    """Bytes of another encoding on a command line arrive as characters that no tokenizer takes."""
    for name in ("prompt", "negative_prompt"):
        try:
            getattr(request, name).encode()
        except UnicodeEncodeError as error:
            raise RequestError(f"{name} is not valid Unicode: {error.reason}", hint="UTF-8 text") from error


def _check_numbers(request: "GenerateRequest") -> None:
    for name in _EXAMPLES:
        value = getattr(request, name)
        if value is not None and value < 1:
            raise RequestError(f"{name}={value!r} is not a positive whole number", hint=_EXAMPLES[name])
    check_finite("frame_rate", request.frame_rate)
    if not 0 < request.frame_rate <= MAX_FRAME_RATE:
        raise RequestError(
            f"frame_rate={request.frame_rate} is outside (0, {MAX_FRAME_RATE}]", hint="24, 25 or 30"
        )
    if request.audio_sample_rate < 1:
        raise RequestError(f"audio_sample_rate={request.audio_sample_rate} is not positive", hint="48000")
    if request.seed is not None and not -(2**63) <= request.seed < 2**63:
        raise RequestError(f"seed={request.seed} does not fit 64 bits", hint="a number such as 43")
    check_finite("denoising_strength", request.denoising_strength)
    if not 0 < request.denoising_strength <= 1:
        raise RequestError(f"denoising_strength={request.denoising_strength} is outside (0, 1]", hint="1.0")
    if request.denoising_strength < 1 and request.retake_video is None:
        raise RequestError(
            f"denoising_strength={request.denoising_strength} needs a video to start from",
            hint="denoising_strength=1.0, or pass retake_video",
        )
    if request.denoising_strength < 1 and not request.retake_video_regions:
        end_s = math.floor(1000 * request.num_frames / request.frame_rate) / 1000
        raise RequestError(
            f"denoising_strength={request.denoising_strength} changes nothing in a retake_video that is kept "
            "as a whole",
            hint=f"retake_video_regions=[(0, {end_s:g})] for all of it, or denoising_strength=1.0",
        )
    if request.stage2_spatial_upsample_factor != 2:
        raise RequestError(
            f"stage2_spatial_upsample_factor={request.stage2_spatial_upsample_factor} is not supported: "
            "the second stage doubles height and width",
            hint="stage2_spatial_upsample_factor=2",
        )


def _check_size(request: "GenerateRequest") -> None:
    step = size_step(request)
    reason = "two stages need" if request.use_two_stage_pipeline else "one stage needs"
    for name in ("height", "width"):
        value = getattr(request, name)
        if value % step:
            raise RequestError(
                f"{name}={value} is not a multiple of {step}, as {reason} it", hint=_nearest(value, step)
            )
    if (request.num_frames - 1) % TEMPORAL_STEP:
        raise RequestError(
            f"num_frames={request.num_frames} is not 8k+1",
            hint=_nearest(request.num_frames, TEMPORAL_STEP, 1),
        )
    if request.tiled and request.tile_overlap_in_pixels >= request.tile_size_in_pixels:
        raise RequestError(
            f"tile_overlap_in_pixels={request.tile_overlap_in_pixels} is not smaller than "
            f"tile_size_in_pixels={request.tile_size_in_pixels}",
            hint="tile_size_in_pixels=512, tile_overlap_in_pixels=128",
        )


def _nearest(value: int, step: int, first: int = 0) -> str:
    """The legal numbers next to one, and the option that takes the smaller, if there is one."""
    legal = list(below_and_above(value, step, first))
    return " or ".join(map(str, legal)) + (", or fit=True (--fit)" if len(legal) == 2 else "")


def _check_images(request: "GenerateRequest") -> None:
    count = len(request.input_images)
    if not count:
        return
    if len(request.input_images_indexes) != count:
        raise RequestError(
            f"input_images_indexes has {len(request.input_images_indexes)} entries for {count} input_images",
            hint="one frame index per image, such as input_images_indexes=[0, -1]",
        )
    for given, frame in zip(request.input_images_indexes, request.image_frames(), strict=True):
        if not 0 <= frame < request.num_frames:
            raise RequestError(
                f"input_images_indexes holds {given}, outside the {request.num_frames} frames",
                hint=f"0 to {request.num_frames - 1}, or -1 for the last frame",
            )
    if len(set(request.image_frames())) != count:
        raise RequestError(
            f"input_images_indexes={list(request.input_images_indexes)} names a frame twice",
            hint="one image per frame",
        )
    check_strengths("input_images_strength", request.input_images_strength, count, "input_images")
    if request.input_images_crf is not None and not 0 <= request.input_images_crf <= 51:
        raise RequestError(
            f"input_images_crf={request.input_images_crf} is outside 0..51",
            hint="33, or 0 for no compression",
        )


def _check_references(request: "GenerateRequest") -> None:
    """Reference clips have latents of whole cells; what belongs to them needs them."""
    count = len(request.in_context_videos)
    check_strengths("in_context_strength", request.in_context_strength, count, "in_context_videos")
    check_strengths(
        "in_context_attention_strength", request.in_context_attention_strength, 1, "strength of all clips"
    )
    if request.in_context_attention_mask is not None and not count:
        raise RequestError(
            "in_context_attention_mask is given without in_context_videos", hint="pass in_context_videos too"
        )
    time, factor = TEMPORAL_STEP * request.temporal_factor, request.in_context_downsample_factor
    if count and (request.num_frames - 1) % time:
        raise RequestError(
            f"num_frames={request.num_frames} is not {time}k+1, as reference clips of one frame in "
            f"{request.temporal_factor} need it",
            hint=_nearest(request.num_frames, time, 1),
        )
    if not count or factor is None:
        return
    step = size_step(request) * factor
    for name in ("height", "width"):
        value = getattr(request, name)
        if value % step:
            raise RequestError(
                f"{name}={value} is not a multiple of {step}, as reference clips of 1/{factor} of the size "
                "need it",
                hint=" or ".join(map(str, below_and_above(value, step))),
            )


def _check_regions(request: "GenerateRequest") -> None:
    duration_s = request.num_frames / request.frame_rate
    for name, source in (("retake_video_regions", "retake_video"), ("retake_audio_regions", "retake_audio")):
        regions: tuple[Region, ...] = getattr(request, name)
        if regions and getattr(request, source) is None:
            raise RequestError(f"{name} is given without {source}", hint=f"pass {source} too")
        for start, end in regions:
            check_finite(name, start)
            check_finite(name, end)
            if start < 0:
                raise RequestError(f"{name}: start {start} s lies before the clip", hint="0.0 or later")
            if start >= end:
                raise RequestError(
                    f"{name}: start {start} s must lie before end {end} s", hint="such as [(1.0, 3.0)]"
                )
            # Players round durations: an end within the frame after the last one means the end of the clip.
            if start >= duration_s or end > duration_s + 1 / request.frame_rate:
                raise RequestError(
                    f"{name}: {start} s to {end} s is outside the clip, which lasts {duration_s:.3f} s",
                    hint=f"an end of at most {duration_s:.3f}, or more num_frames",
                )


def _check_sound(request: "GenerateRequest") -> None:
    for name in ("audio_start_time", "audio_max_duration"):
        value = getattr(request, name)
        if value is None:
            continue
        check_finite(name, value)
        if value < 0 or (name == "audio_max_duration" and value == 0):
            hint = "0.0, or a positive number" if name == "audio_start_time" else "a positive number"
            raise RequestError(f"{name}={value} is not a time in seconds", hint=hint)
        if value and request.retake_audio is None:
            raise RequestError(f"{name} is given without retake_audio", hint="pass retake_audio too")
    if not request.audio_only:
        return
    if request.use_two_stage_pipeline:
        raise RequestError(
            "audio_only has no picture that the second stage could enlarge",
            hint="use_two_stage_pipeline=False",
        )
    pictures = ("input_images", "in_context_videos", "retake_video")
    asked = [name for name in (*pictures, "video_guidance") if getattr(request, name)]
    if asked:
        raise RequestError(
            f"audio_only makes no pictures; {', '.join(asked)} cannot apply", hint="audio_only=False"
        )


def _check_sampling(request: "GenerateRequest") -> None:
    if request.sampler not in SAMPLERS:
        raise RequestError(f"sampler={request.sampler!r} is not known", hint=", ".join(SAMPLERS))
    check_finite("ancestral_eta", request.ancestral_eta)
    if not 0 <= request.ancestral_eta <= 1:
        raise RequestError(f"ancestral_eta={request.ancestral_eta} is outside 0..1", hint="1.0")
    for name in ("stage1_lora_strength", "stage2_lora_strength"):
        if getattr(request, name) is not None:
            check_finite(name, getattr(request, name))
    if request.use_distilled_pipeline:
        asked = ["stage1_lora_strength"] if request.stage1_lora_strength else []
        asked += ["stage2_lora_strength"] if request.stage2_lora_strength is not None else []
        asked += ["dynamic_shift"] if request.dynamic_shift else []
        if asked:
            raise RequestError(
                f"a distilled model has its own steps and needs no distilled LoRA; {', '.join(asked)} cannot "
                "apply",
                hint="use_distilled_pipeline=False with a dev checkpoint",
            )


def _check_guidance(request: "GenerateRequest") -> None:
    if request.cfg_scale is not None:
        check_finite("cfg_scale", request.cfg_scale)
    names = ("video_guidance", "audio_guidance")
    if request.use_distilled_pipeline:
        asked = [name for name in names if getattr(request, name) is not None]
        if request.cfg_scale not in (None, 1, 1.0):
            asked.append(f"cfg_scale={request.cfg_scale}")
        if asked:
            raise RequestError(
                f"a distilled model has its guidance built in; {', '.join(asked)} cannot apply",
                hint="leave cfg_scale out, or use_distilled_pipeline=False with a dev checkpoint",
            )
    for name, scale in product(names, (request.cfg_scale,)):
        guidance: GuidanceParams | None = getattr(request, name)
        if guidance is None:
            continue
        if scale is not None:
            raise RequestError(f"cfg_scale and {name} are both given", hint=f"set {name}.cfg_scale only")
        guidance.validate(name)
