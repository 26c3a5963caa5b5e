"""``diffsynth preprocess`` and ``diffsynth train``."""

import logging
import os
import re
import signal
import threading
import time
from pathlib import Path

import pytest

from diffsynth.cli.train import _interruptible
from diffsynth.training.trainer import TrainingStep, silent
from tests.cli.command import Ended, Here
from tests.training.clips import write_clip, write_config, write_data_set
from tests.training.narrow import write_narrow, write_samples


def test_from_clips_to_an_adapter(here: Here, tmp_path: Path) -> None:
    clips = write_data_set(tmp_path)
    write_clip(clips / "short.mp4", frames=1).with_suffix(".txt").write_text("too short")
    config = str(write_config(tmp_path, training="steps = 2"))
    made = here("preprocess", config, "--quiet")
    assert made.code == 0, made.err
    assert len(list((tmp_path / "samples").glob("*.safetensors"))) == 1
    trained = here("train", config)
    assert trained.code == 0, trained.err
    assert re.search(r"train: +100%.*2/2 .*loss=\d", trained.err)
    assert [path.name for path in sorted((tmp_path / "run").rglob("*.*"))] == [
        "lora_weights_step_00002.safetensors",
        "training_state_step_00002.safetensors",
        "metrics.csv",
    ]
    again = here("train", config)
    assert again.code == 2
    assert "--resume" in again.err


def test_wrong_key_is_named_with_its_line(here: Here, tmp_path: Path) -> None:
    config = write_config(tmp_path, training="stpes = 2")
    for command in ("preprocess", "train"):
        ended = here(command, str(config))
        assert ended.code == 2
        assert f"{config}:18: unknown key 'stpes' in [training]  Try: steps" in ended.err


def test_a_limit_is_kept_and_the_plan_is_told(
    here: Here, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    model = write_narrow(tmp_path / "narrow.safetensors")
    write_samples(tmp_path / "samples")

    def ended(limit: float) -> Ended:
        sections = {
            "model": f'checkpoint = "{model}"\ndevice = "cpu"\ndtype = "float32"',
            "lora": "rank = 2",
            "memory": f'storage = "int8"\nvram_limit = {limit}',
        }
        return here("train", str(write_config(tmp_path, training="steps = 2", **sections)))

    refused = ended(0.0001)
    assert refused.code == 4
    needed, unit = re.findall(r"training needs ([\d.]+) (KB|MB) of device memory", refused.err)[0]
    limit = (float(needed) + 0.01) / {"KB": 2**20, "MB": 2**10}[unit]
    trained = ended(limit)
    assert trained.code == 0, trained.err
    assert re.search(r"memory plan: .* of .* VRAM, .* 0 of 3 blocks stay on the device", caplog.text)
    rows = (tmp_path / "run" / "metrics.csv").read_text().splitlines()
    column = rows[0].split(",").index("bytes_to_device")
    assert all(float(row.split(",")[column]) > 0 for row in rows[1:])


def test_ctrl_c_saves_and_says_how_to_go_on(here: Here, tmp_path: Path) -> None:
    model = write_narrow(tmp_path / "narrow.safetensors")
    write_samples(tmp_path / "samples")
    sections = {
        "model": f'checkpoint = "{model}"\ndevice = "cpu"\ndtype = "float32"',
        "schedule": 'name = "constant"',
    }
    config = str(write_config(tmp_path, training="steps = 100000", **sections))
    table = tmp_path / "run" / "metrics.csv"

    def interrupt() -> None:
        until = time.monotonic() + 60
        while time.monotonic() < until and not (table.exists() and table.read_text().count("\n") > 2):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    pressing = threading.Thread(target=interrupt)
    pressing.start()
    ended = here("train", config)
    pressing.join()
    assert ended.code == 130
    done = re.search(r"stopped after step (\d+) of 100000.*Try: the same command with --resume", ended.err)
    assert done is not None, ended.err
    write_config(tmp_path, training=f"steps = {int(done[1]) + 1}", **sections)
    resumed = here("train", config, "--resume", "--quiet")
    assert resumed.code == 0, resumed.err
    assert (
        tmp_path / "run" / "checkpoints" / f"lora_weights_step_{int(done[1]) + 1:05d}.safetensors"
    ).exists()


def test_ctrl_c_before_the_run_begins_ends_it_at_once() -> None:
    """Then there is nothing to save; later the first one asks, and the second one ends it."""
    with _interruptible(silent) as (on_step, should_stop):
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        on_step(TrainingStep(step=0, steps=1, values={}))
        assert not should_stop()
        os.kill(os.getpid(), signal.SIGINT)
        assert should_stop()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
