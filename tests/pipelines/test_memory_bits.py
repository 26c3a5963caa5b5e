"""Whole generations: wherever the weights lie, every bit is the same, run after run."""

import gc
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffsynth.pipelines.ltx2_audio_video import LTX2AudioVideoPipeline, ModelConfig
from diffsynth.pipelines.stages import plan_stages
from tests.pipelines.placed import (
    MODES,
    PICTURED,
    Made,
    Placement,
    asked,
    compute_dtype,
    make,
    phases,
    place,
    same,
    unmanaged,
)
from tests.pipelines.tiny import DEV, GEMMA, LORA, UPSCALER, load
from tests.standin import StandIn

FORMATS = ("bf16", "f32", "int8", "fp8", "e4m3", "e5m2", "int4")
PLACEMENTS: Mapping[str, Placement] = {
    "1 slot from disk": Placement(slots=1),
    "2 slots, a resident, in RAM": Placement(slots=2, num_residents=1, in_ram=True),
    "2 slots, page-locked": Placement(slots=2, in_ram=True, pinned=True),
    "2 slots from disk": Placement(slots=2),
}


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Packed files of this module only."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DIFFSYNTH_CACHE_PATH", str(tmp_path_factory.mktemp("cache")))
        yield


@cache
def expected(storage: str, mode: str, *, pictures: bool = False, lora: float = 0.0) -> Made:
    """From a plain pipeline on the CPU with weights that went through the format."""
    pipe = unmanaged(storage)
    if lora:
        pipe.load_lora(pipe.dit, LORA, lora)
    return make(pipe, **MODES[mode], **(PICTURED if pictures else {}))


def managed(storage: str, **arguments: Any) -> LTX2AudioVideoPipeline:
    pipe = load(device="standin", dtype=compute_dtype(storage), storage=storage, **arguments)
    pipe.parts.prompt_cache = None  # every run goes through the text phase
    return pipe


