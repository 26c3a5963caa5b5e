"""Whether clips show and sound what was asked for, in every way of making them.

    python -m benchmarks.meaning --out results.json
    python -m benchmarks.meaning --model FOLDER --prompts 8 --only "bf16 one-stage" --only "int8 tiled"

Prompts are held out from training.  A row is a storage format, a mode, a placement and a manner of decoding;
by default one of these changes at a time, ``--full`` takes all combinations, and ``--only`` those rows whose
name has all words of one of the filters.  Rows that are in the file of results already are not made again.
FOLDER holds the checkpoint (``-dev`` in its name if there is a distilled one too), the upsampler, the
distilled LoRA (``distilled`` and ``lora`` in its name) and the text model in ``gemma``.
"""

import json
import multiprocessing
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.machine import describe_machine
from benchmarks.meaning_rows import DECODINGS, FORMATS, MODES, PLACEMENTS, Settings, Way, measure
from diffsynth import nano
from diffsynth.device import resolve_device
from diffsynth.nano.judge import ATTRIBUTES

NANO = Path(nano.__file__).parent / "weights"
BASELINE = "bf16 one-stage resident whole"
LEAST: Mapping[str, float] = dict.fromkeys(ATTRIBUTES, 97.0) | dict.fromkeys(("shape", "pan", "sync"), 90.0)
"""Percent of the baseline, by attribute."""
LOSSES: Mapping[str, float] = {"distilled": 5.0, "8 bits": 2.0, "tiled": 1.0}
"""Points that may be lost against the row without it."""
EIGHT_BITS = ("int8", "fp8", "e4m3", "e5m2")
FIRST_FRAME_DB = 25.0


def ways(*, full: bool, only: Sequence[str] = ()) -> list[Way]:
    """All, or those that change one thing at a time; with the manners of decoding that ``only`` leaves."""
    found = []
    for format, mode, placement in product(FORMATS, MODES, PLACEMENTS):
        usual = (format == "bf16") + (mode == "one-stage") + (placement == "resident")
        # Eight bits are what most runs are stored in: they go through all modes, and all placements.
        often = format == "int8" and (mode == "one-stage" or placement == "resident")
        way = Way(format=format, mode=mode, placement=placement)
        kept = tuple(d for d, name in zip(DECODINGS, way.names(), strict=True) if _chosen(name, only))
        if kept and (full or usual >= 2 or often):
            found.append(replace(way, decodings=kept))
    return found


def _chosen(name: str, only: Sequence[str]) -> bool:
    words = name.split()
    return not only or any(all(word in words for word in filter_.split()) for filter_ in only)


def make(todo: Sequence[Way], settings: Settings, workers: int) -> Iterator[list[dict[str, Any]]]:
    """Rows of one way after another, as they are done; in this process if there is one worker."""
    if workers == 1:
        yield from (measure(way, settings) for way in todo)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        workers, mp_context=context, initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        for done in as_completed([pool.submit(measure, way, settings) for way in todo]):
            yield done.result()


def table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Percentages by row and attribute."""
    made = Table("row", *ATTRIBUTES, "all", "first frame dB", "repeats", "s")
    for row in rows:
        if "failed" in row:
            made.add_row(row["row"], "failed")
            continue
        cells = [_number(row["percent"].get(name)) for name in ATTRIBUTES]
        ratio = row.get("first_frame_psnr")
        nearness = f"{ratio['mean']:.1f} (min {ratio['min']:.1f})" if ratio else ""
        repeats = "yes" if row["repeats"] else "NO"
        made.add_row(
            row["row"], *cells, _number(row["all_right"]), nearness, repeats, _number(row["seconds"])
        )
    return made


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}"


def gates(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What is demanded, as far as there are rows for it, and whether it is so."""
    found = {row["row"]: row for row in rows if "failed" not in row}
    return [gate for row in found.values() for gate in _gates_of(row, found)]


