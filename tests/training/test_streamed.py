"""Adapters over a base that comes block by block, on a device that is smaller than the base."""

import csv
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from diffsynth.device import backend_for
from diffsynth.errors import Cancelled, MemoryBudgetError, RequestError
from diffsynth.loader import ModelConfig
from diffsynth.pipelines.assemble import open_models
from diffsynth.training.adapters import TrainableLora
from diffsynth.training.base import StreamedBase, open_base
from diffsynth.training.batches import random_source
from diffsynth.training.checkpointing import checkpointed_blocks
from diffsynth.training.config import TrainConfig
from diffsynth.training.config_file import read_config
from diffsynth.training.samples import Sample, read_index
from diffsynth.training.stash import HostStash
from diffsynth.training.state import Checkpoints
from diffsynth.training.strategy import Strategy
from diffsynth.training.trainer import TrainingStep, train
from tests.pipelines.placed import smallest_of
from tests.standin import StandIn
from tests.training.clips import write_config
from tests.training.narrow import write_narrow, write_samples

GB = 2**30
BLOCKS = 9


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Packed files of this module only."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DIFFSYNTH_CACHE_PATH", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A transformer of so many blocks that they are most of what a step needs."""
    return write_narrow(tmp_path_factory.mktemp("model") / "deep.safetensors", blocks=BLOCKS)


@pytest.fixture
def configured(model: Path, tmp_path: Path) -> Callable[..., TrainConfig]:
    """A configuration over two samples; ``run`` names the output folder."""
    samples = write_samples(tmp_path / "samples", 2)

    def make(
        run: str, memory: str, *, device: str = "standin", precision: str = "float32", **sections: str
    ) -> TrainConfig:
        given = {
            "model": f'checkpoint = "{model}"\ndevice = "{device}"\ndtype = "{precision}"',
            "data": f'source = "clips"\nfolder = "{samples}"\nbuckets = ["64x64x9"]',
            "output": f'folder = "{run}"\nsave_every = 2\ndtype = "float32"',
            "training": "steps = 4\nlearning_rate = 1e-2\nema_decay = 0.5",
            "lora": "rank = 2",
            "memory": memory,
        }
        return read_config(write_config(tmp_path, **{**given, **sections}))

    return make


@dataclass
class Taken:
    """What a pass gave and took."""

    gradients: Mapping[str, Tensor]
    peak: int
    base: StreamedBase
    moved: list[int]
    host_syncs: int
    pageable: int


def opened_base(config: TrainConfig) -> StreamedBase:
    """Planned for the samples of the configuration."""
    opened = open_models([ModelConfig.named(name) for name in config.model.checkpoint]).only(["dit"])
    base = open_base(config, opened, read_index(config.data.folder))
    assert isinstance(base, StreamedBase)
    return base


def taken(config: TrainConfig, device: StandIn, passes: int = 2) -> Taken:
    """Gradients of an adapter that does something, and the counters of each pass."""
    entries, base = read_index(config.data.folder), opened_base(config)
    strategy = Strategy(
        config.strategy, config.sigmas.make(), shared_sigma=False, dtype=config.model.torch_dtype
    )
    moved, syncs, pageable = [], 0, 0
    with base.entered() as network:
        adapter = TrainableLora(
            network,
            config.lora.targets,
            rank=config.lora.rank,
            alpha=1.0,
            generator=random_source(1, "adapter"),
            device=device.torch_device,
        )
        for layer in adapter.layers.values():
            torch.nn.init.constant_(layer.up, 0.05)
        with checkpointed_blocks(network, hold=base.hold, stash=base.stash):
            for number in range(passes):
                sample = Sample.load(config.data.folder / entries[number % 2].file)
                streams = strategy.streams([sample], partial(random_source, 1, number), device.torch_device)
                before, traffic = device.counters.snapshot(), base.traffic
                loss = strategy.loss(network, streams)
                torch.autograd.backward(loss.total)
                now = device.counters - before
                moved.append((base.traffic - traffic).bytes_to_device)
                syncs += now.host_syncs
                pageable += now.pageable_copies
        gradients = {
            name: parameter.grad.cpu()
            for name, parameter in adapter.parameters().items()
            if parameter.grad is not None
        }
        peak = device.peak_bytes
    return Taken(gradients, peak, base, moved, syncs, pageable)


@pytest.mark.parametrize(
    ("storage", "precision", "activations"),
    [
        ("f32", "float32", "device"),
        ("int8", "bfloat16", "host"),
        pytest.param("f32", "float32", "host", marks=pytest.mark.slow),
        pytest.param("int8", "float32", "device", marks=pytest.mark.slow),
        pytest.param("fp8", "bfloat16", "device", marks=pytest.mark.slow),
        pytest.param("int4", "bfloat16", "device", marks=pytest.mark.slow),
    ],
)
def test_gradients_are_those_of_a_resident_base(
    configured: Callable[..., TrainConfig], storage: str, precision: str, activations: str
) -> None:
    memory = f'storage = "{storage}"\nactivations = "{activations}"'
    config = configured("run", memory, precision=precision)
    with StandIn() as device:
        resident = taken(config, device)
        limit = smallest_of([resident.base.demand], resident.base.budget)
    assert len(resident.base.plan.residents) == BLOCKS
    assert resident.moved == [0, 0]
    config = replace(config, memory=replace(config.memory, vram_limit=limit / GB))
    with StandIn(capacity_bytes=limit) as device:
        streamed = taken(config, device)
    assert streamed.base.plan.slots > 0
    if storage == "f32":
        demand = resident.base.demand
        assert limit < demand.rest_bytes + sum(block.nbytes for block in demand.blocks)
    for name, gradient in resident.gradients.items():
        assert gradient.any()
        assert torch.equal(streamed.gradients[name], gradient), name
    assert streamed.peak <= streamed.base.plan.peak_vram_bytes <= limit
    assert (streamed.host_syncs, streamed.pageable) == (0, 0)
    assert streamed.moved[1] == streamed.base.bytes_per_pass > 0


@pytest.fixture
def tight(configured: Callable[..., TrainConfig]) -> Callable[..., str]:
    """The memory section with the smallest limit that works."""

    def make(storage: str, **how: str) -> str:
        memory = f'storage = "{storage}"'
        base = opened_base(configured("none", memory, **how))
        return f"{memory}\nvram_limit = {(smallest_of([base.demand], base.budget) + 1) / GB:.15f}"

    return make


def test_resumed_runs_are_equal_and_count_their_bytes(
    configured: Callable[..., TrainConfig], tight: Callable[..., str]
) -> None:
    how = {"device": "cpu", "precision": "bfloat16"}
    memory = tight("int8", **how)
    unbroken, broken = (configured(run, memory, **how) for run in ("unbroken", "broken"))
    seen = list[TrainingStep]()
    first = load_file(train(unbroken, on_step=seen.append))
    per_pass = opened_base(unbroken).bytes_per_pass
    moved = [step.values["bytes_to_device"] for step in seen[1:]]
    assert moved[1:] == [per_pass] * 3
    with (unbroken.output.folder / "metrics.csv").open(newline="") as file:
        told = [float(row["bytes_to_device"]) for row in csv.DictReader(file)]
    assert told == pytest.approx(moved, rel=1e-5)
    seen.clear()
    with pytest.raises(Cancelled):
        train(broken, on_step=seen.append, should_stop=lambda: seen[-1].step == 3)
    train(broken, resume=True)
    states = [load_file(Checkpoints(config.output.folder).state(4)) for config in (unbroken, broken)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    with pytest.raises(RequestError, match=r"other settings: model\.storage"):
        train(configured("broken", 'storage = "int4"', **how), resume=True)
    resident = load_file(train(configured("resident", 'storage = "int8"', **how)))
    assert all(torch.equal(first[key], resident[key]) for key in resident)


def test_what_cannot_fit_is_refused_with_what_would(
    configured: Callable[..., TrainConfig], tight: Callable[..., str]
) -> None:
    memory = tight("int4", device="cpu")
    larger = configured("run", memory, lora="rank = 4", device="cpu")
    with pytest.raises(MemoryBudgetError, match=r"training needs .* of device memory") as refused:
        train(larger)
    (rank,) = re.findall(r"rank = (\d+)", refused.value.hint)
    train(configured("smaller", memory, lora=f"rank = {rank}", device="cpu"))


def test_processes_of_one_machine_share_its_memory(
    configured: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of them would take all that is free; what is stated is of each."""

    def planned(memory: str) -> int:
        limit = opened_base(configured("run", memory, device="cpu")).budget.host_bytes
        assert limit is not None
        return limit

    alone = planned('storage = "int8"')
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert planned('storage = "int8"') < alone / 2
    assert planned("host_limit = 5") == 5 * GB


