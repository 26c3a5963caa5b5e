"""What cannot work is refused before any weight is touched, in words that name argument and way out."""

import json
import logging
import os
import pickle
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from diffsynth.errors import CheckpointError, DiffSynthError, OutputError, RequestError
from diffsynth.loader import ModelConfig
from diffsynth.pipelines.inputs import Inputs
from diffsynth.pipelines.ltx2_audio_video import LTX2AudioVideoPipeline
from diffsynth.request import GenerateRequest
from diffsynth.utils.media_io_ltx2 import write_video_audio_ltx2
from tests.pipelines.tiny import (
    DEV,
    GEMMA,
    LORA,
    PICTURES,
    UPSCALER,
    call,
    load,
    sections,
    tensors,
    write_checkpoint,
    write_upscaler,
)

pytestmark = pytest.mark.usefixtures("empty_folder")

TWO_STAGES: dict[str, Any] = {"use_two_stage_pipeline": True}


def refused(kind: type[DiffSynthError], run: Callable[[], object], *words: str) -> str:
    """The message of the refusal, which has to hold all ``words`` and a hint."""
    with pytest.raises(kind) as caught:
        run()
    message = str(caught.value)
    assert caught.value.hint, "no way out"
    for word in words:
        assert word in message, message
    return message


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"height": 65}, ["height=65 is not a multiple of 32", "64 or 96"]),
        ({"width": 96, **TWO_STAGES}, ["width=96 is not a multiple of 64", "64 or 128"]),
        ({"num_frames": 12}, ["num_frames=12 is not 8k+1", "9 or 17"]),
        ({"height": 0}, ["height=0"]),
        ({"width": -64}, ["width=-64"]),
        ({"num_frames": 0}, ["num_frames=0"]),
        ({"num_inference_steps": 0}, ["num_inference_steps=0"]),
        ({"frame_rate": -24}, ["frame_rate=-24"]),
        ({"num_frames": 1, "frame_rate": 60}, ["num_frames=1", "too short for sound", "num_frames=9"]),
        ({"frame_rate": 1000}, ["num_frames=9", "too short for sound", "num_frames=25 or more"]),
        (
            {"num_frames": 1, **TWO_STAGES},
            ["num_frames=1 at height=64 and width=64 is too little", "num_frames=9, or height=128"],
        ),
        ({"audio_only": True, **TWO_STAGES}, ["audio_only", "use_two_stage_pipeline=False"]),
        ({"height": 32}, ["height=32 is too small", "64"]),
        ({"input_images": PICTURES[:1], "input_images_indexes": [9]}, ["input_images_indexes", "0 to 8"]),
        ({"input_images": PICTURES, "input_images_indexes": [8, -1]}, ["input_images_indexes", "twice"]),
        ({"input_images": PICTURES}, ["input_images_indexes has 1 entries for 2"]),
        (
            {"input_images": ["nowhere.png"]},
            ["input_images", "nowhere.png", "No such", "check the path"],
        ),
        ({"input_images": [Image.new("RGB", (1, 9))]}, ["input_images", "1x9", "2x2"]),
        ({"cfg_scale": 3.0, "use_distilled_pipeline": True}, ["cfg_scale=3.0", "leave cfg_scale out"]),
        ({"tile_size_in_pixels": 100}, ["tile_size_in_pixels"]),
        ({"tile_overlap_in_frames": 128}, ["tile_overlap_in_frames"]),
        ({"conventions": "mine"}, ["conventions", "official"]),
        ({"rand_device": "moon"}, ["rand_device='moon'", "cpu"]),
        ({"seed": "43"}, ["seed='43'"]),
        ({"prompt": "a b\udcf6at"}, ["prompt is not valid Unicode", "UTF-8"]),
        ({"input_images": PICTURES[:1], "input_images_indexes": 0}, ["input_images_indexes=0"]),
        ({"retake_video": "nowhere.mp4"}, ["retake_video", "nowhere.mp4"]),
        ({"retake_video": []}, ["retake_video"]),
        ({"retake_video": [Image.new("RGB", (64, 64))]}, ["retake_video has 1 frames", "num_frames=1"]),
        ({"retake_audio": torch.zeros(2, 100, dtype=torch.int16)}, ["retake_audio", "float samples"]),
    ],
)
def test_arguments(
    pipe: LTX2AudioVideoPipeline, untouched: None, arguments: dict[str, Any], words: list[str]
) -> None:
    refused(RequestError, lambda: call(pipe, **arguments), *words)


