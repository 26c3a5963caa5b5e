"""Pictures, clips and sounds as users hand them over -> the objects of a generation and their names."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self, TypedDict

import torch
from PIL import Image
from torch import Tensor

from diffsynth.errors import RequestError
from diffsynth.models.ltx2.mel import MelConfig, prepare_waveform
from diffsynth.request import TEMPORAL_STEP, GenerateRequest
from diffsynth.utils.audio import Waveform
from diffsynth.utils.images import load_image, probe_video
from diffsynth.utils.media_io_ltx2 import AUDIBLE_S, read_audio, read_video

logger = logging.getLogger(__name__)

Picture = str | Path | Image.Image
Clip = str | Path | Sequence[Image.Image] | Tensor
ClipFrames = Sequence[Image.Image] | Tensor
"""Pictures, or a tensor (F, H, W, 3) of values in 0..255."""
Sound = str | Path | Tensor | Waveform


class Clips(TypedDict):
    """Everything that must be as long as the video."""

    in_context_videos: Sequence[Clip]
    in_context_attention_mask: Clip | None
    retake_video: Clip | None


BEYOND_S = 1.0
"""A sound is read so much further than the video goes, to tell whether it goes on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Inputs:
    """The objects that a request names: pictures, clips and a stereo sound that begins with the video."""

    images: tuple[Image.Image, ...] = ()
    in_context_videos: tuple[ClipFrames, ...] = ()
    in_context_attention_mask: ClipFrames | None = None
    retake_video: ClipFrames | None = None
    retake_audio: Waveform | None = None

    def check(self, request: GenerateRequest) -> None:
        """Make sure that these are the objects of ``request``, and long enough for it.

        Raises:
            RequestError: the request names more or fewer of them, a clip is too short, or the sound has more
                than two channels.
        """
        mask = self.in_context_attention_mask
        for name, here, named in (
            ("input_images", len(self.images), len(request.input_images)),
            ("in_context_videos", len(self.in_context_videos), len(request.in_context_videos)),
            (
                "in_context_attention_mask",
                mask is not None,
                request.in_context_attention_mask is not None,
            ),
            ("retake_video", self.retake_video is not None, request.retake_video is not None),
            ("retake_audio", self.retake_audio is not None, request.retake_audio is not None),
        ):
            if here != named:
                raise RequestError(
                    f"{name}: the request names {int(named)}, {int(here)} came with it",
                    hint="inputs=None reads what the request names",
                )
        if self.retake_audio is not None:
            self.retake_audio.to_stereo()
        self.check_lengths(request)

    def check_lengths(self, request: GenerateRequest) -> None:
        """Every clip has the frames of the video, and the mask those of the reference clips.

        Raises:
            RequestError: it names the clip and the nearest legal length.
        """
        for name, clip in self._clips():
            if len(clip) < request.num_frames:
                legal = _legal_length(len(clip))
                raise RequestError(
                    f"{name} has {len(clip)} frames, num_frames is {request.num_frames}",
                    hint=f"num_frames={legal}, which fit=True (--fit) takes, or a longer clip",
                )
        mask = self.in_context_attention_mask
        for number, clip in enumerate(self.in_context_videos):
            if mask is not None and len(mask) != len(clip):
                raise RequestError(
                    f"in_context_attention_mask is of another length than in_context_videos[{number}]: "
                    f"{_at_least(mask, request)} frames, not {_at_least(clip, request)}",
                    hint="a mask with one frame for each frame of the clip",
                )

    def clips(self) -> Clips:
        """Those that must be as long as the video, as :func:`fit_request` takes them."""
        return {
            "in_context_videos": self.in_context_videos,
            "in_context_attention_mask": self.in_context_attention_mask,
            "retake_video": self.retake_video,
        }

    def cut(self, num_frames: int) -> Self:
        """Clips with no more frames than these."""
        mask, retaken = self.in_context_attention_mask, self.retake_video
        return replace(
            self,
            in_context_videos=tuple(clip[:num_frames] for clip in self.in_context_videos),
            in_context_attention_mask=None if mask is None else mask[:num_frames],
            retake_video=None if retaken is None else retaken[:num_frames],
        )

    def _clips(self) -> Iterator[tuple[str, ClipFrames]]:
        if self.retake_video is not None:
            yield "retake_video", self.retake_video
        for number, clip in enumerate(self.in_context_videos):
            yield f"in_context_videos[{number}]", clip
        if self.in_context_attention_mask is not None:
            yield "in_context_attention_mask", self.in_context_attention_mask


