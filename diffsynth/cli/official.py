"""The official pipelines as commands, with their options and their defaults.

``python -m ltx_pipelines.NAME OPTIONS`` becomes ``diffsynth NAME OPTIONS``.  What is asked for is turned into
a request for the one pipeline of this package, so that limits of memory, storage formats and everything else
hold here as well.  Options may take several words (``--image PATH FRAME STRENGTH [CRF]``), hence argparse,
which the official programs use too.

Source: the options of official ltx-pipelines 1.0.0, ``--streaming-prefetch-count`` of 1.1.0, and
``t2a_one_stage`` of 1.2.0.
"""

import logging
import re
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from diffsynth.cli.official_options import (
    AUDIO_GUIDANCE,
    CHECKPOINT,
    COMMON,
    CONDITIONING,
    DISTILLED_CHECKPOINT,
    DISTILLED_LORA,
    GIVEN_SOUND,
    GUIDED,
    HQ_STRENGTHS,
    LENGTH,
    PICTURES,
    RETAKE,
    SIZE,
    STEPS,
    UPSAMPLER,
    VIDEO_GUIDANCE,
    Help,
    Option,
    Parser,
    add_machine_options,
    machine_options,
)
from diffsynth.errors import Cancelled, RequestError
from diffsynth.guidance_params import GuidanceParams
from diffsynth.pipelines.negative_prompt import NEGATIVE_PROMPT
from diffsynth.pipelines.presets import HQ_PRESET, OFFICIAL_PRESETS, Preset
from diffsynth.request import GenerateRequest

logger = logging.getLogger(__name__)

T = TypeVar("T")
Arguments = dict[str, Any]
"""Of a :class:`~diffsynth.request.GenerateRequest`."""
_STORAGES: Mapping[str, str] = {"fp8-cast": "e4m3", "fp8-scaled-mm": "fp8"}
_OPTION_OF: Mapping[str, str] = {
    "input_images": "image",
    "input_images_indexes": "image",
    "input_images_strength": "image",
    "input_images_crf": "image",
    "retake_audio": "audio_path",
    "in_context_videos": "video_conditioning",
    "in_context_strength": "video_conditioning",
    "in_context_attention_mask": "conditioning_attention_mask",
    "in_context_attention_strength": "conditioning_attention_mask",
    "retake_video": "video_path",
    "retake_video_regions": "start_time",
    "stage1_lora_strength": "distilled_lora_strength_stage_1",
    "stage2_lora_strength": "distilled_lora_strength_stage_2",
}
"""Field of a request -> name of the official option that fills it, where it is another."""
_RETAKE_STEPS = 40
_RETAKE_SEED = 42


@dataclass(frozen=True, kw_only=True, slots=True)
class Pipeline:
    """One official pipeline: its options, and what they ask of ours."""

    name: str
    text: str
    options: tuple[Option, ...]
    arguments: Callable[[Namespace, Preset], Arguments]
    preset: Preset | None = None
    """Its own defaults; None: those of the model in the checkpoint."""

    def parser(self) -> ArgumentParser:
        """Reads its options."""
        presets = [self.preset] if self.preset else list(OFFICIAL_PRESETS.values())
        parser = Parser(
            prog=f"diffsynth {self.name}",
            description=self.text,
            formatter_class=Help,
            allow_abbrev=False,
        )
        stages = 2 if UPSAMPLER in self.options else 1
        for option in self.options:
            option.add_to(parser, presets, stages)
        add_machine_options(parser)
        return parser

    def request(self, given: Namespace, version: str, num_blocks: int | None = None) -> GenerateRequest:
        """What was typed, as a request to a model.

        Args:
            given: the options.
            version: of the model, "2.0" or "2.3", whose defaults count.
            num_blocks: of its transformer, where it may be another than the released one.

        Raises:
            RequestError: it cannot work.
        """
        preset = self.preset or OFFICIAL_PRESETS[version]
        if num_blocks is not None:
            preset = _for_blocks(preset, num_blocks, given)
        return GenerateRequest(**self.arguments(given, preset)).validate()


