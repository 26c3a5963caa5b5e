"""Samples on the disk: what a clip and its caption become before training, one file each, and their index.

C channels, F latent frames, H/W latent rows and columns, T audio latents, M mel bins, S text positions.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from diffsynth.conditioning.text import PromptContext
from diffsynth.errors import CheckpointError, OutputError
from diffsynth.utils.files import atomic_file, write_file

FORMAT = "diffsynth sample 1"
INDEX = "index.json"
_SHAPES = {
    "video_shape": "video_latent",
    "audio_shape": "audio_latent",
    "reference_shape": "reference_latent",
    "audio_reference_shape": "audio_reference_latent",
    "video_mask_shape": "video_mask",
    "audio_mask_shape": "audio_mask",
}
"""Name in the index -> tensor of the file."""
_AGAIN = "run `diffsynth preprocess` with this configuration"


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleEntry:
    """What the index says of a sample.

    Attributes:
        file: its name in the folder.
        source: the clip that it was made of.
        caption: as it was encoded.
        video_shape: (C, F, H, W) of the latent; None without pictures.
        audio_shape: (C, T, M); None without sound.
        reference_shape: (C, F, H, W) of the latent of a reference clip; None without one.
        fps: frames per second of the clip; of sound alone, its latents.
        audio_reference_shape: (C, T, M) of the latent of a reference sound; None without one.
        video_mask_shape, audio_mask_shape: (F, H, W) and (T,); None without masks.
    """

    file: str
    source: str
    caption: str
    video_shape: tuple[int, ...] | None
    audio_shape: tuple[int, ...] | None
    fps: float
    reference_shape: tuple[int, ...] | None = None
    audio_reference_shape: tuple[int, ...] | None = None
    video_mask_shape: tuple[int, ...] | None = None
    audio_mask_shape: tuple[int, ...] | None = None

    @property
    def shapes(self) -> tuple[tuple[int, ...] | None, ...]:
        """Of everything that makes up a pass: equal ones can go into one batch."""
        return tuple(getattr(self, name) for name in _SHAPES)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """From JSON.  Raises TypeError for other keys."""
        shapes = {name: None if values.get(name) is None else tuple(values[name]) for name in _SHAPES}
        return cls(**{**values, **shapes})


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Sample:
    """Latents, normalised, float32: ``video`` (1, C, F, H, W), ``audio`` (1, C, T, M); and the context.

    ``reference`` (1, C, F, H', W') is that of a clip that the video is made after, ``audio_reference``
    (1, C, T', M) that of a sound.  ``video_mask`` (1, F, H, W) and ``audio_mask`` (1, T), bool, are True
    where a clip is given.
    """

    video: Tensor | None
    audio: Tensor | None
    context: PromptContext
    fps: float
    reference: Tensor | None = None
    audio_reference: Tensor | None = None
    video_mask: Tensor | None = None
    audio_mask: Tensor | None = None

    def save(self, path: Path, *, source: str, caption: str) -> None:
        """Write a file, complete or not at all; contexts keep their dtype.

        Raises:
            OutputError: the folder is not writable or the disk is full.
        """
        named = {
            **self._latents(),
            "video_context": self.context.video,
            "audio_context": self.context.audio,
        }
        tensors = {name: tensor.cpu().contiguous() for name, tensor in named.items() if tensor is not None}
        metadata = {"format": FORMAT, "fps": repr(self.fps), "source": source, "caption": caption}
        save_tensors(path, tensors, metadata)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a file.

        Raises:
            CheckpointError: it is missing, damaged, or holds something else.
        """
        tensors, metadata = load_tensors(path, FORMAT, hint=_AGAIN)
        return cls(
            video=tensors.get("video_latent"),
            audio=tensors.get("audio_latent"),
            context=PromptContext(tensors["video_context"], tensors["audio_context"]),
            fps=float(metadata["fps"]),
            reference=tensors.get("reference_latent"),
            audio_reference=tensors.get("audio_reference_latent"),
            video_mask=tensors.get("video_mask"),
            audio_mask=tensors.get("audio_mask"),
        )

    def entry(self, file: str, *, source: str, caption: str) -> SampleEntry:
        """The line of the index."""
        latents = self._latents()
        tensors = {name: latents[key] for name, key in _SHAPES.items()}
        shapes = {name: None if t is None else tuple(t.shape[1:]) for name, t in tensors.items()}
        return SampleEntry(file=file, source=source, caption=caption, fps=self.fps, **shapes)

    def _latents(self) -> dict[str, Tensor | None]:
        """By the names in the file."""
        return {
            "video_latent": self.video,
            "audio_latent": self.audio,
            "reference_latent": self.reference,
            "audio_reference_latent": self.audio_reference,
            "video_mask": self.video_mask,
            "audio_mask": self.audio_mask,
        }


def entry_of(path: Path) -> SampleEntry:
    """The line of the index for a file, from its header alone.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            shapes = {
                name: tuple(file.get_slice(key).get_shape())[1:] if key in file.keys() else None  # noqa: SIM118
                for name, key in _SHAPES.items()
            }
            return SampleEntry(
                file=path.name,
                source=metadata["source"],
                caption=metadata["caption"],
                fps=float(metadata["fps"]),
                **shapes,
            )
    except (OSError, SafetensorError, KeyError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error})", hint=f"delete it and {_AGAIN}") from error


def write_index(folder: Path, entries: Sequence[SampleEntry]) -> None:
    """Name the samples of a data set; files that it does not name stay unused.

    Raises:
        OutputError: the folder is not writable or the disk is full.
    """
    text = json.dumps({"samples": [asdict(entry) for entry in entries]}, ensure_ascii=False, indent=1)
    write_file(folder / INDEX, text)


def read_index(folder: Path) -> tuple[SampleEntry, ...]:
    """The samples of a data set.

    Raises:
        CheckpointError: there is no index, an unreadable one, or one without samples.
    """
    path = folder / INDEX
    try:
        stated = json.loads(path.read_text(encoding="utf-8"))
        entries = tuple(SampleEntry.from_dict(entry) for entry in stated["samples"])
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder} holds no samples", hint=_AGAIN) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error})", hint=_AGAIN) from error
    if not entries:
        raise CheckpointError(f"{path} names no samples", hint=_AGAIN)
    return entries


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file that has its name only when it is complete.

    Raises:
        OutputError: the folder is not writable or the disk is full.
    """
    with atomic_file(path) as temporary:
        try:
            save_file(dict(tensors), temporary, dict(metadata))
        except SafetensorError as error:
            raise OutputError(f"{path} could not be written: {error}", hint="free space there") from error


def load_tensors(path: Path, written_as: str, *, hint: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of a safetensors file, on the CPU, and its metadata.

    Raises:
        CheckpointError: it is missing, damaged, or its metadata ``format`` is not ``written_as``.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            tensors: dict[str, torch.Tensor] = {
                name: file.get_tensor(name)
                for name in file.keys()  # noqa: SIM118
            }
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error})", hint=hint) from error
    if metadata.get("format") != written_as:
        raise CheckpointError(f"{path} is no {written_as!r} file", hint=hint)
    return tensors, metadata
