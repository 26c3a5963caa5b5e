"""The stages of the recipe, with work of their own that takes no time."""

import sys
from pathlib import Path

import pytest

from training.nano.__main__ import Stage, run

WORK = """
from dataclasses import dataclass

@dataclass(frozen=True)
class Settings:
    steps: int = 7

def train(settings: Settings, folder, device) -> None:
    with (folder / "log.txt").open("a") as log:
        log.write(f"{settings.steps} {device}\\n")
"""


def test_a_stage_runs_once_with_its_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    package = tmp_path / "some_recipe"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "vocoder.py").write_text(WORK)
    monkeypatch.syspath_prepend(tmp_path)
    changes = {"steps": 3, "seed": 1}
    assert run(Stage.VOCODER, tmp_path, "cpu", changes, package="some_recipe")
    assert not run(Stage.VOCODER, tmp_path, "cpu", changes, package="some_recipe")
    assert (tmp_path / "log.txt").read_text() == "3 cpu\n"
    assert "done already" in capsys.readouterr().out
    (tmp_path / "done" / "vocoder.json").unlink()
    assert run(Stage.VOCODER, tmp_path, "cpu", {"steps": None}, package="some_recipe")
    assert (tmp_path / "log.txt").read_text() == "3 cpu\n7 cpu\n"
    for name in [name for name in sys.modules if name.startswith("some_recipe")]:
        del sys.modules[name]
