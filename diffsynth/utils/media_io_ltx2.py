"""Clips in and out of files: H.264 and AAC in mp4, written piece by piece and never half.

``write_video_audio_ltx2`` is the public writer; the readers come from the modules of pictures and sound.
"""

import contextlib
import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from av.audio.frame import AudioFrame
from av.video.frame import VideoFrame
from av.video.reformatter import ColorRange, Colorspace
from PIL import Image
from torch import Tensor

from diffsynth.errors import OutputError, RequestError
from diffsynth.utils.audio import AAC_RATES, Waveform, read_audio
from diffsynth.utils.files import atomic_file, check_writable
from diffsynth.utils.images import (
    BT709,
    MAX_CRF,
    Clip,
    VideoInfo,
    iter_frames,
    probe_video,
    read_video,
)
from diffsynth.utils.metadata import read_request, request_tags

__all__ = [
    "Clip",
    "VideoInfo",
    "check_output_path",
    "exact_frame_rate",
    "iter_frames",
    "probe_video",
    "read_audio",
    "read_request",
    "read_video",
    "write_video_audio_ltx2",
]

logger = logging.getLogger(__name__)

Frames = Tensor | np.ndarray | Image.Image
"""uint8 (H, W, 3) or (F, H, W, 3), or a picture."""

SUFFIX = ".mp4"
ARGUMENT = "output_path"
DEFAULT_VIDEO_QUALITY = 8.0
MAX_FPS = 1000
AUDIBLE_S = 0.1
"""A sound that differs from its video by less needs no words: models make it in steps of 40 ms and leave out
the last 30 ms, AAC pads its last packet."""
_AAC_FRAME = 1024
_AAC_MAX_BITS = 6144
"""An AAC frame holds 1024 samples in at most so many bits per channel."""


def write_video_audio_ltx2(
    video: Tensor | np.ndarray | Iterable[Frames] | None,
    audio: Any,
    output_path: str | Path,
    fps: float | Fraction | None = None,
    audio_sample_rate: int | None = None,
    *,
    video_quality: float = DEFAULT_VIDEO_QUALITY,
    crf: int | None = None,
    audio_bitrate: int = 192_000,
    request: Mapping[str, Any] | None = None,
) -> Path:
    """Write an mp4: H.264 (libx264, yuv420p, BT.709) and AAC stereo, the index in front of the data.

    The file is written under a temporary name in its folder and takes its own name when it is complete; after
    any exception, also KeyboardInterrupt, nothing is left.

    Args:
        video: a list of PIL pictures, a uint8 tensor or array (F, H, W, 3), or an iterator of pictures,
            frames (H, W, 3) and chunks (f, H, W, 3), which is consumed as the file grows.
        audio: float samples in [-1, 1], (2, S), (S, 2), (1, S) or (S,); mono is doubled; or an object with
            ``waveform`` (or ``samples``) and ``sampling_rate``; or None.  It is cut, or continued with
            silence, to the length of the video.
        output_path: ends in .mp4; its folder exists.
        fps: frames per second; 23.976, 29.97, 59.94 and their like stand for n * 1000 / 1001, and are exact.
            None: the rate that ``video`` carries as ``frame_rate``, else 24.
        audio_sample_rate: Hz.  None: the rate that ``audio`` carries, else samples / duration of the video,
            taken as the nearest rate of AAC when that makes both lengths equal to within one frame.  A rate
            that AAC cannot store is resampled to the nearest that it can.
        video_quality: 0..10; crf = (1 - video_quality / 10) * 51 rounded down, so that the default 8 is
            crf 10, visually lossless.
        crf: constant rate factor of libx264, 0 (lossless) to 51, instead of ``video_quality``.
        audio_bitrate: bits per second, lowered to what AAC can hold at the rate.
        request: stored as JSON in the tags ``comment`` and ``diffsynth``; :func:`read_request` reads it.
            None: what ``video`` carries as ``record``.

    Returns: the path of the file.

    Raises:
        RequestError: an argument cannot work; nothing has been written.
        OutputError: the folder is missing, not writable or full.
    """
    path = check_output_path(output_path)
    if video is None:  # what a call with audio_only returns
        raise RequestError("video is None", hint="diffsynth.utils.audio_file.write_audio for sound alone")
    rate = _frame_rate(fps, getattr(video, "frame_rate", None))
    quality = _crf(video_quality, crf)
    tags = request_tags(getattr(video, "record", None) if request is None else request)
    sound = _sound(audio, audio_sample_rate, _count(video), rate)
    frames = _iterate(video)
    first = next(frames, None)
    if first is None:
        raise RequestError("video holds no frames", hint="at least one frame")
    height, width = _check_size(first)
    with atomic_file(path, argument=ARGUMENT) as temporary:
        try:
            with _Muxer(temporary, (width, height), rate, quality, sound, audio_bitrate, tags) as muxer:
                for frame in chain([first], frames):
                    muxer.add(frame)
                muxer.finish()
            _verify(temporary, muxer.num_frames, path)
        except av.FFmpegError as error:
            if isinstance(error, OSError):
                raise
            raise OutputError(
                f"{ARGUMENT}={path} could not be encoded: {error}", hint="another size or fps"
            ) from error
    return path


