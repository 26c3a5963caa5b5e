"""Which clips there are and what is said of them: a table, a list, or a folder."""

import csv
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffsynth.errors import RequestError

VIDEO_SUFFIXES = frozenset({".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v", ".gif"})
CAPTION_KEYS = ("caption", "prompt")
CLIP_KEYS = ("video", "media_path", "path", "file_name")
SOUND_KEYS = ("audio", "input_audio")
REFERENCE_KEYS = ("reference", "reference_video", "in_context_videos")
AUDIO_REFERENCE_KEYS = ("reference_audio",)
VIDEO_MASK_KEYS = ("video_mask",)
AUDIO_MASK_KEYS = ("audio_mask",)
"""Column names of the official trainer, of DiffSynth-Studio and of Hugging Face data sets."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipSource:
    """A clip before anything of it is read.

    Attributes:
        path: of the video.
        caption: what it shows and how it sounds; None where it is missing.
        sound: a file with the sound, instead of the track of the video.
        reference: a clip that the video is to be made after, frame by frame.
        where: place in the list, for messages.
        audio_reference: a sound that the sound is to be made after.
        video_mask, audio_mask: files with what of the clip is given, see :mod:`diffsynth.training.masks`.
    """

    path: Path
    caption: str | None
    sound: Path | None
    reference: Path | None
    where: str
    audio_reference: Path | None = None
    video_mask: Path | None = None
    audio_mask: Path | None = None


def find_clips(source: Path) -> list[ClipSource]:
    """The clips of a CSV, JSON or JSONL file or of a folder, in their order (a folder's by name).

    A table needs a column for the clip (:data:`CLIP_KEYS`) and one for the caption (:data:`CAPTION_KEYS`); it
    may have others for the sound (:data:`SOUND_KEYS`), a reference clip (:data:`REFERENCE_KEYS`), a
    reference sound (:data:`AUDIO_REFERENCE_KEYS`) and masks (:data:`VIDEO_MASK_KEYS`,
    :data:`AUDIO_MASK_KEYS`).  Paths count from its folder.  In a folder the caption of ``NAME.mp4``
    is the text of ``NAME.txt``.

    Raises:
        RequestError: no such file or folder, one that cannot be read, or without clips.
    """
    try:
        if source.is_dir():
            clips = _in_folder(source)
        else:
            clips = [
                _clip(source, number, row)
                for number, row in _rows(source, source.read_text(encoding="utf-8-sig"))
            ]
    except (OSError, ValueError, csv.Error) as error:
        if isinstance(error, RequestError):
            raise
        raise RequestError(f"{source} cannot be read: {error}", hint="a CSV, JSON or JSONL file") from error
    if not clips:
        raise RequestError(
            f"{source} holds no clips", hint=f"files such as {', '.join(sorted(VIDEO_SUFFIXES))}"
        )
    return clips


def _in_folder(folder: Path) -> list[ClipSource]:
    clips = sorted(path for path in folder.rglob("*") if path.suffix.lower() in VIDEO_SUFFIXES)
    return [
        ClipSource(path=path, caption=_text_beside(path), sound=None, reference=None, where=str(path))
        for path in clips
    ]


def _text_beside(clip: Path) -> str | None:
    beside = clip.with_suffix(".txt")
    try:
        return beside.read_text(encoding="utf-8").strip() or None
    except (OSError, UnicodeDecodeError):  # one such clip is named later, and the others go on
        return None


def _rows(source: Path, text: str) -> Iterable[tuple[int, Mapping[str, Any]]]:
    """(line, or place in a JSON list, from 1) and columns."""
    match source.suffix.lower():
        case ".csv":
            table = csv.DictReader(text.splitlines(keepends=True))
            return [(table.line_num, row) for row in table]
        case ".jsonl":
            lines = enumerate(text.splitlines(), 1)
            return [(number, _parsed(source, number, line)) for number, line in lines if line.strip()]
        case ".json":
            return list(enumerate(json.loads(text), 1))
    raise RequestError(f"{source} is of no known kind", hint="a folder, or a CSV, JSON or JSONL file")


def _parsed(source: Path, number: int, line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise RequestError(
            f"{source.name}:{number} is no JSON: {error}", hint="one object per line"
        ) from error


def _clip(source: Path, number: int, row: Any) -> ClipSource:
    where = f"{source.name}:{number}"
    if not isinstance(row, Mapping):
        raise RequestError(f"{where} is no object", hint='{"video": "a.mp4", "caption": "..."}')
    path, caption = _first(row, CLIP_KEYS), _first(row, CAPTION_KEYS)
    if path is None:
        raise RequestError(f"{where} names no clip", hint=f"a column {' or '.join(CLIP_KEYS)}")

    def beside(keys: Iterable[str]) -> Path | None:
        name = _first(row, keys)
        return None if name is None else source.parent / name

    return ClipSource(
        path=source.parent / path,
        caption=caption,
        sound=beside(SOUND_KEYS),
        reference=beside(REFERENCE_KEYS),
        where=where,
        audio_reference=beside(AUDIO_REFERENCE_KEYS),
        video_mask=beside(VIDEO_MASK_KEYS),
        audio_mask=beside(AUDIO_MASK_KEYS),
    )


def _first(row: Mapping[str, Any], keys: Iterable[str]) -> str | None:
    """The first of ``keys`` that has a text in ``row``, stripped."""
    values = (row.get(key) for key in keys)
    return next((value.strip() for value in values if isinstance(value, str) and value.strip()), None)