def run(name: str, words_given: Sequence[str]) -> None:
    """Run the pipeline ``name`` with what was typed.

    Raises:
        DiffSynthError: of the kind that says what was wrong.
        SystemExit: help was asked for (0), or the options cannot be read (2).
    """
    pipeline = PIPELINES[name]
    given = pipeline.parser().parse_args(list(words_given))
    try:
        _run(pipeline, given)
    except RequestError as error:
        raise RequestError(_as_typed(error.message, pipeline), hint=error.hint) from error
    except KeyboardInterrupt as error:
        raise Cancelled("cancelled; nothing half-written was left") from error


def _run(pipeline: Pipeline, given: Namespace) -> None:
    from diffsynth.cli.generate import ModelOptions, checkpoint_facts, run

    checkpoint = _checkpoint(given)
    request = pipeline.request(given, *checkpoint_facts(checkpoint))
    models = ModelOptions(
        checkpoint=(checkpoint,),
        gemma=given.gemma_root,
        upsampler=getattr(given, "spatial_upsampler_path", None),
        distilled_lora=getattr(given, "distilled_lora", None),
        loras=(*(given.lora or ()), *((path, 1.0) for path in getattr(given, "loras", ()))),
        machine=machine_options(given, _storage(given)),
    )
    run(request=request, models=models, output=given.output_path, quiet=given.quiet, stats=given.stats)


def _as_typed(message: str, pipeline: Pipeline) -> str:
    """The message with the option that was typed for the field that it begins with."""
    field = re.split(r"\W", message, maxsplit=1)[0]
    flags = {option.name: option.flag for option in pipeline.options}
    if field in flags:
        return flags[field] + message.removeprefix(field)
    flag = flags.get(_OPTION_OF.get(field, ""))
    return message if flag is None else f"{flag}: {message}"


def _for_blocks(preset: Preset, num_blocks: int, given: Namespace) -> Preset:
    """The preset without perturbed guidance by blocks that the model does not have.

    As in the official programs, where nothing perturbs such a block; blocks that were typed are checked.
    """
    changes: dict[str, Any] = {}
    for modality in ("video", "audio"):
        params: GuidanceParams = getattr(preset, f"{modality}_guidance")
        typed = getattr(given, f"{modality}_stg_blocks", None) is not None
        if not typed and any(block >= num_blocks for block in params.stg_blocks):
            changes[f"{modality}_guidance"] = replace(params, stg_scale=0.0, stg_blocks=())
    if changes:
        logger.warning("the model has %d blocks: the default perturbed guidance is left out", num_blocks)
    return replace(preset, **changes)


def _checkpoint(given: Namespace) -> str:
    """The dev or the distilled checkpoint, of which there must be one."""
    names = ("checkpoint_path", "distilled_checkpoint_path")
    found: list[str] = [value for name in names if (value := getattr(given, name, None)) is not None]
    if len(found) != 1:
        raise RequestError(
            f"{'both' if found else 'neither'} of --checkpoint-path and --distilled-checkpoint-path given",
            hint="one of them",
        )
    return found[0]


def _storage(given: Namespace) -> str | None:
    """The storage format that ``--storage`` or ``--quantization`` names."""
    storage: str | None = given.storage
    if not given.quantization:
        return storage
    kind = given.quantization[0]
    if storage is not None:
        raise RequestError(
            f"--quantization {kind} and --storage {storage} are both given", hint="one of them"
        )
    if kind not in _STORAGES:
        raise RequestError(
            f"--quantization {kind} is not supported",
            hint=f"{', '.join(_STORAGES)}, or --storage int8 or int4",
        )
    return _STORAGES[kind]


# -- what options ask of the one pipeline --------------------------------------------------------------------


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


def _one_stage(given: Namespace, preset: Preset) -> Arguments:
    # Untiled as the official pipeline has it, unless memory is limited.
    limited = given.vram_limit is not None or given.streaming_prefetch_count is not None
    parts = (_common(given, preset), _size(given, preset, 1), _images(given), _guided(given, preset))
    return _joined(*parts, {"tiled": limited})


def _two_stages(given: Namespace, preset: Preset, **more: Any) -> Arguments:
    parts = (_common(given, preset), _size(given, preset, 2), _images(given), _guided(given, preset))
    return _joined(*parts, more)


def _hq(given: Namespace, preset: Preset) -> Arguments:
    return _two_stages(
        given,
        preset,
        sampler="res_2s",
        dynamic_shift=True,
        stage1_lora_strength=given.distilled_lora_strength_stage_1,
        stage2_lora_strength=given.distilled_lora_strength_stage_2,
    )


