"""``diffsynth generate``: files that can be played and repeated, or an error and nothing at all."""

import json
import resource
import signal
import subprocess
import time
from fractions import Fraction
from pathlib import Path

import av
import pytest

from diffsynth.cli.generate import dtype_named, with_strength
from diffsynth.cli.machine import MachineOptions
from diffsynth.pipelines.limits import VRAMPreset
from diffsynth.request import GenerateRequest
from diffsynth.utils.media_io_ltx2 import read_request
from tests.cli.command import MODELS, SMALL, Here, arguments, environment, run, same_video
from tests.pipelines.tiny import (
    DEV,
    GEMMA,
    LORA,
    PICTURES,
    UPSCALER,
    sections,
    tensors,
    write_checkpoint,
    write_upscaler,
)

BOAT = ("generate", "a boat", *MODELS, *SMALL)
TWO_STAGES = ("--two-stage", "--upsampler", str(UPSCALER), "--distilled-lora", str(LORA))


def rates(path: Path) -> tuple[Fraction, int, int]:
    """Frame rate, frames, sampling rate."""
    with av.open(str(path)) as file:
        pictures, sound = file.streams.video[0], file.streams.audio[0]
        assert (pictures.codec_context.name, sound.codec_context.name) == ("h264", "aac")
        assert pictures.average_rate is not None
        return Fraction(pictures.average_rate), pictures.frames, sound.rate


def request_of(path: Path) -> GenerateRequest:
    record = read_request(path)
    assert record is not None
    return GenerateRequest.from_dict(record["request"])


def test_the_real_command(tmp_path: Path) -> None:
    done = run(*BOAT, "--seed", "43", "--output", "boat.mp4", cwd=tmp_path)
    assert done.code == 0, done.err
    assert rates(tmp_path / "boat.mp4") == (Fraction(24), 9, 24000)
    assert "boat.mp4 (seed 43)" in done.err
    assert "Warning" not in done.err
    for phase in ("encode prompt", "denoise stage 1", "decode video", "decode audio"):
        assert f"{phase}: 100%" in done.err
    assert [path.name for path in tmp_path.iterdir()] == ["boat.mp4"]
    shown = run("inspect", "boat.mp4", "--json", cwd=tmp_path)
    assert shown.code == 0
    assert GenerateRequest.from_dict(json.loads(shown.out)["request"]) == GenerateRequest(
        prompt="a boat", seed=43, height=64, width=64, num_frames=9, num_inference_steps=2
    )


def test_an_interrupt_leaves_nothing(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [*arguments(), *BOAT, "--steps", "5000", "--output", "boat.mp4"],
        cwd=tmp_path,
        env=environment(),
        stderr=subprocess.PIPE,
    )
    assert process.stderr is not None
    seen = b""
    deadline = time.monotonic() + 100
    while b"denoise stage 1:" not in seen and time.monotonic() < deadline:
        piece = process.stderr.read1(200)  # type: ignore[attr-defined]
        assert piece, seen
        seen += piece
    process.send_signal(signal.SIGINT)
    _, rest = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"cancelled" in rest
    assert b"Traceback" not in rest
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("older", [b"", b"an older video"])
def test_a_full_disk(here: Here, tmp_path: Path, older: bytes) -> None:
    path = tmp_path / "boat.mp4"
    if older:
        path.write_bytes(older)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))
    try:
        done = here(*BOAT, "-o", str(path), "--quiet")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert done.code == 3
    assert f"output_path={path} could not be written" in done.err
    assert "free space in" in done.err
    assert "Traceback" not in done.err
    assert [file.read_bytes() for file in tmp_path.iterdir()] == ([older] if older else [])


@pytest.mark.parametrize("mode", ["one stage", "two stages", "distilled"])
def test_modes(here: Here, tmp_path: Path, mode: str) -> None:
    path = tmp_path / "boat.mp4"
    options = {
        "one stage": ("--frame-rate", "29.97"),
        "two stages": TWO_STAGES,
        "distilled": ("--distilled", "--two-stage", "--upsampler", str(UPSCALER)),
    }[mode]
    images = ("--image", str(PICTURES[0]), "--image", str(PICTURES[1]))
    images += ("--image-index", "0", "--image-index", "-1")
    done = here(*BOAT, *options, *images, "--output", str(path), "--quiet")
    assert done.code == 0, done.err
    fps = Fraction(30000, 1001) if mode == "one stage" else Fraction(24)
    assert rates(path) == (fps, 9, 24000)
    request = request_of(path)
    assert request.input_images == tuple(map(str, PICTURES))
    assert request.use_two_stage_pipeline == (mode != "one stage")
    assert request.seed is not None
    record = read_request(path)
    assert record is not None
    expected = {f"{LORA.name} (stage 2)": 0.8} if mode == "two stages" else {}
    assert record["loras"] == expected