def fit_request(
    request: GenerateRequest,
    *,
    in_context_videos: Sequence[Clip] | None = None,
    in_context_attention_mask: Clip | None = None,
    retake_video: Clip | None = None,
) -> GenerateRequest:
    """With ``fit``, the request with no more frames than its clips have; otherwise the request itself.

    Args:
        in_context_videos, in_context_attention_mask, retake_video: instead of what the request names.

    Raises:
        RequestError: a clip cannot be read, or the shorter request cannot work.
    """
    if not request.fit:
        return request
    mask, retaken = in_context_attention_mask, retake_video
    clips: list[tuple[str, Clip | None]] = [
        ("in_context_videos", clip)
        for clip in (request.in_context_videos if in_context_videos is None else in_context_videos)
    ]
    clips.append(("in_context_attention_mask", request.in_context_attention_mask if mask is None else mask))
    clips.append(("retake_video", request.retake_video if retaken is None else retaken))
    lengths = [_length(name, clip) for name, clip in clips if clip is not None]
    longest = min((_legal_length(length) for length in lengths), default=request.num_frames)
    if longest >= request.num_frames:
        return request
    logger.warning("num_frames=%s is cut to %s to fit the given clips", request.num_frames, longest)
    return replace(request, num_frames=longest).validate()


def _length(argument: str, clip: Clip) -> int:
    return probe_video(clip, argument=argument).num_frames if isinstance(clip, str | Path) else len(clip)


def _legal_length(num_frames: int) -> int:
    """The largest 8k+1 that is not above."""
    return max(num_frames - 1, 0) // TEMPORAL_STEP * TEMPORAL_STEP + 1


def _at_least(clip: ClipFrames, request: GenerateRequest) -> str:
    """A number of frames; clips are read one frame further than the video goes, no more."""
    return f"more than {request.num_frames}" if len(clip) > request.num_frames else str(len(clip))


def inputs_by_path(request: GenerateRequest) -> Inputs:
    """Read everything that a request names.

    Raises:
        RequestError: see :func:`load_inputs`.
    """
    return load_inputs(
        request,
        input_images=request.input_images,
        in_context_videos=request.in_context_videos,
        in_context_attention_mask=request.in_context_attention_mask,
        retake_video=request.retake_video,
        retake_audio=request.retake_audio,
    )


def load_inputs(
    request: GenerateRequest,
    *,
    input_images: Sequence[Picture] = (),
    in_context_videos: Sequence[Clip] = (),
    in_context_attention_mask: Clip | None = None,
    retake_video: Clip | None = None,
    retake_audio: Sound | None = None,
) -> Inputs:
    """Read what is given by path, and check what can be checked before any weight is touched.

    Of clips that are longer than the video the beginning counts, and their frames are taken one by one
    whatever the frame rate of their files; warnings say so.

    Raises:
        RequestError: something cannot be read, or a clip is shorter than the video.
    """
    mask = in_context_attention_mask
    inputs = Inputs(
        images=tuple(load_image(image, argument="input_images") for image in input_images),
        in_context_videos=tuple(_clip("in_context_videos", clip, request) for clip in in_context_videos),
        in_context_attention_mask=None if mask is None else _clip("in_context_attention_mask", mask, request),
        retake_video=None if retake_video is None else _clip("retake_video", retake_video, request),
        retake_audio=None if retake_audio is None else _sound(retake_audio, request),
    )
    inputs.check_lengths(request)
    _tell_size(inputs.retake_video, request)
    return inputs.cut(request.num_frames)


