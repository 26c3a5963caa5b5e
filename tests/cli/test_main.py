"""The ways to start the command."""

import subprocess
import sys
from pathlib import Path

from diffsynth import __version__
from tests.cli.command import environment


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
