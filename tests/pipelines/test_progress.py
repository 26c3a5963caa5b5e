"""Progress, cancelling, and the public progress bar."""

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from PIL import Image

from diffsynth.errors import Cancelled
from diffsynth.pipelines.ltx2_audio_video import LTX2AudioVideoPipeline
from diffsynth.pipelines.progress import Progress
from tests.conftest import hooks
from tests.pipelines.tiny import LORA, PICTURES, SMALL, Log, call, same

TWO_STAGES: dict[str, Any] = {"use_two_stage_pipeline": True, "input_images": PICTURES[:1]}


def clip(size: int = 64) -> list[Image.Image]:
    return [Image.new("RGB", (size, size), (20 * i, 90, 200 - 20 * i)) for i in range(9)]


SITUATIONS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "one stage": ({}, ["encode prompt", "denoise stage 1", "decode video", "decode audio"]),
    "pictures": (
        {"input_images": PICTURES, "input_images_indexes": [0, -1]},
        ["encode prompt", "encode inputs of stage 1", "denoise stage 1", "decode video", "decode audio"],
    ),
    "two stages": (
        TWO_STAGES,
        [
            *("encode prompt", "encode inputs of stage 1", "denoise stage 1", "upsample"),
            *("encode inputs of stage 2", "denoise stage 2", "decode video", "decode audio"),
        ],
    ),
    "tiles": (
        {"height": 128, "tile_size_in_pixels": 64, "tile_overlap_in_pixels": 32},
        ["encode prompt", "denoise stage 1", "decode video", "decode audio"],
    ),
    "a clip of which a part is made anew": (
        {"retake_video": clip(), "retake_video_regions": [(0.1, 0.3)], "use_two_stage_pipeline": True},
        [
            *("encode prompt", "encode inputs of stage 1", "denoise stage 1", "upsample"),
            *("encode inputs of stage 2", "denoise stage 2", "decode video", "decode audio"),
        ],
    ),
    "a clip that is kept": (
        {"retake_video": clip()},
        ["encode prompt", "encode inputs of stage 1", "denoise stage 1", "decode video", "decode audio"],
    ),
    "a reference clip": (
        {"in_context_videos": [clip()], "height": 128, "width": 128, "use_two_stage_pipeline": True}
        | {"in_context_downsample_factor": 1},
        [
            *("encode prompt", "encode inputs of stage 1", "denoise stage 1", "upsample"),
            *("denoise stage 2", "decode video", "decode audio"),
        ],
    ),
}


@pytest.mark.parametrize("situation", SITUATIONS)
def test_every_phase_counts_to_its_end(pipe: LTX2AudioVideoPipeline, situation: str) -> None:
    arguments, phases = SITUATIONS[situation]
    log = Log()
    call(pipe, **arguments, on_progress=log)
    found = log.phases()
    assert list(found) == phases
    for phase, reports in found.items():
        total = reports[0][1]
        assert total >= 1, phase
        assert reports == [(done, total) for done in range(total + 1)], phase


def test_a_step_can_be_looked_at(pipe: LTX2AudioVideoPipeline) -> None:
    log = Log()
    call(pipe, on_progress=log)
    steps = [event.denoised for event in log.events if event.denoised is not None]
    assert steps[0].sigma is None
    assert steps[0].preview() is None
    for step in steps[1:]:
        preview = step.preview()
        assert preview is not None
        assert preview.shape == (1, 128, 2, 2, 2)
        assert torch.isfinite(preview).all()


PHASES = SITUATIONS["two stages"][1]


@pytest.mark.parametrize("phase", PHASES)
def test_cancelling_leaves_the_pipeline_usable(pipe: LTX2AudioVideoPipeline, phase: str) -> None:
    pipe.load_lora(pipe.dit, LORA, alpha=0.5)
    expected = call(pipe)
    active = hooks(pipe)

    def cancel(progress: Progress) -> None:
        if progress.phase == phase and progress.done == 1:
            raise Cancelled("enough")

    with pytest.raises(Cancelled, match="enough"):
        call(pipe, **TWO_STAGES, on_progress=cancel, clear_lora_before_state_two=True)
    assert hooks(pipe) == active
    assert same(call(pipe), expected)
    pipe.clear_lora()


def test_an_interrupt_leaves_the_pipeline_usable(pipe: LTX2AudioVideoPipeline) -> None:
    expected = call(pipe)

    def interrupt(progress: Progress) -> None:
        if progress.phase == "denoise stage 2" and progress.done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        call(pipe, **TWO_STAGES, on_progress=interrupt)
    assert hooks(pipe) == []
    assert same(call(pipe), expected)


def test_the_public_progress_bar(pipe: LTX2AudioVideoPipeline) -> None:
    """It wraps the timesteps of each loop and is advanced by one before each step."""
    seen: list[list[float]] = []
    taken: list[float] = []

    def bar(timesteps: Sequence[float]) -> Iterator[float]:
        seen.append(list(timesteps))
        for timestep in timesteps:
            taken.append(timestep)
            yield timestep

    pipe("a boat", seed=1, use_two_stage_pipeline=True, progress_bar_cmd=bar, **SMALL)
    assert [len(timesteps) for timesteps in seen] == [2, 3]
    assert seen[0][0] == pytest.approx(1000.0)
    assert seen[1] == pytest.approx([909.375, 725.0, 421.875])
    assert taken == [*seen[0], *seen[1]]


def test_the_default_bar_is_tqdm(pipe: LTX2AudioVideoPipeline, capsys: pytest.CaptureFixture[str]) -> None:
    pipe("a boat", seed=1, **SMALL)
    printed = capsys.readouterr()
    assert "2/2" in printed.err
    assert printed.out == ""
    pipe("a boat", seed=1, **SMALL, progress_bar_cmd=lambda steps: steps)
    assert capsys.readouterr().err == ""
