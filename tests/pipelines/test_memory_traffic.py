"""What moves: bytes per step, waits of the host, prompts that are known."""

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from diffsynth.lora import linear_shapes
from diffsynth.pipelines.ltx2_audio_video import LTX2AudioVideoPipeline, ModelConfig
from diffsynth.pipelines.progress import Progress
from diffsynth.request import GuidanceParams
from diffsynth.vram.plan import PhasePlan
from diffsynth.vram.planner import HOST_BASE_BYTES, plan
from diffsynth.vram.source import RING_BUFFERS
from tests.pipelines.lora_files import random_factors, write_official
from tests.pipelines.placed import (
    SMALL,
    Placement,
    make,
    manager,
    phases,
    place,
    same,
    smallest_limit,
)
from tests.pipelines.tiny import DEV, GEMMA, LORA, load
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


def test_loras_under_a_limit(tmp_path: Path) -> None:
    """So large ones that the device cannot hold them all: they come with their blocks, once per step."""
    network = load(stage2_lora=None).dit
    weights = {name: network.get_submodule(name).weight for name in linear_shapes(network)}
    file = write_official(random_factors(weights, rank=192), tmp_path)
    arguments = {**SMALL, "num_inference_steps": 4}

    def opened(limit: int | None = None) -> LTX2AudioVideoPipeline:
        pipe = managed(vram_limit=None if limit is None else limit / 2**30)
        pipe.parts.prompt_cache = None
        for alpha in (0.2, -0.1):
            pipe.load_lora(pipe.dit, file, alpha)
        return pipe

    with StandIn():
        roomy = opened()
        limit = smallest_limit(roomy, **arguments)
        wanted = make(roomy, **arguments)
        assert limit < 2 * file.stat().st_size
    with StandIn(capacity_bytes=limit) as device:
        pipe, meter = opened(limit), Meter(device)
        assert same(make(pipe, on_progress=meter, **arguments), wanted)
        assert device.peak_bytes <= limit
        assert pipe.memory_report()["stepped_down"] == []
        plan = {phase["name"]: phase for phase in pipe.memory_report()["plan"]["phases"]}
    streamed, timesteps = plan["denoise 1"]["bytes_per_traversal"], 256
    assert streamed > file.stat().st_size
    assert len(meter.steps) == 3
    for step in meter.steps:
        assert streamed <= step.host_to_device_bytes <= 1.02 * streamed + timesteps


def test_streaming_adds_no_wait_of_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    waits = {}
    for name, placement in PLACEMENTS.items():
        with StandIn() as device, pytest.MonkeyPatch.context() as patch:
            place(patch, placement)
            meter = Meter(device)
            make(managed(), on_progress=meter, **{**SMALL, "num_inference_steps": 4})
            waits[name] = [step.host_syncs for step in meter.steps]
    assert len(set(map(tuple, waits.values()))) == 1, waits


# -- blocks that stay on the disk -------------------------------------------------------------------------


def on_disk(**states: Any) -> LTX2AudioVideoPipeline:
    configs = [ModelConfig(path=DEV, **states), ModelConfig(path=GEMMA)]
    return LTX2AudioVideoPipeline.from_pretrained(
        device="standin", model_configs=configs, tokenizer_config=ModelConfig(path=GEMMA), storage="int8"
    )


def test_the_plan_knows_what_stays_on_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    steps, found = 4, {}
    for device in ("disk", "cpu"):
        with StandIn(), monkeypatch.context() as patch:
            pipe = on_disk(offload_device=device)
            found[device] = lean = leanest_denoising(pipe, num_inference_steps=steps)
            placed = Placement(lean.slots, in_ram=bool(lean.ram_blocks), pinned=lean.pinned)
            place(patch, placed._replace(num_residents=len(lean.residents)))
            make(pipe, num_inference_steps=steps)
            figures = phases(pipe)["denoise 1"]
            part = manager(pipe)._sizes.parts["dit"]
        largest = max(block.nbytes for block in part.blocks)
        blocks = [block.nbytes for block in part.blocks if block.name not in lean.residents]
        assert len(blocks) > 1
        assert lean.bytes_per_traversal == sum(blocks)
        ring = HOST_BASE_BYTES + max(RING_BUFFERS * largest, part.rest_bytes)
        traversals = steps if device == "disk" else 1
        if device == "disk":
            assert (lean.ram_blocks, lean.disk_bytes_per_traversal) == ((), sum(blocks))
            assert lean.peak_host_bytes == ring
        else:
            assert (len(lean.ram_blocks), lean.disk_bytes_per_traversal) == (len(blocks), 0)
            assert lean.peak_host_bytes == ring + sum(blocks)
        once = part.rest_bytes + sum(b.nbytes for b in part.blocks if b.name in lean.residents)
        read = figures["bytes_from_disk"] - once
        ahead = (RING_BUFFERS + lean.slots) * largest if device == "disk" else 0
        assert traversals * sum(blocks) <= read <= traversals * sum(blocks) + ahead
    assert found["disk"].peak_vram_bytes == found["cpu"].peak_vram_bytes


def test_without_a_file_nothing_can_stay_on_the_disk() -> None:
    with StandIn():
        configs = [ModelConfig(path=path, offload_device="disk") for path in (DEV, GEMMA)]
        pipe = LTX2AudioVideoPipeline.from_pretrained(
            device="standin", model_configs=configs, tokenizer_config=ModelConfig(path=GEMMA), cache=False
        )
        assert not any(part.on_disk for part in manager(pipe)._sizes.parts.values())


def leanest_denoising(pipe: LTX2AudioVideoPipeline, **arguments: Any) -> PhasePlan:
    """The plan of the only denoising phase with as little device memory as it can do with."""
    make(pipe, **arguments)
    memory = manager(pipe)
    demand = next(d for d in memory._demands if d.name == "denoise 1")
    one = replace(demand, choices=demand.choices[:1])
    blocks = [block.moved_bytes for block in one.blocks]
    least = one.rest_bytes + one.scratch_bytes + one.choices[0].activation_bytes + 2 * max(blocks)
    return plan([one], replace(memory._budget, vram_bytes=least)).phases[0]


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
