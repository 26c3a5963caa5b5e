"""The final latents outlive a run that dies while it decodes; one that does not leaves nothing."""

import contextlib
import json
import logging
import resource
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from diffsynth.errors import Cancelled, CheckpointError, RequestError
from diffsynth.pipelines.ltx2_audio_video import LTX2AudioVideoPipeline
from diffsynth.pipelines.progress import Progress
from diffsynth.pipelines.rescue import FinalLatents, keep, latents_folder
from diffsynth.pipelines.result import Result
from diffsynth.request import GenerateRequest
from diffsynth.utils.audio import Waveform
from diffsynth.vram.cache import FOLDER_VARIABLE
from tests.pipelines.tiny import DEV, load, pixels

REQUEST = GenerateRequest(
    prompt="a boat",
    negative_prompt="blurry",
    seed=43,
    height=64,
    width=64,
    num_frames=9,
    num_inference_steps=2,
)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own for each test."""
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "cache"))
    return latents_folder()


@pytest.fixture(scope="module")
def unbroken(loaded_pipe: LTX2AudioVideoPipeline) -> Result:
    return loaded_pipe.generate(REQUEST)


def stop_at(phase: str, error: BaseException) -> Callable[[Progress], None]:
    def listen(progress: Progress) -> None:
        if progress.phase == phase and progress.done == progress.total:
            raise error

    return listen


def equal(first: Result, second: Result) -> bool:
    """Every bit of pictures and sound, and the record."""
    assert first.waveform is not None
    assert second.waveform is not None
    assert first.waveform.sampling_rate == second.waveform.sampling_rate
    return (
        pixels(first.frames or []) == pixels(second.frames or [])
        and torch.equal(first.waveform.samples, second.waveform.samples)
        and json.dumps(first.record) == json.dumps(second.record)
    )


def left(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*")) if folder.exists() else []


def test_a_finished_run_leaves_nothing(pipe: LTX2AudioVideoPipeline, folder: Path) -> None:
    seen = []
    pipe.generate(REQUEST, on_progress=lambda progress: seen.append((progress.phase, len(left(folder)))))
    assert ("decode video", 1) in seen
    assert ("decode audio", 1) in seen
    assert all(not files for phase, files in seen if not phase.startswith("decode"))
    assert left(folder) == []


@pytest.mark.parametrize("phase", ["decode video", "decode audio"])
@pytest.mark.parametrize("error", [Cancelled("stopped"), KeyboardInterrupt(), RuntimeError("lost")], ids=repr)
def test_a_run_that_dies_while_decoding_goes_on_from_its_file(
    pipe: LTX2AudioVideoPipeline,
    unbroken: Result,
    folder: Path,
    caplog: pytest.LogCaptureFixture,
    phase: str,
    error: BaseException,
) -> None:
    with pytest.raises(type(error)):
        pipe.generate(REQUEST, on_progress=stop_at(phase, error))
    (file,) = left(folder)
    assert f"the latents are in {file}" in caplog.text
    assert f"Try: diffsynth decode {file} --output video.mp4 --checkpoint {DEV}" in caplog.text
    result = pipe.decode(file)
    assert equal(result, unbroken)
    assert result.request == REQUEST
    assert left(folder) == [file], "a file that was named stays"


def test_sound_alone_is_said_to_go_into_a_sound_file(
    pipe: LTX2AudioVideoPipeline, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(Cancelled):
        pipe.generate(
            replace(REQUEST, audio_only=True), on_progress=stop_at("decode audio", Cancelled("stopped"))
        )
    assert "--output sound.wav --checkpoint" in caplog.text


def test_a_run_that_dies_before_leaves_nothing(pipe: LTX2AudioVideoPipeline, folder: Path) -> None:
    with pytest.raises(Cancelled):
        pipe.generate(REQUEST, on_progress=stop_at("denoise stage 1", Cancelled("stopped")))
    assert left(folder) == []


def test_latents_in_memory(pipe: LTX2AudioVideoPipeline, unbroken: Result) -> None:
    latents = (unbroken.video_latent, unbroken.audio_latent)
    assert equal(pipe.decode(latents, unbroken.record), unbroken)
    assert equal(pipe.decode(FinalLatents.of(unbroken)), unbroken)
    with pytest.raises(RequestError, match="without a record"):
        pipe.decode(latents)
    with pytest.raises(CheckpointError, match="no valid request"):
        pipe.decode(latents, {"model": "LTX-2"})


def test_decoders_are_enough(unbroken: Result, tmp_path: Path) -> None:
    file = tmp_path / "latents.safetensors"
    FinalLatents.of(unbroken).save(file)
    decoders = ("video_vae_decoder", "audio_vae_decoder", "audio_vocoder")
    pipe = LTX2AudioVideoPipeline.from_pretrained(torch.float32, "cpu", [config_of(DEV)], networks=decoders)
    assert set(pipe.parts.loaded()) == {*decoders, "video_statistics"}
    assert equal(pipe.decode(file), unbroken)
    with pytest.raises(CheckpointError, match="missing: tokenizer"):
        pipe.generate(REQUEST)


def test_under_the_memory_manager(unbroken: Result, folder: Path) -> None:
    pipe = load(vram_limit=4.0, storage="f32")
    with pytest.raises(Cancelled):
        pipe.generate(REQUEST, on_progress=stop_at("decode video", Cancelled("stopped")))
    (file,) = left(folder)
    result = pipe.decode(file)
    stored = result.record.pop("storage")
    assert stored == dict.fromkeys(("dit", "text_encoder", "text_encoder_post_modules"), "f32")
    assert equal(result, unbroken)


def test_a_given_sound_is_kept(pipe: LTX2AudioVideoPipeline, folder: Path) -> None:
    sound = torch.rand(2, 20_000, generator=torch.Generator().manual_seed(0)) - 0.5
    arguments: dict[str, Any] = {"prompt": "a boat", "seed": 1, "height": 64, "width": 64, "num_frames": 9}
    arguments |= {"num_inference_steps": 1, "retake_audio": sound, "progress_bar_cmd": lambda steps: steps}
    _, whole = pipe(**arguments)
    with pytest.raises(Cancelled):
        pipe(**arguments, on_progress=stop_at("decode video", Cancelled("stopped")))
    (file,) = left(folder)
    again = pipe.decode(file).audio_tensor()
    assert again is not None
    assert whole is not None
    assert torch.equal(again, whole)
    assert again.sampling_rate == whole.sampling_rate == 48000  # type: ignore[attr-defined]


@contextlib.contextmanager
def small_files() -> Iterator[None]:
    """No file may be larger than 100 bytes, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_costs_a_line_in_the_log(
    pipe: LTX2AudioVideoPipeline,
    unbroken: Result,
    folder: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    # Over before the outcome is reported: the report may go to a file as well.
    with small_files():
        result = pipe.generate(REQUEST)
    assert equal(result, unbroken)
    assert "the latents cannot be kept in case that decoding fails" in caplog.text
    assert left(folder) == []


def test_a_folder_that_cannot_be_made(
    folder: Path, unbroken: Result, caplog: pytest.LogCaptureFixture
) -> None:
    folder.parent.write_text("a file")
    with caplog.at_level(logging.WARNING):
        assert keep(FinalLatents.of(unbroken)) is None
    assert "the latents cannot be kept" in caplog.text


def test_there_and_back(tmp_path: Path) -> None:
    video, audio = torch.randn(1, 4, 2, 2, 2), torch.randn(1, 2, 3, 4).bfloat16()
    record = {"model": "LTX-2", "request": REQUEST.to_dict(), "note": "Größe"}
    sound = Waveform(torch.randn(2, 7), 44100)
    for given in (
        FinalLatents(video=video, audio=audio, record=record),
        FinalLatents(video=None, audio=audio, record=record, sound=sound),
        FinalLatents(video=video, audio=None, record=record),
    ):
        given.save(tmp_path / "a.safetensors")
        found = FinalLatents.load(tmp_path / "a.safetensors")
        for name in ("video", "audio"):
            before, after = getattr(given, name), getattr(found, name)
            assert (before is None) == (after is None)
            assert before is None or torch.equal(before.float(), after)
        assert (found.sound is None) == (given.sound is None)
        if found.sound is not None:
            assert torch.equal(found.sound.samples, sound.samples)
            assert found.sound.sampling_rate == 44100
        assert json.dumps(found.record) == json.dumps(record)
        assert found.request == REQUEST


def test_every_damage_is_noticed(unbroken: Result, tmp_path: Path) -> None:
    file, damaged = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    FinalLatents.of(unbroken).save(file)
    content = file.read_bytes()
    for place in range(0, len(content), 61):
        damaged.write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
        with pytest.raises(CheckpointError) as caught:
            FinalLatents.load(damaged)
        assert str(damaged) in str(caught.value)
        assert caught.value.hint
    for length in (0, 7, len(content) // 2, len(content) - 1):
        damaged.write_bytes(content[:length])
        with pytest.raises(CheckpointError, match="cannot be read"):
            FinalLatents.load(damaged)
    with pytest.raises(CheckpointError, match="cannot be read"):
        FinalLatents.load(tmp_path / "nowhere.safetensors")
    with pytest.raises(CheckpointError, match="does not hold the latents"):
        FinalLatents.load(DEV)


def test_latents_of_the_other_model(pipe: LTX2AudioVideoPipeline, unbroken: Result) -> None:
    record = {**unbroken.record, "model": "LTX-2.3"}
    with pytest.raises(CheckpointError, match=r"made by LTX-2\.3, the model is LTX-2"):
        pipe.decode((unbroken.video_latent, unbroken.audio_latent), record)


def config_of(path: Path) -> Any:
    from diffsynth.pipelines.ltx2_audio_video import ModelConfig

    return ModelConfig(path=path)
