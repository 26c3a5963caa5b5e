"""Command-line options made from the fields of :class:`~diffsynth.request.GenerateRequest`, one each."""

import inspect
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import Field, fields
from typing import Annotated, Any

import typer

from diffsynth.errors import RequestError
from diffsynth.request import GenerateRequest, GuidanceParams, Region
from diffsynth.validation import freeze

PANELS: Mapping[str, tuple[str, ...]] = {
    "Mode": ("use_two_stage_pipeline", "use_distilled_pipeline", "audio_only", "conventions"),
    "Size and time": ("height", "width", "num_frames", "frame_rate", "fit"),
    "Pictures, clips and sounds": (
        "input_images",
        "input_images_indexes",
        "input_images_strength",
        "input_images_crf",
        "input_images_as_keyframes",
        "in_context_videos",
        "in_context_downsample_factor",
        "in_context_temporal_factor",
        "in_context_strength",
        "in_context_attention_strength",
        "in_context_attention_mask",
        "retake_video",
        "retake_video_regions",
        "retake_audio",
        "audio_sample_rate",
        "retake_audio_regions",
        "audio_start_time",
        "audio_max_duration",
    ),
    "Tiles": (
        "tiled",
        "tile_size_in_pixels",
        "tile_overlap_in_pixels",
        "tile_size_in_frames",
        "tile_overlap_in_frames",
    ),
}
DEFAULT_PANEL = "Sampling"
SHORT_NAMES: Mapping[str, str] = {
    "use_two_stage_pipeline": "--two-stage",
    "use_distilled_pipeline": "--distilled",
    "input_images": "--image",
    "input_images_indexes": "--image-index",
    "input_images_strength": "--image-strength",
    "num_inference_steps": "--steps",
    "num_frames": "--frames",
}
POSITIONAL = frozenset({"prompt"})


def option_names(field: Field[Any]) -> list[str]:
    """The long name follows the field; a few have a short one as well."""
    name = "--" + field.name.replace("_", "-")
    names = [name, *filter(None, [SHORT_NAMES.get(field.name)])]
    if field.type is bool and field.default:
        names = [f"{n}/--no-{n[2:]}" for n in names]
    return names


def request_options(command: Callable[..., None]) -> Callable[..., None]:
    """Replace ``**request`` of a command by one option per field of the request, except positional ones."""
    signature = inspect.signature(command)
    own = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    added = list(_parameters())
    command.__signature__ = signature.replace(parameters=[*own, *added])  # type: ignore[attr-defined]
    command.__annotations__ = {
        **{p.name: p.annotation for p in own},
        **{p.name: p.annotation for p in added},
        "return": None,
    }
    return command


def parse_request(values: Mapping[str, Any]) -> GenerateRequest:
    """Turn option values into a request; options that were left out keep the request's default.

    Raises:
        RequestError: JSON or START:END that cannot be read; the option is named.
    """
    given: dict[str, Any] = {}
    for field in fields(GenerateRequest):
        value = values.get(field.name)
        if value in (None, [], ()):
            continue
        given[field.name] = _parse(field, value)
    return GenerateRequest(**given)


def _parameters() -> Iterator[inspect.Parameter]:
    panel_of = {name: panel for panel, names in PANELS.items() for name in names}
    for field in fields(GenerateRequest):
        if field.name in POSITIONAL:
            continue
        option = typer.Option(
            *option_names(field),
            help=str(field.metadata["help"]),
            rich_help_panel=panel_of.get(field.name, DEFAULT_PANEL),
            show_default=field.default not in (None, ()),
        )
        annotation, default = _option_type(field)
        yield inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            annotation=Annotated[annotation, option],
            default=default,
        )


def _option_type(field: Field[Any]) -> tuple[Any, Any]:
    """The type that the command line parses, and its default."""
    if field.type in (bool, int, float, str):
        return field.type, field.default
    parsed: Mapping[Any, Any] = {
        int | None: int | None,
        float | None: float | None,
        tuple[int, ...]: list[int] | None,
        float | tuple[float, ...]: list[float] | None,
        tuple[str, ...]: list[str] | None,
        tuple[Region, ...]: list[str] | None,
    }
    return parsed.get(field.type, str | None), None


def _parse(field: Field[Any], value: Any) -> Any:
    if field.type == GuidanceParams | None:
        return _guidance(field.name, value)
    if field.type == tuple[Region, ...]:
        return tuple(_region(field.name, text) for text in value)
    if field.type == float | tuple[float, ...]:
        return value[0] if len(value) == 1 else tuple(value)
    return tuple(value) if isinstance(value, list) else value


def _guidance(name: str, text: str) -> GuidanceParams:
    option = f"--{name.replace('_', '-')}"
    hint = """'{"cfg_scale": 3, "rescale_scale": 0.7}'"""
    try:
        values = json.loads(text)
    except ValueError as error:
        raise RequestError(f"{option}: {error}", hint=hint) from error
    if not isinstance(values, dict):
        raise RequestError(f"{option}: {text} is no JSON object", hint=hint)
    known = [field.name for field in fields(GuidanceParams)]
    unknown = sorted(values.keys() - set(known))
    if unknown:
        raise RequestError(f"{option}: {', '.join(unknown)} not known", hint=", ".join(known))
    return GuidanceParams(**{key: freeze(value) for key, value in values.items()})


def _region(name: str, text: str) -> tuple[float, float]:
    start, _, end = text.partition(":")
    try:
        return float(start), float(end)
    except ValueError as error:
        raise RequestError(f"--{name.replace('_', '-')}={text} is not START:END", hint="1.0:3.0") from error