def check_output_path(path: str | Path) -> Path:
    """Make sure, before any work, that a video can be written to ``path``; nothing is left there.

    Raises:
        RequestError: the name does not end in .mp4.
        OutputError: the folder is missing or not writable, or ``path`` is a folder.
    """
    path = Path(path)
    if path.suffix.lower() != SUFFIX:
        hint = str(path.with_suffix(SUFFIX)) if path.name else f"video{SUFFIX}"
        raise RequestError(f"{ARGUMENT}={path} does not end in {SUFFIX}", hint=hint)
    return check_writable(path, argument=ARGUMENT)


def exact_frame_rate(fps: float | Fraction) -> Fraction:
    """The frame rate as a fraction: broadcast rates as n * 1000 / 1001, others to five decimal places.

    Raises RequestError outside (0, 1000].
    """
    if not isinstance(fps, int | float | Fraction) or not (math.isfinite(fps) and 0 < fps <= MAX_FPS):
        raise RequestError(f"fps={fps!r} is outside 0..{MAX_FPS}", hint="24")
    if isinstance(fps, Fraction):
        return fps
    for nominal in (24, 30, 48, 60, 120):
        broadcast = Fraction(nominal * 1000, 1001)
        # People write 23.976, 23.98, 29.97 and 59.94; no other usual rate is so near.
        if abs(fps - broadcast) < 0.005:
            return broadcast
    return max(Fraction(fps).limit_denominator(100_000), Fraction(1, 100_000))


def _frame_rate(stated: float | Fraction | None, carried: float | None) -> Fraction:
    """The stated rate, else the one that the frames were made for, else 24."""
    if stated is None:
        return exact_frame_rate(24 if carried is None else carried)
    if carried is not None and exact_frame_rate(carried) != exact_frame_rate(stated):
        logger.warning("fps=%s, but the video was made for %s frames per second", stated, carried)
    return exact_frame_rate(stated)


def _crf(video_quality: float, crf: int | None) -> int:
    if crf is None:
        if not 0 <= video_quality <= 10:
            raise RequestError(f"video_quality={video_quality} is outside 0..10", hint="8")
        return int((1 - video_quality / 10) * MAX_CRF)
    if not 0 <= crf <= MAX_CRF:
        raise RequestError(f"crf={crf} is outside 0..{MAX_CRF}", hint="10")
    return crf


