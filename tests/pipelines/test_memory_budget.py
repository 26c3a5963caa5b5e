"""Limits: what is planned is what is taken, what cannot work is refused, and running out is not the end."""

import gc
import logging
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from diffsynth.errors import MemoryBudgetError, RequestError
from diffsynth.loader import ModelConfig, SafetensorsFile
from diffsynth.pipelines.ltx2_audio_video import LTX2AudioVideoPipeline
from diffsynth.pipelines.progress import Progress
from diffsynth.pipelines.rescue import FinalLatents
from diffsynth.request import GuidanceParams
from tests.pipelines.placed import (
    PICTURED,
    SMALL,
    asked,
    every_mode,
    make,
    manager,
    phases,
    same,
    smallest_limit,
    smallest_of,
)
from tests.pipelines.tiny import DEV, LORA, load, pixels
from tests.standin import StandIn

GB = 2**30
STATISTICS = 2 * 128 * 2
"""Bytes on the device between runs, in bfloat16."""
TWO_STAGES: Mapping[str, Any] = {**SMALL, "height": 64, "width": 128, "use_two_stage_pipeline": True}
CASES: Mapping[str, Mapping[str, Any]] = {
    **every_mode(TWO_STAGES),
    "two stages, pictures": {**TWO_STAGES, **PICTURED},
}
LEAST: Mapping[str, float] = {"encode audio": 0.8, "denoise": 0.9}
"""Share of what is planned that is taken: 0.95, but for sounds of a few frames, and for a stream that is
given, whose negative prompt nobody reads: at tiny widths both are much."""
QUICK = (
    *("one stage", "sound alone", "two stages, pictures", "distilled"),
    *("HQ", "given sound", "retake in two stages", "reference clips"),
)


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Packed files of this module only."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DIFFSYNTH_CACHE_PATH", str(tmp_path_factory.mktemp("cache")))
        yield


def managed(limit: int | None = None, **arguments: Any) -> LTX2AudioVideoPipeline:
    how = {"storage": "int8", "dtype": torch.bfloat16, **arguments}
    pipe = load(device="standin", vram_limit=None if limit is None else limit / GB, **how)
    pipe.parts.prompt_cache = None
    return pipe


def weights_bytes(pipe: LTX2AudioVideoPipeline) -> int:
    return sum(part.total_bytes for part in manager(pipe)._sizes.parts.values())


def check_peaks(pipe: LTX2AudioVideoPipeline) -> None:
    """Every phase takes at most what was planned, and not much less."""
    for name, figures in phases(pipe).items():
        share = figures["peak_vram_bytes"] / figures["planned_vram_bytes"]
        least = LEAST.get(name.rstrip("12 "), 0.95)
        assert least <= share <= 1, f"{name}: {share:.3f}"


# -- plans hold -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=() if case in QUICK else pytest.mark.slow) for case in CASES]
)
def test_every_mode_runs_with_less_memory_than_its_weights(case: str) -> None:
    with StandIn():
        roomy = managed()
        limit = smallest_limit(roomy, **CASES[case])
        check_peaks(roomy)
        wanted = make(roomy, **CASES[case])
    # The clip of a retake takes more than all weights of the tiny set while it is encoded.
    assert limit < weights_bytes(roomy) or "retake_video" in CASES[case]
    with StandIn(capacity_bytes=limit) as device:
        tight = managed(limit)
        assert same(make(tight, **CASES[case]), wanted)
        check_peaks(tight)
        assert device.peak_bytes <= limit
        assert tight.memory_report()["stepped_down"] == []


@pytest.mark.parametrize(
    "how", [{"storage": "f32", "dtype": torch.float32}, {"storage": "e5m2"}, {"storage": "int4"}]
)
def test_peaks_in_other_formats_with_loras(how: dict[str, Any]) -> None:
    with StandIn():
        pipe = managed(**how)
        pipe.load_lora(pipe.dit, LORA, 0.5)
        make(pipe, **CASES["two stages, pictures"])
        check_peaks(pipe)


def test_a_limit_below_the_card_is_kept() -> None:
    with StandIn() as device:
        limit = smallest_limit(managed())
        device.reset_peak()
        make(managed(limit))
        assert device.peak_bytes <= limit


