"""The official commands: their options and defaults, and each of them typed as its documentation has it."""

import json
from pathlib import Path
from typing import Any

import av
import pytest
import torch

from diffsynth.cli.official import PIPELINES
from diffsynth.errors import RequestError
from diffsynth.pipelines.negative_prompt import NEGATIVE_PROMPT
from diffsynth.request import GenerateRequest, GuidanceParams
from diffsynth.utils.audio import Waveform, read_audio
from diffsynth.utils.audio_file import write_audio
from diffsynth.utils.media_io_ltx2 import write_video_audio_ltx2
from diffsynth.utils.metadata import read_request
from tests.cli.command import Here
from tests.pipelines.tiny import DEV, GEMMA

TINY = DEV.parent
OFFICIAL: dict[str, Any] = json.loads((TINY.parent / "defaults.json").read_text(encoding="utf-8"))
LORA = str(TINY / "ltx-2-tiny-distilled-lora-2.safetensors")
UPSAMPLER = str(TINY / "ltx-2-tiny-spatial-upscaler-x2.safetensors")
PICTURE = str(TINY / "cond_image_0.png")
MACHINE = ("--device", "cpu", "--dtype", "float32", "--quiet")
SIZE = ("--height", "64", "--width", "64", "--num-frames", "9")
TWO = ("--height", "128", "--width", "128", "--num-frames", "9", "--spatial-upsampler-path", UPSAMPLER)
GUIDANCE = ("--num-inference-steps", "2", "--video-stg-blocks", "1")
SOUND = ("--audio-stg-blocks", "1")
VERSIONS = {"2.0": "LTX-2", "2.3": "LTX-2.3"}


def words(name: str) -> list[str]:
    """What a command cannot do without, as far as reading its options goes."""
    needed = {
        "--checkpoint-path": ["dev"],
        "--distilled-checkpoint-path": ["distilled"],
        "--gemma-root": ["gemma"],
        "--prompt": ["a boat"],
        "--output-path": ["a.wav" if name == "t2a_one_stage" else "a.mp4"],
        "--distilled-lora": ["lora"],
        "--spatial-upsampler-path": ["upsampler"],
        "--audio-path": ["a.wav"],
        "--video-conditioning": ["clip.mp4", "1.0"],
    }
    own = {option.flag for option in PIPELINES[name].options}
    return [word for flag, values in needed.items() if flag in own for word in (flag, *values)]


def request(name: str, *given: str, version: str = "2.0") -> GenerateRequest:
    pipeline = PIPELINES[name]
    return pipeline.request(pipeline.parser().parse_args([*words(name), *given]), version)


def guidance(values: dict[str, Any]) -> GuidanceParams:
    return GuidanceParams(**{**values, "stg_blocks": tuple(values["stg_blocks"])})


def test_every_official_option_is_there() -> None:
    for name, flags in OFFICIAL["options_1_0_0"].items():
        own = {option.flag for option in PIPELINES[name].options}
        assert own >= set(flags), name
        assert "--streaming-prefetch-count" in own


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", ["ti2vid_one_stage", "ti2vid_two_stages", "keyframe_interpolation"])
def test_defaults_are_those_of_the_model(name: str, version: str) -> None:
    found, stated = request(name, version=version), OFFICIAL["params"][VERSIONS[version]]
    stage = "stage_1" if name == "ti2vid_one_stage" else "stage_2"
    assert (found.height, found.width) == (stated[f"{stage}_height"], stated[f"{stage}_width"])
    for field in ("seed", "num_frames", "frame_rate", "num_inference_steps"):
        assert getattr(found, field) == stated[field]
    assert found.video_guidance == guidance(stated["video"])
    assert found.audio_guidance == guidance(stated["audio"])
    assert found.negative_prompt == NEGATIVE_PROMPT == OFFICIAL["default_negative_prompt"]
    assert found.input_images_as_keyframes == (name == "keyframe_interpolation")


