"""Sound in memory and out of files."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Self

import av
import numpy as np
import torch
from av.audio.frame import AudioFrame
from av.audio.resampler import AudioResampler
from av.audio.stream import AudioStream
from torch import Tensor

from diffsynth.errors import RequestError
from diffsynth.utils.files import unreadable

logger = logging.getLogger(__name__)

AAC_RATES = (7350, 8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000, 64000, 88200, 96000)
"""Sampling rates that AAC can store, in Hz."""

_SEEK_MARGIN_S = 0.5
"""Compressed audio needs the packets before a place to decode it right."""


@dataclass(frozen=True, slots=True, eq=False)
class Waveform:
    """Sound: ``samples`` (channels, samples) float32, nominally in [-1, 1]; ``sampling_rate`` in Hz."""

    samples: Tensor
    sampling_rate: int

    def __post_init__(self) -> None:
        if self.samples.ndim != 2 or self.samples.dtype != torch.float32:
            layout = f"{tuple(self.samples.shape)} {self.samples.dtype}"
            raise RequestError(
                f"a waveform is (channels, samples) float32, not {layout}",
                hint="Waveform.of(audio, rate), which accepts other layouts",
            )
        if self.sampling_rate <= 0:
            raise RequestError(f"sampling rate {self.sampling_rate} Hz", hint="48000")

    @classmethod
    def of(cls, audio: Any, sampling_rate: int) -> Self:
        """From a float tensor or array: (2, S), (S, 2), (1, S), (S, 1), (S,), or with a batch of one.

        Samples come to the CPU as float32.  Raises RequestError for other shapes, integers and no samples.
        """
        samples = torch.as_tensor(audio).detach()
        shape = tuple(samples.shape)
        if not samples.is_floating_point():
            raise RequestError(f"audio of {samples.dtype}", hint="float samples in [-1, 1]")
        if samples.ndim == 3 and shape[0] == 1:
            samples = samples[0]
        if samples.ndim == 1:
            samples = samples[None]
        if samples.ndim == 2 and samples.shape[0] not in {1, 2} and samples.shape[1] in {1, 2}:
            samples = samples.T
        if samples.ndim != 2 or samples.shape[0] not in {1, 2} or not samples.shape[1]:
            raise RequestError(
                f"audio of shape {shape} is neither mono nor stereo", hint="shape (2, samples), or audio=None"
            )
        return cls(samples.to("cpu", torch.float32).contiguous(), sampling_rate)

    @property
    def num_samples(self) -> int:
        """Samples per channel."""
        return self.samples.shape[1]

    @property
    def duration_s(self) -> float:
        """Length in seconds."""
        return self.num_samples / self.sampling_rate

    def to_stereo(self) -> "Waveform":
        """Two channels; mono is doubled.  Raises RequestError for more, whose layout is not known here."""
        channels = self.samples.shape[0]
        if channels > 2:
            raise RequestError(f"audio of {channels} channels", hint="a mono or stereo mix")
        return Waveform(self.samples.expand(2, -1), self.sampling_rate)

    def fit(self, num_samples: int) -> "Waveform":
        """Exactly ``num_samples`` per channel: cut at the end, or continued with silence."""
        missing = num_samples - self.num_samples
        samples = torch.nn.functional.pad(self.samples, (0, missing))
        return Waveform(samples, self.sampling_rate)

    def resample(self, sampling_rate: int) -> "Waveform":
        """Another sampling rate in Hz, by the resampler of the media library: for files, not for networks."""
        if sampling_rate == self.sampling_rate:
            return self
        layout = "mono" if self.samples.shape[0] == 1 else "stereo"
        resampler = AudioResampler(format="fltp", layout=layout, rate=sampling_rate)
        frame = AudioFrame.from_ndarray(self.samples.contiguous().numpy(), format="fltp", layout=layout)
        frame.sample_rate = self.sampling_rate
        pieces = [out.to_ndarray() for source in (frame, None) for out in resampler.resample(source)]
        wanted = round(self.num_samples * sampling_rate / self.sampling_rate)
        resampled = torch.from_numpy(np.concatenate(pieces, axis=1).astype(np.float32, copy=False))
        return Waveform(resampled, sampling_rate).fit(wanted)


def read_audio(
    path: str | Path, start_s: float = 0.0, max_duration_s: float | None = None, *, argument: str = "audio"
) -> Waveform:
    """Read a part of the first sound track of a file, at its own rate.

    Args:
        path: any sound or video file that the media library can read.
        start_s: where to begin, in seconds.
        max_duration_s: length in seconds, the rest of the file by default.
        argument: the argument of the request that errors name.

    Returns: one or two channels; more are mixed down to stereo by their layout.  Integer samples are divided
    by their range (128, 32768, 2147483648; unsigned bytes are centred first).  Shorter than asked where the
    file ends; silence in front where the track begins late.

    Raises:
        RequestError: no file, no sound track, damaged content, or nothing at ``start_s``.
    """
    if start_s < 0 or (max_duration_s is not None and max_duration_s <= 0):
        raise RequestError(
            f"{argument}: {start_s=}, {max_duration_s=}", hint="a start from 0, a positive length"
        )
    try:
        with av.open(str(path), "r") as container:
            if not container.streams.audio:
                raise RequestError(f"{argument}={path} has no sound track", hint="another file")
            stream = container.streams.audio[0]
            # Some containers begin their clock elsewhere than at 0.
            begin_s = start_s + max(0.0, (container.start_time or 0) / av.time_base)
            end_s = None if max_duration_s is None else begin_s + max_duration_s
            if start_s > 0:
                target_s = max(0.0, begin_s - _SEEK_MARGIN_S)
                container.seek(round(target_s / _time_base(stream)), stream=stream, backward=True)
            frames = list(_overlapping(container.decode(stream), begin_s, end_s))
            rate = stream.sample_rate
    except (av.FFmpegError, OSError) as error:
        raise unreadable(argument, path, error) from error
    if not frames:
        raise RequestError(f"{argument}={path} has no sound at {start_s} s", hint="an earlier start")
    first_s = begin_s if frames[0].time is None else float(frames[0].time)
    # Negative where the track begins late: silence keeps it in step with the pictures.
    samples = torch.nn.functional.pad(_join(frames), (-round((begin_s - first_s) * rate), 0))
    if max_duration_s is not None:
        samples = samples[:, : round(max_duration_s * rate)]
    if samples.shape[1] == 0:
        raise RequestError(f"{argument}={path} has no sound at {start_s} s", hint="an earlier start")
    return Waveform(samples.contiguous(), rate)


def sound_length(path: str | Path, *, argument: str = "audio") -> float:
    """Seconds of the first sound track of a file, as its header states them; of files without such a header
    they are counted by decoding.

    Raises:
        RequestError: no file, no sound track, or damaged content.
    """
    try:
        with av.open(str(path), "r") as container:
            if container.streams.audio:
                stream = container.streams.audio[0]
                if stream.duration is not None:
                    return float(stream.duration * _time_base(stream))
                if container.duration is not None:
                    return container.duration / av.time_base
    except (av.FFmpegError, OSError) as error:
        raise unreadable(argument, path, error) from error
    return read_audio(path, argument=argument).duration_s


def _time_base(stream: AudioStream) -> Fraction:
    return stream.time_base or Fraction(1, stream.sample_rate)


def _overlapping(frames: Iterator[AudioFrame], start_s: float, end_s: float | None) -> Iterator[AudioFrame]:
    """The frames that overlap [start, end); time goes on by the samples where a file states none."""
    clock_s = 0.0
    for frame in frames:
        begin_s = clock_s if frame.time is None else float(frame.time)
        clock_s = begin_s + frame.samples / frame.sample_rate
        if end_s is not None and begin_s >= end_s:
            return
        if clock_s > start_s:
            yield frame


def _join(frames: list[AudioFrame]) -> Tensor:
    """All frames as (channels, samples) float32, with more than two channels mixed down."""
    if len(frames[0].layout.channels) <= 2:
        return torch.cat([_to_float(frame) for frame in frames], dim=1)
    logger.info("%d channels are mixed down to stereo", len(frames[0].layout.channels))
    mixer = AudioResampler(format="fltp", layout="stereo", rate=frames[0].sample_rate)
    mixed = [out for source in (*frames, None) for out in mixer.resample(source)]
    return torch.cat([_to_float(frame) for frame in mixed], dim=1)


def _to_float(frame: AudioFrame) -> Tensor:
    """One frame as (channels, samples) float32."""
    channels = len(frame.layout.channels)
    array = frame.to_ndarray()
    # Packed formats come as one row of interleaved samples.
    interleaved = array if frame.format.is_planar else array.reshape(-1, channels).T
    samples = torch.from_numpy(np.ascontiguousarray(interleaved))
    if samples.dtype == torch.uint8:
        return (samples.float() - 128) / 128
    if not samples.is_floating_point():
        return (samples.double() / -torch.iinfo(samples.dtype).min).float()
    return samples.float()