def test_the_recorded_request_repeats_the_video(here: Here, tmp_path: Path) -> None:
    first, second = tmp_path / "first.mp4", tmp_path / "second.mp4"
    assert here(*BOAT, "-o", str(first), "--quiet").code == 0
    seed = request_of(first).seed
    assert here(*BOAT, "-o", str(second), "--quiet", "--seed", str(seed)).code == 0
    assert request_of(first) == request_of(second)
    assert same_video(first, second)
    other = here(*BOAT, "-o", str(second), "--quiet", "--seed", str(seed + 1))
    assert other.code == 0, other.err
    assert not same_video(first, second)


def test_loras_and_their_strengths(here: Here, tmp_path: Path) -> None:
    path = tmp_path / "boat.mp4"
    done = here(*BOAT, "--lora", f"{LORA}=0.5", "-o", str(path), "--quiet")
    assert done.code == 0, done.err
    record = read_request(path)
    assert record is not None
    assert record["loras"] == {LORA.name: 0.5}
    done = here(*BOAT, *TWO_STAGES[:3], "--distilled-lora", f"{LORA}=0.6", "-o", str(path), "--quiet")
    assert done.code == 0, done.err
    record = read_request(path)
    assert record is not None
    assert record["loras"] == {f"{LORA.name} (stage 2)": 0.6}


def test_models_by_id(here: Here, tmp_path: Path, downloaded: Path) -> None:
    given = ("generate", "a boat", *SMALL, "--device", "cpu", "--quiet", "-o", str(tmp_path / "boat.mp4"))
    done = here(*given, "--checkpoint", "Lightricks/LTX-2:ltx-2-19b-dev.safetensors")
    assert done.code == 0, done.err
    assert request_of(tmp_path / "boat.mp4").prompt == "a boat"


def test_an_empty_prompt_is_allowed(here: Here, tmp_path: Path) -> None:
    done = here("generate", "", *MODELS, *SMALL, "-o", str(tmp_path / "boat.mp4"), "--quiet")
    assert done.code == 0, done.err


# -- refusals ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--height", "65"), "height=65 is not a multiple of 32"),
        (("--two-stage", "--width", "96"), "width=96 is not a multiple of 64"),
        (("--frames", "12"), "num_frames=12 is not 8k+1"),
        (("--frames", "0"), "num_frames=0 is not a positive whole number"),
        (("--steps", "-1"), "num_inference_steps=-1"),
        (("--image", "a.png", "--image-index", "9"), "input_images_indexes holds 9"),
        (("--image", "a.png", "--image", "b.png"), "input_images_indexes has 1 entries for 2"),
        (
            ("--image", "a.png", "--image", "b.png", "--image-index", "8", "--image-index", "-1"),
            "names a frame twice",
        ),
        (("--image", "nowhere.png"), "input_images: nowhere.png cannot be read"),
        (("--two-stage",), "needs a latent upsampler  Try: add the spatial upscaler x2"),
        (("--two-stage", "--upsampler", str(UPSCALER)), "(--distilled-lora)"),
        (("--distilled", "--cfg-scale", "3"), "a distilled model has its guidance built in"),
        (("--rand-device", "moon"), "rand_device='moon'"),
        (("--device", "moon"), "device='moon'"),
        (("--dtype", "float8"), "--dtype=float8 is not known  Try: bfloat16"),
        (("--conventions", "mine"), "conventions"),
        (("--vram-limit", "-1"), "vram_limit=-1"),
        (("--audio-only",), "video.mp4 is no name for sound alone"),
        (("-o", "boat.avi"), "output_path=boat.avi does not end in .mp4"),
        (("-o", ""), "output_path=. does not end in .mp4  Try: video.mp4"),
        (("--lora", f"{LORA}=strong"), "the strength 'strong' is no number"),
        (("--lora", f"{LORA}=nan"), f"the strength of {LORA}=nan is not a number"),
        (("--image", "no.png"), "no.png cannot be read as a picture: No such file or directory  Try: check"),
        (("--retake-audio", "no.wav"), "no.wav cannot be read: No such file or directory  Try: check"),
        (("--video-guidance", "{"), "--video-guidance"),
        (("--no-such-option",), "No such option"),
        (("--height", "tall"), "--height"),
    ],
)
def test_a_wrong_request_is_exit_code_2(
    here: Here, untouched: None, empty_folder: Path, options: tuple[str, ...], words: str
) -> None:
    done = here(*BOAT, *options)
    assert done.code == 2
    assert words in done.err
    assert "Traceback" not in done.err
    assert done.out == ""


