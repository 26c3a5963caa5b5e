"""What callers hand to the Python API: told by its kind, and turned into the plain fields of a request."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from diffsynth.errors import RequestError
from diffsynth.loader import ModelConfig
from diffsynth.pipelines.inputs import Clip, Picture, Sound
from diffsynth.utils.audio import Waveform


def check_models(configs: object, tokenizer: object, loras: object) -> None:
    """Make sure that models are named as :meth:`LTX2AudioVideoPipeline.from_pretrained` wants it.

    Raises:
        RequestError: an argument is of another kind.
    """
    example = "[ModelConfig(path='ltx-2-19b-dev.safetensors'), ...]"
    _check("model_configs", configs, _list_of(_is_config), example)
    if tokenizer is not None:
        _check("tokenizer_config", tokenizer, _is_config, "ModelConfig(path='gemma')")
    _check("loras", loras, _list_of(_is_lora), "[('style.safetensors', 1.0)]")


def request_fields(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a call -> fields of a request: objects become their names, lists become tuples.

    Raises:
        RequestError: pictures, clips, sounds or regions of a kind that cannot be used.
    """
    values = {key: value for key, value in arguments.items() if value is not None}
    for key, (is_right, example) in _KINDS.items():
        if key in values:
            _check(key, values[key], is_right, example)
    for key in ("input_images", "in_context_videos"):
        if key in values:
            values[key] = tuple(name_of(item) for item in values[key])
    for key in ("in_context_attention_mask", "retake_video", "retake_audio"):
        if key in values:
            values[key] = name_of(values[key])
    for key in ("retake_video_regions", "retake_audio_regions"):
        if key in values:
            values[key] = tuple((start, end) for start, end in values[key])
    for key in ("input_images_indexes", "input_images_strength", "in_context_strength"):
        if isinstance(values.get(key), Sequence) and not isinstance(values[key], str):
            values[key] = tuple(values[key])
    return values


def name_of(value: Picture | Clip | Sound) -> str:
    """What the request records: the path, or the kind and size of an object in memory."""
    if isinstance(value, str | Path):
        return str(value)
    if isinstance(value, Image.Image):
        return f"picture {value.width}x{value.height}"
    if isinstance(value, Waveform):
        return f"sound of {value.samples.shape[-1]} samples at {value.sampling_rate} Hz"
    if isinstance(value, Tensor):
        is_clip = value.ndim == 4
        return f"clip of {len(value)} frames" if is_clip else f"sound of {value.shape[-1]} samples"
    return f"clip of {len(value)} frames"


def _check(name: str, value: object, is_right: Callable[[object], bool], example: str) -> None:
    if not is_right(value):
        kind = type(value).__name__
        raise RequestError(f"{name}: this {kind} cannot be used", hint=f"{name}={example}")


def _list_of(is_right: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: (
        isinstance(value, Sequence) and not isinstance(value, str) and all(map(is_right, value))
    )


def _is_config(value: object) -> bool:
    return isinstance(value, ModelConfig)


def _is_lora(value: object) -> bool:
    return isinstance(value, Sequence) and len(value) == 2 and isinstance(value[0], str | Path | ModelConfig)


def _is_picture(value: object) -> bool:
    return isinstance(value, str | Path | Image.Image)


def _is_clip(value: object) -> bool:
    return isinstance(value, str | Path | Tensor) or _list_of(_is_picture)(value)


def _is_sound(value: object) -> bool:
    return isinstance(value, str | Path | Tensor | Waveform)


def _is_region(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str) and len(value) == 2


_KINDS: Mapping[str, tuple[Callable[[object], bool], str]] = {
    "input_images": (_list_of(_is_picture), "[Image.open('first.png')], or a list of paths"),
    "in_context_videos": (_list_of(_is_clip), "['reference.mp4'], or a list of lists of PIL images"),
    "in_context_attention_mask": (_is_clip, "'mask.mp4', or a list of PIL images"),
    "retake_video": (_is_clip, "'clip.mp4', or a list of PIL images"),
    "retake_audio": (_is_sound, "'sound.wav', or a float tensor (channels, samples)"),
    "retake_video_regions": (_list_of(_is_region), "[(1.0, 3.0)], in seconds"),
    "retake_audio_regions": (_list_of(_is_region), "[(1.0, 3.0)], in seconds"),
}
"""Argument -> whether a value of it can be used, and one that can."""
