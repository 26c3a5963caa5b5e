"""``--model nano``: the files of the package, its settings, and what is typed before them."""

from pathlib import Path

import pytest

from diffsynth.nano import EXAMPLE, bundle
from diffsynth.request import GenerateRequest
from diffsynth.utils.metadata import read_request
from tests.cli.command import Here

LORA = "nano-distilled-lora.safetensors"
MODES = {
    "one stage": ((), {}, {"num_inference_steps": 20}),
    "two stages": (
        ("--two-stage", "--steps", "2"),
        {f"{LORA} (stage 2)": 1.0},
        {"use_two_stage_pipeline": True, "num_inference_steps": 2},
    ),
    "distilled": (("--distilled",), {LORA: 1.0}, {"use_distilled_pipeline": True}),
    "distilled, two stages": (
        ("--distilled", "--two-stage"),
        {LORA: 1.0},
        {"use_distilled_pipeline": True, "use_two_stage_pipeline": True},
    ),
    "typed": (
        ("--height", "512", "--width", "768", "--steps", "1", "--negative-prompt", "a circle"),
        {},
        {"height": 512, "width": 768, "num_inference_steps": 1, "negative_prompt": "a circle"},
    ),
}


@pytest.fixture(autouse=True)
def weights(untrained_nano: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(bundle, "WEIGHTS", untrained_nano)
    return untrained_nano


def generate(here: Here, folder: Path, *typed: str) -> dict[str, object]:
    output = folder / "clip.mp4"
    machine = ("--device", "cpu", "--seed", "1", "--quiet", "--output", str(output))
    ended = here("generate", EXAMPLE, "--model", "nano", *typed, *machine)
    assert ended.code == 0, ended.err
    record = read_request(output)
    assert record is not None
    return record


@pytest.mark.parametrize("mode", MODES)
def test_a_mode_has_its_files_and_settings(here: Here, tmp_path: Path, mode: str) -> None:
    typed, loras, changed = MODES[mode]
    record = generate(here, tmp_path, *typed)
    usual = {"height": 256, "width": 256, "num_frames": 25, "seed": 1, "prompt": EXAMPLE}
    assert GenerateRequest.from_dict(record["request"]) == GenerateRequest(**(usual | changed))  # type: ignore[arg-type]
    assert record.get("loras", {}) == loras


def test_own_loras_come_after(here: Here, tmp_path: Path, weights: Path) -> None:
    file = weights / "nano-framed-lora.safetensors"
    typed = ("--distilled", "--frames", "9", "--lora", f"{file}=0.5", "--lora", "framed=0.25")
    record = generate(here, tmp_path, *typed)
    assert list(record["loras"].items()) == [(LORA, 1.0), (file.name, 0.5), (f"{file.name} (2)", 0.25)]  # type: ignore[attr-defined]


def test_what_cannot_be_is_said(here: Here, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unknown = here("generate", EXAMPLE, "--model", "micro")
    assert (unknown.code, "--model=micro is not known  Try: nano" in unknown.err) == (2, True)
    both = here("generate", EXAMPLE, "--model", "nano", "--checkpoint", "a.safetensors")
    assert (both.code, "--model and --checkpoint are both given" in both.err) == (2, True)
    monkeypatch.setattr(bundle, "WEIGHTS", tmp_path)
    missing = here("generate", EXAMPLE, "--model", "nano")
    assert (missing.code, "has no nano.safetensors, gemma/model.safetensors" in missing.err) == (3, True)


def test_words_that_it_never_saw_are_told(
    here: Here, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(bundle, "WEIGHTS", tmp_path)  # told before anything is opened
    here("generate", "A big red circle, 3 purple elephants!", "--model", "nano")
    assert f"nano does not know big, 3, elephants; it knows clips like: {EXAMPLE}" in caplog.text
    caplog.clear()
    here("generate", EXAMPLE, "--model", "nano")
    assert not caplog.text
