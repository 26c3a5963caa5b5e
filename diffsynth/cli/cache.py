"""``diffsynth cache``: the converted weights on the disk."""

import re
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from diffsynth.errors import RequestError

if TYPE_CHECKING:
    from diffsynth.vram.cache import CacheEntry

cache_app = typer.Typer(
    name="cache",
    help="Converted weights on the disk: made at the first start, used by later ones.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Folder = Annotated[
    Path | None, typer.Option(help="cache folder; DIFFSYNTH_CACHE_PATH or the user's cache if left out")
]
_UNITS_S = {"h": 3600, "d": 86400, "w": 7 * 86400}


@cache_app.command("list")
def list_entries(
    folder: Folder = None,
    json: Annotated[bool, typer.Option("--json", help="as JSON")] = False,
) -> None:
    """Show what is in the cache: network, format, size, age, state and the files that it was made of."""
    import json as encoder

    from diffsynth.vram.cache import PackedCache

    cache = PackedCache(folder)
    entries = cache.entries()
    if json:
        report = {"folder": str(cache.folder), "entries": [_as_json(entry) for entry in entries]}
        typer.echo(encoder.dumps(report, ensure_ascii=False, indent=2))
        return
    for entry in entries:
        typer.echo(_line(entry))
    total = sum(entry.nbytes for entry in entries)
    typer.echo(f"{cache.folder}: {len(entries)} files, {total / 1e9:.3f} GB")


@cache_app.command("clear")
def clear(
    older_than: Annotated[
        str | None, typer.Option(help="only files made longer ago, e.g. 12h, 30d or 2w")
    ] = None,
    folder: Folder = None,
) -> None:
    """Delete files of the cache; they are made anew when they are needed."""
    from diffsynth.vram.cache import PackedCache

    removed = PackedCache(folder).clear(None if older_than is None else parse_age(older_than))
    for entry in removed:
        typer.echo(f"deleted {entry.path}")
    typer.echo(f"{len(removed)} files, {sum(entry.nbytes for entry in removed) / 1e9:.3f} GB freed")


def parse_age(text: str) -> timedelta:
    """``"12h"``, ``"30d"`` or ``"2w"`` as a duration.

    Raises:
        RequestError: the text is none.
    """
    match = re.fullmatch(r"(\d{1,6}(?:\.\d+)?)([hdw])", text.strip())
    if match is None:
        raise RequestError(f"--older-than {text!r} is no duration", hint="12h, 30d or 2w")
    return timedelta(seconds=float(match[1]) * _UNITS_S[match[2]])


def _line(entry: "CacheEntry") -> str:
    what = f"{entry.network} {entry.format}" if entry.network else "unknown"
    made_of = f", from {', '.join(entry.sources)}" if entry.sources else ""
    when = entry.created.astimezone().strftime("%Y-%m-%d %H:%M")
    return f"{what}: {entry.nbytes / 1e9:.3f} GB, {when}, {entry.state}{made_of}\n  {entry.path}"


def _as_json(entry: "CacheEntry") -> dict[str, object]:
    return {
        "path": str(entry.path),
        "network": entry.network,
        "sources": list(entry.sources),
        "format": entry.format,
        "bytes": entry.nbytes,
        "created": entry.created.isoformat(),
        "state": str(entry.state),
    }
