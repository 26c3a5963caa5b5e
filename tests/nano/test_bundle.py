"""The model of the package by its name: files, settings, both commands of training."""

from pathlib import Path

import pytest
import torch

from diffsynth import nano
from diffsynth.errors import CheckpointError
from diffsynth.nano import bundle
from diffsynth.pipelines.ltx2_audio_video import LTX2AudioVideoPipeline
from diffsynth.training.config_file import read_config


@pytest.fixture
def weights(untrained_nano: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(bundle, "WEIGHTS", untrained_nano)
    return untrained_nano


@pytest.mark.parametrize("distilled", [False, True])
def test_arguments_make_a_clip(weights: Path, distilled: bool) -> None:
    pipe = LTX2AudioVideoPipeline.from_pretrained(
        torch_dtype=torch.float32, device="cpu", **nano.models(distilled=distilled)
    )
    names = [handle.source for handle in pipe.active_loras]
    assert names == (["nano-distilled-lora.safetensors"] if distilled else [])
    size = {"height": 64, "width": 64, "num_frames": 9}
    settings = {**nano.settings(distilled=distilled), **size}
    video, audio = pipe(nano.EXAMPLE, seed=1, progress_bar_cmd=lambda steps: steps, **settings)
    assert video is not None
    assert audio is not None
    assert [frame.size for frame in video] == [(64, 64)] * 9
    assert audio.shape[0] == 2


def test_what_is_missing_is_named_with_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle, "WEIGHTS", tmp_path)
    with pytest.raises(CheckpointError, match=r"has no nano.safetensors, .*python -m training.nano all"):
        nano.models()


def test_training_names_it(weights: Path, tmp_path: Path) -> None:
    config = tmp_path / "run.toml"
    data = '[data]\nsource = "clips"\nfolder = "samples"\nbuckets = ["64x64x9"]\n[output]\nfolder = "run"\n'
    config.write_text(f'[model]\ncheckpoint = "nano"\n{data}')
    model = read_config(config).model
    assert model.checkpoint == (str(weights / "nano.safetensors"),)
    assert model.gemma == str(weights / "gemma")
    config.write_text(f'[model]\ncheckpoint = "nano"\ngemma = "other/one:*"\n{data}')
    assert read_config(config).model.gemma == "other/one:*"
