"""What streaming costs: phases and steps under a cap on device memory, with random weights of the real sizes.

    python -m benchmarks.offload --model ltx-2 --cap 8 --request 512x768x121 --passes 1,2,4 --steps 3 \\
        --folder /data/synthetic --out benchmarks/results/offload_h200.json

Every row is a process of its own; the rows are in ``--rows``, other programs in ``--peers``.  No checkpoint
is needed: weights are made when they are read, packed once into ``FOLDER/cache`` and found there by later
rows.  The file of results is written after every row, and a later run with the same settings adds to it.
"""

import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.apart import measured_apart
from benchmarks.machine import describe_machine
from benchmarks.offload_row import GB, ROWS, STARTS, USABLE, Case, Row
from benchmarks.peers import PEERS, measure_peer
from benchmarks.synthetic import MODELS, Dimensions, write_set
from diffsynth.device import backend_for, resolve_device
from diffsynth.pipelines.storage import NAMES
from diffsynth.vram.link import machine_budget, machine_figures

MODES = ("one-stage", "two-stage", "distilled")
DEFAULT_ROWS = "first-start,second-start,resident,streamed,shared,mapped,disk,no-cache"


def cases(requests: Sequence[str], modes: Sequence[str], passes: Sequence[int], steps: int) -> list[Case]:
    """Every size in every mode; one stage with every number of passes, the largest first.

    The first case encodes the prompts, negative one included; the later ones find them known.  Two stages are
    guided by two passes in the first, distilled ones by none.
    """
    found = []
    for mode in modes:
        counts = {"one-stage": sorted(passes, reverse=True), "two-stage": [2]}.get(mode, [1])
        for size in requests:
            height, width, frames = (int(number) for number in size.split("x"))
            found += [
                Case(mode=mode, height=height, width=width, num_frames=frames, passes=count, steps=steps)
                for count in counts
            ]
    return found


def run_row(row: Row, timeout_s: float) -> dict[str, Any]:
    """Measure a row in a process of its own; the reason where it fails."""
    return {"row": row.name, **measured_apart("benchmarks.offload_row", row, timeout_s)}


