"""The public names of the loader, and how little their import costs."""

import subprocess
import sys
from pathlib import Path

import pytest

import diffsynth.loader as loader

ROOT = Path(__file__).parents[2]


def test_all_is_what_the_package_promises() -> None:
    assert loader.__all__ == [
        "FileReport",
        "ModelConfig",
        "NetworkKind",
        "NetworkWeights",
        "SafetensorsFile",
        "Storage",
        "WeightFiles",
        "describe",
        "find_network",
        "load_network",
        "model_version",
        "recognise",
        "sort_networks",
    ]
    assert all(getattr(loader, name).__name__ == name for name in loader.__all__)


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        loader.nothing  # noqa: B018


def test_import_and_inspection_need_neither_torch_nor_a_hub_library() -> None:
    script = (
        "import sys\n"
        "from diffsynth.loader import ModelConfig, describe\n"
        "ModelConfig(model_id='a/b', origin_file_pattern='c').validate()\n"
        "assert describe(sys.argv[1]).networks\n"
        "heavy = {'torch', 'numpy', 'transformers', 'modelscope', 'huggingface_hub', 'tqdm', 'safetensors'}\n"
        "print(sorted(heavy & set(sys.modules)))\n"
    )
    checkpoint = ROOT / "tests" / "golden" / "pipelines" / "tiny_ltx2" / "ltx-2-tiny-dev.safetensors"
    done = subprocess.run(
        [sys.executable, "-c", script, str(checkpoint)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
