"""What a training step costs: a LoRA over a base with random weights of the real sizes, under caps on memory.

    python -m benchmarks.train_step --folder /data/synthetic

Every row is a process of its own: everything resident without a limit, then one row per cap of ``--caps``,
each with all sizes of ``--request``.  Weights are made when they are read and packed once into
``FOLDER/cache``.  The file of results is written after every row; a later run with the same settings does
what is missing.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.apart import measured_apart
from benchmarks.machine import describe_machine
from benchmarks.synthetic import MODELS
from benchmarks.train_step_row import GB, TrainRow
from diffsynth.device import resolve_device

RESIDENT = "resident"


def run_row(row: TrainRow, timeout_s: float) -> dict[str, Any]:
    """Measure a row in a process of its own; the reason where it fails."""
    return {"name": row.name, **measured_apart("benchmarks.train_step_row", row, timeout_s)}


def compare(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Step and gradient of every row over those of the resident one, by size."""
    found: dict[str, Any] = {}
    resident = next((row for row in rows if row["name"] == RESIDENT), {})
    there = {case["request"]: case for case in resident.get("cases", ()) if "step_s" in case}
    for row in rows:
        for case in row.get("cases", ()):
            other = there.get(case["request"])
            if other is None or "step_s" not in case or row["name"] == RESIDENT:
                continue
            first, wanted = case["steps"][0]["gradient_norm"], other["steps"][0]["gradient_norm"]
            found.setdefault(row["name"], {})[case["request"]] = {
                "step_over_resident": round(case["step_s"] / other["step_s"], 4),
                "first_gradient_norm_differs_by": abs(first - wanted) / wanted,
            }
    return found


def table(report: Mapping[str, Any]) -> Table:
    """A line per row and size."""
    made = Table(
        *("row", "size", "step s", "/ resident", "to device GB", "resident blocks", "activations"),
        *("planned GB", "allocated GB", "reserved GB", "device GB", "RAM GB"),
    )
    for row in report["rows"]:
        if "failed" in row:
            made.add_row(row["name"], row["failed"])
        for case in row.get("cases", ()):
            if "failed" in case:
                made.add_row(row["name"], case["request"], case["failed"])
                continue
            ratio = report["comparison"].get(row["name"], {}).get(case["request"], {})
            made.add_row(
                row["name"],
                case["request"],
                f"{case['step_s']:.3f}",
                str(ratio.get("step_over_resident", "")),
                _gb(case["bytes_to_device_per_step"]),
                f"{case['residents']} of {case['blocks']}",
                "host" if case["activations_on_host"] else "device",
                *(_gb(case[f"{name}_bytes"]) for name in ("planned_vram", "peak_allocated", "peak_reserved")),
                _gb(case["device_used_bytes"]),
                _gb(case["peak_host_bytes"]),
            )
    return made


def _gb(nbytes: float | None) -> str:
    return "" if nbytes is None else f"{nbytes / GB:.2f}"


def main(
    folder: Annotated[Path, typer.Option(help="for packed files and samples")],
    model: Annotated[str, typer.Option(help=", ".join(MODELS))] = "ltx-2",
    layers: Annotated[int | None, typer.Option(min=1, help="so many blocks instead of all")] = None,
    caps: Annotated[str, typer.Option(help="GB of the imitated cards; nine tenths are used")] = "24,16",
    storage: Annotated[str, typer.Option(help="of the base")] = "int8",
    rank: Annotated[int, typer.Option(min=1, help="of the adapter, on the four attention projections")] = 32,
    activations: Annotated[str | None, typer.Option(help="device or host; default: as planned")] = None,
    optimizer: Annotated[str, typer.Option(help="adamw or adamw8bit")] = "adamw",
    request: Annotated[list[str] | None, typer.Option(help="HEIGHTxWIDTHxFRAMES; repeat for more")] = None,
    steps: Annotated[int, typer.Option(min=1, help="counted steps, after one for warming up")] = 4,
    device: Annotated[str | None, typer.Option(help="default: the best there is")] = None,
    dtype: Annotated[str, typer.Option(help="of the computation")] = "bfloat16",
    row_timeout: Annotated[float, typer.Option(help="seconds")] = 400.0,
    out: Annotated[Path | None, typer.Option(help="file of results; default: in the folder")] = None,
) -> None:
    """Measure one step of LoRA training."""
    if model not in MODELS:
        raise typer.BadParameter(f"model is one of {', '.join(MODELS)}")
    # As the command line has it.
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    folder.mkdir(parents=True, exist_ok=True)
    shared = TrainRow(
        name=RESIDENT,
        model=model,
        layers=layers,
        cap_gb=None,
        storage=storage,
        rank=rank,
        activations=activations,
        optimizer=optimizer,
        requests=tuple(request or ("512x768x121", "544x960x89")),
        steps=steps,
        device=device,
        dtype=dtype,
        folder=str(folder.resolve()),
    )
    rows = [shared] + [replace(shared, name=f"{cap:g} GB", cap_gb=cap) for cap in map(float, caps.split(","))]
    output = out or folder / f"train_step_{model}.json"
    report = _begun(output, shared, resolve_device(device))
    console = Console(width=200)
    for row in rows:
        done = next((found for found in report["rows"] if found["name"] == row.name), None)
        if done is not None and "failed" not in done:
            continue
        result = run_row(row, row_timeout)
        report["rows"] = [found for found in report["rows"] if found["name"] != row.name] + [result]
        report["comparison"] = compare(report["rows"])
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    console.print(table(report))
    console.print(f"{output}")


def _begun(output: Path, shared: TrainRow, device: torch.device) -> dict[str, Any]:
    """The report, with the rows of an earlier run of the same settings on the same device."""
    settings = {
        key: value for key, value in asdict(shared).items() if key not in ("name", "cap_gb", "folder")
    }
    settings["requests"] = list(shared.requests)
    report: dict[str, Any] = {"machine": describe_machine(device), "settings": settings}
    report |= {"rows": [], "comparison": {}}
    if output.is_file():
        earlier = json.loads(output.read_text(encoding="utf-8"))
        if earlier["machine"]["device"] == report["machine"]["device"] and earlier["settings"] == settings:
            report["rows"] = earlier["rows"]
            report["comparison"] = compare(report["rows"])
    return report


if __name__ == "__main__":
    typer.run(main)
