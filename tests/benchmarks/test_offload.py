"""The benchmark itself, at tiny size: every row runs, its record is complete, and rows agree in every bit."""

import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

import benchmarks.offload as offload
from benchmarks.offload_row import ROWS, STARTS, Case, Row, measure
from benchmarks.peers import PEERS, measure_peer
from benchmarks.synthetic import Dimensions, RandomSource, write_file, write_set
from diffsynth.errors import OutputError
from diffsynth.loader import NetworkKind, SafetensorsFile, WeightFiles, find_network
from diffsynth.pipelines.released import released_parts

CASE = Case(mode="one-stage", height=64, width=64, num_frames=1, passes=2, steps=1)
ROW = Row(
    name="streamed",
    model="tiny",
    layers=8,
    cap_gb=0.0014,
    host_gb=16,
    storage="int8",
    device="cpu",
    dtype="float32",
    folder="",
    cases=(CASE,),
)
PHASE_FIGURES = {
    *("phase", "seconds", "planned_vram_bytes", "peak_vram_bytes", "peak_vram_reserved_bytes"),
    *(
        "planned_host_bytes",
        "peak_host_bytes",
        "peak_rss_bytes",
        "bytes_to_device",
        "bytes_from_disk",
        "stalls",
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("synthetic")


@pytest.fixture(scope="module")
def rows(folder: Path) -> list[dict[str, Any]]:
    """Every row, the first one into an empty cache."""
    patch = pytest.MonkeyPatch()
    patch.setenv("DIFFSYNTH_CACHE_PATH", str(folder))  # the rows set it, and it must not stay
    try:
        return [measure(replace(ROW, name=name, folder=str(folder))) for name in ROWS]
    finally:
        patch.undo()


def test_every_row_is_complete(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        (case,) = row["cases"]
        assert "failed" not in case, (row["row"], case["failed"])
        assert case["first_step_s"] > 0
        assert row["whole_peak_host_bytes"] <= row["high_water_mark_bytes"]
        if row["row"] in STARTS:
            assert case["ended"] == "after the first step"
            continue
        phases = [phase["phase"] for phase in case["phases"]]
        assert phases == ["text", "connectors", "denoise 1", "decode video", "decode audio"]
        assert all(phase.keys() >= PHASE_FIGURES for phase in case["phases"])
        (stage,) = case["denoise"]
        assert stage["steps"] == CASE.steps
        assert stage["step_s"] > 0


def test_rows_are_what_they_say(rows: list[dict[str, Any]]) -> None:
    found = {row["row"]: row for row in rows}
    stages = {name: row["cases"][0]["denoise"][0] for name, row in found.items() if name not in STARTS}
    # A start ends before anything is decoded; the first whole run converts the decoders.
    assert [name for name, row in found.items() if row["converted"]] == ["first-start", "resident"]
    assert stages["resident"]["bytes_to_device_per_step"] == 0
    for name, stage in stages.items():
        assert stage["bytes_to_device_per_step"] <= 1.02 * stage["planned_bytes_per_step"]
        assert name == "resident" or stage["bytes_to_device_per_step"] > 0
    # Readers may be a few blocks ahead when a step ends.
    for name in ("disk", "mapped"):
        read = stages[name]["bytes_from_disk_per_step"]
        assert read == pytest.approx(stages[name]["bytes_to_device_per_step"], rel=0.5)
    assert stages["streamed"]["bytes_from_disk_per_step"] == 0


def test_rows_agree_in_every_bit(rows: list[dict[str, Any]]) -> None:
    compared = offload.compare(rows)
    assert compared["equal_bits"] == {CASE.name: True}
    assert compared["step_over_resident"].keys() == ROWS.keys() - {"resident", *STARTS}
    assert compared["start_over_first_start"]["second-start"] > 0


def test_written_files_are_read(
    rows: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DIFFSYNTH_CACHE_PATH", str(tmp_path))
    write_set(Dimensions.of("tiny", ROW.layers), tmp_path)
    given = replace(ROW, folder=str(tmp_path), files=True)
    found = [measure(replace(given, name=name)) for name in ("streamed", "resident")]
    assert [row["converted"] for row in found] == [True, False]
    assert offload.compare(found)["equal_bits"] == {CASE.name: True}
    (made,) = (row for row in rows if row["row"] == "streamed")
    moved = [row["cases"][0]["denoise"][0]["bytes_to_device_per_step"] for row in (found[0], made)]
    assert moved[0] == moved[1]


def test_all_modes_and_passes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFSYNTH_CACHE_PATH", str(folder))
    wanted = tuple(offload.cases(["128x64x1"], offload.MODES, [1, 4], 1))
    assert [case.passes for case in wanted] == [4, 1, 2, 1]
    wanted = (*wanted, replace(CASE, image=True))
    found = measure(replace(ROW, layers=2, cap_gb=8, folder=str(folder), cases=wanted))
    assert not [case["failed"] for case in found["cases"] if "failed" in case]
    assert [len(case["denoise"]) for case in found["cases"]] == [1, 1, 2, 2, 1]
    assert "encode inputs 1" in [phase["phase"] for phase in found["cases"][-1]["phases"]]


def test_command_adds_to_its_file(tmp_path: Path) -> None:
    output = tmp_path / "offload.json"
    arguments = [f"--folder={tmp_path / 'synthetic'}", f"--out={output}", "--model=tiny", "--device=cpu"]
    arguments += ["--request=64x64x1", "--passes=1", "--steps=1", "--peers=ltx-core"]
    app = typer.Typer()
    app.command()(offload.main)
    first = CliRunner().invoke(app, [*arguments, "--rows=resident"])
    assert first.exit_code == 0, first.output
    report = json.loads(output.read_text())
    assert report["machine"]["device"] == "CPU"
    assert [row["row"] for row in report["rows"]] == ["resident"]
    assert "No module named 'ltx_core'" in report["peers"][0]["not_available"]
    second = CliRunner().invoke(app, [*arguments, "--rows=", "--peers="])
    assert second.exit_code == 0, second.output
    assert [row["row"] for row in json.loads(output.read_text())["rows"]] == ["resident"]


def test_peer_without_interpreter(tmp_path: Path) -> None:
    for name in PEERS:
        found = measure_peer(
            name, ROW, CASE, interpreter=str(tmp_path / "python"), search_path=None, cap_bytes=0, device="cpu"
        )
        assert "no interpreter" in found["not_available"]


@pytest.mark.parametrize("model", ["ltx-2", "ltx-2.3"])
def test_dimensions_are_the_released_ones(model: str) -> None:
    dimensions = Dimensions.of(model)
    parts = released_parts(dimensions.version)
    for kind, part in ((NetworkKind.TRANSFORMER, parts.dit), (NetworkKind.GEMMA, parts.text_encoder)):
        assert part is not None
        found = sum(math.prod(shape) for shape in dimensions.shapes(kind).values())
        assert found == sum(tensor.numel() for tensor in part.state_dict().values())
    assert sum(math.prod(shape) for shape in dimensions.lora().values()) == pytest.approx(3.70e9, rel=0.01)


def test_written_set_is_what_is_made_on_demand(tmp_path: Path) -> None:
    dimensions = Dimensions.of("tiny")
    files = write_set(dimensions, tmp_path)
    source = RandomSource("checkpoint", dimensions.single_file())
    written = SafetensorsFile(files[0])
    assert written.shapes == source.shapes
    for key in list(source.shapes)[::50]:
        assert torch.equal(written.read(key), source.read(key)), key
    assert find_network(NetworkKind.GEMMA, WeightFiles(tmp_path / "gemma")).entries
    assert (tmp_path / "gemma" / "tokenizer.json").is_file()


def test_writing_goes_on_where_it_was(tmp_path: Path) -> None:
    shapes = {f"weight.{number}": (64, 64) for number in range(8)}
    whole, begun = tmp_path / "whole.safetensors", tmp_path / "begun.safetensors"
    write_file(whole, RandomSource("whole", shapes))
    begun.with_name("begun.safetensors.part").write_bytes(whole.read_bytes()[:40_000])
    write_file(begun, RandomSource("begun", shapes))
    assert begun.read_bytes() == whole.read_bytes()
    other = tmp_path / "other.safetensors"
    other.with_name("other.safetensors.part").write_bytes(b"something else" * 9000)
    write_file(other, RandomSource("other", shapes))
    assert other.read_bytes() == whole.read_bytes()


def test_full_disk_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="GB are free"):
        write_file(tmp_path / "large.safetensors", RandomSource("large", {"weight": (10**9, 10**6)}))
    assert sys.platform != "linux" or not (tmp_path / "large.safetensors").exists()
