"""``diffsynth inspect``: what a file holds."""

import json
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import save_file

from diffsynth.pipelines.ltx2_audio_video import LTX2AudioVideoPipeline
from diffsynth.request import GenerateRequest
from diffsynth.utils.audio_file import write_audio
from diffsynth.utils.media_io_ltx2 import write_video_audio_ltx2
from tests.cli.command import Here, run
from tests.pipelines.tiny import DEV, GEMMA, LORA, PICTURES, UPSCALER, call, tensors

PARTS = (
    *("transformer", "text connectors", "video encoder", "video decoder"),
    *("audio encoder", "audio decoder", "vocoder"),
)


def test_a_checkpoint(here: Here) -> None:
    done = here("inspect", str(DEV))
    assert done.code == 0
    assert "model: LTX-2\n" in done.out
    assert "configuration: in the file" in done.out
    for part in PARTS:
        assert f"{part}: " in done.out
    report = json.loads(here("inspect", str(DEV), "--json").out)
    assert {"file", "model", "configuration", *PARTS} == report.keys()
    numbers = [int(report[part].split(" parameters")[0].replace(",", "")) for part in PARTS]
    stored = {key: tensor.numel() for key, tensor in tensors(DEV).items()}
    own = [key for key in stored if key.startswith("vocoder.")]
    assert numbers[PARTS.index("vocoder")] == sum(stored[key] for key in own)
    assert "BF16" in report["transformer"]


def test_a_checkpoint_without_metadata(here: Here, tmp_path: Path) -> None:
    file = tmp_path / "plain.safetensors"
    save_file(tensors(DEV), file)
    done = here("inspect", str(file))
    assert done.code == 0
    assert "configuration: inferred from shapes" in done.out


def test_ltx_2_3(here: Here, ltx_2_3: Path) -> None:
    assert "model: LTX-2.3\n" in here("inspect", str(ltx_2_3)).out


def test_an_upsampler_a_lora_and_a_folder(here: Here) -> None:
    assert "latent upsampler: " in here("inspect", str(UPSCALER)).out
    assert "LoRA: official keys, " in here("inspect", str(LORA)).out
    assert "rank 2" in here("inspect", str(LORA)).out
    assert "Gemma 3: " in here("inspect", str(GEMMA)).out


def test_a_video(here: Here, pipe: LTX2AudioVideoPipeline, tmp_path: Path) -> None:
    video, audio = call(pipe, prompt="ein Boot auf dem See, „hallo“ \U0001f6a3")
    path = write_video_audio_ltx2(video, audio, tmp_path / "boat.mp4")
    done = here("inspect", str(path))
    assert done.code == 0
    assert "prompt: ein Boot auf dem See, „hallo“ \U0001f6a3" in done.out
    assert "seed: 43" in done.out
    report = json.loads(here("inspect", str(path), "--json").out)
    assert report == json.loads(json.dumps(video.record))
    assert GenerateRequest.from_dict(report["request"]) == GenerateRequest(**video.record["request"])


def test_a_sound(here: Here, pipe: LTX2AudioVideoPipeline, tmp_path: Path) -> None:
    request = GenerateRequest(prompt="waves", audio_only=True, num_frames=9, num_inference_steps=1)
    result = pipe.generate(request)
    assert result.waveform is not None
    for name in ("waves.wav", "waves.flac"):
        path = write_audio(result.waveform, tmp_path / name, request=result.record)
        assert "prompt: waves" in here("inspect", str(path)).out


def test_a_video_of_somebody_else(here: Here, tmp_path: Path) -> None:
    path = write_video_audio_ltx2([Image.open(PICTURES[0])], None, tmp_path / "a.mp4")
    done = here("inspect", str(path))
    assert done.code == 3
    assert "carries no request" in done.err


@pytest.mark.parametrize("name", ["nowhere.safetensors", "nowhere.mp4"])
def test_a_missing_file(tmp_path: Path, name: str) -> None:
    done = run("inspect", name, cwd=tmp_path)
    assert done.code == 3
    assert f"{name}: no such file" in done.err
    assert "Traceback" not in done.err


@pytest.mark.parametrize("name", ["broken.safetensors", "broken.mp4", "broken.bin"])
def test_a_broken_file(here: Here, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x80\x04nothing of the kind")
    done = here("inspect", str(tmp_path / name))
    assert done.code == 3
    assert name in done.err
    assert "Traceback" not in done.err