# -- refusals ---------------------------------------------------------------------------------------------


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From the call on, no weight may be read."""

    def read(*_: object) -> None:
        raise AssertionError("weights were read")

    return lambda: monkeypatch.setattr(SafetensorsFile, "_fill", read)


def test_what_cannot_work_is_refused_before_weights_are_read(unread: Callable[[], None]) -> None:
    with StandIn():
        pipe = managed(100_000)
        unread()
        with pytest.raises(MemoryBudgetError, match=r"\d+\.\d\d [KM]B of device memory, 0\.10 MB") as refused:
            make(pipe)
        assert refused.value.hint


def test_a_request_given_beforehand_is_refused_while_loading() -> None:
    with StandIn(), pytest.raises(MemoryBudgetError, match="B of device memory"):
        managed(100_000, request=asked())


def test_the_nearest_request_is_named_and_runs() -> None:
    large = {**SMALL, "height": 128, "width": 192, "num_frames": 17}
    with StandIn():
        limit = smallest_limit(managed(), **large) - 1
    with StandIn(capacity_bytes=limit):
        pipe = managed(limit)
        with pytest.raises(MemoryBudgetError, match="height=128, width=192, num_frames=17") as refused:
            make(pipe, **large)
        hints = refused.value.hint.split(", or ")
        for hint in hints:
            changes = {name: int(value) for name, value in re.findall(r"(\w+)=(\d+)", hint)}
            assert changes
            make(pipe, **{**large, **changes})


def test_weights_that_no_file_holds_count_as_host_memory() -> None:
    with StandIn():
        with pytest.raises(MemoryBudgetError, match="host memory"):
            make(managed(host_limit=2.5635, cache=False))
        make(managed(host_limit=2.5635))


def test_a_card_that_cannot_denoise_can_decode(tmp_path: Path) -> None:
    sound = {**SMALL, "audio_only": True}  # in this model pictures need more to be decoded than to be made
    with StandIn():
        roomy = managed()
        made = roomy.generate(asked(**sound))
        latents = tmp_path / "latents.safetensors"
        FinalLatents.of(made).save(latents)
        roomy.decode(latents)
        assert [phase["name"] for phase in roomy.memory_report()["plan"]["phases"]] == ["decode audio"]
        check_peaks(roomy)
        limit = smallest_of(manager(roomy)._demands, manager(roomy)._budget)
    with StandIn(capacity_bytes=limit) as device:
        small = managed(limit)
        with pytest.raises(MemoryBudgetError, match=r"needs .* of device memory"):
            make(small, **sound)
        decoded = small.decode(latents)
        assert device.peak_bytes <= limit
        with pytest.raises(MemoryBudgetError, match="decode audio needs"):
            managed(limit - 1).decode(latents)
    assert made.waveform is not None
    assert decoded.waveform is not None
    assert torch.equal(decoded.waveform.samples, made.waveform.samples)


def test_pictures_are_decoded_within_their_own_plan() -> None:
    with StandIn():
        pipe = managed()
        made = pipe.generate(asked())
        decoded = pipe.decode(FinalLatents.of(made))
        assert list(phases(pipe)) == ["decode video", "decode audio"]
        check_peaks(pipe)
    assert pixels(decoded.frames or []) == pixels(made.frames or [])


# -- running out ------------------------------------------------------------------------------------------


class Intruder:
    """Takes device memory after some steps of a stage, and gives it back when the video is decoded."""

    def __init__(self, device: StandIn, nbytes: int, stage: int, after: int) -> None:
        self._device, self._nbytes, self._stage, self._after = device, nbytes, stage, after
        self.steps: list[int] = []

    def __call__(self, progress: Progress) -> None:
        if progress.phase == f"denoise stage {self._stage}":
            self.steps.append(progress.done)
            if self.steps == list(range(self._after + 1)):
                self._device.take_elsewhere(self._nbytes)
        elif progress.phase == "decode video":
            self._device.take_elsewhere(0)


SLEEPY = GuidanceParams(cfg_scale=3.0, skip_step=2)
"""The stream sits out two steps of three, and its estimate of the step before stands."""


@pytest.mark.parametrize(
    ("stage", "after", "guidance"),
    [
        (1, 0, {}),
        (1, 2, {}),
        (2, 0, {}),
        (2, 2, {}),
        (1, 2, {"video_guidance": SLEEPY, "audio_guidance": GuidanceParams(cfg_scale=3.0)}),
    ],
    ids=["first step", "third step", "first step of stage 2", "third step of stage 2", "a stream that waits"],
)
def test_a_run_that_runs_out_goes_on_with_less(
    stage: int, after: int, guidance: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    steps = {**(SMALL if stage == 1 else TWO_STAGES), "num_inference_steps": 4, **guidance}
    phase = f"denoise {stage}"
    exact: dict[str, Any] = {"storage": "f32", "dtype": torch.float32}
    with StandIn():
        wanted = make(managed(**exact), **steps)
    capacity = 8_000_000
    with StandIn(capacity_bytes=capacity) as device:
        pipe = managed(**exact)
        make(pipe, **steps)
        denoising = phases(pipe)[phase]["planned_vram_bytes"]
        intruder = Intruder(device, capacity - int(0.9 * denoising), stage, after)
        with caplog.at_level(logging.WARNING):
            assert same(make(pipe, on_progress=intruder, **steps), wanted)
        count = 5 if stage == 1 else 4
        assert intruder.steps == list(range(count)), "no finished step is done again"
        assert pipe.memory_report()["stepped_down"] == [phase]
        lines = [record.getMessage() for record in caplog.records if "ran out" in record.getMessage()]
        assert len(lines) == 1
        assert lines[0].startswith(f"{phase}: the device ran out of memory with a plan of")
        assert phases(pipe)[phase]["planned_vram_bytes"] <= 0.9 * denoising
        gc.collect()
        assert device.current_bytes == 2 * STATISTICS
        make(pipe, **steps)
        assert pipe.memory_report()["stepped_down"] == [], "a new run begins with the whole budget"


def test_out_of_memory_for_good_leaves_nothing_behind() -> None:
    with StandIn(capacity_bytes=8_000_000) as device:
        pipe = managed()
        pipe.load_lora(pipe.dit, LORA, 0.5)
        wanted = make(pipe, **TWO_STAGES)
        with pytest.raises(MemoryBudgetError, match=r"ran out of memory.*denoise 2 needs") as failed:
            make(pipe, on_progress=_second_stage_intruder(device), **TWO_STAGES)
        assert failed.value.hint
        del failed
        gc.collect()
        assert device.current_bytes == STATISTICS, device.ledger()
        device.take_elsewhere(0)
        assert same(make(pipe, **TWO_STAGES), wanted), "LoRAs of the stage are gone as well"


def _second_stage_intruder(device: StandIn) -> Callable[[Progress], None]:
    def listen(progress: Progress) -> None:
        if progress.phase == "denoise stage 2" and progress.done == 1:
            device.take_elsewhere(7_900_000)

    return listen


def test_a_failure_that_is_no_lack_of_memory_passes_through() -> None:
    def fail(progress: Progress) -> None:
        if progress.phase == "denoise stage 1" and progress.done == 1:
            raise KeyboardInterrupt

    with StandIn() as device:
        pipe = managed()
        with pytest.raises(KeyboardInterrupt):
            make(pipe, on_progress=fail)
        gc.collect()
        assert device.current_bytes == STATISTICS, device.ledger()
        make(pipe)


# -- states -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("states", "message"),
    [
        ({"computation_device": "cpu"}, "computation_device=cpu differs from device=standin"),
        ({"computation_dtype": torch.float16}, "computation_dtype=torch.float16 differs from torch_dtype"),
    ],
)
def test_computation_states_must_agree(states: dict[str, Any], message: str) -> None:
    with StandIn(), pytest.raises(RequestError, match=re.escape(message)):
        LTX2AudioVideoPipeline.from_pretrained(
            torch_dtype=torch.bfloat16, device="standin", model_configs=[ModelConfig(path=DEV, **states)]
        )
