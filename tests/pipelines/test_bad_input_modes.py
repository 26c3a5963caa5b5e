"""What cannot work in the modes with clips, sounds and samplers is refused before any weight is touched."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from diffsynth.errors import RequestError
from diffsynth.pipelines.inputs import Inputs
from diffsynth.pipelines.ltx2_audio_video import LTX2AudioVideoPipeline
from diffsynth.request import GenerateRequest, GuidanceParams
from diffsynth.utils.media_io_ltx2 import write_video_audio_ltx2
from tests.pipelines.test_bad_input import refused
from tests.pipelines.tiny import DEV, GEMMA, LORA, PICTURES, call, load, same

pytestmark = pytest.mark.usefixtures("empty_folder")

CLIP = [Image.new("RGB", (64, 64), (9 * i, 0, 0)) for i in range(9)]
SOUND = torch.ones(2, 9000)
RETAKE: dict[str, Any] = {"retake_video": CLIP}
REFERENCE: dict[str, Any] = {"in_context_videos": [CLIP], "in_context_downsample_factor": 1}
DISTILLED: dict[str, Any] = {"use_distilled_pipeline": True, "num_inference_steps": None}
FULL = GuidanceParams(cfg_scale=3, modality_scale=3)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        # regions
        ({**RETAKE, "retake_video_regions": [(0.3, 0.1)]}, ["start 0.3 s must lie before end 0.1 s"]),
        ({**RETAKE, "retake_video_regions": [(-0.1, 0.2)]}, ["start -0.1 s lies before the clip", "0.0 or"]),
        ({**RETAKE, "retake_video_regions": [(0.2, 0.2)]}, ["retake_video_regions", "must lie before"]),
        ({**RETAKE, "retake_video_regions": [(0.4, 0.5)]}, ["outside the clip", "0.375"]),
        ({**RETAKE, "retake_video_regions": [(0.1, 5.0)]}, ["outside the clip, which lasts 0.375 s"]),
        (
            {"retake_audio": SOUND, "retake_audio_regions": [(0.1, float("nan"))]},
            ["retake_audio_regions=nan is not a number"],
        ),
        ({"retake_video_regions": [(0.1, 0.2)]}, ["retake_video_regions is given without retake_video"]),
        # sizes, with the nearest legal cut
        ({"height": 65}, ["height=65", "64 or 96, or fit=True (--fit)"]),
        ({"num_frames": 12}, ["num_frames=12", "9 or 17, or fit=True"]),
        (
            {"retake_video": CLIP[:7]},
            ["retake_video has 7 frames", "num_frames=1, which fit=True"],
        ),
        # references and masks
        ({"in_context_videos": [CLIP, CLIP[:5]]}, ["in_context_videos[1] has 5 frames, num_frames is 9"]),
        (
            {**REFERENCE, "in_context_attention_mask": CLIP[:8]},
            ["in_context_attention_mask has 8 frames", "num_frames=1"],
        ),
        (
            {**REFERENCE, "in_context_attention_mask": [*CLIP, *CLIP]},
            ["another length than in_context_videos[0]: more than 9 frames, not 9"],
        ),
        ({"in_context_attention_mask": CLIP}, ["is given without in_context_videos"]),
        (
            {"in_context_videos": [CLIP], "in_context_downsample_factor": 4},
            ["height=64 is not a multiple of 128", "reference clips of 1/4"],
        ),
        ({"in_context_videos": [torch.zeros(9, 3, 8, 8)]}, ["in_context_videos", "(frames, height, width"]),
        # strengths
        ({"input_images": PICTURES[:1], "input_images_strength": "high"}, ["input_images_strength='high'"]),
        ({"input_images": PICTURES[:1], "input_images_strength": float("nan")}, ["strength=nan", "number"]),
        ({**REFERENCE, "in_context_strength": "high"}, ["in_context_strength='high'"]),
        ({**REFERENCE, "in_context_strength": [0.5, 0.5]}, ["in_context_strength has 2 entries for 1"]),
        ({**REFERENCE, "in_context_strength": 1.5}, ["in_context_strength=1.5 is outside 0..1"]),
        ({**REFERENCE, "in_context_attention_strength": float("inf")}, ["in_context_attention_strength=inf"]),
        ({"stage1_lora_strength": float("nan")}, ["stage1_lora_strength=nan"]),
        ({"stage2_lora_strength": "0.5"}, ["stage2_lora_strength='0.5'"]),
        # sounds
        ({"retake_audio": torch.zeros(2, 0)}, ["retake_audio", "(2, 0)"]),
        ({"retake_audio": torch.full((2, 9), float("nan"))}, ["retake_audio", "not finite"]),
        ({"retake_audio": torch.zeros(64, 2)}, ["64 channels", "channels before samples"]),
        ({"retake_audio": SOUND, "audio_start_time": 60.0}, ["no sound at 60.0 s", "audio_start_time"]),
        ({"retake_audio": SOUND, "audio_start_time": -1.0}, ["audio_start_time=-1.0"]),
        ({"retake_audio": SOUND, "audio_max_duration": 0.0}, ["audio_max_duration=0.0"]),
        ({"audio_start_time": 1.0}, ["audio_start_time is given without retake_audio"]),
        ({"audio_only": True, "input_images": PICTURES[:1]}, ["audio_only", "input_images cannot apply"]),
        ({"audio_only": True, "retake_video": CLIP}, ["audio_only", "retake_video cannot apply"]),
        # guidance and samplers
        ({**DISTILLED, "video_guidance": FULL}, ["distilled", "video_guidance cannot apply"]),
        ({**DISTILLED, "audio_guidance": FULL, "cfg_scale": 2.0}, ["audio_guidance, cfg_scale=2.0"]),
        ({**DISTILLED, "stage1_lora_strength": 0.25}, ["distilled", "stage1_lora_strength cannot apply"]),
        ({**DISTILLED, "dynamic_shift": True}, ["distilled", "dynamic_shift cannot apply"]),
        ({"video_guidance": GuidanceParams(cfg_kind="cfg+")}, ["video_guidance.cfg_kind='cfg+'", "apg"]),
        ({"video_guidance": GuidanceParams(apg_norm_threshold=-1)}, ["apg_norm_threshold=-1"]),
        ({"video_guidance": GuidanceParams(stg_scale=1, stg_blocks=(3,))}, ["stg_blocks", "3 blocks"]),
        ({"sampler": "heun"}, ["sampler='heun'", "res_2s"]),
        ({"sampler": "ancestral", "ancestral_eta": 2.0}, ["ancestral_eta=2.0"]),
        ({"sampler": "res_2s", "conventions": "diffsynth"}, ["sampler='res_2s'", "conventions='official'"]),
    ],
)
def test_arguments(
    pipe: LTX2AudioVideoPipeline, untouched: None, arguments: dict[str, Any], words: list[str]
) -> None:
    refused(RequestError, lambda: call(pipe, **arguments), *words)


def test_a_file_without_sound(pipe: LTX2AudioVideoPipeline, untouched: None, tmp_path: Path) -> None:
    silent = write_video_audio_ltx2(CLIP, None, tmp_path / "silent.mp4", 24)
    refused(RequestError, lambda: call(pipe, retake_audio=silent), "silent.mp4 has no sound track")
    silent.unlink()


@pytest.mark.parametrize(
    ("sound", "words"),
    [
        (torch.zeros(2, 9000), "retake_audio is silent"),
        (torch.ones(2, 48000), "retake_audio goes on after the video, which lasts 0.375 s: it is cut there"),
        (torch.ones(2, 2400), "retake_audio ends after 0.100 s, the video after 0.375 s: silence follows"),
    ],
)
def test_sounds_that_may_be_mistaken(
    pipe: LTX2AudioVideoPipeline, caplog: pytest.LogCaptureFixture, sound: torch.Tensor, words: str
) -> None:
    with caplog.at_level(logging.WARNING):
        call(pipe, retake_audio=sound, audio_sample_rate=24000)
    assert words in caplog.text


def test_a_clip_that_does_not_fit_is_cut_on_demand(
    pipe: LTX2AudioVideoPipeline, caplog: pytest.LogCaptureFixture
) -> None:
    arguments: dict[str, Any] = {"retake_video": [*CLIP, *CLIP[:4]], "num_frames": 25, "height": 70}
    with caplog.at_level(logging.WARNING):
        frames, _ = call(pipe, **arguments, fit=True)
    assert len(frames) == 9
    assert frames[0].size == (64, 64)
    assert "height=70 is cut to 64 to fit" in caplog.text
    assert "num_frames=25 is cut to 9 to fit the given clips" in caplog.text
    assert "retake_video is 64x64: it is resized" not in caplog.text
    request = GenerateRequest(
        prompt="a", retake_video="clip", num_frames=25, height=64, width=96, num_inference_steps=1, fit=True
    )
    result = pipe.generate(request, Inputs(retake_video=CLIP))
    assert result.request.num_frames == 9
    with caplog.at_level(logging.WARNING):
        call(pipe, retake_video=CLIP, width=96)
    assert "retake_video is 64x64: it is resized and cropped to 96x64" in caplog.text
    late = {**arguments, "retake_video_regions": [(0.5, 0.9)]}
    refused(RequestError, lambda: call(pipe, **late, fit=True), "outside the clip, which lasts 0.375 s")


# -- LoRAs ------------------------------------------------------------------------------------------------


def in_context_lora(file: Path, **metadata: str) -> Path:
    save_file(load_file(LORA), file, metadata)
    return file


@pytest.mark.parametrize("names", [("union-2.safetensors", "union-4.safetensors"), ("2/union", "4/union")])
def test_loras_that_want_references_of_two_sizes(
    pipe: LTX2AudioVideoPipeline, tmp_path: Path, names: tuple[str, str]
) -> None:
    for factor, name in zip((2, 4), names, strict=True):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        pipe.load_lora(pipe.dit, in_context_lora(tmp_path / name, reference_downscale_factor=str(factor)))
    message = refused(
        RequestError,
        lambda: call(pipe, in_context_videos=[CLIP], height=128, width=128),
        "references of different sizes",
        "load only one",
    )
    assert f"{Path(names[0]).name}: 2, {Path(names[1]).name}: 4" in message
    assert len(call(pipe)[0]) == 9, "without references they go together"
    pipe.clear_lora()


def test_a_lora_says_how_large_its_references_are(
    pipe: LTX2AudioVideoPipeline, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pipe.load_lora(pipe.dit, in_context_lora(tmp_path / "one.safetensors", reference_downscale_factor="1"))
    frames, _ = call(pipe, in_context_videos=[CLIP])
    assert frames.record["request"]["in_context_downsample_factor"] == 1
    with caplog.at_level(logging.WARNING):
        call(pipe, in_context_videos=[CLIP], in_context_downsample_factor=2)
    assert "in_context_downsample_factor=2, but the LoRA was made for 1" in caplog.text
    pipe.clear_lora()
    frames, _ = call(pipe, in_context_videos=[CLIP])
    assert frames.record["request"]["in_context_downsample_factor"] == 2


def test_a_lora_for_sparse_references(
    pipe: LTX2AudioVideoPipeline, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It decides which frames of the reference count; nobody looks at the others."""
    stated = {"reference_downscale_factor": "1", "reference_temporal_scale_factor": "2"}
    sparse = in_context_lora(tmp_path / "sparse.safetensors", **stated)
    pipe.load_lora(pipe.dit, sparse)
    refused(
        RequestError,
        lambda: call(pipe, in_context_videos=[CLIP]),
        "num_frames=9 is not 16k+1, as reference clips of one frame in 2 need it",
        "1 or 17, or fit=True",
    )
    clip = [*CLIP, *CLIP][:17]
    made = call(pipe, in_context_videos=[clip], num_frames=17)
    assert made[0].record["request"]["in_context_temporal_factor"] == 2
    kept = [clip[0] if number == 0 else clip[number - (number + 1) % 2] for number in range(17)]
    assert same(made, call(pipe, in_context_videos=[kept], num_frames=17))
    with caplog.at_level(logging.WARNING):
        full = call(pipe, in_context_videos=[clip], num_frames=17, in_context_temporal_factor=1)
    assert "in_context_temporal_factor=1, but the LoRA was made for 2" in caplog.text
    assert not same(made, full)
    pipe.load_lora(pipe.dit, in_context_lora(tmp_path / "full.safetensors", reference_downscale_factor="1"))
    refused(
        RequestError,
        lambda: call(pipe, in_context_videos=[clip], num_frames=17),
        "different frame rates",
        "load only one",
    )
    pipe.clear_lora()


def test_the_first_stage_needs_the_distilled_lora_for_its_strength(untouched: None) -> None:
    request = GenerateRequest(prompt="a", height=64, width=64, num_frames=9, stage1_lora_strength=0.25)
    refused(
        RequestError,
        lambda: load(DEV, GEMMA, stage2_lora=None, request=request),
        "stage1_lora_strength needs the distilled LoRA",
    )


@pytest.mark.parametrize("strength", ["0.8", None, float("inf")])
def test_strengths_of_loras(pipe: LTX2AudioVideoPipeline, untouched: None, strength: Any) -> None:
    refused(RequestError, lambda: pipe.load_lora(pipe.dit, LORA, alpha=strength), repr(strength))
    refused(RequestError, lambda: load(stage2_lora_strength=strength), "stage2_lora_strength", repr(strength))
    refused(RequestError, lambda: load(loras=[(LORA, strength)]), "loras", repr(strength))