def _iterate(video: Tensor | np.ndarray | Iterable[Frames]) -> Iterator[np.ndarray]:
    """Single frames (H, W, 3) uint8 from every accepted form."""
    pieces = [video] if isinstance(video, (Tensor, np.ndarray)) else video
    for piece in pieces:
        if isinstance(piece, Image.Image):
            yield np.asarray(piece.convert("RGB"))
            continue
        array = piece.numpy(force=True) if isinstance(piece, Tensor) else np.asarray(piece)
        if array.ndim not in {3, 4} or array.shape[-1] != 3 or array.dtype != np.uint8:
            raise RequestError(
                f"video frames of shape {array.shape} and {array.dtype}",
                hint="uint8, (frames, height, width, 3)",
            )
        yield from array if array.ndim == 4 else (array,)


def _count(video: Tensor | np.ndarray | Iterable[Frames]) -> int | None:
    """Number of frames where it is known before they are consumed."""
    if isinstance(video, (Tensor, np.ndarray)):
        return len(video) if video.ndim == 4 else 1
    if not isinstance(video, Sequence):
        return None
    return sum(1 if isinstance(piece, Image.Image) or piece.ndim != 4 else len(piece) for piece in video)


def _check_size(frame: np.ndarray) -> tuple[int, int]:
    height, width = frame.shape[:2]
    if height % 2 or width % 2 or not height or not width:
        smaller, larger = (
            f"{width // 2 * 2}x{height // 2 * 2}",
            f"{-(-width // 2) * 2}x{-(-height // 2) * 2}",
        )
        raise RequestError(
            f"video of {width}x{height} pixels: H.264 needs even sizes", hint=f"{smaller} or {larger}"
        )
    return height, width


def _sound(audio: Any, stated: int | None, num_frames: int | None, fps: Fraction) -> Waveform | None:
    """Stereo at a rate that AAC can store."""
    if audio is None:
        return None
    carried = getattr(audio, "sampling_rate", None)
    samples = getattr(audio, "waveform", getattr(audio, "samples", audio))
    rate = stated if stated is not None else carried
    if rate is None:
        num_samples = Waveform.of(samples, 1).num_samples
        rate = _rate_from_lengths(num_samples, num_frames, fps)
    elif rate <= 0 or rate != int(rate):
        raise RequestError(f"audio_sample_rate={rate} is not a rate in Hz", hint="48000, or 24000 for LTX-2")
    if carried is not None and rate != carried:
        logger.warning(
            "audio_sample_rate=%s, but the sound was made at %s Hz: its pitch is off", rate, carried
        )
    sound = Waveform.of(samples, int(rate)).to_stereo()
    stored = min(AAC_RATES, key=lambda r: abs(r - sound.sampling_rate))
    if stored != sound.sampling_rate:
        logger.warning("AAC cannot store %d Hz: resampled to %d Hz", sound.sampling_rate, stored)
    if not torch.isfinite(sound.samples).all():
        logger.warning("audio holds values that are not finite; NaN is written as silence")
    return sound.resample(stored)


def _rate_from_lengths(num_samples: int, num_frames: int | None, fps: Fraction) -> int:
    if not num_frames:
        raise RequestError(
            "audio_sample_rate is needed: the length of the video is not known in advance",
            hint="audio_sample_rate=48000, or 24000 for LTX-2",
        )
    duration_s = num_frames / fps
    nearest = min(AAC_RATES, key=lambda rate: abs(num_samples / rate - duration_s))
    if abs(num_samples / nearest - duration_s) < 1 / fps:
        return nearest
    return max(1, round(num_samples / duration_s))