def test_wrong_files_are_exit_code_3(
    here: Here, untouched: None, empty_folder: Path, tmp_path: Path, ltx_2_3: Path
) -> None:
    def refused(*options: str, words: str) -> None:
        done = here("generate", "a boat", *SMALL, "--device", "cpu", *options)
        assert done.code == 3, done.err
        assert words in done.err
        assert "Traceback" not in done.err

    gemma = ("--gemma", str(GEMMA))
    dev = ("--checkpoint", str(DEV), *gemma)
    refused("--checkpoint", "nowhere.safetensors", *gemma, words="nowhere.safetensors does not exist")
    refused(*dev[:2], "--gemma", "nowhere", words="nowhere does not exist")
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(DEV.read_bytes()[:-10])
    refused("--checkpoint", str(cut), *gemma, words="cut.safetensors: cut off")
    refused(*dev, "--two-stage", "--upsampler", "no.safetensors", words="no.safetensors does not exist")
    newer = write_upscaler(tmp_path / "ltx-2.3-spatial-upscaler-x2.safetensors")
    refused(*dev, "--upsampler", str(newer), words="belongs to LTX-2.3, the model is LTX-2")
    refused(
        *("--checkpoint", str(ltx_2_3), *gemma, "--two-stage", "--distilled", "--upsampler", str(UPSCALER)),
        words="belongs to LTX-2, the model is LTX-2.3",
    )
    refused(
        *("--checkpoint", str(ltx_2_3), *gemma, "--distilled-lora", str(LORA)),
        words="was made for LTX-2, the model is LTX-2.3",
    )
    refused("--checkpoint", str(ltx_2_3), *gemma, "--lora", str(LORA), words="was made for LTX-2, the model")
    refused(*dev, "--lora", "nowhere.safetensors", words="nowhere.safetensors does not exist")
    no_sound = {key: value for key, value in tensors(DEV).items() if not key.startswith("audio_vae.")}
    part = write_checkpoint(tmp_path / "part.safetensors", no_sound, sections())
    refused("--checkpoint", str(part), *gemma, words="missing: audio_vae_decoder")
    refused(*dev, "-o", "nowhere/boat.mp4", words="output_path=nowhere/boat.mp4 could not be written")
    refused(*dev, "-o", f"{cut}/boat.mp4", words="is not one")


def test_spellings_of_limits_and_dtypes() -> None:
    assert dtype_named("bf16") is dtype_named("bfloat16")
    limit = MachineOptions.of(None, "bf16", "8 GB", None, None, True).vram_limit
    assert isinstance(limit, str)
    assert VRAMPreset(limit) is VRAMPreset.GB_8
    assert with_strength(f"{LORA}=-1e-1") == (str(LORA), -0.1)


def test_a_missing_checkpoint_names_the_option(here: Here, untouched: None, empty_folder: Path) -> None:
    done = here("generate", "a boat", *SMALL)
    assert done.code == 2
    assert "--checkpoint is missing" in done.err
    assert "--checkpoint Lightricks/LTX-2:ltx-2-19b-dev.safetensors" in done.err


def test_a_traceback_only_when_asked_for(here: Here, empty_folder: Path) -> None:
    plain, debug = here(*BOAT, "--height", "65"), here("--debug", *BOAT, "--height", "65")
    assert (plain.code, debug.code) == (2, 2)
    assert "Traceback" not in plain.err
    assert "Traceback" in debug.err
    assert "RequestError" in debug.err
    assert debug.err.splitlines()[-1] == plain.err.splitlines()[-1]
