"""The example scripts run as they are, against the tiny files under the names of the released ones."""

import ast
import os
import re
import runpy
import subprocess
import sys
import wave
from dataclasses import replace
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import av
import pytest
from PIL import Image

from diffsynth.pipelines.gpus import find_gpu
from diffsynth.pipelines.nearest import plan_request
from diffsynth.pipelines.parts import ModelVersion
from diffsynth.pipelines.presets import HQ_PRESET
from diffsynth.request import GenerateRequest
from diffsynth.utils.media_io_ltx2 import read_request

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples" / "ltx2"
README = (EXAMPLES / "README.md").read_text(encoding="utf-8")
FOLDER, LOW_VRAM = EXAMPLES / "model_inference", EXAMPLES / "model_inference_low_vram"
MOVES = ("Dolly-In", "Dolly-Out", "Dolly-Left", "Dolly-Right", "Jib-Up", "Jib-Down", "Static")
BASIC = [
    f"{model}-{kind}-{mode}"
    for model in ("LTX-2", "LTX-2.3")
    for kind in ("T2AV", "I2AV")
    for mode in ("OneStage", "TwoStage", "DistilledPipeline")
]
CAMERA = [f"LTX-2-T2AV-Camera-Control-{move}" for move in MOVES]
IN_CONTEXT = {
    "LTX-2-T2AV-IC-LoRA-Union-Control": 2,
    "LTX-2-T2AV-IC-LoRA-Detailer": 1,
    "LTX-2.3-T2AV-IC-LoRA-Union-Control": 2,
    "LTX-2.3-T2AV-IC-LoRA-Motion-Track-Control": 2,
}
"""Script -> size of the first stage over the size of its reference clip."""
A2V, RETAKE = "LTX-2.3-A2V-TwoStage", "LTX-2.3-T2AV-TwoStage-Retake"
HQ, KEYFRAMES, T2A = "LTX-2.3-T2AV-TwoStage-HQ", "LTX-2.3-Keyframe-Interpolation", "LTX-2.3-T2A-OneStage"
INDEXES = {KEYFRAMES: (0, -1), "LTX-2.3-I2AV-TwoStage": (0, -1)}
"""Frames of the pictures, where it is not the first one alone."""
NAMES = [*BASIC, *CAMERA, *IN_CONTEXT, A2V, RETAKE, HQ, KEYFRAMES, T2A]
ROWS = {
    name: cells.split("|") for name, cells in re.findall(r"^\| \[`(LTX-[^`]+)`\]\S+ \|(.*)\|$", README, re.M)
}
"""Script -> what it shows, its files, and minutes on a card of 8 GB."""
CARD = find_gpu("RTX 4060 8GB")
MODULES = {"camera_control", "common", "inputs", "low_vram"}


def small(name: str) -> tuple[int, int, int]:
    """The smallest legal height, width and length; a region that ends at two seconds needs as long a clip."""
    if name == RETAKE:
        return 64, 64, 49
    return (128, 128, 9) if name in IN_CONTEXT else (64, 64, 9)


def run(script: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, *more: str) -> Path:
    """As ``python SCRIPT`` does: its own folder comes first among the places of modules.

    Returns: the one file that it leaves in the empty working folder.
    """
    height, width, num_frames = small(script.stem)
    size = [f"--height={height}", f"--width={width}", f"--num-frames={num_frames}"]
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [str(script.parent), *sys.path])
    monkeypatch.setattr(sys, "argv", [str(script), *size, *more])
    for module in MODULES:  # those of the last script
        monkeypatch.delitem(sys.modules, module, raising=False)
    runpy.run_path(str(script), run_name="__main__")
    (made,) = folder.iterdir()
    return made


def quick(name: str) -> list[str]:
    """Distilled models have their own list of steps."""
    return [] if "Distilled" in name else ["--num-inference-steps=2"]


