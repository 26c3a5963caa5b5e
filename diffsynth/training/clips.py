"""Which clips there are and what is said of them: a table, a list, or a folder."""

import csv
import io
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffsynth.errors import RequestError

VIDEO_SUFFIXES = frozenset({".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v", ".gif"})
SOUND_SUFFIXES = frozenset(
    {".wav", ".flac", ".mp3", ".m4a", ".aac", ".ogg", ".oga", ".opus", ".aif", ".aiff", ".wma", ".mka"}
)
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
        path: of the video, or of a sound without pictures.
        caption: what it shows and how it sounds; None where it is missing.
        sound: a file with the sound, instead of the track of the video.
        reference: a clip that the video is to be made after, frame by frame.
        where: place in the list, for messages.
        audio_reference: a sound that the sound is to be made after.
        video_mask, audio_mask: files with what of the clip is given, see :mod:`diffsynth.training.masks`.
        pictures: False for a sound without them.
    """

    path: Path
    caption: str | None
    sound: Path | None
    reference: Path | None
    where: str
    audio_reference: Path | None = None
    video_mask: Path | None = None
    audio_mask: Path | None = None
    pictures: bool = True


def find_clips(source: Path, *, video: bool = True) -> list[ClipSource]:
    """The clips of a CSV, JSON or JSONL file or of a folder, in their order (a folder's by name).

    A table needs a column for the clip (:data:`CLIP_KEYS`) and one for the caption (:data:`CAPTION_KEYS`); it
    may have others for the sound (:data:`SOUND_KEYS`), a reference clip (:data:`REFERENCE_KEYS`), a
    reference sound (:data:`AUDIO_REFERENCE_KEYS`) and masks (:data:`VIDEO_MASK_KEYS`,
    :data:`AUDIO_MASK_KEYS`).  Paths count from its folder.  In a folder the caption of ``NAME.mp4``
    is the text of ``NAME.txt``.

    A row that names a sound and no clip, or a sound file as its clip, is a sound without pictures.  So is a
    sound file in a folder, unless a video beside it has its name: then it is something of that video.

    Args:
        source: of the clips.
        video: whether pictures are wanted.

    Raises:
        RequestError: no such file or folder, one that cannot be read, or without clips; with ``video`` a
            sound without pictures among them.  In a folder only one with a caption counts as such.
    """
    try:
        if source.is_dir():
            clips = _in_folder(source, video)
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
    alone = [clip for clip in clips if not clip.pictures]
    if video and alone:
        raise RequestError(
            f"{alone[0].where} is a sound without pictures, in a data set with pictures",
            hint="video = false in [data], or a data set for the sounds and one for the clips",
        )
    return clips


def _in_folder(folder: Path, video: bool) -> list[ClipSource]:
    files = sorted(folder.rglob("*"))
    shown = {path.with_suffix("") for path in files if path.suffix.lower() in VIDEO_SUFFIXES}
    found = []
    for path in files:
        suffix = path.suffix.lower()
        pictures, caption = suffix in VIDEO_SUFFIXES, _text_beside(path)
        sound = suffix in SOUND_SUFFIXES and path.with_suffix("") not in shown
        if pictures or (sound and (caption is not None or not video)):
            found.append(
                ClipSource(
                    path=path,
                    caption=caption,
                    sound=None,
                    reference=None,
                    where=str(path),
                    pictures=pictures,
                )
            )
    return found


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
            table = csv.DictReader(io.StringIO(text, newline=""))
            return [(table.line_num, row) for row in table]
        case ".jsonl":
            lines = enumerate(text.split("\n"), 1)  # JSON may hold what splitlines takes for an end
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
    clip, sound, caption = (_first(row, keys) for keys in (CLIP_KEYS, SOUND_KEYS, CAPTION_KEYS))
    path = clip or sound
    if path is None:
        raise RequestError(f"{where} names no clip", hint=f"a column {' or '.join(CLIP_KEYS)}")

    def beside(keys: Iterable[str]) -> Path | None:
        name = _first(row, keys)
        return None if name is None else source.parent / name

    return ClipSource(
        path=source.parent / path,
        caption=caption,
        sound=None if clip is None else beside(SOUND_KEYS),
        reference=beside(REFERENCE_KEYS),
        where=where,
        audio_reference=beside(AUDIO_REFERENCE_KEYS),
        video_mask=beside(VIDEO_MASK_KEYS),
        audio_mask=beside(AUDIO_MASK_KEYS),
        pictures=clip is not None and Path(clip).suffix.lower() not in SOUND_SUFFIXES,
    )


def _first(row: Mapping[str, Any], keys: Iterable[str]) -> str | None:
    """The first of ``keys`` that has a text in ``row``, stripped."""
    values = (row.get(key) for key in keys)
    return next((value.strip() for value in values if isinstance(value, str) and value.strip()), None)
