"""Prompts that the text model rewrites, in whole generations."""

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from diffsynth.conditioning import enhance
from diffsynth.errors import Cancelled, MemoryBudgetError
from diffsynth.pipelines.demand import SCRAP_BYTES
from diffsynth.pipelines.enhance import EnhancePrompt, known_enhancement
from diffsynth.pipelines.inputs import inputs_by_path
from diffsynth.pipelines.ltx2_audio_video import LTX2AudioVideoPipeline
from diffsynth.pipelines.progress import OnProgress, Progress, ignore
from diffsynth.pipelines.state import GenerationState
from diffsynth.pipelines.units import known_contexts
from diffsynth.request import GenerateRequest
from diffsynth.sampling.conventions import get_conventions
from diffsynth.sampling.noise import noise_source
from diffsynth.utils.media_io_ltx2 import write_video_audio_ltx2
from diffsynth.utils.metadata import read_request
from tests.pipelines.placed import (
    PICTURED,
    Placement,
    asked,
    make,
    manager,
    phases,
    place,
    same,
    smallest_limit,
    unmanaged,
)
from tests.pipelines.tiny import DEV, GEMMA, UPSCALER, Log, load
from tests.standin import StandIn

NEW_TOKENS = 12
PLACEMENTS = {
    "1 slot from disk": Placement(slots=1),
    "2 slots, a resident, in RAM": Placement(slots=2, num_residents=1, in_ram=True),
    "2 slots, page-locked": Placement(slots=2, in_ram=True, pinned=True),
    "all resident": Placement(0, 99),
}
STATISTICS = 2 * 128 * 2


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of the caches of one test; short instructions and answers."""
    monkeypatch.setenv("DIFFSYNTH_CACHE_PATH", str(tmp_path / "cache"))
    monkeypatch.setattr(enhance, "MAX_NEW_TOKENS", NEW_TOKENS)
    monkeypatch.setattr(enhance, "TEXT_TO_VIDEO", "Describe what is seen and heard.")
    monkeypatch.setattr(enhance, "PICTURE_TO_VIDEO", "Describe what changes.")
    return tmp_path / "cache"


def managed(limit: int | None = None, **arguments: Any) -> LTX2AudioVideoPipeline:
    how = {"storage": "int8", "dtype": torch.bfloat16, **arguments}
    return load(device="standin", vram_limit=None if limit is None else limit / 2**30, **how)


def enhanced(pipe: LTX2AudioVideoPipeline, on_progress: OnProgress = ignore, **arguments: Any) -> str:
    """Plan a whole generation, but run only the unit."""
    request = asked(enhance_prompt=True, **arguments)
    inputs = inputs_by_path(request)
    conventions = get_conventions(request.conventions)
    state = GenerationState(
        request=request,
        inputs=inputs,
        conventions=conventions,
        stages=(),
        noise=noise_source(conventions.noise_source, 0, "cpu"),
        on_progress=on_progress,
        enhanced_prompt=known_enhancement(pipe.parts, request, inputs),
    )
    with torch.inference_mode():
        pipe._plan(state.prompted, known_contexts(pipe.parts, state.prompted))
        EnhancePrompt().run(pipe.parts, state)
    assert state.enhanced_prompt is not None
    return state.enhanced_prompt


# -- what comes of it -------------------------------------------------------------------------------------


def test_the_enhanced_prompt_is_encoded_in_place_of_the_prompt(caplog: pytest.LogCaptureFixture) -> None:
    pipe = unmanaged("f32")
    with caplog.at_level(logging.INFO):
        made = make(pipe, enhance_prompt=True)
        text = enhanced(pipe)
    assert f"enhanced prompt: {text}" in caplog.messages
    assert same(made, make(pipe, prompt=text)), "noise does not depend on it"
    assert not same(made, make(pipe))


def test_original_and_enhanced_prompt_are_stored(tmp_path: Path) -> None:
    pipe = unmanaged("f32")
    request = asked(enhance_prompt=True, num_frames=9)
    result = pipe.generate(request)
    assert result.request == request
    assert result.record["request"]["prompt"] == "a boat on a lake"
    assert result.enhanced_prompt == result.record["enhanced_prompt"] != "a boat on a lake"
    write_video_audio_ltx2(result.frames, result.waveform, tmp_path / "a.mp4")
    stored = read_request(tmp_path / "a.mp4")
    assert stored is not None
    assert stored["enhanced_prompt"] == result.enhanced_prompt
    again = GenerateRequest.from_dict(stored["request"])
    assert again.enhance_prompt
    assert pipe.generate(again).enhanced_prompt == result.enhanced_prompt
    plain = pipe.generate(replace(request, enhance_prompt=False))
    assert plain.enhanced_prompt is None
    assert "enhanced_prompt" not in plain.record


def test_the_call_takes_it_too() -> None:
    pipe = unmanaged("f32")
    request = asked(enhance_prompt=True)
    video, _ = pipe(
        prompt=request.prompt,
        negative_prompt=request.negative_prompt,
        enhance_prompt=True,
        seed=request.seed,
        height=64,
        width=96,
        num_frames=9,
        num_inference_steps=2,
        progress_bar_cmd=lambda steps: steps,
    )
    assert video is not None
    assert video.record["enhanced_prompt"] == enhanced(pipe)


def test_the_seed_decides() -> None:
    pipe = unmanaged("f32")
    assert enhanced(pipe) == enhanced(pipe)
    assert enhanced(pipe) != enhanced(pipe, seed=44)


def test_no_answer_leaves_the_prompt(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pipe = unmanaged("f32")
    monkeypatch.setattr(enhance, "stop_ids", lambda _: range(512))
    with caplog.at_level(logging.WARNING):
        assert enhanced(pipe) == "a boat on a lake"
    assert "wrote nothing" in caplog.text


def test_progress_counts_tokens() -> None:
    log = Log()
    enhanced(unmanaged("f32"), log)
    counts = log.phases()
    assert next(iter(counts)) == "enhance prompt"
    assert counts["enhance prompt"] == [(done, NEW_TOKENS) for done in range(NEW_TOKENS + 1)]


def test_an_answer_that_ends_early_ends_the_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, log = unmanaged("f32"), Log()
    monkeypatch.setattr(enhance, "stop_ids", lambda _: range(300, 512))
    enhanced(pipe, log)
    done, total = log.phases()["enhance prompt"][-1]
    assert 0 < done == total < NEW_TOKENS


# -- where the weights lie --------------------------------------------------------------------------------


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("storage", ["bf16", "int8"])
def test_streamed_equals_resident(storage: str, placement: str, monkeypatch: pytest.MonkeyPatch) -> None:
    place(monkeypatch, PLACEMENTS[placement])
    plain = unmanaged(storage)
    with StandIn(seed=4):
        pipe = managed(storage=storage)
        assert enhanced(pipe) == enhanced(plain)
        figures = phases(pipe)["enhance prompt"]
        # A resident block is bound once more, when the phase begins.
        assert figures["traversals"] - NEW_TOKENS in (0, 1)


def test_it_runs_with_less_memory_than_the_weights() -> None:
    with StandIn():
        roomy = managed(cache=False)
        limit = smallest_limit(roomy, enhance_prompt=True, audio_only=True)
        text = enhanced(roomy)
    weights = sum(part.total_bytes for part in manager(roomy)._sizes.parts.values())
    assert limit < weights
    with StandIn(capacity_bytes=limit) as device:
        tight = managed(limit, cache=False)
        assert enhanced(tight, audio_only=True) == text
        assert device.peak_bytes <= limit
        figures = phases(tight)["enhance prompt"]
        assert 0.95 <= figures["peak_vram_bytes"] / figures["planned_vram_bytes"] <= 1
        assert tight.memory_report()["stepped_down"] == []


def test_a_long_chat_is_planned_with_its_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(enhance, "TEXT_TO_VIDEO", "word " * 400)
    with StandIn():
        pipe = managed()
        enhanced(pipe)
        figures = phases(pipe)["enhance prompt"]
        assert 0.95 <= figures["peak_vram_bytes"] / figures["planned_vram_bytes"] <= 1


def test_what_does_not_fit_is_refused_beforehand() -> None:
    with StandIn(), pytest.raises(MemoryBudgetError, match="enhance_prompt: enhance prompt needs"):
        managed(50_000, request=asked(enhance_prompt=True))


def test_cancelling_leaves_nothing(folder: Path) -> None:
    def cancel(progress: Progress) -> None:
        if progress.phase == "enhance prompt" and progress.done == 3:
            raise Cancelled("stopped")

    with StandIn() as device:
        pipe = managed()
        with pytest.raises(Cancelled):
            make(pipe, on_progress=cancel, enhance_prompt=True)
        assert device.current_bytes == STATISTICS, device.ledger()
        assert not list(folder.glob("prompts/*.json"))
        assert make(pipe, enhance_prompt=True).pixels, "the pipeline can be used again"


# -- texts that are known ---------------------------------------------------------------------------------


def test_a_known_text_is_not_written_again(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with StandIn():
        pipe = managed()
        text = enhanced(pipe)
        make(pipe, prompt=text)
        assert len(list(folder.glob("prompts/*.json"))) == 1
        again = managed()
        with caplog.at_level(logging.INFO):
            assert again.generate(asked(enhance_prompt=True)).enhanced_prompt == text
        assert f"enhanced prompt: {text}" in caplog.messages
        assert not {"enhance prompt", "text", "connectors"} & phases(again).keys()
        for change in ({"seed": 44}, {"prompt": "a boat"}):
            enhanced(again, **change)
            assert "enhance prompt" in phases(again)
        assert len(list(folder.glob("prompts/*.json"))) == 3


def test_a_damaged_text_is_written_anew(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with StandIn():
        pipe = managed()
        text = enhanced(pipe)
        (path,) = folder.glob("prompts/*.json")
        path.write_text("{}")
        with caplog.at_level(logging.WARNING):
            assert enhanced(pipe) == text
        assert "enhanced again" in caplog.text
        assert text in path.read_text()


def test_an_enhanced_prompt_that_is_encoded_already(folder: Path) -> None:
    with StandIn():
        pipe = managed()
        first = make(pipe, enhance_prompt=True)
        (path,) = folder.glob("prompts/*.json")
        path.unlink()
        made = make(pipe, enhance_prompt=True)
        assert "enhance prompt" in phases(pipe)
        assert "text" not in phases(pipe)
        assert same(made, first)


# -- pictures ---------------------------------------------------------------------------------------------


def test_with_pictures() -> None:
    pipe = unmanaged("f32")
    text = enhanced(pipe, **PICTURED)
    assert same(make(pipe, enhance_prompt=True, **PICTURED), make(pipe, prompt=text, **PICTURED))


def test_the_first_frame_is_looked_at_whatever_its_place_in_the_list() -> None:
    pipe = unmanaged("f32")
    first, last = PICTURED["input_images"]
    swapped = {"input_images": (last, first), "input_images_indexes": (-1, 0)}
    one = {"input_images": (first,), "input_images_indexes": (0,)}
    assert enhanced(pipe, **PICTURED) == enhanced(pipe, **swapped) == enhanced(pipe, **one) != enhanced(pipe)
    assert enhanced(pipe, input_images=(last,), input_images_indexes=(-1,)) == enhanced(pipe)


def test_another_picture_gives_another_text() -> None:
    pipe = unmanaged("f32")
    texts = {enhanced(pipe, input_images=(name,)) for name in PICTURED["input_images"]}
    assert len(texts) == 2


@pytest.mark.parametrize("storage", ["bf16", "int8"])
def test_pictures_under_the_memory_manager(storage: str, folder: Path) -> None:
    plain = unmanaged(storage)
    with StandIn() as device:
        pipe = managed(storage=storage)
        assert enhanced(pipe, **PICTURED) == enhanced(plain, **PICTURED)
        figures = phases(pipe)
        assert list(figures) == ["look at picture", "enhance prompt"]
        for name, phase in figures.items():
            assert 0 <= phase["planned_vram_bytes"] - phase["peak_vram_bytes"] <= 2 * SCRAP_BYTES, name
        assert device.current_bytes == STATISTICS, device.ledger()
        enhanced(pipe, **PICTURED)
        assert not phases(pipe), "it is known"
        enhanced(pipe, input_images=PICTURED["input_images"][1:])
        assert "look at picture" in phases(pipe), "another picture"


def test_without_a_vision_tower_the_picture_is_not_looked_at(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(GEMMA, tmp_path / "gemma")
    config = json.loads((GEMMA / "config.json").read_text())
    del config["vision_config"]
    (tmp_path / "gemma" / "config.json").write_text(json.dumps(config))
    with caplog.at_level(logging.WARNING):
        pipe = load(DEV, tmp_path / "gemma", UPSCALER)
    assert "without looking at pictures: the configuration of Gemma 3" in caplog.text
    assert pipe.parts.picture_encoder is None
    with caplog.at_level(logging.WARNING):
        text = enhanced(pipe, **PICTURED)
    assert caplog.messages[-1].startswith("the text model was loaded without its vision tower")
    assert text == enhanced(pipe)