def test_defaults_of_the_other_pipelines() -> None:
    found, stated = request("ti2vid_two_stages_hq"), OFFICIAL["params"]["HQ"]
    assert (found.height, found.width) == (stated["stage_2_height"], stated["stage_2_width"])
    assert (found.num_inference_steps, found.sampler) == (stated["num_inference_steps"], "res_2s")
    assert found.video_guidance == guidance(stated["video"])
    assert found.audio_guidance == guidance(stated["audio"])
    strengths = [found.stage1_lora_strength, found.stage2_lora_strength]
    assert strengths == OFFICIAL["hq_distilled_lora_strength"]
    sound = request("a2vid_two_stage", version="2.3")
    assert sound.video_guidance == guidance(OFFICIAL["params"]["LTX-2.3"]["video"])
    assert sound.audio_guidance == GuidanceParams()
    assert (sound.retake_audio, sound.retake_audio_regions) == ("a.wav", ())
    assert request("a2vid_two_stage", "--audio-cfg-guidance-scale", "5") == request("a2vid_two_stage")
    distilled = request("distilled")
    assert distilled.use_distilled_pipeline
    assert (distilled.height, distilled.video_guidance, distilled.negative_prompt) == (1024, None, "")
    half = request("ic_lora", "--skip-stage-2")
    assert (half.height, half.width, half.use_two_stage_pipeline) == (512, 768, False)


def test_options_of_several_words() -> None:
    found = request(
        *("ti2vid_one_stage", "--image", "a.png", "0", "1", "--image", "b c.png", "-1", "0.5"),
        *("--video-stg-blocks", "3", "5", "--audio-stg-blocks", "--audio-stg-guidance-scale", "0"),
    )
    assert found.input_images == ("a.png", "b c.png")
    assert found.input_images_indexes == (0, -1)
    assert found.input_images_strength == (1.0, 0.5)
    assert found.input_images_crf is None
    assert found.video_guidance is not None
    assert found.audio_guidance is not None
    assert (found.video_guidance.stg_blocks, found.audio_guidance.stg_blocks) == ((3, 5), ())
    assert request("ti2vid_one_stage", "--image", "a.png", "0", "1", "20").input_images_crf == 20
    reference = request("ic_lora", "--conditioning-attention-mask", "mask.mp4", "0.5")
    assert (reference.in_context_attention_mask, reference.in_context_attention_strength) == ("mask.mp4", 0.5)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("--image", "a.png", "0"), "--image: a.png 0 is not PATH FRAME STRENGTH [CRF]"),
        (("--image", "a.png", "x", "1"), "is not PATH FRAME STRENGTH [CRF]"),
        (("--lora",), "--lora: nothing is not PATH [STRENGTH]"),
        (("--heigth", "64"), "unrecognized arguments: --heigth"),
        (("--seed", "x"), "--seed"),
        (("--offload", "cpu"), "Try: --vram-limit auto"),
        (("--max-batch-size=4",), "Try: leave it out"),
    ],
)
def test_options_that_cannot_be_read(
    given: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        request("ti2vid_one_stage", *given)
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert "Try: " in line


@pytest.mark.parametrize("flag", ["--num-frames", "--height", "--frame-rate", "--num-inference-steps"])
def test_zero_is_no_default(flag: str) -> None:
    with pytest.raises(RequestError, match="=0"):
        request("ti2vid_one_stage", flag, "0")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("--width", "70"), "diffsynth: --width=70 is not a multiple of 32"),
        (("--image", "no.png", "0", "1"), "diffsynth: --image: input_images: no.png cannot be read"),
        (("--image", PICTURE, "0", "2"), "diffsynth: --image: input_images_strength=2.0 is outside 0..1"),
        (("--output-path", ""), "diffsynth: --output-path=. does not end in .mp4  Try: video.mp4"),
    ],
)
def test_errors_name_the_option_that_was_typed(
    given: tuple[str, ...], message: str, here: Here, tmp_path: Path
) -> None:
    done = here(*typed("ti2vid_one_stage", tmp_path / "a.mp4", *SIZE, *GUIDANCE, *SOUND, *given))
    assert done.code == 2
    assert done.err.startswith(message)


