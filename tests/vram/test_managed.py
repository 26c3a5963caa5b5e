"""Managed networks on the strict stand-in: wherever blocks lie, the bits are those of an ordinary module."""

import copy
import gc
import tracemalloc
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from diffsynth.device import backend_for
from diffsynth.errors import CheckpointError
from diffsynth.lora.apply import LoraStack
from diffsynth.lora.file import read_lora
from diffsynth.models.ltx2.transformer import LTX2Transformer
from diffsynth.models.ltx2.upsampler import LatentUpsampler, UpsamplerConfig
from diffsynth.vram.blocks import TensorSpec, make_layout
from diffsynth.vram.formats import AS_IS, StorageFormat
from diffsynth.vram.managed import ManagedModule
from diffsynth.vram.source import RamSource
from tests.runners.case import Case
from tests.standin import StandIn
from tests.vram.networks import (
    BOTH_STREAMS,
    GOLDEN,
    SOURCES,
    Packed,
    on_host,
    pack_network,
    passes,
    same,
    total,
    transformer,
)
from tests.vram.support import reader_threads

FORMATS = ("bf16", "f32", "int8", "fp8", "e4m3", "e5m2", "int4")
BLOCKS = tuple(f"transformer_blocks.{index}" for index in range(4))


@cache
def packed(name: str) -> Packed:
    return transformer(StorageFormat(name))


def compute_dtype(name: str) -> torch.dtype:
    return AS_IS.get(StorageFormat(name), torch.bfloat16)


@cache
def expected(name: str, count: int = 1) -> list[Tensor]:
    """From an ordinary module on the CPU with the decoded weights."""
    network = packed(name).decoded()
    assert isinstance(network, LTX2Transformer)
    with torch.inference_mode():
        return on_host(network.forward_passes(passes(count, "cpu", compute_dtype(name))))


def run(managed: ManagedModule, device: StandIn, name: str, count: int = 1) -> list[Tensor]:
    network = managed.module
    assert isinstance(network, LTX2Transformer)
    inputs = passes(count, device.torch_device, compute_dtype(name))
    with torch.inference_mode():
        return on_host(network.forward_passes(inputs))


@pytest.fixture
def device(request: pytest.FixtureRequest) -> Iterator[StandIn]:
    with StandIn(seed=getattr(request, "param", 0)) as device:
        yield device


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("packed")


# -- placement never changes a bit --------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMATS)
def test_every_source_and_placement_gives_the_bits_of_an_ordinary_module(
    device: StandIn, folder: Path, name: str
) -> None:
    network = packed(name).write(folder, name)
    for kind, residents, slots in (
        ("ram", BLOCKS, 0),
        ("ram", (), 2),
        ("mapped", (), 1),
        ("file", BLOCKS[2:3], 2),
    ):
        managed = network.manage(device.backend, kind)
        with managed.active(residents=residents, slots=slots):
            assert same(run(managed, device, name), expected(name)), (kind, residents, slots)
        assert device.current_bytes == 0
    assert reader_threads() == []


@pytest.mark.parametrize("kind", SOURCES)
def test_every_source_gives_the_same_bits_in_every_traversal(
    device: StandIn, folder: Path, kind: str
) -> None:
    managed = packed("int8").write(folder, f"traversals-{kind}").manage(device.backend, kind)
    with managed.active(residents=BLOCKS[1:2], slots=2):
        for _ in range(3):
            assert same(run(managed, device, "int8"), expected("int8"))


@pytest.mark.parametrize("name", ["bf16", "f32"])
def test_formats_that_keep_tensors_give_the_bits_of_the_original(name: str) -> None:
    original = packed(name).module
    assert isinstance(original, LTX2Transformer)
    with torch.inference_mode():
        velocities = original.forward_passes(passes(1, "cpu", compute_dtype(name)))
    assert same(on_host(velocities), expected(name))


@pytest.mark.parametrize(("device", "slots"), [(1, 1), (2, 2), (3, 3), (4, 4)], indirect=["device"])
def test_any_ring_depth_and_any_residents(device: StandIn, slots: int) -> None:
    managed = packed("int8").manage(device.backend)
    for residents in ((), BLOCKS[:1], BLOCKS[1:3]):
        with managed.active(residents=residents, slots=slots):
            for _ in range(2):  # the second traversal begins with what was fetched during the first
                assert same(run(managed, device, "int8"), expected("int8"))


