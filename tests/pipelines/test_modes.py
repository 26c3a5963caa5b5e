"""Every mode from prompt and pictures to a file: what comes out, and what the file says of itself."""

from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import pytest
import torch
from PIL import Image

from diffsynth.loader import ModelConfig
from diffsynth.pipelines.ltx2_audio_video import LTX2AudioVideoPipeline
from diffsynth.request import GenerateRequest
from diffsynth.utils.media_io_ltx2 import read_request, write_video_audio_ltx2
from tests.pipelines.tiny import (
    DEV,
    GEMMA,
    PICTURES,
    Log,
    call,
    load,
    pixels,
    same,
    write_upscaler,
)

MODES: dict[str, dict[str, Any]] = {
    "one stage": {},
    "two stages": {"use_two_stage_pipeline": True},
    "distilled": {
        "use_two_stage_pipeline": True,
        "use_distilled_pipeline": True,
        "num_inference_steps": None,
    },
    "distilled in one stage": {"use_distilled_pipeline": True, "num_inference_steps": None},
}
IMAGES: dict[str, dict[str, Any]] = {
    "T2AV": {},
    "I2AV": {"input_images": PICTURES, "input_images_indexes": (0, -1), "input_images_strength": (1.0, 0.5)},
}


@pytest.mark.parametrize("images", IMAGES)
@pytest.mark.parametrize("mode", MODES)
def test_mode(pipe: LTX2AudioVideoPipeline, mode: str, images: str, tmp_path: Path) -> None:
    video, audio = call(
        pipe, **MODES[mode], **IMAGES[images], height=64, width=128, num_frames=17, frame_rate=25
    )
    assert isinstance(video, list)
    assert len(video) == 17
    assert all(isinstance(frame, Image.Image) for frame in video)
    assert {(frame.mode, frame.size) for frame in video} == {("RGB", (128, 64))}
    assert audio.dtype == torch.float32
    assert audio.device.type == "cpu"
    assert audio.shape[0] == 2
    assert audio.abs().max() <= 1
    assert video.frame_rate == 25
    assert audio.sampling_rate == 24000
    assert abs(audio.shape[1] / 24000 - 17 / 25) < 0.05

    path = write_video_audio_ltx2(video, audio, tmp_path / "video.mp4")
    with av.open(str(path)) as file:
        pictures, sound = file.streams.video[0], file.streams.audio[0]
        assert (pictures.codec_context.name, sound.codec_context.name) == ("h264", "aac")
        assert pictures.average_rate == Fraction(25)
        assert pictures.frames == 17
        assert (pictures.width, pictures.height) == (128, 64)
        assert (sound.rate, sound.channels) == (24000, 2)
        lengths = [float(stream.duration * stream.time_base) for stream in (pictures, sound)]
        assert abs(lengths[0] - lengths[1]) < 1 / 25
    record = read_request(path)
    assert record is not None
    request = GenerateRequest.from_dict(record["request"])
    assert request.seed == 43
    assert request.frame_rate == 25
    assert request.input_images == tuple(map(str, IMAGES[images].get("input_images", ())))


def test_the_result_may_be_changed(pipe: LTX2AudioVideoPipeline) -> None:
    _, audio = call(pipe)
    audio.mul_(0.5)
    assert audio.requires_grad is False


def test_modes_differ(pipe: LTX2AudioVideoPipeline) -> None:
    results = [pixels(call(pipe, **arguments)[0]) for arguments in MODES.values()]
    assert len(set(results)) == len(MODES)


def test_pictures_show(pipe: LTX2AudioVideoPipeline) -> None:
    plain = call(pipe)
    assert not same(plain, call(pipe, input_images=PICTURES[:1]))
    first, last = (call(pipe, input_images=PICTURES[:1], input_images_indexes=[i]) for i in (0, -1))
    assert not same(first, last)


def test_the_last_frame_has_two_names(pipe: LTX2AudioVideoPipeline) -> None:
    named, counted = (call(pipe, input_images=PICTURES[:1], input_images_indexes=[i]) for i in (-1, 8))
    assert same(named, counted)


def test_strength_of_each_picture(pipe: LTX2AudioVideoPipeline) -> None:
    def run(strength: Any) -> Any:
        return call(pipe, input_images=PICTURES, input_images_indexes=[0, -1], input_images_strength=strength)

    assert same(run(0.7), run([0.7, 0.7]))
    assert not same(run([0.7, 0.7]), run([0.7, 0.2]))
    assert not same(run([0.7, 0.7]), run([0.2, 0.7]))


