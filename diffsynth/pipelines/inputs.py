"""Pictures, clips and sounds as users hand them over -> the objects of a generation and their names."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from diffsynth.errors import RequestError
from diffsynth.request import GenerateRequest
from diffsynth.utils.audio import Waveform
from diffsynth.utils.images import frames_to_images, load_image
from diffsynth.utils.media_io_ltx2 import read_audio, read_video

logger = logging.getLogger(__name__)

Picture = str | Path | Image.Image
Clip = str | Path | Sequence[Image.Image]
Sound = str | Path | Tensor | Waveform


@dataclass(frozen=True, kw_only=True, slots=True)
class Inputs:
    """The objects that a request names: pictures, clips (tuples of pictures) and a sound."""

    images: tuple[Image.Image, ...] = ()
    in_context_videos: tuple[tuple[Image.Image, ...], ...] = ()
    retake_video: tuple[Image.Image, ...] | None = None
    retake_audio: Waveform | None = None

    def check(self, request: GenerateRequest) -> None:
        """Make sure that these are the objects of ``request``.

        Raises:
            RequestError: the request names more or fewer of them.
        """
        for name, here, named in (
            ("input_images", len(self.images), len(request.input_images)),
            ("in_context_videos", len(self.in_context_videos), len(request.in_context_videos)),
            ("retake_video", self.retake_video is not None, request.retake_video is not None),
            ("retake_audio", self.retake_audio is not None, request.retake_audio is not None),
        ):
            if here != named:
                raise RequestError(
                    f"{name}: the request names {int(named)}, {int(here)} came with it",
                    hint="inputs=None reads what the request names",
                )


def inputs_by_path(request: GenerateRequest) -> Inputs:
    """Read everything that a request names.

    Raises:
        RequestError: see :func:`load_inputs`.
    """
    return load_inputs(
        request,
        input_images=request.input_images,
        in_context_videos=request.in_context_videos,
        retake_video=request.retake_video,
        retake_audio=request.retake_audio,
    )


def name_of(value: Picture | Clip | Sound) -> str:
    """What the request records: the path, or the kind and size of an object in memory."""
    if isinstance(value, str | Path):
        return str(value)
    if isinstance(value, Image.Image):
        return f"picture {value.width}x{value.height}"
    if isinstance(value, Waveform):
        return f"sound of {value.samples.shape[-1]} samples at {value.sampling_rate} Hz"
    if isinstance(value, Tensor):
        return f"sound of {value.shape[-1]} samples"
    return f"clip of {len(value)} frames"


def load_inputs(
    request: GenerateRequest,
    *,
    input_images: Sequence[Picture] = (),
    in_context_videos: Sequence[Clip] = (),
    retake_video: Clip | None = None,
    retake_audio: Sound | None = None,
) -> Inputs:
    """Read what is given by path, and check what can be checked before any weight is touched.

    Of clips that are longer than the video the beginning counts; of the one to retake, a warning says so.

    Raises:
        RequestError: something cannot be read, or a clip is shorter than the video.
    """
    # One frame more than needed shows that there are more.
    retaken = None if retake_video is None else _clip("retake_video", retake_video, request.num_frames + 1)
    if retaken is not None and len(retaken) > request.num_frames:
        retaken = retaken[: request.num_frames]
        logger.warning(
            "retake_video is longer than num_frames=%d: what follows is left out", request.num_frames
        )
    if retaken is not None and len(retaken) != request.num_frames:
        raise RequestError(
            f"retake_video has {len(retaken)} frames, num_frames is {request.num_frames}",
            hint=f"num_frames={(len(retaken) - 1) // 8 * 8 + 1}" if retaken else "a clip with frames",
        )
    return Inputs(
        images=tuple(load_image(image, argument="input_images") for image in input_images),
        in_context_videos=tuple(_clip("in_context_videos", c, request.num_frames) for c in in_context_videos),
        retake_video=retaken,
        retake_audio=None if retake_audio is None else _sound(retake_audio, request.audio_sample_rate),
    )


def _clip(argument: str, value: Clip, frame_cap: int) -> tuple[Image.Image, ...]:
    if isinstance(value, str | Path):
        return tuple(frames_to_images(read_video(value, frame_cap=frame_cap, argument=argument).frames))
    frames = tuple(load_image(frame, argument=argument) for frame in value)[:frame_cap]
    if not frames:
        raise RequestError(f"{argument} holds a clip without frames", hint="a list of pictures")
    return frames


def _sound(value: Sound, rate: int) -> Waveform:
    if isinstance(value, Waveform):
        return value
    if isinstance(value, str | Path):
        return read_audio(Path(value), argument="retake_audio")
    if value.ndim not in (1, 2) or not torch.is_floating_point(value):
        raise RequestError(
            f"retake_audio is a {value.dtype} tensor of shape {tuple(value.shape)}",
            hint="float samples of shape (channels, samples) in [-1, 1]",
        )
    return Waveform(value.float().cpu().reshape(-1, value.shape[-1]), rate)


def request_fields(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a call -> fields of a request: objects become their names, lists become tuples."""
    values = {key: value for key, value in arguments.items() if value is not None}
    for key in ("input_images", "in_context_videos"):
        if key in values:
            values[key] = tuple(name_of(item) for item in values[key])
    for key in ("retake_video", "retake_audio"):
        if key in values:
            values[key] = name_of(values[key])
    for key in ("retake_video_regions", "retake_audio_regions"):
        if key in values:
            values[key] = tuple((start, end) for start, end in values[key])
    for key in ("input_images_indexes", "input_images_strength"):
        if isinstance(values.get(key), Sequence):
            values[key] = tuple(values[key])
    return values