class _Muxer:
    """Encodes frames and, in step with them, the sound; closes the container whatever happens."""

    def __init__(
        self,
        path: Path,
        size: tuple[int, int],
        fps: Fraction,
        crf: int,
        sound: Waveform | None,
        audio_bitrate: int,
        tags: Mapping[str, str],
    ) -> None:
        self.num_frames = 0
        self._size, self._fps = size, fps
        # The index in front lets a browser start at once; own tag names need the second flag.
        flags = {"movflags": "+faststart+use_metadata_tags"}
        self._container = av.open(str(path), "w", format="mp4", container_options=flags)
        self._container.metadata.update(tags)
        self._video = self._container.add_stream("libx264", rate=fps, options={"crf": str(crf)})
        self._video.width, self._video.height, self._video.pix_fmt = *size, "yuv420p"
        context = self._video.codec_context
        context.color_range = int(ColorRange.MPEG)
        context.colorspace = context.color_primaries = context.color_trc = BT709
        self._audio = None
        if sound is not None:
            rate = sound.sampling_rate
            self._audio = self._container.add_stream("aac", rate=rate, layout="stereo")
            self._audio.bit_rate = min(audio_bitrate, 2 * _AAC_MAX_BITS * rate // _AAC_FRAME)
        self._sound = sound
        self._sound_position = 0

    def __enter__(self) -> "_Muxer":
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        # After an error the file is thrown away, and closing it may well fail for the same reason again.
        with contextlib.suppress(av.FFmpegError) if kind is not None else contextlib.nullcontext():
            self._container.close()

    def add(self, array: np.ndarray) -> None:
        """Encode one frame and the sound up to its end."""
        width, height = self._size
        if array.shape[:2] != (height, width):
            found = f"{array.shape[1]}x{array.shape[0]}"
            raise RequestError(
                f"video: frame {self.num_frames} is {found}, the first is {width}x{height}",
                hint="frames of one size",
            )
        frame = VideoFrame.from_ndarray(np.ascontiguousarray(array), format="rgb24").reformat(
            format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG
        )
        frame.pts, frame.time_base = self.num_frames, 1 / self._fps
        self.num_frames += 1
        self._container.mux(self._video.encode(frame))
        self._add_sound()

    def _add_sound(self) -> None:
        """Sound from where it stopped to the end of the last frame, silence where there is no more.

        Each frame ends at its rounded share of samples, so the whole track has round(duration * rate).  The
        encoder puts its priming samples before time 0, which the file marks to be skipped, and the length
        that the file states does not count the padding of the last packet.
        """
        if self._sound is None or self._audio is None:
            return
        rate = self._sound.sampling_rate
        start, end = self._sound_position, round(self.num_frames * rate / self._fps)
        if end <= start:
            return
        piece = Waveform(self._sound.samples[:, start:end], rate).fit(end - start).samples
        # Truncated, not rounded, as the official writer does it.
        pcm = (piece.nan_to_num(0.0).clamp(-1, 1) * 32767).to(torch.int16)
        frame = AudioFrame.from_ndarray(
            pcm.T.reshape(1, -1).contiguous().numpy(), format="s16", layout="stereo"
        )
        frame.sample_rate, frame.pts, frame.time_base = rate, start, Fraction(1, rate)
        self._container.mux(self._audio.encode(frame))
        self._sound_position = end

    def finish(self) -> None:
        """Encode what the encoders still hold."""
        self._container.mux(self._video.encode(None))
        if self._sound is None or self._audio is None:
            return
        self._container.mux(self._audio.encode(None))
        surplus_s = (self._sound.num_samples - self._sound_position) / self._sound.sampling_rate
        if abs(surplus_s) > max(float(1 / self._fps), AUDIBLE_S):
            what = "cut by" if surplus_s > 0 else "continued with silence for"
            logger.warning("audio is %s %.3f s to fit the video", what, abs(surplus_s))


def _verify(path: Path, num_frames: int, shown: Path) -> None:
    """A disk that fills up while the index is moved to the front may go unnoticed by the muxer."""
    try:
        with av.open(str(path), "r") as container:
            found = container.streams.video[0].frames
    except av.FFmpegError as error:
        raise OutputError(f"{ARGUMENT}={shown} could not be written: {error}", hint="another disk") from error
    if found != num_frames:
        raise OutputError(f"{ARGUMENT}={shown} holds {found} of {num_frames} frames", hint="another disk")
