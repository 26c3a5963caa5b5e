"""``--stats``: what each phase of a run was planned to take, what it took, and what moved."""

from collections.abc import Mapping
from typing import Any

import typer
from rich.console import Console
from rich.table import Table

GB = 2**30
COLUMNS = ("planned", "peak", "passes", "to device", "/pass", "from disk", "/pass", "stalls")


def show_stats(report: Mapping[str, Any]) -> None:
    """Print the report of :meth:`LTX2AudioVideoPipeline.memory_report` as a table, in GB of 2**30 bytes."""
    if not report["managed"]:
        typer.echo("no figures: the weights lay on the device; they come with --vram-limit or --storage")
        return
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("GB", no_wrap=True)
    for name in COLUMNS:
        table.add_column(name, justify="right", no_wrap=True)
    for phase in report["phases"]:
        table.add_row(*_row(phase))
    Console().print(table)


def _row(phase: Mapping[str, Any]) -> tuple[str, ...]:
    """A pass is one way through all blocks: a step of a denoising loop."""
    passes = phase["traversals"]
    moved = [
        figure
        for total in (phase["bytes_to_device"], phase["bytes_from_disk"])
        for figure in (_gb(total), _gb(total / passes) if passes else "")
    ]
    measured = phase["peak_vram_bytes"]
    return (
        str(phase["phase"]),
        _gb(phase["planned_vram_bytes"]),
        "" if measured is None else _gb(measured),
        str(passes or ""),
        *moved,
        str(phase["stalls"]),
    )


def _gb(nbytes: float) -> str:
    return f"{nbytes / GB:.3f}"