def test_both_streams(device: StandIn) -> None:
    network = transformer(StorageFormat.INT8, BOTH_STREAMS, num_blocks=3)
    ordinary = network.decoded()
    assert isinstance(ordinary, LTX2Transformer) and ordinary.config.has_audio
    with torch.inference_mode():
        wanted = on_host(ordinary.forward_passes(passes(2, "cpu", torch.bfloat16, BOTH_STREAMS)))
    managed = network.manage(device.backend)
    inputs = passes(2, device.torch_device, torch.bfloat16, BOTH_STREAMS)
    for residents, slots in (((), 1), (BLOCKS[1:2], 2)):
        with managed.active(residents=residents, slots=slots) as module, torch.inference_mode():
            assert isinstance(module, LTX2Transformer)
            assert same(on_host(module.forward_passes(inputs)), wanted)


@pytest.mark.parametrize("name", ["fp8", "e5m2"])
def test_devices_with_and_without_float8_casts_agree(name: str) -> None:
    with StandIn(strict_dtypes=False) as device:
        managed = packed(name).manage(device.backend)
        with managed.active(slots=1):
            assert same(run(managed, device, name), expected(name))


def test_a_device_without_streams(folder: Path) -> None:
    network, backend = packed("int4").write(folder, "cpu"), backend_for("cpu")
    for kind in SOURCES:
        managed = network.manage(backend, kind)
        with managed.active(slots=2) as module, torch.inference_mode():
            assert isinstance(module, LTX2Transformer)
            for _ in range(2):
                velocities = module.forward_passes(passes(1, "cpu", torch.bfloat16))
                assert same(on_host(velocities), expected("int4"))


def test_phases_may_be_entered_in_any_grad_mode(device: StandIn) -> None:
    managed = packed("int8").manage(device.backend)
    with torch.inference_mode():
        managed.enter(slots=1)
    module = managed.module
    assert isinstance(module, LTX2Transformer)
    with torch.no_grad():
        velocities = module.forward_passes(passes(1, device.torch_device, torch.bfloat16))
    assert same(on_host(velocities), expected("int8"))
    managed.exit()


# -- traffic and memory -------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 4])
def test_one_traversal_serves_all_passes(device: StandIn, count: int) -> None:
    network = packed("int8")
    managed = network.manage(device.backend)
    with managed.active(residents=BLOCKS[2:3], slots=2):
        for _ in range(2):
            before = managed.traffic
            assert same(run(managed, device, "int8", count), expected("int8", count))
            moved = managed.traffic - before
            assert moved.bytes_to_device == total(network.block_bytes, set(BLOCKS) - {BLOCKS[2]})
            assert (moved.traversals, moved.copies) == (1, 3)
    assert same(expected("int8", count)[:1], expected("int8"))


@pytest.mark.parametrize("name", ["int8", "fp8", "int4"])
def test_streaming_neither_allocates_nor_waits(device: StandIn, name: str) -> None:
    """A streamed run allocates and synchronises exactly as often as a resident one."""
    managed = packed(name).manage(device.backend)
    counted = []
    for residents in (BLOCKS, ()):
        with managed.active(residents=residents, slots=2):
            run(managed, device, name)
            inputs = passes(1, device.torch_device, torch.bfloat16)
            before = device.counters.snapshot()
            with torch.inference_mode():
                assert isinstance(managed.module, LTX2Transformer)
                managed.module.forward_passes(inputs)
            counted.append(device.counters - before)
    resident, streamed = counted
    assert streamed.allocations == resident.allocations
    assert streamed.host_syncs == resident.host_syncs
    moved = streamed.host_to_device_bytes - resident.host_to_device_bytes
    assert moved == total(packed(name).block_bytes, BLOCKS)


def test_only_slots_residents_and_one_decoded_weight_are_on_the_device(device: StandIn) -> None:
    network = packed("int8")
    sizes = network.block_bytes
    managed = network.manage(device.backend)
    largest = max(
        e.shape[0] * e.shape[1] * 2 for e in network.layouts[BLOCKS[0]].entries if len(e.shape) == 2
    )
    assert managed.scratch_bytes() == largest
    rest = network.layouts["rest"].nbytes
    with managed.active(residents=BLOCKS[:1], slots=2):
        in_use = rest + sizes[BLOCKS[0]] + 2 * max(sizes.values()) + largest
        assert managed.device_bytes == device.current_bytes == in_use
    with managed.active(slots=0):
        assert device.current_bytes == rest
    assert managed.device_bytes == 0


def test_a_device_smaller_than_the_weights_runs_them() -> None:
    network = packed("bf16")
    weights = sum(layout.nbytes for layout in network.layouts.values())
    with StandIn() as device:
        managed = network.manage(device.backend)
        with managed.active(slots=1):
            run(managed, device, "bf16")
            peak = device.peak_bytes
    assert peak < weights
    with StandIn(capacity_bytes=peak) as device:
        managed = network.manage(device.backend)
        with pytest.raises(torch.OutOfMemoryError):
            managed.enter(residents=BLOCKS, slots=0)
        assert device.current_bytes == 0
        with managed.active(slots=1):
            assert same(run(managed, device, "bf16"), expected("bf16"))


