"""What a built wheel holds and weighs, and what importing the package costs."""

import shutil
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest

from diffsynth.nano import bundle
from tests.cli.command import ROOT

MB = 10**6
WHEEL_LIMIT, WEIGHTS_LIMIT = 25 * MB, 20 * MB
BUILD = "import sys; from setuptools import build_meta; print(build_meta.build_wheel(sys.argv[1]))"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built in a copy of the tree, in which nothing is left then."""
    tree, target = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    shutil.copytree(ROOT / "diffsynth", tree / "diffsynth", ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-W", "ignore", "-c", BUILD, str(target)]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (built,) = target.iterdir()
    return built


def test_a_wheel_holds_the_package_with_its_weights(wheel: Path) -> None:
    sources = (path for path in (ROOT / "diffsynth").rglob("*") if path.is_file())
    expected = {str(path.relative_to(ROOT)) for path in sources if "__pycache__" not in path.parts}
    with ZipFile(wheel) as file:
        held = {name for name in file.namelist() if ".dist-info/" not in name}
    assert held == expected


def test_a_wheel_is_small(wheel: Path) -> None:
    assert wheel.stat().st_size < WHEEL_LIMIT


def test_the_weights_are_small() -> None:
    sizes = {path.name: path.stat().st_size for path in bundle.WEIGHTS.rglob("*") if path.is_file()}
    assert bundle.files().checkpoint.name in sizes
    assert sum(sizes.values()) < WEIGHTS_LIMIT


@pytest.mark.parametrize(
    "module", ["diffsynth", "diffsynth.pipelines.ltx2_audio_video", "diffsynth.utils.media_io_ltx2"]
)
def test_import_brings_nothing_of_nano(module: str) -> None:
    code = f"import sys, {module}; print(*(name for name in sys.modules if 'diffsynth.nano' in name))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_import_of_nano_brings_no_judge() -> None:
    code = (
        "import sys; from diffsynth import nano; print('torch' in sys.modules, 'judge' in str(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
