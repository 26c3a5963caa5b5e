"""The request that made a video, inside the video."""

import json
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import av

from diffsynth.errors import RequestError
from diffsynth.utils.files import reason_of

TAG = "diffsynth"
"""The project's own tag; ``comment`` holds the same text, for tools that drop tags they do not know."""


def request_tags(request: Mapping[str, Any] | None) -> dict[str, str]:
    """Container tags for a request of plain JSON values; paths and fractions become text.

    Raises RequestError when a value has no place in JSON, naming it.
    """
    if request is None:
        return {}
    try:
        text = json.dumps(dict(request), ensure_ascii=False, default=_plain)
    except (TypeError, ValueError) as error:
        raise RequestError(
            f"the request cannot be stored in the video: {error}", hint="plain numbers, text and lists"
        ) from error
    return {"comment": text, TAG: text}


def read_request(path: str | Path) -> dict[str, Any] | None:
    """The request stored in a video, None when there is none.

    Raises RequestError when the file is missing or no media file.
    """
    try:
        with av.open(str(path), "r") as container:
            tags = {key.lower(): value for key, value in container.metadata.items()}
    except (av.FFmpegError, OSError) as error:
        raise RequestError(f"{path} cannot be read: {reason_of(error)}", hint="a video file") from error
    for tag in (TAG, "comment"):
        try:
            value = json.loads(tags.get(tag, "null"))
        except ValueError:
            # A comment by somebody else.
            continue
        if isinstance(value, dict):
            return value
    return None


def _plain(value: object) -> str:
    if isinstance(value, (Path, Fraction)):
        return str(value)
    raise TypeError(f"{value!r} is not a plain value")
