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
from typing import Any

from diffsynth.cli.official_arguments import (
    Arguments,
    a2vid,
    distilled,
    hq,
    ic_lora,
    keyframes,
    one_stage,
    retake,
    t2a,
    two_stages,
)
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
from diffsynth.pipelines.presets import HQ_PRESET, OFFICIAL_PRESETS, Preset
from diffsynth.request import GenerateRequest

logger = logging.getLogger(__name__)

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
    named = (getattr(given, f"{m.removesuffix('_guidance')}_stg_guidance_scale", 0) for m in changes)
    if any(scale != 0 for scale in named):  # no guidance, or none of this kind, leaves nothing out
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


_GENERATED = (*COMMON, *LENGTH, *SIZE, *STEPS, *PICTURES)
_GUIDED = (CHECKPOINT, *_GENERATED, *GUIDED, *VIDEO_GUIDANCE)
_TWO_STAGES = (*_GUIDED, *AUDIO_GUIDANCE, DISTILLED_LORA, UPSAMPLER)

PIPELINES: Mapping[str, Pipeline] = {
    pipeline.name: pipeline
    for pipeline in (
        Pipeline(
            name="ti2vid_one_stage",
            text="Text and pictures to video, in one pass.  With sound and guidance, at the final size.",
            options=(*_GUIDED, *AUDIO_GUIDANCE),
            arguments=one_stage,
        ),
        Pipeline(
            name="ti2vid_two_stages",
            text="Text and pictures to video, in two stages.  Guided at half the size, then twice as large "
            "with the distilled LoRA.",
            options=_TWO_STAGES,
            arguments=two_stages,
        ),
        Pipeline(
            name="ti2vid_two_stages_hq",
            text="Two stages with the sampler res_2s.  Of second order; the defaults are made for LTX-2.3.",
            options=(*_TWO_STAGES, *HQ_STRENGTHS),
            arguments=hq,
            preset=HQ_PRESET,
        ),
        Pipeline(
            name="distilled",
            text="Two stages of a distilled checkpoint.  8 and 3 steps, no guidance.",
            options=(DISTILLED_CHECKPOINT, *_GENERATED, UPSAMPLER),
            arguments=distilled,
        ),
        Pipeline(
            name="keyframe_interpolation",
            text="Two stages between keyframes.  Every picture guides as one; -1 is the last frame.",
            options=_TWO_STAGES,
            arguments=keyframes,
        ),
        Pipeline(
            name="a2vid_two_stage",
            text="Video for a given sound.  The sound is kept sample for sample.",
            options=(*_TWO_STAGES, *GIVEN_SOUND),
            arguments=a2vid,
        ),
        Pipeline(
            name="retake",
            text="A part of a clip made anew.  In picture and sound; the rest is kept.",
            options=(*COMMON, *RETAKE),
            arguments=retake,
        ),
        Pipeline(
            name="ic_lora",
            text="Video that follows reference clips.  With in-context LoRAs and a distilled checkpoint.",
            options=(DISTILLED_CHECKPOINT, *_GENERATED, UPSAMPLER, *CONDITIONING),
            arguments=ic_lora,
        ),
        Pipeline(
            name="t2a_one_stage",
            text="Sound alone, as .wav or .flac.",
            options=(CHECKPOINT, *COMMON, *LENGTH, *STEPS, *GUIDED, *AUDIO_GUIDANCE),
            arguments=t2a,
        ),
    )
}
"""By name."""