def test_an_unreadable_picture(pipe: LTX2AudioVideoPipeline, untouched: None, tmp_path: Path) -> None:
    bad = tmp_path / "picture.png"
    bad.write_bytes(PICTURES[0].read_bytes()[:100])
    refused(RequestError, lambda: call(pipe, input_images=[bad]), "input_images", "picture.png")


def test_tiles_that_fail_only_at_the_size_of_a_stage(pipe: LTX2AudioVideoPipeline, untouched: None) -> None:
    """Raised before the first stage, not after it."""
    tiles: dict[str, Any] = {"tile_size_in_pixels": 64, "tile_overlap_in_pixels": 32}
    size: dict[str, Any] = {"height": 128, "width": 128, **TWO_STAGES}
    refused(RequestError, lambda: call(pipe, input_images=PICTURES[:1], **size, **tiles), "tile_")
    narrow: dict[str, Any] = {"tile_size_in_pixels": 64, "tile_overlap_in_pixels": 0}
    refused(RequestError, lambda: call(pipe, height=160, **narrow), "tile_overlap_in_pixels=0")


def test_inputs_that_are_not_those_of_the_request(pipe: LTX2AudioVideoPipeline, untouched: None) -> None:
    request = GenerateRequest(prompt="a", height=64, width=64, num_frames=9, input_images=("a.png",))
    refused(RequestError, lambda: pipe.generate(request, Inputs()), "input_images: the request names 1, 0")
    refused(RequestError, lambda: pipe.generate(request), "a.png")


def test_an_empty_prompt_is_allowed_and_said(
    pipe: LTX2AudioVideoPipeline, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert len(call(pipe, prompt="")[0]) == 9
        assert "the prompt is empty" in caplog.text
        caplog.clear()
        call(pipe, prompt="a boat")
        assert "prompt is empty" not in caplog.text


def test_steps_of_a_distilled_model_are_ignored_and_said(
    pipe: LTX2AudioVideoPipeline, caplog: pytest.LogCaptureFixture
) -> None:
    call(pipe, use_distilled_pipeline=True, num_inference_steps=30)
    assert "num_inference_steps is not used" in caplog.text


def test_a_negative_prompt_without_guidance_is_said(
    pipe: LTX2AudioVideoPipeline, caplog: pytest.LogCaptureFixture
) -> None:
    call(pipe, cfg_scale=1.0, negative_prompt=pipe.default_negative_prompt["LTX-2"])
    assert "negative_prompt" not in caplog.text
    call(pipe, cfg_scale=1.0, negative_prompt="blurry")
    assert "negative_prompt is not used: there is no guidance" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "example"),
    [
        ({"input_images": Image.new("RGB", (64, 64))}, "input_images=[Image.open("),
        ({"input_images": "first.png"}, "input_images=[Image.open("),
        ({"input_images": [np.zeros((64, 64, 3))]}, "input_images=[Image.open("),
        ({"in_context_videos": "clip.mp4"}, "in_context_videos=['reference.mp4']"),
        ({"retake_video": np.zeros((9, 64, 64, 3))}, "retake_video='clip.mp4'"),
        ({"retake_audio": np.zeros((2, 9000))}, "retake_audio='sound.wav'"),
        ({"retake_video": "a.mp4", "retake_video_regions": (0.1, 0.2)}, "retake_video_regions=[(1.0, 3.0)]"),
    ],
)
def test_objects_of_another_kind(
    pipe: LTX2AudioVideoPipeline, untouched: None, arguments: dict[str, Any], example: str
) -> None:
    refused(RequestError, lambda: call(pipe, **arguments), "cannot be used", f"Try: {example}")


