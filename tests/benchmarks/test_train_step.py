"""The benchmark of training steps, with the tiny dimensions on the CPU."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.train_step import RESIDENT, compare, main, run_row
from benchmarks.train_step_row import TrainRow


@pytest.fixture
def row(tmp_path: Path) -> TrainRow:
    return TrainRow(
        name=RESIDENT,
        model="tiny",
        layers=None,
        cap_gb=None,
        storage="int8",
        rank=2,
        activations=None,
        optimizer="adamw",
        requests=("64x64x9",),
        steps=1,
        device="cpu",
        dtype="float32",
        folder=str(tmp_path),
    )


def test_rows_are_added_to_their_file_once(row: TrainRow, capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path(row.folder)

    def run() -> dict[str, list[dict[str, object]]]:
        main(
            folder,
            model=row.model,
            caps="0.0018",
            rank=row.rank,
            request=["64x64x9"],
            steps=1,
            device="cpu",
            dtype="float32",
        )
        found: dict[str, list[dict[str, object]]] = json.loads((folder / "train_step_tiny.json").read_text())
        return found

    report = run()
    resident, capped = report["rows"]
    assert [resident["name"], capped["name"]] == [RESIDENT, "0.0018 GB"]
    ((whole,), (streamed,)) = resident["cases"], capped["cases"]  # type: ignore[misc]
    assert whole["residents"] == whole["blocks"] == 3
    assert streamed["bytes_to_device_per_step"] == streamed["planned_bytes_per_step"] > 0
    assert [step["loss"] for step in streamed["steps"]] == [step["loss"] for step in whole["steps"]]
    (ratios,) = compare(report["rows"])["0.0018 GB"].values()
    assert ratios["first_gradient_norm_differs_by"] == 0
    assert run()["rows"] == report["rows"]  # nothing was measured again
    assert "0.0018 GB" in capsys.readouterr().out


def test_a_row_says_why_it_failed(row: TrainRow) -> None:
    assert "none.json" in run_row(replace(row, model="none"), 60)["failed"]
