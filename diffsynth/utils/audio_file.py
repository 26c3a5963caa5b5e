"""Writing sound alone to a file, without loss beyond 16 bits per sample."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import av
import torch
from av import AudioFrame, AudioStream

from diffsynth.errors import OutputError, RequestError
from diffsynth.utils.audio import Waveform
from diffsynth.utils.files import atomic_file, check_writable
from diffsynth.utils.metadata import request_tags

CODECS: Mapping[str, str] = {".wav": "pcm_s16le", ".flac": "flac"}
"""Suffix of the file -> codec."""

_ARGUMENT = "output_path"
_CHUNK_SAMPLES = 4096


def check_audio_path(path: str | Path) -> Path:
    """Make sure, before any work, that sound can be written to ``path``; nothing is left there.

    Raises:
        RequestError: the suffix is not one of :data:`CODECS`.
        OutputError: the folder is missing or not writable, or ``path`` is a folder.
    """
    path = Path(path)
    if path.suffix.lower() not in CODECS:
        raise RequestError(
            f"{_ARGUMENT}={path} is no name for sound alone",
            hint=" or ".join((path.stem or "sound") + suffix for suffix in CODECS),
        )
    return check_writable(path, argument=_ARGUMENT)


def write_audio(
    sound: Waveform, output_path: str | Path, *, request: Mapping[str, Any] | None = None
) -> Path:
    """Write a .wav or .flac file of 16 bits; after any exception nothing is left.

    Samples are clipped to [-1, 1], multiplied by 32767 and truncated, as in a video.

    Args:
        sound: mono or stereo.
        output_path: its suffix says the format; its folder exists.
        request: stored as JSON in the metadata, see :func:`~diffsynth.utils.metadata.read_request`.

    Returns: the path of the file.

    Raises:
        RequestError, OutputError: see :func:`check_audio_path`; the disk is full.
    """
    path = check_audio_path(output_path)
    suffix = path.suffix.lower()
    stereo = sound.to_stereo()
    pcm = (stereo.samples.nan_to_num(0.0).clamp(-1, 1) * 32767).to(torch.int16).T.contiguous()
    with atomic_file(path, argument=_ARGUMENT) as temporary:
        try:
            with av.open(str(temporary), "w", format=suffix.removeprefix(".")) as container:
                container.metadata.update(request_tags(request))
                stream = container.add_stream(CODECS[suffix], rate=stereo.sampling_rate, layout="stereo")
                assert isinstance(stream, AudioStream), "the codecs are those of sound"
                for first in range(0, len(pcm), _CHUNK_SAMPLES):
                    piece = pcm[first : first + _CHUNK_SAMPLES].reshape(1, -1).numpy()
                    frame = AudioFrame.from_ndarray(piece, format="s16", layout="stereo")
                    frame.sample_rate, frame.pts = stereo.sampling_rate, first
                    container.mux(stream.encode(frame))
                container.mux(stream.encode(None))
        except av.FFmpegError as error:
            if isinstance(error, OSError):
                raise
            raise OutputError(
                f"{_ARGUMENT}={path} could not be encoded: {error}", hint="another rate"
            ) from error
    return path