def test_phases_leave_nothing_behind_on_the_device_and_repeat_exactly(device: StandIn, folder: Path) -> None:
    network = packed("int8").write(folder, "repeat")
    for kind in ("file", "mixed", "mapped"):
        managed = network.manage(device.backend, kind)
        for _ in range(3):
            with managed.active(residents=BLOCKS[:1], slots=1):
                assert managed.host_bytes > 0
                assert same(run(managed, device, "int8"), expected("int8"))
            assert (device.current_bytes, managed.host_bytes, device.pinned.used) == (0, 0, 0)


def test_phases_leave_nothing_behind_on_the_host(folder: Path) -> None:
    network, backend = packed("int8").write(folder, "growth"), backend_for("cpu")
    all_managed = [network.manage(backend, kind) for kind in ("file", "mixed", "mapped", "ram")]
    inputs = passes(1, "cpu", torch.bfloat16)

    def rounds() -> tuple[int, int]:
        """Tensors that are alive after some phases, and bytes of Python objects."""
        for managed in all_managed * 5:
            with managed.active(residents=BLOCKS[:1], slots=1) as module, torch.inference_mode():
                assert isinstance(module, LTX2Transformer)
                module.forward_passes(inputs)
        gc.collect()
        alive = sum(type(thing) in (Tensor, nn.Parameter) for thing in gc.get_objects())
        return alive, tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    try:
        before, after = rounds(), rounds()
    finally:
        tracemalloc.stop()
    assert after[0] == before[0]
    assert after[1] - before[1] < 30_000  # caches of the interpreter settle


def test_page_locked_memory_goes_back_with_the_source(device: StandIn) -> None:
    managed = packed("int8").manage(device.backend)
    assert device.pinned.used == managed.host_bytes
    del managed
    gc.collect()
    assert device.pinned.used == 0


# -- the module ---------------------------------------------------------------------------------------------


def test_a_run_that_stops_in_the_middle_can_be_repeated(device: StandIn) -> None:
    managed = packed("int8").manage(device.backend)
    inner = managed.module.get_submodule(f"{BLOCKS[2]}.ff")

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with managed.active(slots=2):
        handle = inner.register_forward_hook(stop)
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                run(managed, device, "int8")
        handle.remove()
        assert same(run(managed, device, "int8"), expected("int8"))
    assert device.current_bytes == 0


def test_the_module_has_data_only_while_it_may(device: StandIn) -> None:
    managed = packed("int8").manage(device.backend)
    module = managed.module
    block = module.get_submodule(BLOCKS[1])
    linear = block.get_submodule("attn1.to_q")
    assert isinstance(linear, nn.Linear)
    seen = []
    linear.register_forward_hook(lambda *_: seen.append((block.scale_shift_table.device.type, linear.weight)))

    def all_empty() -> bool:
        return all(tensor.is_meta for tensor in module.state_dict().values())

    assert all_empty()
    with managed.active(slots=1):
        run(managed, device, "int8")
        assert block.scale_shift_table.is_meta
        assert not module.get_submodule("patchify_proj").weight.is_meta
    assert [kind for kind, _ in seen] == ["standin"]
    assert seen[0][1].is_meta and seen[0][1].shape == (linear.out_features, linear.in_features)
    assert all_empty()
    with pytest.raises(RuntimeError, match=r"transformer_blocks\.0 has no weights: enter\(\)"):
        block_0 = module.get_submodule(BLOCKS[0])
        block_0([])


def test_hooks_of_a_lora_stack_see_the_same_layers(device: StandIn) -> None:
    """Layers stay the same objects: what is hooked to them works, with the same bits."""
    name, layer = "bf16", f"{BLOCKS[1]}.attn1.to_q"
    linear = packed(name).module.get_submodule(layer)
    assert isinstance(linear, nn.Linear)
    width = linear.in_features
    generator = torch.Generator().manual_seed(0)
    down, up = torch.randn(2, width, generator=generator), torch.randn(width, 2, generator=generator)
    tensors = {f"diffusion_model.{layer}.lora_A.weight": down, f"diffusion_model.{layer}.lora_B.weight": up}
    lora = read_lora(tensors, {layer: (width, width)})
    ordinary = packed(name).decoded()
    assert isinstance(ordinary, LTX2Transformer)
    with LoraStack(ordinary).scoped(lora), torch.inference_mode():
        changed = on_host(ordinary.forward_passes(passes(1, "cpu", torch.bfloat16)))
    assert not same(changed, expected(name))
    managed = packed(name).manage(device.backend)
    with managed.active(slots=2):
        with LoraStack(managed.module).scoped(lora):
            assert same(run(managed, device, name), changed)
        assert same(run(managed, device, name), expected(name))


