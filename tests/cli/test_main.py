"""The ways to start the command."""

import subprocess
import sys
from pathlib import Path

import pytest

from diffsynth import __version__
from tests.cli.command import Here, environment


def test_every_command_is_told_whole_in_80_columns(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    shown = here("-h")
    assert shown.code == 0
    listed = shown.out.partition("Commands:")[2].strip().splitlines()
    assert [line.split()[0] for line in listed[:4]] == ["generate", "decode", "inspect", "demo"]
    assert all(line.endswith(".") and not line.endswith("...") for line in listed)
    assert here("generate", "-h").code == 0


def test_as_a_module(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "diffsynth", "--version"],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout.strip()) == (0, __version__)