def test_help_teaches(here: Here) -> None:
    shown = here("ti2vid_two_stages", "--help")
    assert shown.code == 0
    assert "--image PATH FRAME STRENGTH [CRF]" in shown.out
    assert "(40, or with LTX-2.3 30)" in " ".join(shown.out.split())
    assert "--vram-limit" in shown.out


def test_blocks_that_a_model_lacks(caplog: pytest.LogCaptureFixture) -> None:
    pipeline = PIPELINES["ti2vid_one_stage"]
    given = pipeline.parser().parse_args([*words("ti2vid_one_stage"), "--audio-stg-blocks", "7"])
    found = pipeline.request(given, "2.0", 3)
    assert found.video_guidance is not None
    assert found.audio_guidance is not None
    assert (found.video_guidance.stg_scale, found.video_guidance.cfg_scale) == (0.0, 3.0)
    assert found.audio_guidance.stg_blocks == (7,)  # which the pipeline refuses
    assert "the model has 3 blocks" in caplog.text
    assert pipeline.request(given, "2.0", 48) == request("ti2vid_one_stage", "--audio-stg-blocks", "7")


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("distilled", ()),
        ("ti2vid_one_stage", ("--video-stg-guidance-scale", "0", "--audio-stg-guidance-scale", "0")),
    ],
)
def test_what_is_not_asked_for_is_not_said_to_be_left_out(
    name: str, more: tuple[str, ...], caplog: pytest.LogCaptureFixture
) -> None:
    pipeline = PIPELINES[name]
    pipeline.request(pipeline.parser().parse_args([*words(name), *more]), "2.0", 3)
    assert "the model has" not in caplog.text


def test_pictures_of_one_quality_only() -> None:
    with pytest.raises(RequestError, match="different CRF"):
        request("distilled", "--image", "a.png", "0", "1", "20", "--image", "b.png", "8", "1", "0")


