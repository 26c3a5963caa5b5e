"""What moves: bytes per step, waits of the host, prompts that are known."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from diffsynth.pipelines.ltx2_audio_video import LTX2AudioVideoPipeline
from diffsynth.pipelines.progress import Progress
from diffsynth.request import GuidanceParams
from tests.pipelines.placed import SMALL, Placement, make, phases, place, same
from tests.pipelines.tiny import LORA, load
from tests.standin import Counters, StandIn

FOUR = GuidanceParams(cfg_scale=3, stg_scale=1, stg_blocks=(1,), modality_scale=3)
PASSES: Mapping[int, Mapping[str, Any]] = {
    1: {"cfg_scale": 1.0},
    2: {"cfg_scale": 3.0},
    4: {"video_guidance": FOUR, "audio_guidance": FOUR},
}
PLACEMENTS: Mapping[str, Placement] = {
    "2 slots": Placement(2, in_ram=True),
    "2 slots, page-locked": Placement(2, in_ram=True, pinned=True),
    "1 slot, a resident": Placement(1, 1),
    "all resident": Placement(0, 99),
}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of the caches of one test."""
    monkeypatch.setenv("DIFFSYNTH_CACHE_PATH", str(tmp_path / "cache"))
    return tmp_path / "cache"


class Meter:
    """Counts between the ends of denoising steps; the first step, which fills the slots, is left out."""

    def __init__(self, device: StandIn) -> None:
        self._device = device
        self._before: Counters | None = None
        self.steps: list[Counters] = []

    def __call__(self, progress: Progress) -> None:
        if progress.denoised is None:
            return
        now = self._device.counters.snapshot()
        if self._before is not None and progress.done > 1:
            self.steps.append(now - self._before)
        self._before = now


def managed(**arguments: Any) -> LTX2AudioVideoPipeline:
    return load(device="standin", dtype=torch.bfloat16, storage="int8", **arguments)


@pytest.mark.parametrize(
    ("passes", "placement"),
    [
        (1, "2 slots"),
        (2, "2 slots, page-locked"),
        (2, "all resident"),
        (4, "1 slot, a resident"),
        (4, "2 slots"),
    ],
)
def test_blocks_that_are_not_resident_come_once_per_step(
    passes: int, placement: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    place(monkeypatch, PLACEMENTS[placement])
    with StandIn() as device:
        pipe, meter = managed(), Meter(device)
        pipe.load_lora(pipe.dit, LORA, 0.5)
        make(pipe, on_progress=meter, **{**SMALL, "num_inference_steps": 4}, **PASSES[passes])
        plan = {phase["name"]: phase for phase in pipe.memory_report()["plan"]["phases"]}
    streamed = plan["denoise 1"]["bytes_per_traversal"]
    assert (streamed > 0) == (placement != "all resident")
    timesteps = 256
    assert len(meter.steps) == 3
    for step in meter.steps:
        assert streamed <= step.host_to_device_bytes <= 1.02 * streamed + timesteps
        assert step.pageable_copies == 0


def test_streaming_adds_no_wait_of_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    waits = {}
    for name, placement in PLACEMENTS.items():
        with StandIn() as device, pytest.MonkeyPatch.context() as patch:
            place(patch, placement)
            meter = Meter(device)
            make(managed(), on_progress=meter, **{**SMALL, "num_inference_steps": 4})
            waits[name] = [step.host_syncs for step in meter.steps]
    assert len(set(map(tuple, waits.values()))) == 1, waits


# -- prompts that are known -------------------------------------------------------------------------------


def test_a_known_prompt_never_reads_the_text_model(folder: Path) -> None:
    with StandIn():
        first = make(managed())
        text_models = [path for path in folder.glob("packed/*") if path.name.startswith("text_encoder-")]
        assert len(text_models) == 1
        text_models[0].unlink()
        pipe = managed()
        assert same(make(pipe), first)
        assert not {"text", "connectors"} & phases(pipe).keys()
        assert not text_models[0].exists()
        make(pipe, negative_prompt="shaky")
        assert {"text", "connectors"} < phases(pipe).keys(), "one of the two is new"
        assert text_models[0].exists()


@pytest.mark.parametrize("damage", ["empty", "cut", "another file"])
def test_a_damaged_encoding_is_made_anew(damage: str, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with StandIn():
        pipe = managed()
        first = make(pipe)
        for path in folder.glob("prompts/*"):
            whole = path.read_bytes()
            broken = {"empty": b"", "cut": whole[: len(whole) // 2], "another file": LORA.read_bytes()}
            path.write_bytes(broken[damage])
        with caplog.at_level(logging.WARNING):
            assert same(make(pipe), first)
        assert "encoded again" in caplog.text
        assert "text" in phases(pipe)
        make(pipe)
        assert "text" not in phases(pipe), "the new encoding is kept"


def test_without_a_cache_prompts_are_encoded_every_time(folder: Path) -> None:
    with StandIn():
        pipe = managed(cache=False)
        for _ in range(2):
            make(pipe)
            assert "text" in phases(pipe)
    assert not [*folder.rglob("packed/*"), *folder.rglob("prompts/*")]
