"""The training configurations run as they are, against the tiny files under the names of released ones."""

import re
import runpy
import sys
from pathlib import Path

import pytest
from safetensors import safe_open

from diffsynth.training.config_file import read_config
from tests.cli.command import Here

FOLDER = Path(__file__).parents[2] / "examples" / "ltx2" / "model_training"
NAMES = sorted(path.stem for path in FOLDER.glob("LTX-*.toml"))
README = (FOLDER / "README.md").read_text(encoding="utf-8")
SMALL = ("--steps=2", "--bucket=64x64x25", "--validation-steps=2", "--device=cpu", "--dtype=float32")


def run(name: str, monkeypatch: pytest.MonkeyPatch, *options: str) -> None:
    """As ``python train.py NAME`` does."""
    monkeypatch.setattr(sys, "path", [str(FOLDER), *sys.path])
    monkeypatch.setattr(sys, "argv", ["train.py", name, *SMALL, *options])
    monkeypatch.delitem(sys.modules, "clips", raising=False)
    runpy.run_path(str(FOLDER / "train.py"), run_name="__main__")


@pytest.mark.parametrize("name", NAMES)
def test_configuration(
    name: str,
    downloaded: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    run(name, monkeypatch)
    adapter = tmp_path / name / "run" / "checkpoints" / "lora_weights_step_00002.safetensors"
    assert capsys.readouterr().out.splitlines()[-1] == str(adapter)
    clips = sorted(path.name for path in (tmp_path / name / "run" / "validation").iterdir())
    suffix = "wav" if "T2A-" in name else "mp4"
    assert clips == [f"step_00000_1.{suffix}"]
    with safe_open(adapter, framework="pt") as file:
        metadata = file.metadata()
    assert metadata["base_model"] == ("LTX-2.3" if "2.3" in name else "LTX-2")
    assert metadata.get("reference_downscale_factor") == ("2" if "T2AV-IC" in name else None)


def test_a_second_run_goes_on(
    downloaded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, here: Here
) -> None:
    """With the copy of the configuration and the commands as well."""
    monkeypatch.chdir(tmp_path)
    name = "LTX-2-I2AV-LoRA"
    run(name, monkeypatch)
    copy = tmp_path / name / "run.toml"
    text = copy.read_text().split("[validation]")[0]
    for old, new in (
        ("768x512x49", "64x64x25"),
        ("[model]", '[model]\ndevice = "cpu"\ndtype = "float32"'),
        ("steps = 2000", "steps = 2"),
    ):
        assert old in text
        text = text.replace(old, new)
    copy.write_text(text)
    samples = {path: path.stat().st_mtime_ns for path in (tmp_path / name / "samples").glob("*.safetensors")}
    assert len(samples) == 3
    for command in (("preprocess",), ("train", "--resume")):
        ended = here(command[0], str(copy), *command[1:], "--quiet")
        assert ended.code == 0, ended.err
    assert all(path.stat().st_mtime_ns == before for path, before in samples.items())


def test_every_configuration_is_in_the_readme() -> None:
    assert re.findall(r"^\| \[`([^`]+)`\]\(\1\.toml\) \|", README, flags=re.MULTILINE) == sorted(
        NAMES, key=README.index
    )
    for name in NAMES:
        text = (FOLDER / f"{name}.toml").read_text(encoding="utf-8")
        assert text.startswith("# ")
        config = read_config(FOLDER / f"{name}.toml")
        assert ("2.3" in config.model.checkpoint[0]) == ("2.3" in name)
