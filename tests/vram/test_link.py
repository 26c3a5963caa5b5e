"""MachineFigures of a machine: measured once, remembered, never in the way."""

import json
from pathlib import Path

import pytest

from diffsynth.device import backend_for, host_memory
from diffsynth.vram import link
from diffsynth.vram.cache import FOLDER_VARIABLE
from diffsynth.vram.link import (
    FILE_NAME,
    MachineFigures,
    disk_speed,
    link_speed,
    machine_budget,
    machine_figures,
    machine_key,
)

CPU = backend_for("cpu")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure with little, so that tests take no time."""
    monkeypatch.setattr(link, "_LINK_BYTES", 2**20)
    monkeypatch.setattr(link, "_DISK_BYTES", 2**20)
    monkeypatch.setattr(link, "_MATRIX_WIDTHS", (64,))


def test_speeds_are_measured_and_plausible(tmp_path: Path) -> None:
    assert 1e7 < link_speed(CPU, 2**22) < 1e13
    assert 1e6 < disk_speed(tmp_path, 2**23) < 1e12
    assert not list(tmp_path.iterdir()), "nothing is left"


def test_what_was_measured_is_remembered(tmp_path: Path) -> None:
    first = machine_figures(CPU, folder=tmp_path)
    file = tmp_path / FILE_NAME
    assert [path.name for path in tmp_path.iterdir()] == [FILE_NAME]
    known = json.loads(file.read_text())
    key = machine_key(CPU.device)
    assert known[key]["link_bytes_per_s"] == first.link_bytes_per_s
    known[key]["link_bytes_per_s"] = 123.0
    known["another card"] = {"tflops": 1}
    file.write_text(json.dumps(known))
    assert machine_figures(CPU, folder=tmp_path).link_bytes_per_s == 123.0
    assert json.loads(file.read_text())["another card"] == {"tflops": 1}


@pytest.mark.parametrize("content", ["", "{", "[]", '{"KEY": 3}', '{"KEY": {"tflops": -1, "foo": 2}}'])
def test_a_damaged_file_is_made_anew(tmp_path: Path, content: str) -> None:
    file = tmp_path / FILE_NAME
    file.write_text(content.replace("KEY", machine_key(CPU.device)))
    found = machine_figures(CPU, folder=tmp_path)
    assert found.tflops > 0
    assert json.loads(file.read_text())[machine_key(CPU.device)]["tflops"] == found.tflops


def test_only_what_is_missing_is_measured(tmp_path: Path) -> None:
    key = machine_key(CPU.device)
    (tmp_path / FILE_NAME).write_text(json.dumps({key: {"tflops": 7.0}}))
    found = machine_figures(CPU, folder=tmp_path)
    assert found.tflops == 7.0
    assert found.link_bytes_per_s != MachineFigures().link_bytes_per_s


def test_without_measuring_there_are_defaults(tmp_path: Path) -> None:
    assert machine_figures(CPU, folder=tmp_path, measure=False) == MachineFigures()
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_costs_only_the_memory(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    in_the_way = tmp_path / "file"
    in_the_way.write_text("")
    with caplog.at_level("INFO"):
        found = machine_figures(CPU, folder=in_the_way / "below")
    assert found.disk_bytes_per_s == MachineFigures().disk_bytes_per_s
    assert found.tflops > 0
    assert "disk_bytes_per_s cannot be measured" in caplog.text


def test_the_folder_is_that_of_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    machine_figures(CPU)
    assert (tmp_path / FILE_NAME).is_file()


def test_a_budget_takes_limits_as_given_and_finds_the_others() -> None:
    figures = MachineFigures(link_bytes_per_s=1e9, disk_bytes_per_s=2e9, tflops=3)
    given = machine_budget(CPU, figures, vram_bytes=5, host_bytes=6, workspaces=False)
    assert (given.vram_bytes, given.host_bytes, given.reserve_bytes) == (5, 6, 0)
    assert (given.link_bytes_per_s, given.disk_bytes_per_s, given.tflops) == (1e9, 2e9, 3)
    assert not given.workspaces
    assert given.pin_limit_bytes == 0, "the CPU copies from pageable memory as fast"
    found = machine_budget(CPU, figures)
    assert found.vram_bytes is None
    total = host_memory().total
    assert total is not None
    assert found.host_bytes is not None
    assert 0 < found.host_bytes < total
