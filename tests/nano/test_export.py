"""The exported set through the pipeline, in all modes, with untrained networks."""

import json
from pathlib import Path

import pytest
import torch

from diffsynth.errors import CheckpointError
from diffsynth.pipelines.ltx2_audio_video import LTX2AudioVideoPipeline, ModelConfig
from tests.nano.untrained import write_exported
from training.nano.export import ExportSettings, export

PROMPT = "a red circle moves left over a blue background, a high beep"
MODES = {
    "one-stage": {"num_inference_steps": 2, "cfg_scale": 3.0},
    "two-stage": {"num_inference_steps": 2, "use_two_stage_pipeline": True},
    "distilled": {"use_distilled_pipeline": True},
}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_exported(tmp_path_factory.mktemp("nano"), "distilled_lora")


@pytest.mark.parametrize("mode", MODES)
def test_an_exported_set_generates(exported: Path, mode: str) -> None:
    pipe = LTX2AudioVideoPipeline.from_pretrained(
        torch_dtype=torch.float32,
        device="cpu",
        model_configs=[
            ModelConfig(path=exported / "nano.safetensors"),
            ModelConfig(path=exported / "gemma" / "model.safetensors"),
            ModelConfig(path=exported / "nano-upscaler-x2.safetensors"),
        ],
        tokenizer_config=ModelConfig(path=exported / "gemma"),
        stage2_lora_config=ModelConfig(path=exported / "nano-distilled-lora.safetensors"),
    )
    if mode == "distilled":
        assert pipe.load_lora(pipe.dit, exported / "nano-distilled-lora.safetensors").report.unmatched == ()
    size = {"height": 128, "width": 128, "num_frames": 9, "seed": 1}
    frames, sound = pipe(prompt=PROMPT, progress_bar_cmd=lambda steps: steps, **size, **MODES[mode])
    assert frames is not None
    assert [frame.size for frame in frames] == [(128, 128)] * 9
    assert sound is not None
    assert sound.shape[0] == 2


def test_about_says_what_is_there(exported: Path) -> None:
    about = json.loads((exported / "about.json").read_text())
    assert about["bytes"]["nano.safetensors"] == (exported / "nano.safetensors").stat().st_size
    assert set(about["networks"]) == {"video_vae", "audio_vae", "vocoder", "upsampler"}
    assert about["stages"] == {"vocoder": {"seconds": 3}}


def test_what_is_missing_or_too_large_is_said(exported: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no transformer, text connectors, video encoder"):
        export(ExportSettings(), tmp_path, "cpu")
    with pytest.raises(CheckpointError, match="bytes together are too many"):
        export(ExportSettings(limit_bytes=1000), exported.parent, "cpu")
