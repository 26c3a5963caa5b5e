"""Host memory of a first start: bounded, measured, planned, and refused where it is too much."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from diffsynth.errors import MemoryBudgetError
from diffsynth.pipelines import packing
from diffsynth.pipelines.released import released_parts
from diffsynth.pipelines.sizes import model_sizes
from diffsynth.pipelines.storage import Storage
from diffsynth.vram.cache import FOLDER_VARIABLE
from diffsynth.vram.planner import HOST_BASE_BYTES
from tests.pipelines.placed import make, manager
from tests.pipelines.tiny import load

ROOT = Path(__file__).parents[2]
GB = 2**30
THREADS = 8_000_000
"""Stacks and small objects of the thread that watches."""


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))


def managed(**arguments: Any) -> Any:
    return load(dtype=torch.bfloat16, storage="int8", **arguments)


@pytest.mark.parametrize("version", ["2.0", "2.3"])
def test_no_released_network_takes_3_gb(version: Any) -> None:
    parts = released_parts(version)
    for storage in ("int8", "int4", "bf16"):
        sizes = model_sizes(parts, Storage.named(storage)).parts
        needed = {part: size.conversion_bytes for part, size in sizes.items()}
        assert max(needed.values()) < 3e9, needed
        # The embedding of the text model is the largest tensor of all, and must be there once.
        assert needed["text_encoder"] > 262_208 * 3840 * 2


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells own from file pages")
def test_projections_are_cut_without_holding_them(tmp_path: Path) -> None:
    # Freed memory goes back at once, so that what is counted is what is alive.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**20), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.pipelines.conversion_memory", str(tmp_path), str(2**24)]
    ended = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout)
    assert found["projections"] > 230e6
    assert found["grown"] <= found["planned"] + THREADS
    assert found["planned"] < 0.5 * found["projections"]
    # It is measured: two groups of slices, a block and the tensor that goes into it show.
    assert found["grown"] > 2 * 2**24


@pytest.mark.parametrize("slices_bytes", [1, 5000])
def test_slices_are_the_same_however_many_are_cut_at_a_time(
    slices_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = "text_encoder_post_modules"

    def packed() -> dict[str, torch.Tensor]:
        weights = manager(managed(cache=False))._weights
        weights.convert(part)
        return {name: content for name, (_, content) in weights._in_ram[part].items()}

    whole = packed()
    monkeypatch.setattr(packing, "SLICES_BYTES", slices_bytes)
    cut = packed()
    assert sum(name.startswith("slices.") for name in whole) == 4
    for name, content in whole.items():
        assert torch.equal(cut[name], content), name


def test_the_plan_of_a_first_start_counts_the_conversion() -> None:
    first = managed()
    make(first)
    sizes = manager(first)._sizes.parts
    plan = first.memory_report()["plan"]
    largest = max(
        sizes[part].conversion_bytes for part in sizes if part not in ("upsampler", "video_vae_encoder")
    )
    assert plan["conversion_host_bytes"] == HOST_BASE_BYTES + largest
    assert plan["peak_host_bytes"] == max(
        HOST_BASE_BYTES + largest, *(phase["peak_host_bytes"] for phase in plan["phases"])
    )
    second = managed()
    make(second)
    plan = second.memory_report()["plan"]
    assert plan["conversion_host_bytes"] == 0
    assert plan["peak_host_bytes"] == max(phase["peak_host_bytes"] for phase in plan["phases"])
    # What the first start did not need is converted when a request needs it.
    make(second, use_two_stage_pipeline=True, height=128, width=128)
    converted = second.memory_report()["plan"]["conversion_host_bytes"]
    assert converted == HOST_BASE_BYTES + sizes["upsampler"].conversion_bytes


def test_a_conversion_that_is_too_large_is_refused_until_it_was_done(tmp_path: Path) -> None:
    limit = (HOST_BASE_BYTES + 2**25) / GB
    with pytest.raises(MemoryBudgetError, match=r"the first start converts the \w+, which needs") as refused:
        make(managed(host_limit=limit))
    assert not list(tmp_path.rglob("*.safetensors"))
    enough = float(refused.value.hint.split("=")[1].split(" ")[0])
    make(managed(host_limit=enough))
    make(managed(host_limit=limit))