def test_pictures_by_path_and_by_object_are_the_same(pipe: LTX2AudioVideoPipeline) -> None:
    with Image.open(PICTURES[0]) as picture:
        assert same(call(pipe, input_images=[picture]), call(pipe, input_images=[str(PICTURES[0])]))


def test_a_request_alone_reads_its_pictures(pipe: LTX2AudioVideoPipeline) -> None:
    video, audio = call(pipe, input_images=[PICTURES[0]])
    result = pipe.generate(GenerateRequest.from_dict(video.record["request"]))
    assert result.frames is not None
    assert same((video, audio), (result.frames, result.audio_tensor()))


def test_default_steps_and_guidance(pipe: LTX2AudioVideoPipeline) -> None:
    log = Log()
    call(pipe, num_inference_steps=None, on_progress=log)
    assert log.phases()["denoise stage 1"][-1] == (40, 40)
    assert same(call(pipe), call(pipe, cfg_scale=3.0))
    assert not same(call(pipe), call(pipe, cfg_scale=1.0))


def test_the_negative_prompt_matters_only_with_guidance(pipe: LTX2AudioVideoPipeline) -> None:
    assert not same(call(pipe), call(pipe, negative_prompt="shaky"))
    assert same(call(pipe, cfg_scale=1), call(pipe, cfg_scale=1, negative_prompt="shaky"))


def test_the_default_negative_prompt(pipe: LTX2AudioVideoPipeline) -> None:
    assert pipe.default_negative_prompt["LTX-2"].startswith("blurry, out of focus")
    assert "LTX-2.3" in pipe.default_negative_prompt


def test_sound_alone(pipe: LTX2AudioVideoPipeline) -> None:
    video, audio = call(pipe, audio_only=True)
    assert video is None
    assert audio.shape[0] == 2
    assert audio.sampling_rate == 24000


def test_tiles_concern_pictures_only(pipe: LTX2AudioVideoPipeline) -> None:
    size: dict[str, Any] = {"height": 128, "width": 128}
    whole, log = call(pipe, **size, tiled=False), Log()
    assert same(whole, call(pipe, **size, tiled=True)), "it fits in one tile"
    tiled = call(pipe, **size, tile_size_in_pixels=96, tile_overlap_in_pixels=64, on_progress=log)
    assert log.phases()["decode video"][-1] == (4, 4)
    assert [frame.size for frame in tiled[0]] == [(128, 128)] * 9
    assert not same(whole, tiled)
    assert torch.equal(whole[1], tiled[1])


def test_bfloat16() -> None:
    video, audio = call(load(dtype=torch.bfloat16), **MODES["two stages"], **IMAGES["I2AV"])
    assert len(video) == 9
    assert audio.dtype == torch.float32
    assert torch.isfinite(audio).all()


def test_ltx_2_3(ltx_2_3: Path, tmp_path: Path) -> None:
    upscaler = write_upscaler(tmp_path / "ltx-2.3-spatial-upscaler-x2.safetensors", spatial_upsample=True)
    pipe, log = load(ltx_2_3, GEMMA, upscaler, stage2_lora=None), Log()
    video, audio = call(pipe, num_inference_steps=None, on_progress=log)
    assert log.phases()["denoise stage 1"][-1] == (30, 30)
    assert audio.sampling_rate == 48000
    path = write_video_audio_ltx2(video, audio, tmp_path / "video.mp4")
    with av.open(str(path)) as file:
        assert file.streams.audio[0].rate == 48000
    assert video.record["model"] == "LTX-2.3"
    video, _ = call(pipe, **MODES["distilled"], **IMAGES["I2AV"])
    assert video[0].size == (64, 64)


def test_memory_fields_are_accepted() -> None:
    states: dict[str, Any] = {
        "offload_dtype": "disk",
        "offload_device": "disk",
        "onload_dtype": torch.float8_e5m2,
        "onload_device": "cpu",
        "preparing_dtype": torch.float8_e5m2,
        "preparing_device": torch.device("cpu"),
        "computation_dtype": torch.float32,
        "computation_device": "cpu",
    }
    pipe = LTX2AudioVideoPipeline.from_pretrained(
        torch_dtype=torch.float32,
        device="cpu",
        model_configs=[ModelConfig(path=path, **states) for path in (DEV, GEMMA)],
        tokenizer_config=ModelConfig(path=GEMMA),
        vram_limit=7.5,
    )
    assert len(call(pipe)[0]) == 9
