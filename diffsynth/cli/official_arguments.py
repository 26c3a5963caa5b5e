"""What the options of each official command ask of the one pipeline of this package."""

import logging
from argparse import Namespace
from dataclasses import replace
from typing import Any, TypeVar

from diffsynth.cli.official_options import AUDIO_GUIDANCE
from diffsynth.errors import RequestError
from diffsynth.guidance_params import GuidanceParams
from diffsynth.pipelines.negative_prompt import NEGATIVE_PROMPT
from diffsynth.pipelines.presets import Preset

logger = logging.getLogger(__name__)

T = TypeVar("T")
Arguments = dict[str, Any]
"""Of a :class:`~diffsynth.request.GenerateRequest`."""

_RETAKE_STEPS = 40
_RETAKE_SEED = 42


def _common(given: Namespace, preset: Preset) -> Arguments:
    """What all pipelines but retake say."""
    return {
        "prompt": given.prompt,
        "enhance_prompt": given.enhance_prompt,
        "seed": _given(given.seed, preset.seed),
        "num_frames": _given(given.num_frames, preset.num_frames),
        "frame_rate": _given(given.frame_rate, preset.frame_rate),
        "fit": given.fit,
    }


def _given(value: T | None, default: T) -> T:
    """What was typed, be it 0, which is refused where it cannot work."""
    return default if value is None else value


def _size(given: Namespace, preset: Preset, stages: int) -> Arguments:
    return {
        "height": _given(given.height, stages * preset.height),
        "width": _given(given.width, stages * preset.width),
        "use_two_stage_pipeline": stages == 2,
    }


def _images(given: Namespace) -> Arguments:
    images = given.image or ()
    if not images:
        return {}
    qualities = {image[3] for image in images}
    if len(qualities) > 1:
        raise RequestError("--image: pictures with different CRF", hint="the same CRF for all pictures")
    return {
        "input_images": tuple(image[0] for image in images),
        "input_images_indexes": tuple(image[1] for image in images),
        "input_images_strength": tuple(image[2] for image in images),
        "input_images_crf": qualities.pop(),
    }


def _guided(given: Namespace, preset: Preset) -> Arguments:
    return {
        "negative_prompt": _given(given.negative_prompt, NEGATIVE_PROMPT),
        "num_inference_steps": _given(given.num_inference_steps, preset.num_inference_steps),
        "video_guidance": _guidance(given, "video", preset.video_guidance),
        "audio_guidance": _guidance(given, "audio", preset.audio_guidance),
    }


def _guidance(given: Namespace, modality: str, base: GuidanceParams) -> GuidanceParams:
    """Of one stream, as far as the pipeline has options for it; else neutral."""
    if not hasattr(given, f"{modality}_cfg_guidance_scale"):
        return GuidanceParams()
    changes = {
        "cfg_scale": getattr(given, f"{modality}_cfg_guidance_scale"),
        "stg_scale": getattr(given, f"{modality}_stg_guidance_scale"),
        "stg_blocks": getattr(given, f"{modality}_stg_blocks"),
        "rescale_scale": getattr(given, f"{modality}_rescale_scale"),
        "modality_scale": getattr(given, {"video": "a2v", "audio": "v2a"}[modality] + "_guidance_scale"),
        "skip_step": getattr(given, f"{modality}_skip_step"),
    }
    return replace(base, **{name: value for name, value in changes.items() if value is not None})


def one_stage(given: Namespace, preset: Preset) -> Arguments:
    """Guided, at the final size."""
    # Untiled as the official pipeline has it, unless memory is limited.
    limited = given.vram_limit is not None or given.streaming_prefetch_count is not None
    parts = (_common(given, preset), _size(given, preset, 1), _images(given), _guided(given, preset))
    return _joined(*parts, {"tiled": limited})


def two_stages(given: Namespace, preset: Preset, **more: Any) -> Arguments:
    """Guided at half the size, then the second stage; ``more`` goes into the request as it is."""
    parts = (_common(given, preset), _size(given, preset, 2), _images(given), _guided(given, preset))
    return _joined(*parts, more)


def hq(given: Namespace, preset: Preset) -> Arguments:
    """Two stages of the second-order sampler, with the distilled LoRA in both."""
    return two_stages(
        given,
        preset,
        sampler="res_2s",
        dynamic_shift=True,
        stage1_lora_strength=given.distilled_lora_strength_stage_1,
        stage2_lora_strength=given.distilled_lora_strength_stage_2,
    )


def distilled(given: Namespace, preset: Preset) -> Arguments:
    """Two stages without guidance."""
    parts = (_common(given, preset), _size(given, preset, 2), _images(given))
    return _joined(*parts, {"use_distilled_pipeline": True})


def keyframes(given: Namespace, preset: Preset) -> Arguments:
    """Two stages in which every picture is a keyframe."""
    return two_stages(given, preset, input_images_as_keyframes=True)


def a2vid(given: Namespace, preset: Preset) -> Arguments:
    """The sound is not generated, so there is nothing in it to guide, although there are options for that."""
    asked = [option.flag for option in AUDIO_GUIDANCE if getattr(given, option.name) is not None]
    if asked:
        logger.warning("the sound is given and stays as it is: %s change nothing", ", ".join(asked))
    return two_stages(
        given,
        preset,
        audio_guidance=GuidanceParams(),
        retake_audio=str(given.audio_path),
        audio_start_time=given.audio_start_time,
        audio_max_duration=given.audio_max_duration,
    )


def retake(given: Namespace, preset: Preset) -> Arguments:
    """The clip decides size, length and frame rate; without a sound track all of the sound is made."""
    from diffsynth.utils.images import probe_video

    clip = probe_video(given.video_path, argument="--video-path")
    regions = ((given.start_time, given.end_time),)
    arguments: Arguments = {
        "prompt": given.prompt,
        "enhance_prompt": given.enhance_prompt,
        "seed": {None: _RETAKE_SEED, -1: None}.get(given.seed, given.seed),
        "height": clip.height,
        "width": clip.width,
        "num_frames": clip.num_frames,
        "frame_rate": float(clip.fps),
        "fit": given.fit,
        "retake_video": str(given.video_path),
        "retake_video_regions": regions,
    }
    if clip.has_audio:
        arguments |= {"retake_audio": str(given.video_path), "retake_audio_regions": regions}
    if given.distilled_checkpoint_path is not None:
        return arguments | {"use_distilled_pipeline": True}
    guidance = {"video_guidance": preset.video_guidance, "audio_guidance": preset.audio_guidance}
    return arguments | guidance | {"num_inference_steps": _RETAKE_STEPS}


def ic_lora(given: Namespace, preset: Preset) -> Arguments:
    """Distilled, with reference clips."""
    clips = given.video_conditioning
    mask, strength = given.conditioning_attention_mask or (None, 1.0)
    arguments = distilled(given, preset) | {
        "in_context_videos": tuple(path for path, _ in clips),
        "in_context_strength": tuple(each for _, each in clips),
        "in_context_attention_mask": mask,
        "in_context_attention_strength": strength,
        "clear_lora_before_state_two": True,
    }
    if given.skip_stage_2:  # then the first stage, of half the size, is all there is
        half = {name: arguments[name] // 2 for name in ("height", "width")}
        arguments |= {"use_two_stage_pipeline": False, **half}
    return arguments


def t2a(given: Namespace, preset: Preset) -> Arguments:
    """Guided sound alone."""
    return _joined(
        _common(given, preset), _guided(given, preset), {"audio_only": True, "video_guidance": None}
    )


def _joined(*parts: Arguments) -> Arguments:
    return {name: value for part in parts for name, value in part.items()}
