"""``diffsynth cache``: what lies on the disk: converted weights, encoded prompts, latents left undecoded."""

import contextlib
import re
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from diffsynth.errors import OutputError, RequestError

if TYPE_CHECKING:
    from diffsynth.vram.cache import CacheEntry, PackedCache

PROMPTS, LATENTS = "prompts", "latents"
"""Folders beside the one of the converted weights."""

cache_app = typer.Typer(
    name="cache",
    help="Converted weights and encoded prompts.  They are made when first needed and used by later starts.",
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
    """Show what is in the cache.  Converted weights with network, format, size, age, state and origin;
    encoded prompts; latents of runs that were stopped while decoding."""
    import json as encoder

    cache = _packed(folder)
    entries, others = (
        cache.entries(),
        {name: _files(cache.folder.parent / name) for name in (PROMPTS, LATENTS)},
    )
    if json:
        report = {
            "folder": str(cache.folder.parent),
            "entries": [_as_json(entry) for entry in entries],
            **{name: {"files": len(files), "bytes": _size(files)} for name, files in others.items()},
            "latent_files": [str(path) for path in others[LATENTS]],
        }
        typer.echo(encoder.dumps(report, ensure_ascii=False, indent=2))
        return
    for entry in entries:
        typer.echo(_line(entry))
    for path in others[LATENTS]:
        typer.echo(f"latents that were never decoded: diffsynth decode {path}")
    typer.echo(f"encoded prompts: {len(others[PROMPTS])} files, {_size(others[PROMPTS]) / 1e6:.1f} MB")
    total = sum(entry.nbytes for entry in entries) + sum(map(_size, others.values()))
    typer.echo(f"{cache.folder.parent}: {len(entries)} files of weights, {total / 1e9:.3f} GB in all")


@cache_app.command("clear")
def clear(
    older_than: Annotated[
        str | None, typer.Option(help="only files made longer ago, e.g. 12h, 30d or 2w")
    ] = None,
    folder: Folder = None,
    latents: Annotated[
        bool, typer.Option("--latents", help="also latents that were never decoded: they are not made anew")
    ] = False,
) -> None:
    """Delete weights and encoded prompts.  They are made anew when they are needed."""
    age = None if older_than is None else parse_age(older_than)
    cache = _packed(folder)
    removed = cache.clear(age)
    for entry in removed:
        typer.echo(f"deleted {entry.path}")
    freed = sum(entry.nbytes for entry in removed)
    for name in (PROMPTS, LATENTS) if latents else (PROMPTS,):
        files = _files(cache.folder.parent / name, age)
        size = _size(files)
        for path in files:
            _delete(path)
        if files:
            typer.echo(f"deleted {len(files)} files in {cache.folder.parent / name}")
        freed += size
    typer.echo(f"{len(removed)} files of weights; {freed / 1e9:.3f} GB freed in all")


def _packed(folder: Path | None) -> "PackedCache":
    from diffsynth.vram.cache import PackedCache

    return PackedCache(None if folder is None else folder / "packed")


def _files(folder: Path, age: timedelta | None = None) -> list[Path]:
    """Small files of the cache that are older than ``age``, oldest first."""
    limit = float("inf") if age is None else (datetime.now(UTC) - age).timestamp()
    return [path for made, path in sorted(_dated(folder)) if made <= limit]


def _dated(folder: Path) -> Iterator[tuple[float, Path]]:
    for path in [*folder.glob("*.safetensors"), *folder.glob("*.json")]:
        with contextlib.suppress(FileNotFoundError):  # deleted by somebody else meanwhile
            yield path.stat().st_mtime, path


def _size(files: Iterable[Path]) -> int:
    size = 0
    for path in files:
        with contextlib.suppress(FileNotFoundError):
            size += path.stat().st_size
    return size


def _delete(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(
            f"{path} could not be deleted: {error.strerror}", hint="end the programs that use it"
        ) from error


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