# -- each of them runs ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tone = torch.sin(torch.arange(24000) * 0.05).expand(2, -1).contiguous() * 0.5
    return write_audio(Waveform(tone, 24000), tmp_path_factory.mktemp("sound") / "tone.wav")


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    frames = torch.randint(
        0, 255, (9, 64, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    noise = torch.randn(2, 9000, generator=torch.Generator().manual_seed(1)) * 0.1
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    return write_video_audio_ltx2(frames, noise, path, 24, 24000)


def typed(name: str, output: Path, *given: str) -> tuple[str, ...]:
    """A command as the official documentation has it, with the paths of the tiny set."""
    distilled = name in {"distilled", "ic_lora"}
    checkpoint = "--distilled-checkpoint-path" if distilled else "--checkpoint-path"
    models = (checkpoint, str(DEV), "--gemma-root", str(GEMMA))
    return (name, *models, "--prompt", "a boat", "--output-path", str(output), *given, *MACHINE)


def written(output: Path) -> tuple[int, int, int, Any, int]:
    """Frames, height, width, rate of the pictures and rate of the sound."""
    with av.open(str(output)) as container:
        video, audio = container.streams.video[0], container.streams.audio[0]
        assert (video.codec_context.name, audio.codec_context.name) == ("h264", "aac")
        count = sum(1 for _ in container.decode(video))
        return count, video.height, video.width, video.average_rate, audio.rate


LORAS = ("--distilled-lora", LORA, "0.8")
RUNS: dict[str, tuple[str, ...]] = {
    "ti2vid_one_stage": (*SIZE, *GUIDANCE, *SOUND, "--image", PICTURE, "0", "1.0"),
    "ti2vid_two_stages": (*TWO, *GUIDANCE, *SOUND, *LORAS, "--lora", LORA, "0.3"),
    "ti2vid_two_stages_hq": (*TWO, "--num-inference-steps", "2", *LORAS),
    "distilled": (*TWO, "--image", PICTURE, "0", "0.9", "0"),
    "keyframe_interpolation": (
        *TWO,
        *GUIDANCE,
        *SOUND,
        *LORAS,
        "--image",
        PICTURE,
        "0",
        "1",
        "--image",
        PICTURE,
        "-1",
        "1",
    ),
    "ic_lora": (*TWO, "--lora", LORA),
}


@pytest.mark.parametrize("name", RUNS)
def test_each_writes_a_video(name: str, here: Here, tmp_path: Path, clip: Path) -> None:
    output = tmp_path / "boat.mp4"
    more = ("--video-conditioning", str(clip), "1.0") if name == "ic_lora" else ()
    done = here(*typed(name, output, *RUNS[name], *more))
    assert done.code == 0, done.err
    size = 64 if name == "ti2vid_one_stage" else 128
    assert written(output) == (9, size, size, 24, 24000)
    record = read_request(output)
    assert record is not None
    assert record["request"]["seed"] == 10


def test_given_sound_is_kept(here: Here, tmp_path: Path, sound: Path) -> None:
    output = tmp_path / "boat.mp4"
    given = (*TWO, *GUIDANCE, *LORAS, "--audio-path", str(sound), "--audio-start-time", "0.25")
    done = here(*typed("a2vid_two_stage", output, *given))
    assert done.code == 0, done.err
    assert written(output) == (9, 128, 128, 24, 24000)
    kept, whole = read_audio(output).samples, read_audio(sound, 0.25).samples
    length = min(kept.shape[1], 9000)
    assert torch.nn.functional.mse_loss(kept[:, :length], whole[:, :length]) < 1e-3  # AAC lies between


@pytest.mark.parametrize("checkpoint", ["--checkpoint-path", "--distilled-checkpoint-path"])
def test_retake(here: Here, tmp_path: Path, clip: Path, checkpoint: str) -> None:
    output = tmp_path / "boat.mp4"
    models = (checkpoint, str(DEV), "--gemma-root", str(GEMMA), "--loras", LORA)
    times = ("--video-path", str(clip), "--start-time", "0.1", "--end-time", "0.3", "--prompt", "a boat")
    done = here("retake", *models, *times, "--output-path", str(output), *MACHINE)
    assert done.code == 0, done.err
    assert written(output) == (9, 64, 64, 24, 24000)
    record = read_request(output)
    assert record is not None
    assert record["request"]["retake_audio_regions"] == [[0.1, 0.3]]


def test_sound_alone(here: Here, tmp_path: Path) -> None:
    output = tmp_path / "boat.flac"
    steps = ("--num-frames", "9", "--num-inference-steps", "2", *SOUND)
    done = here(*typed("t2a_one_stage", output, *steps))
    assert done.code == 0, done.err
    assert read_audio(output).sampling_rate == 24000
    assert here(*typed("t2a_one_stage", tmp_path / "boat.mp4", *steps)).code == 2


def test_memory_options(here: Here, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFSYNTH_CACHE_PATH", str(tmp_path / "cache"))
    limits = ("--vram-limit", "1", "--streaming-prefetch-count", "2", "--quantization", "fp8-cast", "--stats")
    done = here(*typed("ti2vid_one_stage", tmp_path / "a.mp4", *SIZE, *GUIDANCE, *SOUND, *limits))
    assert done.code == 0, done.err
    assert "denoise 1" in done.out
    assert any("e4m3" in path.name for path in (tmp_path / "cache" / "packed").iterdir())
    for given, message in (
        (("--quantization", "fp8-cast", "--storage", "int8"), "are both given"),
        (("--quantization", "nvfp4-cast"), "nvfp4-cast is not supported"),
        (("--streaming-prefetch-count", "0"), "prefetch_count=0"),
    ):
        refused = here(*typed("ti2vid_one_stage", tmp_path / "b.mp4", *SIZE, *GUIDANCE, *SOUND, *given))
        assert refused.code == 2, refused.err
        assert message in refused.err