def test_a_whole_network_comes_and_goes() -> None:
    case = Case.load(next((GOLDEN / "upsampler").glob("*.safetensors")))
    with torch.device("meta"):
        network = LatentUpsampler(UpsamplerConfig.from_sections(case.meta["config"]))
    network.load_state_dict(case.weights(), strict=True, assign=True)
    network.requires_grad_(False).eval()
    latent = next(tensor for name, tensor in case.tensors.items() if name.startswith("in/latent"))
    with torch.inference_mode():
        ordinary = network(latent)
    whole = pack_network(network, [], StorageFormat.F32)
    with StandIn() as device:
        managed = whole.manage(device.backend)
        for _ in range(2):
            with managed.active() as module, torch.inference_mode():
                assert device.current_bytes == whole.layouts["rest"].nbytes
                result = module(latent.to(device.torch_device)).cpu()
            assert torch.equal(result, ordinary)
            assert device.current_bytes == 0


def test_weights_stored_in_another_dtype_are_converted_before_use(device: StandIn) -> None:
    linear = nn.Linear(32, 8).requires_grad_(False)
    specs = {
        name: TensorSpec(tuple(tensor.shape), torch.bfloat16, StorageFormat.F32)
        for name, tensor in linear.state_dict().items()
    }
    layouts = {"rest": make_layout(specs)}
    source = RamSource.pack(layouts, {"rest": linear.state_dict()}, device.backend)
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    wanted = copy.deepcopy(linear).to(torch.bfloat16)(x)
    with ManagedModule(linear, source, device.backend).active() as module, torch.inference_mode():
        assert torch.equal(module(x.to(device.torch_device)).cpu(), wanted)


# -- what is refused ----------------------------------------------------------------------------------------


def test_blocks_that_do_not_fit_the_module_are_refused(device: StandIn) -> None:
    network = packed("int8")
    source = network.source("ram", device.backend)

    def manage(**changed: object) -> None:
        module = packed("int8").decoded().to("meta")
        ManagedModule(module, source, device.backend, **({"blocks": BLOCKS} | changed))  # type: ignore[arg-type]

    with pytest.raises(CheckpointError, match=r"missing \['adaln_single"):
        manage(rest=())
    with pytest.raises(CheckpointError, match=r"unknown \['proj_out\.bias'\]"):
        manage(left_out=["proj_out.bias"])
    with pytest.raises(CheckpointError, match=r"missing \['transformer_blocks\.3"):
        manage(blocks=BLOCKS[:3])
    with pytest.raises(
        CheckpointError, match="stored as int8, which only weights of linear layers on the device"
    ):
        manage(blocks=BLOCKS[:3], host=BLOCKS[3:])
    other = transformer(StorageFormat.BF16, num_blocks=3)
    with pytest.raises(CheckpointError, match="lies otherwise"):
        managed = network.manage(device.backend)
        managed.enter(source=other.source("ram", device.backend))


def test_a_shape_or_format_that_a_tensor_cannot_have_is_refused(device: StandIn) -> None:
    def manage(saved: nn.Module, network: nn.Module) -> None:
        saved_as = pack_network(saved, [], StorageFormat.F32)
        source = RamSource.pack(saved_as.layouts, {"rest": saved_as.tensors}, device.backend)
        ManagedModule(network, source, device.backend)

    with pytest.raises(CheckpointError, match=r"weight has shape \(3, 2\), the network needs \(2, 3\)"):
        manage(nn.Linear(2, 3, bias=False), nn.Linear(3, 2, bias=False))
    manage(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    with pytest.raises(CheckpointError, match="stored as e4m3, which only weights of linear layers"):
        saved = pack_network(nn.ModuleDict({"x": nn.Linear(2, 2, bias=False)}), ["x"], StorageFormat.E4M3)
        each = dict.fromkeys(saved.layouts, saved.tensors)
        source = RamSource.pack(saved.layouts, each, device.backend)
        ManagedModule(nn.ModuleDict({"x": nn.Embedding(2, 2)}), source, device.backend, blocks=["x"])


def test_a_phase_cannot_be_entered_twice(device: StandIn) -> None:
    managed = packed("int8").manage(device.backend)
    with managed.active(slots=1):
        with pytest.raises(RuntimeError, match="a phase of this module is on"):
            managed.enter()
        with pytest.raises(RuntimeError, match="adapters change between phases"):
            managed.set_adapters({})
    managed.exit()
