"""Adapters that travel with their blocks: the bits of LoRA hooks on an ordinary module, no trace after."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffsynth.errors import CheckpointError
from diffsynth.lora.apply import LoraStack
from diffsynth.lora.file import Lora, read_lora
from diffsynth.models.ltx2.transformer import LTX2Transformer
from diffsynth.vram.adapters import Adapter, Adapters
from diffsynth.vram.formats import StorageFormat
from diffsynth.vram.managed import ManagedModule
from diffsynth.vram.source import BlockSource, RamSource
from tests.standin import StandIn
from tests.vram.networks import Packed, on_host, passes, same, total, transformer
from tests.vram.support import reader_threads

NETWORKS = {name: transformer(StorageFormat(name)) for name in ("bf16", "int8")}
BLOCKS = NETWORKS["bf16"].blocks
RANK = 4


@pytest.fixture
def device(request: pytest.FixtureRequest) -> Iterator[StandIn]:
    with StandIn(seed=getattr(request, "param", 0)) as device:
        yield device


def layers(network: Packed) -> dict[str, tuple[int, int]]:
    """Some layers of every block but one, and one outside of the blocks."""
    wanted = ("attn1.to_q", "attn2.to_out.0", "ff.net.2")
    names = ["patchify_proj", *(f"{block}.{name}" for block in BLOCKS[:-1] for name in wanted)]
    found = {}
    for name in names:
        linear = network.module.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        found[name] = (linear.out_features, linear.in_features)
    return found


def random_lora(network: Packed, seed: int, dtype: torch.dtype = torch.float32) -> Lora:
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, (width_out, width_in) in layers(network).items():
        stem = f"diffusion_model.{name}"
        tensors[f"{stem}.lora_A.weight"] = torch.randn(RANK, width_in, generator=generator).to(dtype)
        tensors[f"{stem}.lora_B.weight"] = torch.randn(width_out, RANK, generator=generator).to(dtype)
    return read_lora(tensors, layers(network))


def adapters_of(*loras: tuple[Lora, float]) -> dict[str, list[Adapter]]:
    found: dict[str, list[Adapter]] = {}
    for lora, strength in loras:
        for name, update in lora.updates.items():
            found.setdefault(name, []).append(
                Adapter(update.down, update.up, strength * update.scale, update.weight_diff, update.bias_diff)
            )
    return found


def with_hooks(network: Packed, *loras: tuple[Lora, float]) -> list[Tensor]:
    """The same LoRAs, hooked to an ordinary module with the decoded weights."""
    ordinary = network.decoded()
    assert isinstance(ordinary, LTX2Transformer)
    stack = LoraStack(ordinary)
    for lora, strength in loras:
        stack.add(lora, strength)
    with torch.inference_mode():
        return on_host(ordinary.forward_passes(passes(1, "cpu", torch.bfloat16)))


def run(managed: ManagedModule, device: StandIn) -> list[Tensor]:
    assert isinstance(managed.module, LTX2Transformer)
    with torch.inference_mode():
        return on_host(managed.module.forward_passes(passes(1, device.torch_device, torch.bfloat16)))


@pytest.mark.parametrize("name", NETWORKS)
def test_adapters_give_the_bits_of_lora_hooks_wherever_they_lie(device: StandIn, name: str) -> None:
    network = NETWORKS[name]
    loras = (random_lora(network, 1), 0.7), (random_lora(network, 2, torch.bfloat16), -0.3)
    wanted, plain = with_hooks(network, *loras), with_hooks(network)
    assert not same(wanted, plain)
    managed = network.manage(device.backend)
    for residents, slots, adapter_residents, adapter_slots in (
        (BLOCKS, 0, BLOCKS, 0),
        ((), 1, (), 1),
        (BLOCKS[:2], 2, (), 2),
        ((), 2, BLOCKS[1:2], 1),
    ):
        managed.set_adapters(adapters_of(*loras))
        how = {"adapter_residents": adapter_residents, "adapter_slots": adapter_slots}
        with managed.active(residents=residents, slots=slots, **how):
            for _ in range(2):
                assert same(run(managed, device), wanted)
        assert device.current_bytes == 0
        managed.set_adapters({})
        with managed.active(residents=residents, slots=slots, **how):
            assert same(run(managed, device), plain)
    assert reader_threads() == []


def test_factors_stream_in_their_own_slots_and_are_counted(device: StandIn) -> None:
    network = NETWORKS["int8"]
    managed = network.manage(device.backend)
    with managed.active(slots=1):
        without = managed.device_bytes
    sizes: dict[str, int] = {}

    def remember(laid_out: Adapters) -> BlockSource:
        sizes.update({name: layout.nbytes for name, layout in laid_out.layouts.items()})
        each = dict.fromkeys(laid_out.layouts, laid_out.tensors)
        return RamSource.pack(laid_out.layouts, each, device.backend)

    managed.set_adapters(adapters_of((random_lora(network, 1), 1.0)), source=remember)
    streamed = BLOCKS[:-1]
    assert set(sizes) == {*streamed, "rest"}
    with managed.active(slots=1, adapter_slots=2):
        assert managed.device_bytes == device.current_bytes
        assert managed.device_bytes - without == sizes["rest"] + 2 * max(total(sizes, [b]) for b in streamed)
        run(managed, device)
        before, counted = managed.traffic, device.counters.snapshot()
        inputs = passes(1, device.torch_device, torch.bfloat16)
        copied = device.counters.host_to_device_bytes
        with torch.inference_mode():
            assert isinstance(managed.module, LTX2Transformer)
            managed.module.forward_passes(inputs)
        moved = managed.traffic - before
        expected = total(network.block_bytes, BLOCKS) + total(sizes, streamed)
        assert moved.bytes_to_device == expected
        assert moved.traversals == 1
        assert 0 <= device.counters.host_to_device_bytes - copied - expected < 1000  # and the positions
        assert (device.counters - counted).pageable_copies == 0


def test_full_differences_and_a_scale_of_zero(device: StandIn) -> None:
    network = NETWORKS["bf16"]
    layer = f"{BLOCKS[1]}.attn1.to_q"
    width_out, width_in = layers(network)[layer]
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"diffusion_model.{layer}.diff": torch.randn(width_out, width_in, generator=generator),
        f"diffusion_model.{layer}.diff_b": torch.randn(width_out, generator=generator),
    }
    lora = read_lora(tensors, layers(network))
    assert lora.updates[layer].weight_diff is not None and lora.updates[layer].bias_diff is not None
    managed = network.manage(device.backend)
    managed.set_adapters(adapters_of((lora, 0.5)))
    with managed.active(slots=1):
        assert same(run(managed, device), with_hooks(network, (lora, 0.5)))
    managed.set_adapters(adapters_of((lora, 0.0)))
    with managed.active(slots=1):
        assert same(run(managed, device), with_hooks(network))


def test_a_run_with_adapters_that_stops_in_the_middle_can_be_repeated(device: StandIn) -> None:
    network = NETWORKS["int8"]
    lora = random_lora(network, 3)
    managed = network.manage(device.backend)
    managed.set_adapters(adapters_of((lora, 1.0)))

    def stop(*_: object) -> None:
        raise ValueError("stopped")

    with managed.active(slots=2, adapter_slots=2):
        handle = managed.module.get_submodule(f"{BLOCKS[1]}.ff").register_forward_hook(stop)
        with pytest.raises(ValueError, match="stopped"):
            run(managed, device)
        handle.remove()
        assert same(run(managed, device), with_hooks(network, (lora, 1.0)))


def test_a_phase_that_does_not_fit_gives_everything_back() -> None:
    """Whatever allocation is the one that fails: slots, scratch buffer, adapters."""
    network = NETWORKS["int8"]
    adapters = adapters_of((random_lora(network, 1), 1.0))
    how: dict[str, Any] = {"residents": BLOCKS[:1], "slots": 2, "adapter_slots": 1}
    with StandIn() as device:
        managed = network.manage(device.backend)
        managed.set_adapters(adapters)
        with managed.active(**how):
            needed = managed.device_bytes
    for share in range(10):
        with StandIn(capacity_bytes=needed * share // 9) as device:
            managed = network.manage(device.backend)
            managed.set_adapters(adapters)
            if share == 9:
                managed.enter(**how)
                assert device.peak_bytes == device.current_bytes == needed
                managed.exit()
            else:
                with pytest.raises(torch.OutOfMemoryError):
                    managed.enter(**how)
            assert device.current_bytes == 0
            assert not managed.entered
            managed.set_adapters({})


def test_adapters_of_another_network_are_refused(device: StandIn) -> None:
    managed = NETWORKS["bf16"].manage(device.backend)
    down, up = torch.zeros(2, 3), torch.zeros(3, 2)
    with pytest.raises(CheckpointError, match=r"no linear layer transformer_blocks\.9"):
        managed.set_adapters({"transformer_blocks.9.attn1.to_q": [Adapter(down, up, 1.0)]})
    with pytest.raises(CheckpointError, match=r"no linear layer transformer_blocks\.0\.attn1"):
        managed.set_adapters({"transformer_blocks.0.attn1": [Adapter(down, up, 1.0)]})
    with pytest.raises(CheckpointError, match=r"its adapter has the shapes .*\(2, 3\)"):
        managed.set_adapters({"transformer_blocks.0.attn1.to_q": [Adapter(down, up, 1.0)]})
    with pytest.raises(CheckpointError, match=r"its adapter has the shapes"):
        managed.set_adapters({"transformer_blocks.0.attn1.to_q": [Adapter(down, None, 1.0)]})
    with managed.active(slots=1):
        run(managed, device)