def _distilled(given: Namespace, preset: Preset) -> Arguments:
    parts = (_common(given, preset), _size(given, preset, 2), _images(given))
    return _joined(*parts, {"use_distilled_pipeline": True})


def _keyframes(given: Namespace, preset: Preset) -> Arguments:
    return _two_stages(given, preset, input_images_as_keyframes=True)


def _a2vid(given: Namespace, preset: Preset) -> Arguments:
    """The sound is not generated, so there is nothing in it to guide, although there are options for that."""
    asked = [option.flag for option in AUDIO_GUIDANCE if getattr(given, option.name) is not None]
    if asked:
        logger.warning("the sound is given and stays as it is: %s change nothing", ", ".join(asked))
    return _two_stages(
        given,
        preset,
        audio_guidance=GuidanceParams(),
        retake_audio=str(given.audio_path),
        audio_start_time=given.audio_start_time,
        audio_max_duration=given.audio_max_duration,
    )


def _retake(given: Namespace, preset: Preset) -> Arguments:
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


def _ic_lora(given: Namespace, preset: Preset) -> Arguments:
    clips = given.video_conditioning
    mask, strength = given.conditioning_attention_mask or (None, 1.0)
    arguments = _distilled(given, preset) | {
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


def _t2a(given: Namespace, preset: Preset) -> Arguments:
    return _joined(
        _common(given, preset), _guided(given, preset), {"audio_only": True, "video_guidance": None}
    )


def _joined(*parts: Arguments) -> Arguments:
    return {name: value for part in parts for name, value in part.items()}


_GENERATED = (*COMMON, *LENGTH, *SIZE, *STEPS, *PICTURES)
_GUIDED = (CHECKPOINT, *_GENERATED, *GUIDED, *VIDEO_GUIDANCE)
_TWO_STAGES = (*_GUIDED, *AUDIO_GUIDANCE, DISTILLED_LORA, UPSAMPLER)

PIPELINES: Mapping[str, Pipeline] = {
    pipeline.name: pipeline
    for pipeline in (
        Pipeline(
            name="ti2vid_one_stage",
            text="Video with sound from text and pictures, at its size in one pass.",
            options=(*_GUIDED, *AUDIO_GUIDANCE),
            arguments=_one_stage,
        ),
        Pipeline(
            name="ti2vid_two_stages",
            text="Half the size with guidance first, then twice as large with the distilled LoRA.",
            options=_TWO_STAGES,
            arguments=_two_stages,
        ),
        Pipeline(
            name="ti2vid_two_stages_hq",
            text="Two stages with the second-order sampler res_2s; the defaults are made for LTX-2.3.",
            options=(*_TWO_STAGES, *HQ_STRENGTHS),
            arguments=_hq,
            preset=HQ_PRESET,
        ),
        Pipeline(
            name="distilled",
            text="Two stages with a distilled checkpoint: 8 and 3 steps, no guidance.",
            options=(DISTILLED_CHECKPOINT, *_GENERATED, UPSAMPLER),
            arguments=_distilled,
        ),
        Pipeline(
            name="keyframe_interpolation",
            text="Two stages in which every picture guides as a keyframe; -1 is the last frame.",
            options=_TWO_STAGES,
            arguments=_keyframes,
        ),
        Pipeline(
            name="a2vid_two_stage",
            text="Video for a given sound, which is kept sample for sample.",
            options=(*_TWO_STAGES, *GIVEN_SOUND),
            arguments=_a2vid,
        ),
        Pipeline(
            name="retake",
            text="A part of a clip made anew, in picture and sound; the rest is kept.",
            options=(*COMMON, *RETAKE),
            arguments=_retake,
        ),
        Pipeline(
            name="ic_lora",
            text="Video that follows reference clips, with in-context LoRAs and a distilled checkpoint.",
            options=(DISTILLED_CHECKPOINT, *_GENERATED, UPSAMPLER, *CONDITIONING),
            arguments=_ic_lora,
        ),
        Pipeline(
            name="t2a_one_stage",
            text="Sound alone, as .wav or .flac.",
            options=(CHECKPOINT, *COMMON, *LENGTH, *STEPS, *GUIDED, *AUDIO_GUIDANCE),
            arguments=_t2a,
        ),
    )
}
"""By name."""
