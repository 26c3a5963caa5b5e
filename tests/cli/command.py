"""The real ``diffsynth`` command, in a process of its own or in this one."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from diffsynth.cli import main
from diffsynth.utils.audio import read_audio
from diffsynth.utils.images import read_video
from diffsynth.utils.metadata import read_request
from tests.pipelines.tiny import DEV, GEMMA

ROOT = Path(__file__).parents[2]
MODELS = ("--checkpoint", str(DEV), "--gemma", str(GEMMA), "--device", "cpu", "--dtype", "float32")
SMALL = ("--height", "64", "--width", "64", "--frames", "9", "--steps", "2")


@dataclass(frozen=True)
class Ended:
    code: int
    out: str
    err: str


def arguments() -> list[str]:
    """What starts the command: the installed script, or the function that it calls."""
    script = Path(sys.executable).with_name("diffsynth")
    if script.exists():
        return [str(script)]
    return [sys.executable, "-c", "from diffsynth.cli import main; main()"]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def run(*given: str, cwd: Path) -> Ended:
    """In a process of its own."""
    done = subprocess.run(
        [*arguments(), *given], cwd=cwd, env=environment(), capture_output=True, text=True, timeout=120
    )
    return Ended(done.returncode, done.stdout, done.stderr)


def same_video(one: Path, other: Path) -> bool:
    """Whether two files show the same pictures with the same sound and say that the same request made them.

    How weights were stored may differ.  For equal pictures the H.264 encoder rarely takes another decision
    in one block, and what follows it in its picture differs by a few levels; AAC makes more of the last bits
    of a sample, which another number of threads may change.  Other noise differs by dozens of levels
    everywhere.
    """
    pictures = [read_video(path).frames.float() for path in (one, other)]
    sounds = [read_audio(path).samples for path in (one, other)]
    records = [{**(read_request(path) or {}), "storage": None} for path in (one, other)]
    if pictures[0].shape != pictures[1].shape or records[0] != records[1]:
        return False
    if sounds[0].shape != sounds[1].shape:
        return False
    unlike = [float((first - second).abs().mean()) for first, second in (pictures, sounds)]
    return unlike[0] < 0.5 and unlike[1] < 0.002


class Here:
    """The same command in this process, which saves the seconds that importing takes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch = monkeypatch
        self._capsys = capsys

    def __call__(self, *given: str) -> Ended:
        self._monkeypatch.setattr(sys, "argv", ["diffsynth", *given])
        self._capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        printed = self._capsys.readouterr()
        code = ended.value.code
        return Ended(code if isinstance(code, int) else 0, printed.out, printed.err)