def check_file(path: Path, name: str) -> None:
    """Size, length and rates of what a script made."""
    height, width, num_frames = small(name)
    rate = 48000 if name.startswith("LTX-2.3") or name in {A2V, RETAKE} else 24000
    if path.suffix == ".wav":
        with wave.open(str(path)) as sound:
            assert (sound.getnchannels(), sound.getframerate()) == (2, rate)
            assert sound.getnframes() / rate == pytest.approx(num_frames / 24, abs=0.05)
            assert any(sound.readframes(-1))
        return
    with av.open(str(path)) as file:
        pictures, sound = file.streams.video[0], file.streams.audio[0]
        assert (pictures.height, pictures.width, pictures.frames) == (height, width, num_frames)
        assert (pictures.average_rate, sound.rate) == (24, rate)


def made_by(path: Path) -> tuple[GenerateRequest, dict[str, Any]]:
    """The request of a file, and the record around it."""
    record = read_request(path)
    assert record is not None
    return GenerateRequest.from_dict(record["request"]), record


def test_all_scripts_are_there() -> None:
    for folder in (FOLDER, LOW_VRAM):
        assert sorted(path.stem for path in folder.glob("LTX-*.py")) == sorted(NAMES)
        assert {path.stem for path in folder.glob("*.py")} - set(NAMES) <= MODULES
    assert sorted(ROWS) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_script(
    name: str,
    downloaded: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = run(FOLDER / f"{name}.py", tmp_path, monkeypatch, *quick(name))
    assert capsys.readouterr().out.strip() == path.name
    check_file(path, name)
    request, record = made_by(path) if name != T2A else (GenerateRequest(audio_only=True), {"loras": {}})
    check_plan(name, request)
    if name == T2A:
        return
    assert request.use_two_stage_pipeline == ("OneStage" not in name)
    assert request.use_distilled_pipeline == ("Distilled" in name)
    assert bool(request.negative_prompt) == ("Distilled" not in name)
    assert request.seed == 43
    assert request.input_images_indexes == INDEXES.get(name, (0,))
    assert bool(request.input_images) == ("I2AV" in name or "Motion" in name or name == KEYFRAMES)
    assert request.in_context_downsample_factor == IN_CONTEXT.get(name)
    assert len(request.in_context_videos) == (name in IN_CONTEXT)
    assert request.clear_lora_before_state_two == (name in IN_CONTEXT)
    assert record["loras"] == expected_loras(name)
    regions = (request.retake_video_regions, request.retake_audio_regions)
    assert regions == ((((1.0, 2.0),), ((0.5, 1.5),)) if name == RETAKE else ((), ()))
    assert (request.retake_audio is not None) == (name in {A2V, RETAKE})


def check_plan(name: str, request: GenerateRequest) -> None:
    """At its full size it fits a card of 8 GB and 24 GB of host memory; the README says how long it takes."""
    version: ModelVersion = "2.3" if "2.3" in name else "2.0"
    steps = HQ_PRESET.num_inference_steps if name == HQ else None
    full = replace(request, **stated(name), num_inference_steps=steps)
    own_lora = name in CAMERA or name in IN_CONTEXT
    found = plan_request(full, version, CARD.budget(host_gb=24), storage="int8", lora=own_lora)
    said_min = float(ROWS[name][-1].removesuffix("min "))
    assert said_min == pytest.approx(found.seconds / 60, rel=0.1, abs=0.5), f"{found.seconds / 60:.1f} min"


def expected_loras(name: str) -> dict[str, float]:
    """Files and strengths that the record must name."""
    distilled = "ltx-2.3-22b-distilled-lora-384-1.1" if "2.3" in name else "ltx-2-19b-distilled-lora-384"
    if name == HQ:
        return {f"{distilled}.safetensors (stage {n})": s for n, s in ((1, 0.25), (2, 0.5))}
    loras = {} if "OneStage" in name or "Distilled" in name else {f"{distilled}.safetensors (stage 2)": 0.8}
    model = "ltx-2.3-22b" if "2.3" in name else "ltx-2-19b"
    if name in CAMERA:
        loras[f"{model}-lora-{name.split('T2AV-')[1].lower()}.safetensors"] = 1.0
    if name in IN_CONTEXT:
        half = "-ref0.5" if IN_CONTEXT[name] == 2 else ""
        loras[f"{model}-{name.split('T2AV-')[1].lower()}{half}.safetensors"] = 1.0
    return loras


@pytest.mark.parametrize("name", NAMES)
def test_low_vram_script(
    name: str, downloaded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = run(LOW_VRAM / f"{name}.py", tmp_path, monkeypatch, *quick(name))
    check_file(path, name)


def test_options_from_the_shell(downloaded: Path, tmp_path: Path) -> None:
    script = [sys.executable, str(LOW_VRAM / "LTX-2-T2AV-DistilledPipeline.py")]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    options = ["--height=64", "--width=128", "--num-frames=9", "--output=mine.mp4", "--vram-limit=4"]
    start = partial(subprocess.run, cwd=tmp_path, env=environment, check=True, capture_output=True)
    start([*script, *options])
    request, _ = made_by(tmp_path / "mine.mp4")
    assert (request.height, request.width, request.num_frames) == (64, 128, 9)
    shown = subprocess.run(
        [*script, "--help"], cwd=tmp_path, env=environment, check=True, capture_output=True
    )
    assert b"distilled LTX-2" in shown.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["mine.mp4"]


@pytest.mark.parametrize("command", re.findall(r"^python (.*)$", README, flags=re.MULTILINE))
def test_commands_of_the_readme(
    command: str, downloaded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script, *options = command.split()
    path = run(ROOT / script, tmp_path, monkeypatch, *options, "--height=64", "--width=64", "--num-frames=9")
    check_file(path, Path(script).stem)


def stated(name: str) -> dict[str, int]:
    """Size and length that a script says, from its text."""
    file = "camera_control" if name in CAMERA else name
    calls = (
        node
        for node in ast.walk(ast.parse((FOLDER / f"{file}.py").read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "settings"
    )
    (call,) = calls
    return {k.arg: k.value.value for k in call.keywords if k.arg and isinstance(k.value, ast.Constant)}


@pytest.mark.parametrize("name", NAMES)
def test_sizes_are_the_public_ones(name: str) -> None:
    height, width = (512, 768) if "OneStage" in name else (1024, 1536)
    if name == HQ:
        height, width = 2 * HQ_PRESET.height, 2 * HQ_PRESET.width
    assert stated(name) == {"height": height, "width": width, "num_frames": 121}


@pytest.mark.parametrize("name", NAMES)
def test_low_vram_scripts_state_their_limits(name: str) -> None:
    text = (LOW_VRAM / f"{name}.py").read_text(encoding="utf-8")
    assert text.startswith(f'"""{name}.py on a card of 8 GB, with 24 GB of host memory."""')
    assert 'run(__file__, vram_limit="8gb", host_limit=24)' in text


def test_files_of_the_readme_are_those_of_the_scripts() -> None:
    files = runpy.run_path(str(FOLDER / "common.py"))["FILES"]
    for name in ("dev", "distilled", "upscaler", "distilled LoRA"):
        (row,) = re.findall(rf"^\| {name} \|(.*)\|$", README, re.M)
        stems = [Path(files[model][name.lower().replace(" ", "-")]).stem for model in ("LTX-2", "LTX-2.3")]
        assert re.findall(r"`([^`]+)`", row) == stems


def test_given_files_are_small() -> None:
    files = [path for path in EXAMPLES.rglob("*") if path.suffix not in {".py", ".pyc", ".md"}]
    assert sum(path.stat().st_size for path in files if path.is_file()) < 200_000
    with Image.open(EXAMPLES / "first_frame.png") as picture:
        assert (picture.mode, picture.size) == ("RGB", (768, 512))


@pytest.mark.parametrize("num_frames", [1, 9, 121])
def test_drawn_inputs(num_frames: int) -> None:
    """Clips of the asked size and length whose pictures differ; a tune as long as the video."""
    inputs = runpy.run_path(str(FOLDER / "inputs.py"))
    settings = {"height": 64, "width": 96, "num_frames": num_frames, "num_inference_steps": 2}
    for name in ("clip", "depth_clip", "edge_clip", "track_clip"):
        frames = inputs[name](settings)
        assert [(frame.mode, frame.size) for frame in frames] == [("RGB", (96, 64))] * num_frames
        assert len({frame.tobytes() for frame in frames}) > 0.9 * num_frames
    tune = inputs["tune"](settings)
    assert tune.shape == (2, Fraction(num_frames * 48000, 24))
    assert 0.1 < tune.abs().max() < 1