def _gates_of(row: Mapping[str, Any], rows: Mapping[str, Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    format, mode, placement, decoding = row["row"].split()
    if row["row"] == BASELINE:
        short = {n: v for n, v in row["percent"].items() if v < LEAST[n]}
        yield _gate(row, "enough", short, not short)
    kinds = {
        "distilled": (mode == "distilled", f"{format} one-stage {placement} {decoding}"),
        "8 bits": (format in EIGHT_BITS, f"bf16 {mode} {placement} {decoding}"),
        "tiled": (decoding == "tiled", f"{format} {mode} {placement} whole"),
    }
    for kind, (applies, other) in kinds.items():
        if applies and other in rows:
            before = rows[other]["percent"]
            lost = {n: before[n] - v for n, v in row["percent"].items()}
            short = {n: points for n, points in lost.items() if points > LOSSES[kind]}
            yield _gate(row, f"{kind}: at most {LOSSES[kind]:g} points less than {other}", short, not short)
    resident = rows.get(f"{format} {mode} resident {decoding}")
    if placement != "resident" and resident:
        pairs = zip(row["latent_crc32"], resident["latent_crc32"], strict=True)
        others = [number for number, (own, its) in enumerate(pairs) if own != its]
        yield _gate(row, "the same bits as resident", {"other clips": others}, not others)
    if "first_frame_psnr" in row:
        least = row["first_frame_psnr"]["min"]
        enough = f"first frame at {FIRST_FRAME_DB:g} dB or more"
        yield _gate(row, enough, {"min": least}, least >= FIRST_FRAME_DB)
    yield _gate(row, "a seed repeats its bits", {}, row["repeats"])


def _gate(row: Mapping[str, Any], demand: str, figures: Mapping[str, Any], passed: bool) -> dict[str, Any]:
    return {"row": row["row"], "demand": demand, "passed": passed, "figures": dict(figures)}


def _earlier(out: Path | None, settings: Settings) -> list[dict[str, Any]]:
    """Rows that were made with the same settings; those that failed are tried again."""
    if out is None or not out.exists():
        return []
    data = json.loads(out.read_text(encoding="utf-8"))
    return (
        [row for row in data["rows"] if "failed" not in row] if data["settings"] == _stated(settings) else []
    )


def _stated(settings: Settings) -> dict[str, Any]:
    """As the file of results has them: the model of the package by its name."""
    model = nano.NAME if Path(settings.model) == NANO else settings.model
    return asdict(settings) | {"model": model}


def _write(out: Path, settings: Settings, rows: Sequence[Mapping[str, Any]]) -> None:
    data = {
        "machine": describe_machine(resolve_device(settings.device)),
        "settings": _stated(settings),
        "gates": gates(rows),
        "rows": list(rows),
    }
    out.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def main(
    model: Annotated[Path, typer.Option(help="Its folder; the package has one.")] = NANO,
    prompts: Annotated[int, typer.Option(help="How many.")] = 64,
    word: Annotated[str | None, typer.Option(help="That every prompt has, for example ping.")] = None,
    side: Annotated[int, typer.Option(help="Of the pictures, in pixels.")] = 256,
    num_frames: Annotated[int, typer.Option(help="8k+1.")] = 25,
    steps: Annotated[int, typer.Option(help="Denoising steps where the mode has no list of its own.")] = 20,
    cfg_scale: Annotated[float, typer.Option(help="Guidance where the mode has any.")] = 3.0,
    device: Annotated[str | None, typer.Option(help="The best one if not given.")] = None,
    dtype: Annotated[str, typer.Option(help="To compute in: bfloat16 or float32.")] = "bfloat16",
    seed: Annotated[int, typer.Option(help="Of the prompts; clip n has seed + n.")] = 0,
    only: Annotated[list[str] | None, typer.Option(help="Words that the name of a row must have.")] = None,
    full: Annotated[bool, typer.Option(help="All combinations.")] = False,
    workers: Annotated[int, typer.Option(help="Processes side by side.")] = 1,
    out: Annotated[Path | None, typer.Option(help="JSON file of results, written after every row.")] = None,
) -> None:
    """Print a table of percentages, and what is demanded of it."""
    settings = Settings(
        model=str(model),
        prompts=prompts,
        word=word,
        side=side,
        num_frames=num_frames,
        steps=steps,
        cfg_scale=cfg_scale,
        device=device,
        dtype=dtype,
        seed=seed,
    )
    rows = _earlier(out, settings)
    known = {row["row"] for row in rows}
    todo = [way for way in ways(full=full, only=only or ()) if not known.issuperset(way.names())]
    console = Console(width=200)
    for number, made in enumerate(make(todo, settings, workers), 1):
        rows = [row for row in rows if row["row"] not in {new["row"] for new in made}] + made
        for row in made:
            percent = "  ".join(f"{name} {value:.0f}" for name, value in row.get("percent", {}).items())
            console.print(
                f"{number}/{len(todo)} {row['row']}: {row.get('failed') or percent}", highlight=False
            )
        if out is not None:
            _write(out, settings, rows)
    order = [name for way in ways(full=True) for name in way.names()]
    rows.sort(key=lambda row: order.index(row["row"]))
    console.print(table(rows))
    for gate in gates(rows):
        if not gate["passed"]:
            console.print(f"short of: {gate['row']}: {gate['demand']}: {gate['figures']}", highlight=False)


if __name__ == "__main__":
    typer.run(main)
