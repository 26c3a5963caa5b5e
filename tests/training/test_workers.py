"""Two processes learn what one learns, and one of them writes."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from diffsynth.errors import RequestError
from diffsynth.training import workers
from diffsynth.training.config_file import read_config
from diffsynth.training.state import Checkpoints
from diffsynth.training.trainer import train
from diffsynth.training.workers import Workers
from tests.cli.command import environment
from tests.training.clips import write_config
from tests.training.narrow import write_narrow, write_samples
from tests.training.test_trainer import content


def configured(folder: Path, run: str, *, steps: int, passes: int = 2) -> Path:
    return write_config(
        folder,
        model=f'checkpoint = "{folder / "narrow.safetensors"}"\ndevice = "cpu"\ndtype = "float32"',
        output=f'folder = "{run}"\nsave_every = 1\ndtype = "float32"',
        training=f"steps = {steps}\ngradient_accumulation = {passes}\nlearning_rate = 1e-3\nema_decay = 0.5",
        schedule='name = "constant"',
        lora="rank = 4",
    )


TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def torchrun(config: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [*TORCHRUN, "-m", "diffsynth", "train", str(config), *options]
    return subprocess.run(
        command, env=environment(), capture_output=True, text=True, timeout=180, check=False
    )


def test_two_processes_learn_what_one_learns(tmp_path: Path) -> None:
    """Resumed after two of four steps, against one process that makes both passes of each step."""
    write_narrow(tmp_path / "narrow.safetensors")
    write_samples(tmp_path / "samples", 3)
    for steps, options in ((2, ()), (4, ("--resume",))):
        done = torchrun(configured(tmp_path, "two", steps=steps), *options)
        assert done.returncode == 0, done.stderr
        assert done.stderr.count(f"lora_weights_step_0000{steps}.safetensors") == 1
    alone = read_config(configured(tmp_path, "one", steps=4))
    train(alone)
    one, two = Checkpoints(alone.output.folder), Checkpoints(tmp_path / "two")
    for path, other in (
        (one.result("lora", 4), two.result("lora", 4)),
        (one.result("lora", 4, mean=True), two.result("lora", 4, mean=True)),
        (one.state(4), two.state(4)),
    ):
        (tensors, metadata), (others, stated) = content(path), content(other)
        assert metadata == stated
        assert tensors.keys() == others.keys()
        for name, tensor in tensors.items():
            torch.testing.assert_close(others[name], tensor, rtol=1e-4, atol=1e-7, msg=name)
    rows = [(tmp_path / run / "metrics.csv").read_text().splitlines() for run in ("one", "two")]
    assert len(rows[0]) == len(rows[1]) == 5
    for row, other in zip(rows[0][1:], rows[1][1:], strict=True):
        assert float(row.split(",")[1]) == pytest.approx(float(other.split(",")[1]), rel=1e-4)


def test_ctrl_c_reaches_all(tmp_path: Path) -> None:
    """The terminal sends it to every process, and torchrun sends it once more: one state is saved."""
    write_narrow(tmp_path / "narrow.safetensors")
    write_samples(tmp_path / "samples", 3)
    config, table = configured(tmp_path, "two", steps=100_000), tmp_path / "two" / "metrics.csv"
    command = [*TORCHRUN, "-m", "diffsynth", "train", str(config)]
    with subprocess.Popen(
        command, env=environment(), stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as running:
        until = time.monotonic() + 100
        while time.monotonic() < until and not (table.exists() and table.read_text().count("\n") > 2):
            time.sleep(0.05)
        os.killpg(running.pid, signal.SIGINT)
        _, said = running.communicate(timeout=60)
    found = re.search(r"stopped after step (\d+) of 100000.*--resume", said)
    assert found, said
    assert list(Checkpoints(tmp_path / "two").states()) == [int(found[1])]


def test_passes_that_cannot_be_dealt_out(tmp_path: Path) -> None:
    for passes in (2, 4):
        Workers(rank=1, size=2).check(passes)
    with pytest.raises(RequestError, match=r"gradient_accumulation=3 .* 2 processes.*= 4: it counts"):
        Workers(rank=0, size=2).check(3)
    write_narrow(tmp_path / "narrow.safetensors")
    write_samples(tmp_path / "samples", 3)
    done = torchrun(configured(tmp_path, "two", steps=1, passes=3))
    assert done.returncode != 0
    assert "gradient_accumulation=3 cannot be dealt out among 2 processes" in done.stderr
    assert not (tmp_path / "two").exists()


def test_every_pass_has_one_process() -> None:
    shares = [list(Workers(rank=rank, size=3).share(6)) for rank in range(3)]
    assert shares == [[0, 3], [1, 4], [2, 5]]
    assert list(Workers().share(3)) == [0, 1, 2]


def test_one_device_for_several_processes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with (
        pytest.raises(RequestError, match=r"device='cuda:1' for 2 processes.*device = \"cuda\""),
        workers.joined("cuda:1"),
    ):
        pass


GATHER = """
import json, os, sys, torch
from diffsynth.training.workers import joined
with joined("cpu") as (workers, device):
    parameters = [torch.nn.Parameter(torch.zeros(n)) for n in (3, 2, 4)]
    if workers.rank == 0:
        parameters[0].grad = torch.arange(3.0)
    parameters[1].grad = torch.full((2,), 1.0 + workers.rank)
    workers.add_gradients(parameters)
    grads = [None if p.grad is None else p.grad.tolist() for p in parameters]
    told = [workers.any(workers.rank == 1), workers.any(False), workers.gathered(workers.rank)]
    print(json.dumps([grads, told]), file=open(sys.argv[1] + str(workers.rank), "w"))
"""


def test_gradients_that_only_some_have(tmp_path: Path) -> None:
    """One that nobody has stays none, as the optimiser skips it in one process too."""
    (tmp_path / "gather.py").write_text(GATHER)
    subprocess.run(
        [*TORCHRUN, str(tmp_path / "gather.py"), str(tmp_path / "said")],
        env=environment(),
        check=True,
        capture_output=True,
        timeout=120,
        cwd=os.fspath(tmp_path),
    )
    for rank in range(2):
        grads, told = json.loads((tmp_path / f"said{rank}").read_text())
        assert grads == [[0, 1, 2], [3, 3], None]
        assert told == [True, False, [0, 1]]