@pytest.mark.parametrize(
    ("memory", "training", "message"),
    [
        ('vram_limit = "9gb"', "", r"\[memory\] vram_limit='9gb'"),
        ('storage = "int3"', "", r"\[memory\] storage='int3'"),
        ('activations = "disk"', "", r"\[memory\] activations='disk'"),
        ("vram_limit = 8", 'mode = "full"', r"mode='full': only a frozen base"),
        ("vram_limit = 8.5", "gradient_checkpointing = false", "without gradient_checkpointing"),
        ("limit = 8", "", r"unknown key 'limit' in \[memory\]"),
    ],
)
def test_sections_that_cannot_work(
    configured: Callable[..., TrainConfig], memory: str, training: str, message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        configured("run", memory, training=f"steps = 2\n{training}")


def test_hidden_states_on_the_host_without_a_memory_manager(configured: Callable[..., TrainConfig]) -> None:
    steps = "steps = 2\nlearning_rate = 1e-2"
    with StandIn() as device:
        before = load_file(train(configured("before", "", training=steps)))
        after = load_file(train(configured("after", 'activations = "host"', training=steps)))
        assert device.counters.device_to_host_copies > BLOCKS
        assert device.counters.pageable_copies == 0
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_host_memory_of_a_larger_pass_serves_smaller_ones() -> None:
    """Buckets take turns: page-locked memory is not taken anew for every other pass."""
    with StandIn() as device:
        stash = HostStash(backend_for(device.torch_device))
        held = []
        for rows in (3, 5, 2, 5, 3):
            put = [
                [torch.full((rows, 2), float(10 * rows + block), device=device.torch_device)]
                for block in range(4)
            ]
            tickets = [stash.put(tensors) for tensors in put]
            held.append(stash.host_bytes)
            for ticket, tensors in zip(reversed(tickets), reversed(put), strict=True):
                (taken,) = stash.take(ticket)
                assert torch.equal(taken.cpu(), tensors[0].cpu())
        assert device.counters.device_to_host_copies > 0
        assert held == [4 * 3 * 8] + [4 * 5 * 8] * 4
        stash.close()
        assert stash.host_bytes == 0
