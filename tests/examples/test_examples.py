"""The example scripts run as they are, against the tiny files under the names of the released ones."""

import os
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import pytest
from PIL import Image

from diffsynth.request import GenerateRequest
from diffsynth.utils.media_io_ltx2 import read_request

EXAMPLES = Path(__file__).parents[2] / "examples" / "ltx2"
FOLDER, LOW_VRAM = EXAMPLES / "model_inference", EXAMPLES / "model_inference_low_vram"
MOVES = ("Dolly-In", "Dolly-Out", "Dolly-Left", "Dolly-Right", "Jib-Up", "Jib-Down", "Static")
NAMES = [
    *(
        f"{model}-{kind}-{mode}"
        for model in ("LTX-2", "LTX-2.3")
        for kind in ("T2AV", "I2AV")
        for mode in ("OneStage", "TwoStage", "DistilledPipeline")
    ),
    *(f"LTX-2-T2AV-Camera-Control-{move}" for move in MOVES),
    "LTX-2-T2AV-IC-LoRA-Union-Control",
    "LTX-2-T2AV-IC-LoRA-Detailer",
    "LTX-2.3-T2AV-IC-LoRA-Union-Control",
    "LTX-2.3-T2AV-IC-LoRA-Motion-Track-Control",
    "LTX-2.3-A2V-TwoStage",
    "LTX-2.3-T2AV-TwoStage-Retake",
    "LTX-2.3-T2AV-TwoStage-HQ",
    "LTX-2.3-Keyframe-Interpolation",
    "LTX-2.3-T2A-OneStage",
]
SIZES = {"LTX-2.3-T2AV-TwoStage-Retake": (64, 64, 49)}
"""Where it is not the smallest: a region of two seconds needs a clip of two seconds."""
MODULES = ("camera_control", "common", "inputs", "low_vram")


@pytest.fixture
def here(downloaded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty working folder; what a script imports from its own folder is forgotten after it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    for name in MODULES:
        sys.modules.pop(name, None)


def options(name: str) -> list[str]:
    small = (128, 128, 9) if "IC-LoRA" in name else (64, 64, 9)
    height, width, num_frames = SIZES.get(name, small)
    return [f"--height={height}", f"--width={width}", f"--num-frames={num_frames}"]


def run(script: Path, monkeypatch: pytest.MonkeyPatch, *more: str) -> None:
    """As ``python SCRIPT`` does: the folder of the script comes first, the script is ``__main__``."""
    monkeypatch.setattr(sys, "argv", [str(script), *options(script.stem), *more])
    sys.path.insert(0, str(script.parent))
    runpy.run_path(str(script), run_name="__main__")


@pytest.mark.parametrize("name", NAMES)
def test_script(
    name: str, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(FOLDER / f"{name}.py", monkeypatch)
    (path,) = here.iterdir()
    assert capsys.readouterr().out.strip() == path.name


@pytest.mark.parametrize("name", NAMES)
def test_low_vram_script(name: str, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(LOW_VRAM / f"{name}.py", monkeypatch)
    assert len(list(here.iterdir())) == 1
