"""A network larger than what it may take: measured memory of a process stays under the plan's figure."""

import json
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
GB = 10**9
BLOCK = 33_700_000
THREADS = 8_000_000
"""Stacks and small objects of the reader threads and of the one that watches."""

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells own from file pages")


def measured(num_blocks: int, *modes: str) -> dict[str, Any]:
    """What the child process found."""
    # Freed memory goes back at once, so that what is counted is what is alive.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**20), "OMP_NUM_THREADS": "1"}
    with TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "tests.vram.host_memory", folder, str(num_blocks), *modes]
        ended = subprocess.run(
            command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=600
        )
        assert ended.returncode == 0, ended.stderr
        assert not list(Path(folder).glob("*packed*"))
    return dict(json.loads(ended.stdout))


def check(figures: dict[str, Any], weights_bytes: int) -> None:
    """One mode: under the plan, below the weights, and everything given back."""
    planned = figures["planned_host"] + figures["planned_device"]
    assert figures["peak"] <= planned + THREADS
    assert figures["peak"] - figures["base"] < weights_bytes
    assert figures["after"] - figures["base"] < 2 * THREADS
    # Readers may be a ring ahead at either end of the traversal.
    assert abs(figures["from_disk"][-1] - figures["planned_disk"]) <= 4 * BLOCK


def test_process_stays_under_the_plan() -> None:
    found = measured(24, "disk", "share")
    disk, share = found["modes"]["disk"], found["modes"]["share"]
    assert found["weights_bytes"] > 0.8 * GB
    check(disk, found["weights_bytes"])
    check(share, found["weights_bytes"])
    assert disk["in_ram"] == 0
    assert disk["planned_disk"] == disk["streamed"]
    # The measurement sees what it is about: the share that is kept shows in the peak.
    assert share["in_ram"] > 0
    assert share["peak"] - disk["peak"] > 0.9 * share["in_ram"]
    assert disk["sum"] == share["sum"]


@pytest.mark.slow
def test_process_stays_under_the_plan_with_several_gigabytes() -> None:
    found = measured(120, "disk", "share", "mapped")
    assert found["weights_bytes"] > 4 * GB
    for figures in found["modes"].values():
        check(figures, found["weights_bytes"])
    mapped = found["modes"]["mapped"]
    # Pages of the file come and go as the system likes; they are not the process's own.
    assert mapped["peak"] < 0.15 * found["weights_bytes"]
    assert len({figures["sum"] for figures in found["modes"].values()}) == 1