def compare(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What only shows between rows: ratios to the resident row, equal bits, second start over first."""
    steps = {row["row"]: dict(_steps(row)) for row in rows}
    resident = steps.get("resident", {})
    ratios = {
        name: {key: round(value / resident[key], 4) for key, value in own.items() if key in resident}
        for name, own in steps.items()
        if name not in ("resident", *STARTS)
    }
    latents: dict[str, dict[str, list[str]]] = {}
    for row in rows:
        for case in row.get("cases", ()):
            if case.get("latent_crc32"):
                latents.setdefault(case["case"], {}).setdefault(case["latent_crc32"], []).append(row["row"])
    starts = {row["row"]: row["cases"][0].get("first_step_s") for row in rows if row.get("cases")}
    first = starts.get("first-start")
    return {
        "step_over_resident": ratios,
        "equal_bits": {case: len(found) == 1 for case, found in latents.items()},
        "rows_by_bits": latents,
        "start_over_first_start": {
            name: round(value / first, 4)
            for name, value in starts.items()
            if first and value and name != "first-start"
        },
    }


def tables(report: Mapping[str, Any]) -> Iterator[Table]:
    """Steps, then phases, then peers."""
    ratios = report["comparison"]["step_over_resident"]
    steps = Table("row", "case", "stage", "step s", "/ resident", "to device GB", "from disk GB", "stalls")
    phases = Table("row", "case", "phase", "s", "planned GB", "peak GB", "reserved GB", "RAM GB")
    for row in report["rows"]:
        if "failed" in row:
            steps.add_row(row["row"], row["failed"])
        for case in row.get("cases", ()):
            if "failed" in case:
                steps.add_row(row["row"], case["case"], case["failed"])
            for stage in case["denoise"]:
                ratio = ratios.get(row["row"], {}).get(_key(case, stage))
                steps.add_row(
                    row["row"],
                    case["case"],
                    str(stage["stage"]),
                    f"{stage['step_s']:.3f}",
                    "" if ratio is None else f"{ratio:.3f}",
                    _gb(stage["bytes_to_device_per_step"]),
                    _gb(stage["bytes_from_disk_per_step"]),
                    f"{stage['stalls_per_step']:.0f}",
                )
            for phase in case["phases"]:
                phases.add_row(
                    row["row"],
                    case["case"],
                    phase["phase"],
                    f"{phase['seconds']:.2f}",
                    _gb(phase["planned_vram_bytes"]),
                    _gb(phase["peak_vram_bytes"]),
                    _gb(phase["peak_vram_reserved_bytes"]),
                    _gb(phase["peak_host_bytes"]),
                )
    yield steps
    yield phases
    yield _whole(report)
    if report["peers"]:
        yield _peer_table(report)


def _whole(report: Mapping[str, Any]) -> Table:
    made = Table("row", "first step s", "peak RAM GB", "planned RAM GB", "with file pages GB", "converted")
    for row in report["rows"]:
        for case in row.get("cases", ())[:1]:
            made.add_row(
                row["row"],
                "" if case["first_step_s"] is None else f"{case['first_step_s']:.1f}",
                _gb(row["whole_peak_host_bytes"]),
                _gb(max(c["planned_peak_host_bytes"] for c in row["cases"])),
                _gb(row["high_water_mark_bytes"]),
                "yes" if row["converted"] else "no",
            )
    return made


def _peer_table(report: Mapping[str, Any]) -> Table:
    made = Table("peer", "case", "step s", "/ streamed", "peak GB", "RAM GB", "")
    streamed = next((dict(_steps(row)) for row in report["rows"] if row["row"] == "streamed"), {})
    for peer in report["peers"]:
        own = streamed.get(f"{peer['case']} stage 1")
        said = peer.get("not_available") or peer.get("failed") or ""
        made.add_row(
            peer["peer"],
            peer["case"],
            f"{peer['step_s']:.3f}" if "step_s" in peer else "",
            f"{peer['step_s'] / own:.2f}" if own and "step_s" in peer else "",
            _gb(peer.get("peak_vram_bytes")),
            _gb(peer.get("peak_rss_bytes")),
            said,
        )
    return made


def _steps(row: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for case in row.get("cases", ()):
        for stage in case["denoise"]:
            yield _key(case, stage), stage["step_s"]


def _key(case: Mapping[str, Any], stage: Mapping[str, Any]) -> str:
    return f"{case['case']} stage {stage['stage']}"


def _gb(nbytes: float | None) -> str:
    return "" if nbytes is None else f"{nbytes / GB:.2f}"


def _pairs(given: Sequence[str], option: str) -> dict[str, str]:
    pairs = [item.partition("=") for item in given]
    if any(not mark for _, mark, _ in pairs):
        raise typer.BadParameter(f"{option} PROGRAM=PATH")
    return {name: value for name, _, value in pairs}


def _known(given: str, known: Sequence[str], option: str) -> list[str]:
    names = [name.strip() for name in given.split(",") if name.strip()]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise typer.BadParameter(f"{option}: {', '.join(unknown)}; known: {', '.join(known)}")
    return names


def main(
    folder: Annotated[Path, typer.Option(help="for packed files and the LoRA")],
    model: Annotated[str, typer.Option(help=", ".join(MODELS))] = "ltx-2",
    layers: Annotated[int | None, typer.Option(min=1, help="so many blocks instead of all")] = None,
    cap: Annotated[float, typer.Option(help="GB of the imitated card; nine tenths are used")] = 8.0,
    host_limit: Annotated[float, typer.Option(help="GB of host memory in the row `shared`")] = 16.0,
    storage: Annotated[str, typer.Option(help=", ".join(NAMES))] = "int8",
    rows: Annotated[str, typer.Option(help=", ".join(ROWS))] = DEFAULT_ROWS,
    request: Annotated[list[str] | None, typer.Option(help="HEIGHTxWIDTHxFRAMES; repeat for more")] = None,
    modes: Annotated[str, typer.Option(help=", ".join(MODES))] = "one-stage",
    passes: Annotated[str, typer.Option(help="numbers of guidance passes, 1 to 4")] = "1,2,4",
    image: Annotated[bool, typer.Option(help="also with a first frame, two passes")] = False,
    files: Annotated[
        bool, typer.Option(help="write checkpoints into the folder first and read them, as users do")
    ] = False,
    steps: Annotated[int, typer.Option(min=1, help="counted steps, after one for warming up")] = 3,
    peers: Annotated[str, typer.Option(help=", ".join(PEERS))] = "",
    peer_python: Annotated[list[str] | None, typer.Option(help="PROGRAM=INTERPRETER")] = None,
    peer_path: Annotated[list[str] | None, typer.Option(help="PROGRAM=FOLDER with unpacked wheels")] = None,
    device: Annotated[str | None, typer.Option(help="default: the best there is")] = None,
    dtype: Annotated[str, typer.Option(help="computation dtype")] = "bfloat16",
    row_timeout: Annotated[float, typer.Option(help="seconds")] = 560.0,
    out: Annotated[Path | None, typer.Option(help="file of results; rows in it are kept")] = None,
) -> None:
    """Measure the memory manager, and other programs beside it."""
    if model not in MODELS:
        raise typer.BadParameter(f"model is one of {', '.join(MODELS)}")
    # As the command line has it; for other programs as well.
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    names = _known(rows, list(ROWS), "--rows")
    counts = [int(number) for number in passes.split(",")]
    sizes = request or ["512x768x121"]
    wanted = cases(sizes, _known(modes, MODES, "--modes"), counts, steps)
    if image:
        wanted += [replace(c, image=True) for c in cases(sizes, ["one-stage"], [2], steps)]
    shared = Row(
        name="",
        model=model,
        layers=layers,
        cap_gb=cap,
        host_gb=host_limit,
        storage=storage,
        device=device,
        dtype=dtype,
        folder=str(folder.resolve()),
        cases=tuple(wanted),
        files=files,
    )
    folder.mkdir(parents=True, exist_ok=True)
    if files:
        write_set(Dimensions.of(model, layers), folder)
    target = resolve_device(device)
    output = out or Path(__file__).parent / "results" / f"offload_{model}_{target.type}.json"
    report = _begun(output, shared, target)
    console = Console()
    for name in names:
        chosen = shared.cases[:1] if name in STARTS else shared.cases
        result = run_row(replace(shared, name=name, cases=chosen), row_timeout)
        report["rows"] = [row for row in report["rows"] if row["row"] != name] + [result]
        _save(output, report)
    programs, paths = _pairs(peer_python or (), "--peer-python"), _pairs(peer_path or (), "--peer-path")
    for name in _known(peers, list(PEERS), "--peers"):
        for case in (c for c in wanted if c.mode == "one-stage" and not c.image):
            found = _run_peer(name, shared, case, programs, paths, row_timeout)
            report["peers"] = [p for p in report["peers"] if (p["peer"], p["case"]) != (name, case.name)]
            report["peers"].append(found)
            _save(output, report)
    for table in tables(report):
        console.print(table)
    console.print(f"{output}")


def _run_peer(
    name: str,
    row: Row,
    case: Case,
    programs: Mapping[str, str],
    paths: Mapping[str, str],
    timeout_s: float,
) -> dict[str, Any]:
    device = resolve_device(row.device)
    backend = backend_for(device)
    # Not measured here: this process would hold a context beside the program's.  The rows have done it.
    known = machine_figures(backend, folder=Path(row.folder) / "cache", measure=False)
    usable = int(USABLE * row.cap_gb * GB)
    usable -= machine_budget(backend, known).reserve_bytes
    program = PEERS[name].program
    return measure_peer(
        name,
        row,
        case,
        interpreter=programs.get(program, sys.executable),
        search_path=paths.get(program),
        cap_bytes=max(0, usable),
        device=device.type,
        timeout_s=timeout_s,
    )


def _begun(output: Path, shared: Row, device: torch.device) -> dict[str, Any]:
    """The report, with the rows of an earlier run of the same settings on the same device."""
    settings = {key: value for key, value in asdict(shared).items() if key not in ("name", "folder")}
    settings["cases"] = [case.name for case in shared.cases]
    report: dict[str, Any] = {"machine": describe_machine(device), "settings": settings}
    report |= {"rows": [], "peers": [], "comparison": compare(())}
    if output.is_file():
        earlier = json.loads(output.read_text(encoding="utf-8"))
        same_machine = earlier["machine"]["device"] == report["machine"]["device"]
        if same_machine and earlier["settings"] == json.loads(json.dumps(settings)):
            report |= {key: earlier[key] for key in ("rows", "peers")}
    return report


def _save(output: Path, report: dict[str, Any]) -> None:
    report["comparison"] = compare(report["rows"])
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