def _tell_size(clip: ClipFrames | None, request: GenerateRequest) -> None:
    """A clip of another size is no mistake, but what happens to it is said."""
    if clip is None:
        return
    first = clip[0]
    size = first.size if isinstance(first, Image.Image) else (first.shape[1], first.shape[0])
    if size != (request.width, request.height):
        logger.warning(
            "retake_video is %sx%s: it is resized and cropped to %sx%s", *size, request.width, request.height
        )


def _tell_rate(argument: str, fps: float, request: GenerateRequest) -> None:
    """Frames are not converted to another rate; where that makes a frame of difference, it is said."""
    if abs(1 - request.frame_rate / fps) * request.num_frames >= 1:
        logger.warning(
            "%s has %.5g frames per second, frame_rate is %.5g: its frames are taken as they are, "
            "so that what they show runs at %.2f times its speed",
            argument,
            fps,
            request.frame_rate,
            request.frame_rate / fps,
        )


def _clip(argument: str, value: Clip, request: GenerateRequest) -> ClipFrames:
    frame_cap = request.num_frames + 1
    if isinstance(value, str | Path):
        clip = read_video(value, frame_cap=frame_cap, argument=argument)
        frames: ClipFrames = clip.frames
        _tell_rate(argument, float(clip.fps), request)
    elif isinstance(value, Tensor):
        if value.ndim != 4 or value.shape[-1] != 3:
            raise RequestError(
                f"{argument} is a tensor of shape {tuple(value.shape)}",
                hint="(frames, height, width, 3), values in 0..255",
            )
        frames = value[:frame_cap].cpu()
    else:
        frames = tuple(load_image(frame, argument=argument) for frame in value[:frame_cap])
    if not len(frames):
        raise RequestError(f"{argument} holds a clip without frames", hint="a list of pictures")
    if len(frames) == frame_cap:
        logger.warning("%s is longer than num_frames=%d: what follows is left out", argument, frame_cap - 1)
    return frames


def _sound(value: Sound, request: GenerateRequest) -> Waveform:
    """The part of a sound that goes with the video, in stereo."""
    start_s, limit_s = request.audio_start_time, request.audio_max_duration
    video_s = request.num_frames / request.frame_rate
    wanted_s = video_s + BEYOND_S if limit_s is None else limit_s
    if isinstance(value, str | Path):
        sound = read_audio(value, start_s, wanted_s, argument="retake_audio")
    else:
        sound = _part(_waveform(value, request.audio_sample_rate), start_s, wanted_s)
    if not torch.isfinite(sound.samples).all():
        raise RequestError("retake_audio holds samples that are not finite", hint="numbers in [-1, 1]")
    if not sound.samples.any():
        logger.warning("retake_audio is silent: there is nothing in it that the video could follow")
    unheard_s = max(1 / request.frame_rate, AUDIBLE_S)
    if sound.duration_s - video_s > unheard_s:
        logger.warning("retake_audio goes on after the video, which lasts %.3f s: it is cut there", video_s)
    elif video_s - sound.duration_s > unheard_s:
        logger.warning(
            "retake_audio ends after %.3f s, the video after %.3f s: silence follows",
            sound.duration_s,
            video_s,
        )
    rate = sound.sampling_rate
    stereo = prepare_waveform(sound.samples, rate, MelConfig(sampling_rate=rate))[0]
    return Waveform(stereo.contiguous(), rate)


def _waveform(value: Tensor | Waveform, rate: int) -> Waveform:
    if isinstance(value, Waveform):
        return value
    if value.ndim not in (1, 2) or not torch.is_floating_point(value) or not value.numel():
        raise RequestError(
            f"retake_audio is a {value.dtype} tensor of shape {tuple(value.shape)}",
            hint="float samples of shape (channels, samples) in [-1, 1]",
        )
    return Waveform(value.float().cpu().reshape(-1, value.shape[-1]), rate)


def _part(sound: Waveform, start_s: float, duration_s: float) -> Waveform:
    rate = sound.sampling_rate
    first = round(start_s * rate)
    if first >= sound.num_samples:
        raise RequestError(f"retake_audio has no sound at {start_s} s", hint="an earlier audio_start_time")
    return Waveform(sound.samples[:, first : first + round(duration_s * rate)], rate)