@pytest.mark.parametrize(
    ("arguments", "example"),
    [
        ({"model_configs": ModelConfig(path=DEV)}, "model_configs=[ModelConfig(path="),
        ({"model_configs": [str(DEV)]}, "model_configs=[ModelConfig(path="),
        ({"tokenizer_config": str(GEMMA)}, "tokenizer_config=ModelConfig("),
        ({"loras": (str(LORA), 1.0)}, "loras=[('style.safetensors', 1.0)]"),
        ({"host_limit": "4"}, "host_limit=7.5"),
        ({"vram_limit": [8]}, "vram_limit=7.5"),
    ],
)
def test_models_and_limits_of_another_kind(untouched: None, arguments: dict[str, Any], example: str) -> None:
    given: Any = {"model_configs": [ModelConfig(path=DEV)], "device": "cpu", **arguments}
    refused(RequestError, lambda: LTX2AudioVideoPipeline.from_pretrained(**given), f"Try: {example}")


def test_a_clip_longer_than_the_models_know_is_said(
    pipe: LTX2AudioVideoPipeline, caplog: pytest.LogCaptureFixture
) -> None:
    call(pipe, num_frames=9, frame_rate=0.45)
    assert "up to 20 s" not in caplog.text
    call(pipe, num_frames=9, frame_rate=0.2)
    assert "up to 20 s" in caplog.text


def test_what_is_said_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    request = GenerateRequest(height=64, width=64, num_frames=9, num_inference_steps=1, seed=1)
    with caplog.at_level(logging.INFO):
        pipe = load(DEV, GEMMA, request=request)
        pipe.generate(request)
        managed = load(DEV, GEMMA, request=request, vram_limit=1.0, cache=False)
        managed.generate(request)
    said = [line for line in caplog.messages if "is converting" not in line]
    assert sum("the prompt is empty" in line for line in said) == 2
    assert sum("memory plan" in line for line in said) == 1
    assert sum(line.startswith(f"{DEV}: dit, text_encoder_post_modules") for line in said) == 1


# -- what the loaded files cannot do ----------------------------------------------------------------------