@pytest.mark.parametrize("storage", FORMATS)
def test_every_format_in_two_stages_with_pictures(storage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = expected(storage, "two stages", pictures=True)
    place(monkeypatch, PLACEMENTS["2 slots from disk"])
    with StandIn():
        pipe = managed(storage)
        assert same(make(pipe, **MODES["two stages"], **PICTURED), wanted)
        assert phases(pipe)["denoise 1"]["bytes_from_disk"] > 0


@pytest.mark.parametrize("storage", ["f32", "int8"])
def test_everything_resident(storage: str) -> None:
    wanted = expected(storage, "two stages", pictures=True)
    with StandIn():
        pipe = managed(storage)
        assert same(make(pipe, **MODES["two stages"], **PICTURED), wanted)
        figures = phases(pipe)["denoise 1"]
        assert figures["bytes_to_device"] < 1.01 * figures["planned_vram_bytes"]
        assert figures["copies"] == 4, "three blocks and the rest, once"


@pytest.mark.parametrize(
    ("storage", "mode"), [*(("int8", mode) for mode in MODES), ("fp8", "distilled"), ("fp8", "retake")]
)
def test_every_mode(storage: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    place(monkeypatch, PLACEMENTS["2 slots, a resident, in RAM"])
    # The strict device has no float64, in which res_2s works on the CPU.
    with StandIn(seed=1, strict_dtypes=mode != "HQ"):
        pipe = managed(storage)
        assert same(make(pipe, **MODES[mode]), expected(storage, mode))
        plans = {phase["name"]: phase for phase in pipe.memory_report()["plan"]["phases"]}
        for stage in plan_stages(asked(**MODES[mode]), "2.0"):
            plan, figures = plans[f"denoise {stage.number}"], phases(pipe)[f"denoise {stage.number}"]
            assert plan["traversals"] == stage.evaluations
            assert figures["traversals"] == stage.evaluations + 1, "the next one is begun ahead"
            streamed = stage.evaluations * plan["bytes_per_traversal"]
            assert figures["bytes_to_device"] <= 1.02 * streamed + plan["peak_vram_bytes"]


def test_res_2s_without_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    with StandIn():
        resident = make(managed("int8"), **MODES["HQ"])
    place(monkeypatch, PLACEMENTS["2 slots, page-locked"])
    with StandIn(seed=1):
        assert same(make(managed("int8"), **MODES["HQ"]), resident)
    exact = expected("int8", "HQ")
    assert resident.video is not None
    assert exact.video is not None
    assert (resident.video - exact.video).abs().max() < 0.05, "bf16 amplifies what float32 leaves out"


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_every_placement_with_loras(placement: str, monkeypatch: pytest.MonkeyPatch) -> None:
    place(monkeypatch, PLACEMENTS[placement])
    with StandIn(seed=2):
        pipe = managed("int8")
        pipe.load_lora(pipe.dit, LORA, -0.7)
        assert same(make(pipe, **MODES["two stages"]), expected("int8", "two stages", lora=-0.7))


def streamed_by_phase(pipe: LTX2AudioVideoPipeline, **arguments: Any) -> dict[str, int]:
    """Bytes per traversal that the plan of a request has; nothing runs."""
    pipe._plan(pipe.check(asked(**arguments)), {})
    return {plan["name"]: plan["bytes_per_traversal"] for plan in pipe.memory_report()["plan"]["phases"]}


def test_an_in_context_lora_of_the_first_stage_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its metadata state the size of the references, and it does not travel in the second stage."""
    file = tmp_path / "union.safetensors"
    save_file(load_file(LORA), file, {"reference_downscale_factor": "2"})
    cleared = {**MODES["reference clips"], "in_context_downsample_factor": None}
    kept = {**cleared, "clear_lora_before_state_two": False}
    place(monkeypatch, Placement(slots=1, num_residents=1, in_ram=True))
    plain = unmanaged("int8")
    with StandIn(seed=4):
        pipe = managed("int8")
        bare = streamed_by_phase(pipe, **{**cleared, "in_context_downsample_factor": 2})
        for each in (plain, pipe):
            each.load_lora(each.dit, file, 0.8)
        both, first = streamed_by_phase(pipe, **kept), streamed_by_phase(pipe, **cleared)
        assert both["denoise 1"] == first["denoise 1"] > bare["denoise 1"]
        assert both["denoise 2"] > first["denoise 2"] == bare["denoise 2"]
        assert pipe.check(asked(**cleared)).in_context_downsample_factor == 2
        made = make(pipe, **cleared)
        assert same(made, make(plain, **cleared))
        assert list(pipe.active_loras.values()) == [0.8], "the user's strength is back after the second stage"


@pytest.mark.slow
@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("storage", FORMATS)
def test_the_whole_product(storage: str, mode: str, placement: str, monkeypatch: pytest.MonkeyPatch) -> None:
    place(monkeypatch, PLACEMENTS[placement])
    pictures = mode not in {"sound alone", "given clip", "keyframes"}
    with StandIn(seed=3, strict_dtypes=mode != "HQ"):
        pipe = managed(storage)
        pipe.load_lora(pipe.dit, LORA, 0.6)
        made = make(pipe, **MODES[mode], **(PICTURED if pictures else {}))
    assert same(made, expected(storage, mode, pictures=pictures, lora=0.6))


def test_without_a_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFSYNTH_CACHE_PATH", str(tmp_path / "cache"))
    place(monkeypatch, PLACEMENTS["2 slots, a resident, in RAM"])
    with StandIn():
        pipe = managed("int8", cache=False)
        assert same(make(pipe, **MODES["two stages"]), expected("int8", "two stages"))
        figures = phases(pipe)["denoise 1"]
        assert figures["bytes_from_disk"] == 0
        assert figures["bytes_to_device"] > 0
    assert not list(tmp_path.rglob("packed/*"))


@pytest.mark.parametrize("how", [{"host_limit": 4.0}, {"vram_limit": 8.0}, {"vram_limit": "8gb"}])
def test_limits_that_suffice_change_nothing(how: dict[str, Any]) -> None:
    with StandIn():
        pipe = load(device="standin", dtype=torch.bfloat16, **how)
        assert same(make(pipe, **MODES["one stage"]), expected("int8", "one stage"))


def test_loras_come_and_go(monkeypatch: pytest.MonkeyPatch) -> None:
    place(monkeypatch, PLACEMENTS["2 slots, a resident, in RAM"])
    with StandIn():
        pipe = managed("bf16")
        assert same(make(pipe), expected("bf16", "one stage"))
        pipe.load_lora(pipe.dit, LORA, 0.5)
        assert same(make(pipe), expected("bf16", "one stage", lora=0.5))
        pipe.clear_lora()
        assert same(make(pipe), expected("bf16", "one stage"))


def test_three_runs_neither_drift_nor_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    place(monkeypatch, PLACEMENTS["2 slots, a resident, in RAM"])
    with StandIn() as device:
        pipe = managed("int8")
        results, held, objects = [], [], []
        for _ in range(3):
            results.append(make(pipe, **MODES["two stages"], **PICTURED))
            gc.collect()
            held.append(device.current_bytes)
            objects.append(len(gc.get_objects()))
        statistics = 2 * 128 * 2
        assert held == [statistics] * 3, device.ledger()
        # What is made once (layouts, bindings, caches of torch) is there after the first run.
        assert objects[2] - objects[1] < 50
        assert same(results[0], results[1])
        assert same(results[1], results[2])
        assert same(results[0], expected("int8", "two stages", pictures=True))


@pytest.mark.parametrize("seed", range(2))
def test_copies_may_arrive_in_any_order(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    place(monkeypatch, Placement(slots=2, num_residents=0, in_ram=True))
    with StandIn(seed=10 + seed):
        assert same(make(managed("int8")), expected("int8", "one stage"))


def test_states_of_the_quick_start_take_effect() -> None:
    states: dict[str, Any] = {
        "offload_dtype": torch.float8_e5m2,
        "offload_device": "cpu",
        "onload_dtype": torch.float8_e5m2,
        "onload_device": "cpu",
        "preparing_dtype": torch.float8_e5m2,
        "preparing_device": "standin",
        "computation_dtype": torch.bfloat16,
        "computation_device": "standin",
    }
    with StandIn():
        pipe = LTX2AudioVideoPipeline.from_pretrained(
            torch_dtype=torch.bfloat16,
            device="standin",
            model_configs=[ModelConfig(path=path, **states) for path in (DEV, GEMMA, UPSCALER)],
            tokenizer_config=ModelConfig(path=GEMMA),
            stage2_lora_config=ModelConfig(path=LORA),
            vram_limit=7.5,
        )
        assert same(make(pipe, **MODES["two stages"]), expected("e5m2", "two stages"))
        assert pipe.memory_report()["managed"]
