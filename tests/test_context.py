"""What a process takes of a device beside its tensors, on a stand-in that takes it."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from diffsynth.device import CONTEXT_BYTES, MemoryFigures, backend_for, measured_context
from diffsynth.device.context import CONTEXT_LIMIT_BYTES, CONTEXT_MARGIN_BYTES
from diffsynth.pipelines.limits import MemoryLimits
from diffsynth.vram import link
from diffsynth.vram.link import machine_figures
from tests.pipelines.placed import manager
from tests.pipelines.tiny import load
from tests.standin import StandIn
from tests.standin.backend import StandInBackend

GB = 2**30
MB = 2**20
CARD = 8 * GB


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine that was never measured, and is measured with little."""
    for name, value in (("_LINK_BYTES", MB), ("_DISK_BYTES", MB), ("_MATRIX_WIDTHS", (64,))):
        monkeypatch.setattr(link, name, value)
    monkeypatch.setenv("DIFFSYNTH_CACHE_PATH", str(tmp_path))
    return tmp_path


def standin(context: int, libraries: int) -> StandIn:
    return StandIn(capacity_bytes=CARD, context_bytes=context, library_bytes=libraries)


@pytest.mark.parametrize("others", [0, 100 * MB, 5 * GB])
def test_kernels_and_libraries_are_found_whatever_others_hold(others: int) -> None:
    with standin(CONTEXT_BYTES, 700 * MB) as device:
        device.take_elsewhere(others)
        found = measured_context(device.backend)
        assert device.current_bytes == 0
    assert found == CONTEXT_BYTES + 700 * MB + min(others, CONTEXT_MARGIN_BYTES)


@pytest.mark.parametrize(
    ("context", "libraries", "found"),
    [
        (600 * MB, 700 * MB, 1300 * MB),
        (300 * MB, 100 * MB, CONTEXT_BYTES),
        (900 * MB, 5 * GB, CONTEXT_LIMIT_BYTES),
    ],
    ids=["a larger context", "never less than assumed", "never more than makes sense"],
)
def test_bounds(context: int, libraries: int, found: int) -> None:
    with standin(context, libraries) as device:
        assert measured_context(device.backend) == found


class Crowded(StandInBackend):
    """Another process takes or gives back memory while libraries are loaded."""

    change = 0

    def synchronize(self) -> None:
        super().synchronize()
        self._owner.memory.others += self.change


@pytest.mark.parametrize(
    ("change", "found"), [(6 * GB, CONTEXT_LIMIT_BYTES), (-GB, CONTEXT_BYTES + CONTEXT_MARGIN_BYTES)]
)
def test_what_others_do_meanwhile_is_bounded(change: int, found: int) -> None:
    with standin(CONTEXT_BYTES, 900 * MB) as device:
        device.take_elsewhere(GB)
        backend = Crowded(device)
        backend.change = change
        assert measured_context(backend) == found


def test_a_device_that_was_used_shows_no_growth_and_is_not_measured(folder: Path) -> None:
    with standin(CONTEXT_BYTES, 700 * MB) as device:
        tensor = torch.ones(1, device="standin")
        with pytest.raises(RuntimeError, match="used standin:0 before"):
            measured_context(device.backend)
        del tensor
        assert machine_figures(device.backend).context_bytes == 0
    with standin(CONTEXT_BYTES, 700 * MB) as device:
        assert machine_figures(device.backend).context_bytes == CONTEXT_BYTES + 700 * MB, "it is tried again"
    with standin(CONTEXT_BYTES, 900 * MB) as device:
        assert machine_figures(device.backend).context_bytes == CONTEXT_BYTES + 700 * MB, "and remembered"


def test_a_device_that_does_not_tell_its_memory_is_not_measured() -> None:
    class Silent(StandInBackend):
        def memory(self) -> MemoryFigures:
            return MemoryFigures(peak_reserved=0)

    with standin(CONTEXT_BYTES, 0) as device, pytest.raises(RuntimeError, match="does not tell its memory"):
        measured_context(Silent(device))


def test_the_cpu_has_no_context() -> None:
    cpu = backend_for("cpu")
    assert machine_figures(cpu).context_bytes == 0
    assert MemoryLimits(vram_limit=1.0).budget(cpu).reserve_bytes == 0


def test_auto_is_what_is_free_and_the_context() -> None:
    budgets = []
    for _ in ("measured", "remembered"):
        with standin(CONTEXT_BYTES, 700 * MB) as device:
            device.take_elsewhere(GB)
            budgets.append(MemoryLimits(vram_limit="auto").budget(device.backend))
    assert [budget.vram_bytes for budget in budgets] == [int(0.95 * 7 * GB)] * 2
    assert {budget.reserve_bytes for budget in budgets} == {CONTEXT_BYTES + 700 * MB + CONTEXT_MARGIN_BYTES}


@pytest.mark.parametrize(("libraries", "reserve"), [(700 * MB, CONTEXT_BYTES + 700 * MB), (0, CONTEXT_BYTES)])
def test_budgets_leave_room_for_the_context(
    libraries: int, reserve: int, caplog: pytest.LogCaptureFixture
) -> None:
    arguments: dict[str, Any] = {"height": 64, "width": 64, "num_frames": 9, "num_inference_steps": 2}
    with standin(CONTEXT_BYTES, libraries), caplog.at_level(logging.INFO):
        pipe = load(device="standin", dtype=torch.bfloat16, storage="int8", vram_limit=2.0)
        assert manager(pipe)._budget.reserve_bytes == reserve
        pipe(prompt="a boat", seed=1, progress_bar_cmd=lambda steps: steps, **arguments)
        planned = [phase["planned_vram_bytes"] for phase in pipe.memory_report()["phases"]]
    assert all(reserve < nbytes < 2 * GB for nbytes in planned)
    assert f"of 2.00 GB VRAM ({reserve / GB:.2f} GB of it for the device's context)" in caplog.text