def test_two_stages_without_an_upsampler(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = load(DEV, GEMMA)
    message = refused(RequestError, lambda: call(pipe, **TWO_STAGES), "use_two_stage_pipeline", "upsampler")
    assert "spatial upscaler x2 of Lightricks/LTX-2" in message


def test_two_stages_without_the_distilled_lora() -> None:
    pipe = load(stage2_lora=None)
    message = refused(RequestError, lambda: call(pipe, **TWO_STAGES), "stage2_lora_config")
    assert "distilled LoRA of Lightricks/LTX-2" in message
    assert "use_distilled_pipeline=True" in message
    distilled = call(pipe, **TWO_STAGES, use_distilled_pipeline=True, num_inference_steps=None)
    assert len(distilled[0]) == 9


def test_guidance_with_a_distilled_checkpoint(tmp_path: Path) -> None:
    distilled = tmp_path / "ltx-2-19b-distilled.safetensors"
    distilled.symlink_to(DEV)
    pipe = load(distilled, GEMMA, UPSCALER)
    for arguments in ({}, {"cfg_scale": 3.0}, TWO_STAGES):
        message = refused(RequestError, lambda a=arguments: call(pipe, **a), distilled.name, "guidance")  # type: ignore[misc]
        assert "use_distilled_pipeline=True, or cfg_scale=1" in message
    assert len(call(pipe, cfg_scale=1)[0]) == 9
    assert len(call(pipe, use_distilled_pipeline=True, num_inference_steps=None)[0]) == 9


def test_a_request_is_refused_before_the_weights_are_read(untouched: None, tmp_path: Path) -> None:
    def opened(*models: Path, **arguments: Any) -> None:
        request = GenerateRequest(prompt="a", height=128, width=128, num_frames=9, **arguments)
        load(*models, stage2_lora=None, request=request)

    larger = write_upscaler(tmp_path / "x1.5.safetensors", spatial_scale=1.5, rational_resampler=True)
    in_time = write_upscaler(tmp_path / "t.safetensors", spatial_upsample=False, temporal_upsample=True)
    distilled: dict[str, Any] = {**TWO_STAGES, "use_distilled_pipeline": True}
    refused(RequestError, lambda: opened(DEV, GEMMA, **TWO_STAGES), "upsampler")
    refused(RequestError, lambda: opened(DEV, GEMMA, UPSCALER, **TWO_STAGES), "stage2_lora_config")
    refused(RequestError, lambda: opened(DEV, GEMMA, in_time, **distilled), "t.safetensors", "upscaler x2")
    refused(CheckpointError, lambda: opened(DEV, GEMMA, larger, **distilled), "x1.5.safetensors")
    refused(CheckpointError, lambda: opened(GEMMA), "missing", "dit")
    refused(RequestError, lambda: opened(DEV, GEMMA, conventions="mine"), "conventions")
    with pytest.raises(AssertionError, match="weights were read"):
        opened(DEV, GEMMA)


def test_an_upsampler_that_does_not_double(ltx_2_3: Path, tmp_path: Path, untouched: None) -> None:
    """The x1.5 file belongs to LTX-2.3 and is loaded with it, but serves no second stage."""
    larger = write_upscaler(tmp_path / "x1.5.safetensors", spatial_scale=1.5, rational_resampler=True)
    request = GenerateRequest(prompt="a", height=128, width=128, num_frames=9, use_two_stage_pipeline=True)
    refused(
        RequestError,
        lambda: load(ltx_2_3, GEMMA, larger, stage2_lora=None, request=request),
        "x1.5.safetensors does not double height and width",
        "spatial upscaler x2 of Lightricks/LTX-2.3",
    )


@pytest.mark.parametrize(
    ("left_out", "part", "file"),
    [
        ("audio_vae.decoder.", "audio_vae_decoder", "audio_vae_decoder.safetensors"),
        ("vae.decoder.", "video_vae_decoder", "video_vae_decoder.safetensors"),
        ("vocoder.", "audio_vocoder", "audio_vocoder.safetensors"),
        ("text_embedding_projection.", "text_encoder_post_modules", "text_encoder_post_modules.safetensors"),
    ],
)
def test_a_missing_part(tmp_path: Path, left_out: str, part: str, file: str) -> None:
    prefixes = (
        left_out,
        *(["model.diffusion_model.video_emb", "model.diffusion_model.audio_emb"] * ("text" in part)),
    )
    state = {key: value for key, value in tensors(DEV).items() if not key.startswith(prefixes)}
    pipe = load(write_checkpoint(tmp_path / "some.safetensors", state, sections()), GEMMA)
    refused(
        CheckpointError,
        lambda: call(pipe),
        f"missing: {part}",
        "a Lightricks/LTX-2 checkpoint",
        f"{file} of DiffSynth-Studio/LTX-2-Repackage",
    )


def test_pictures_need_the_encoder(tmp_path: Path) -> None:
    state = {key: value for key, value in tensors(DEV).items() if not key.startswith("vae.encoder.")}
    pipe = load(write_checkpoint(tmp_path / "some.safetensors", state, sections()), GEMMA)
    refused(CheckpointError, lambda: call(pipe, input_images=PICTURES[:1]), "missing: video_vae_encoder")
    assert len(call(pipe)[0]) == 9, "nothing else needs it"


# -- files that cannot be used, or not together -----------------------------------------------------------


def test_upsampler_and_lora_of_the_other_model(ltx_2_3: Path, tmp_path: Path, untouched: None) -> None:
    newer = write_upscaler(tmp_path / "ltx-2.3-spatial-upscaler-x2.safetensors")
    refused(
        CheckpointError,
        lambda: load(ltx_2_3, GEMMA, UPSCALER, stage2_lora=None),
        f"{UPSCALER.name} belongs to LTX-2, the model is LTX-2.3",
        "Lightricks/LTX-2.3",
    )
    refused(
        CheckpointError,
        lambda: load(DEV, GEMMA, newer, stage2_lora=None),
        f"{newer.name} belongs to LTX-2.3, the model is LTX-2",
    )
    refused(
        CheckpointError,
        lambda: load(ltx_2_3, GEMMA),
        f"{LORA.name} was made for LTX-2, the model is LTX-2.3",
        "a LoRA for LTX-2.3",
    )


def test_a_lora_of_the_other_model_that_fits_is_warned_about(
    pipe: LTX2AudioVideoPipeline, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lora = tmp_path / "ltx-2.3-22b-lora-camera.safetensors"
    lora.symlink_to(LORA)
    with caplog.at_level(logging.WARNING):
        handle = pipe.load_lora(pipe.dit, lora)
    warning = f"{lora.name} was made for LTX-2.3, not for LTX-2"
    assert [record.getMessage() for record in caplog.records] == [warning]
    assert handle.report.made_for == "LTX-2.3"
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        load(DEV, GEMMA, UPSCALER, stage2_lora=lora)
    assert caplog.text.count(warning) == 1
    pipe.clear_lora()


def test_a_lora_for_something_else(pipe: LTX2AudioVideoPipeline, tmp_path: Path) -> None:
    file = tmp_path / "other.safetensors"
    state = {f"unet.down.0.lora_{part}.weight": torch.zeros(2, 2) for part in ("A", "B")}
    save_file(state, file)
    refused(CheckpointError, lambda: pipe.load_lora(pipe.dit, file), "nothing in it fits this model")
    save_file({**tensors(LORA), "diffusion_model.patchify_proj.dora_scale": torch.ones(32)}, file)
    refused(CheckpointError, lambda: pipe.load_lora(pipe.dit, file), "DoRA", "merge the adapter")
    assert not pipe.active_loras
    refused(RequestError, lambda: pipe.load_lora(pipe.text_encoder, LORA), "pipe.load_lora(pipe.dit")
    refused(RequestError, lambda: pipe.load_lora(pipe.dit, LORA, alpha=float("nan")), "nan")


def test_files_of_two_models(ltx_2_3: Path, tmp_path: Path, untouched: None) -> None:
    vocoder = {key: value for key, value in tensors(DEV).items() if key.startswith("vocoder.")}
    rest = {key: value for key, value in tensors(ltx_2_3).items() if not key.startswith("vocoder.")}
    old = write_checkpoint(tmp_path / "old.safetensors", vocoder, sections())
    new = write_checkpoint(tmp_path / "new.safetensors", rest, sections(ltx_2_3), "2.3.0")
    refused(
        CheckpointError,
        lambda: load(new, old, GEMMA, stage2_lora=None),
        "files of two models",
        "LTX-2.3",
        "old.safetensors",
    )


def test_the_same_part_twice(tmp_path: Path, untouched: None) -> None:
    copy = tmp_path / "copy.safetensors"
    copy.symlink_to(DEV)
    refused(CheckpointError, lambda: load(DEV, copy, GEMMA), "both hold the transformer")


def test_a_lora_among_the_models(untouched: None) -> None:
    refused(CheckpointError, lambda: load(DEV, GEMMA, LORA), "is a LoRA, not a model", "pipe.load_lora")


def damaged(file: Path, tmp_path: Path, how: str) -> Path:
    data, target = file.read_bytes(), tmp_path / "damaged.safetensors"
    if how == "cut off":
        target.write_bytes(data[: len(data) // 2])
    elif how == "cut off in the header":
        target.write_bytes(data[:5000])
    elif how == "empty":
        target.write_bytes(b"")
    elif how == "zeros":
        target.write_bytes(bytes(len(data)))
    elif how == "header of another length":
        target.write_bytes((int.from_bytes(data[:8], "little") - 3).to_bytes(8, "little") + data[8:])
    elif how == "a web page":
        target.write_bytes(b"<!DOCTYPE html><html>please log in</html>")
    return target


DAMAGE = ["cut off", "cut off in the header", "empty", "zeros", "header of another length", "a web page"]


@pytest.mark.parametrize("how", DAMAGE)
@pytest.mark.parametrize("file", [DEV, UPSCALER], ids=["checkpoint", "upsampler"])
def test_damaged_files(untouched: None, tmp_path: Path, file: Path, how: str) -> None:
    bad = damaged(file, tmp_path, how)
    others = [f for f in (DEV, UPSCALER) if f != file]
    refused(CheckpointError, lambda: load(bad, *others, GEMMA), bad.name)


@pytest.mark.parametrize("how", DAMAGE)
def test_damaged_loras(untouched: None, tmp_path: Path, how: str) -> None:
    refused(CheckpointError, lambda: load(stage2_lora=damaged(LORA, tmp_path, how)), "damaged.safetensors")


@pytest.mark.parametrize("section", ["transformer", "vae", "vocoder"])
def test_unknown_configuration_keys(untouched: None, tmp_path: Path, section: str) -> None:
    config = sections()
    config[section]["mixture_of_experts"] = 8
    newer = write_checkpoint(tmp_path / "newer.safetensors", tensors(DEV), config)
    refused(CheckpointError, lambda: load(newer, GEMMA), "mixture_of_experts", "diffsynth inspect")


class Evil:
    """Opening its pickle would end the test run."""

    def __reduce__(self) -> Any:
        return os._exit, (99,)


@pytest.mark.parametrize("name", ["model.safetensors", "model.ckpt", "model.bin", "model.pt"])
def test_pickles(untouched: None, tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    file.write_bytes(pickle.dumps(Evil()))
    refused(CheckpointError, lambda: load(file, GEMMA), name, "pickle", ".safetensors file of the same model")
    torch.save({"weight": torch.zeros(2)}, file)
    refused(CheckpointError, lambda: load(file, GEMMA), name, "pickle")
    refused(CheckpointError, lambda: load(stage2_lora=file), name, "pickle")


def test_missing_files(untouched: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nowhere = tmp_path / "nowhere.safetensors"
    refused(CheckpointError, lambda: load(nowhere, GEMMA), "path: ", "nowhere.safetensors does not exist")
    refused(CheckpointError, lambda: load(stage2_lora=nowhere), "nowhere.safetensors")
    refused(CheckpointError, lambda: load(tokenizer=tmp_path), str(tmp_path))
    monkeypatch.setenv("DIFFSYNTH_MODEL_BASE_PATH", str(tmp_path))
    config = ModelConfig(model_id="a/b", origin_file_pattern="c.safetensors", skip_download=True)
    refused(
        CheckpointError,
        lambda: LTX2AudioVideoPipeline.from_pretrained(device="cpu", model_configs=[config]),
        "a/b: not on this machine",
        str(tmp_path / "a" / "b" / "c.safetensors"),
    )


def test_other_arguments_of_from_pretrained(untouched: None) -> None:
    load_ = LTX2AudioVideoPipeline.from_pretrained
    configs = [ModelConfig(path=DEV)]
    refused(RequestError, lambda: load_(device="cpu"), "model_configs is empty")
    refused(RequestError, lambda: load_(device="moon", model_configs=configs), "device='moon'")
    refused(RequestError, lambda: load_(vram_limit=0, model_configs=configs), "vram_limit=0")
    refused(RequestError, lambda: load_(vram_limit=-1, model_configs=configs), "vram_limit=-1")
    refused(
        RequestError, lambda: load_(torch_dtype="bfloat16", model_configs=configs), "torch_dtype='bfloat16'"
    )  # type: ignore[arg-type]
    refused(
        RequestError, lambda: load_(torch_dtype=torch.int8, model_configs=configs), "torch_dtype=torch.int8"
    )


# -- the result cannot be written -------------------------------------------------------------------------


def test_output_folder_missing_or_not_one(pipe: LTX2AudioVideoPipeline, tmp_path: Path) -> None:
    video, audio = call(pipe)
    file = tmp_path / "file"
    file.touch()

    def write(path: Path) -> Callable[[], object]:
        return lambda: write_video_audio_ltx2(video, audio, path)

    refused(
        OutputError, write(tmp_path / "nowhere" / "a.mp4"), "output_path", f"create the folder {tmp_path}"
    )
    refused(OutputError, write(file / "a.mp4"), "output_path", f"{file} is not one")
    refused(OutputError, write(Path("/proc/a.mp4")), "output_path=/proc/a.mp4 could not be written")
    refused(RequestError, write(tmp_path / "a.avi"), "output_path", "a.mp4")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "output"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_output_folder_not_writable(pipe: LTX2AudioVideoPipeline, tmp_path: Path) -> None:
    folder = tmp_path / "read-only"
    folder.mkdir(mode=0o555)
    video, audio = call(pipe)
    write = write_video_audio_ltx2
    refused(OutputError, lambda: write(video, audio, folder / "a.mp4"), "output_path", "may write to")
    assert not list(folder.iterdir())


def test_disk_full(pipe: LTX2AudioVideoPipeline, empty_folder: Path) -> None:
    video, audio = call(pipe)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))
    try:
        with pytest.raises(OutputError) as caught:
            write_video_audio_ltx2(video, audio, empty_folder / "a.mp4")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "output_path" in str(caught.value)
    assert "free space in" in caught.value.hint


def test_nothing_is_read_of_a_configuration_that_is_no_json(tmp_path: Path, untouched: None) -> None:
    file = tmp_path / "broken.safetensors"
    save_file(tensors(DEV), file, {"config": json.dumps(sections())[:-5]})
    refused(CheckpointError, lambda: load(file, GEMMA), "broken.safetensors")
