"""The stand-in as a device: tensors, memory, counters, missing dtypes."""

import gc
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from diffsynth.device import available_devices, backend_for, capabilities, is_out_of_memory, resolve_device
from tests.standin import Counters, HazardError, StandIn, UnsupportedOnDeviceError
from tests.standin.cases import computed_on, same_bits

GOLDEN = Path(__file__).parent.parent / "golden"
CPU = torch.device("cpu")


@pytest.fixture
def device() -> Iterator[StandIn]:
    with StandIn() as opened:
        yield opened


@pytest.fixture(params=["inference_mode", "no_grad", "grad"])
def mode(request: pytest.FixtureRequest) -> Iterator[None]:
    modes = {"inference_mode": torch.inference_mode, "no_grad": torch.no_grad, "grad": torch.enable_grad}
    with modes[request.param]():
        yield


# -- tensors ----------------------------------------------------------------------------------------------

FACTORIES: dict[str, Callable[[torch.device], Tensor]] = {
    "zeros": lambda d: torch.zeros(2, 3, device=d),
    "ones": lambda d: torch.ones(2, dtype=torch.bfloat16, device=d),
    "full": lambda d: torch.full((2,), 1.5, device=d),
    "arange": lambda d: torch.arange(5, device=d),
    "arange step": lambda d: torch.arange(0, 1, 0.25, device=d),
    "linspace": lambda d: torch.linspace(0, 1, 4, device=d),
    "eye": lambda d: torch.eye(3, device=d),
    "hann_window": lambda d: torch.hann_window(5, device=d),
    "tensor": lambda d: torch.tensor([[1, 2], [3, 4]], device=d),
    "as_tensor": lambda d: torch.as_tensor([1.0, 2.0], device=d),
    "randn": lambda d: torch.randn(4, device=d),
    "to": lambda d: torch.ones(3).to(d),
    "to with dtype": lambda d: torch.ones(3).to(d, torch.bfloat16),
    "to like another": lambda d: torch.ones(3).to(torch.zeros(1, device=d)),
    "zeros_like": lambda d: torch.zeros_like(torch.ones(3, device=d)),
    "new_tensor": lambda d: torch.ones(3, device=d).new_tensor([1.0, 2.0]),
    "parameter": lambda d: nn.Parameter(torch.ones(3, device=d), requires_grad=False),
    "module": lambda d: nn.Linear(3, 2).to(d).weight.detach(),
}


@pytest.mark.parametrize("name", FACTORIES)
def test_tensors_are_made_on_the_device_with_the_values_of_the_cpu(
    device: StandIn, mode: None, name: str
) -> None:
    results = []
    for target in (torch.device("standin"), CPU):
        torch.manual_seed(0)
        results.append(FACTORIES[name](target))
    there, here = results
    assert there.device == device.torch_device == torch.device("standin", 0)
    assert there.dtype == here.dtype
    assert same_bits(there.detach().cpu(), here.detach())


OPERATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "linear": lambda x, w: functional.linear(x, w),
    "bfloat16 linear": lambda x, w: functional.linear(x.bfloat16(), w.bfloat16()),
    "matmul": lambda x, w: x @ x.transpose(-1, -2),
    "einsum": lambda x, w: torch.einsum("bhnd,bhmd->bhnm", x, x),
    "attention": lambda x, w: functional.scaled_dot_product_attention(x, x, x),
    "masked attention": lambda x, w: functional.scaled_dot_product_attention(
        x, x, x, attn_mask=torch.ones(5, 5, device=x.device).tril() > 0
    ),
    "conv3d": lambda x, w: functional.conv3d(x[None], torch.ones(3, 2, 2, 2, 2, device=x.device), padding=1),
    "group_norm": lambda x, w: functional.group_norm(x, 2),
    "layer_norm": lambda x, w: functional.layer_norm(x, (8,)),
    "rms_norm": lambda x, w: functional.rms_norm(x, (8,)),
    "embedding": lambda x, w: functional.embedding(torch.tensor([0, 2, 1], device=x.device), w),
    "unique": lambda x, w: torch.unique(x > 0, return_inverse=True)[1],
    "mask": lambda x, w: x[x > 0],
    "list index": lambda x, w: x[:, [3, 1]],
    "write through a view": lambda x, w: x[0].add_(1).new_zeros(()) + x,
    "assign a slice": lambda x, w: x.index_put((torch.tensor([1], device=x.device),), x[:1]),
    "in place": lambda x, w: x.mul_(2).sigmoid_(),
    "in place shape": lambda x, w: x[0, 0].t_(),
    "reshape": lambda x, w: x.transpose(1, 2).reshape(2, 5, 32),
    "pad": lambda x, w: functional.pad(x, (1, 1, 2, 0)),
    "cat and split": lambda x, w: torch.cat(x.chunk(2, dim=1)[::-1], dim=-1),
    "host scalar": lambda x, w: torch.where(x > torch.tensor(0.0), x, 0.0),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_give_the_bits_of_the_cpu(device: StandIn, mode: None, name: str) -> None:
    torch.manual_seed(1)
    x, w = torch.randn(2, 4, 5, 8), torch.randn(3, 8)
    here = OPERATIONS[name](x.clone(), w)
    there = OPERATIONS[name](x.to("standin"), w.to("standin"))
    assert there.device == device.torch_device
    assert same_bits(there.cpu().contiguous(), here.contiguous())


@pytest.mark.parametrize(
    "case",
    [
        "transformer/full_ltx2",
        "transformer/video_only_ltx23",
        "video_vae/decoder_ltx2.3",
        "video_vae/encoder_ltx2.3",
        "audio/audio_decoder",
        "audio/vocoder_ltx2",
        "upsampler/spatial_x2_ltx2",
        "text/post_ltx23_batch",
    ],
)
def test_networks_give_the_bits_of_the_cpu(device: StandIn, case: str) -> None:
    path = GOLDEN / f"{case}.safetensors"
    here, there = computed_on(path, CPU), computed_on(path, device.torch_device)
    assert here.keys() == there.keys()
    assert [name for name in here if not same_bits(here[name], there[name])] == []
    assert device.peak_bytes > 0


def test_a_module_goes_there_and_back(device: StandIn, mode: None) -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    expected = {key: value.clone() for key, value in module.state_dict().items()}
    module.to("standin")
    assert {p.device for p in module.parameters()} == {device.torch_device}
    module.to(torch.bfloat16)
    assert module(torch.ones(1, 4, device="standin", dtype=torch.bfloat16)).dtype == torch.bfloat16
    module.cpu()
    for key, value in module.state_dict().items():
        assert value.device == CPU
        assert torch.equal(value, expected[key].bfloat16())


def test_loading_with_assign_leaves_nothing_on_meta(device: StandIn, mode: None) -> None:
    with torch.device("meta"):
        module = nn.Linear(3, 2)
    weights = {"weight": torch.ones(2, 3, device="standin"), "bias": torch.zeros(2, device="standin")}
    module.load_state_dict(weights, strict=True, assign=True)
    assert module(torch.ones(1, 3, device="standin")).tolist() == [[3.0, 3.0]]


def test_a_no_op_move_keeps_the_tensor(device: StandIn, mode: None) -> None:
    x = torch.ones(3, device="standin")
    assert x.to("standin") is x
    assert x.float() is x
    assert x.to("standin", copy=True) is not x
    assert x.to("meta").is_meta


@pytest.mark.parametrize(
    "mix",
    [
        lambda x, y: x + y,
        lambda x, y: y * x,
        lambda x, y: torch.cat([x, y]),
        lambda x, y: functional.linear(x, y),
        lambda x, y: x[y.long()],
        lambda x, y: x.masked_fill_(y > 0, 0.0),
    ],
)
def test_host_and_device_do_not_mix(device: StandIn, mix: Callable[[Tensor, Tensor], Tensor]) -> None:
    with pytest.raises(RuntimeError, match=r"same device.*standin:0 and cpu"):
        mix(torch.ones(2, 2, device="standin"), torch.ones(2, 2))


def test_a_generator_of_the_host_is_refused(device: StandIn) -> None:
    with pytest.raises(RuntimeError, match="'standin' device type for generator"):
        torch.randn(3, device="standin", generator=torch.Generator())


def test_the_device_exists_only_while_it_is_open() -> None:
    with StandIn() as device:
        kept = torch.ones(2, device="standin")
        assert available_devices()[-1] == "standin"
        assert resolve_device("standin") == device.torch_device == kept.device
        with pytest.raises(UnsupportedOnDeviceError, match="another"):
            StandIn().__enter__()
    assert "standin" not in available_devices()
    assert not torch.accelerator.is_available() or torch.cuda.is_available()
    with pytest.raises(UnsupportedOnDeviceError, match="no stand-in is open"):
        torch.ones(2, device="standin")
    with pytest.raises(UnsupportedOnDeviceError, match="no stand-in is open"):
        kept + 1
    with StandIn(), pytest.raises(UnsupportedOnDeviceError, match="closed"):
        kept + 1
    weight = nn.Linear(2, 2)
    weight(torch.ones(1, 2)).sum().backward()
    assert weight.weight.grad is not None


def test_other_threads_see_the_device(device: StandIn) -> None:
    results: list[float] = []

    def work() -> None:
        with torch.inference_mode():
            results.append(nn.Linear(4, 1).to("standin")(torch.zeros(1, 4, device="standin")).numel())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert results == [1]


# -- memory -----------------------------------------------------------------------------------------------


def test_every_storage_counts_once_until_its_last_view_dies(device: StandIn, mode: None) -> None:
    x = torch.zeros(100, device="standin")
    assert device.current_bytes == 400
    views = [x[10:20], x.view(10, 10), x.detach(), x.expand(5, 100)]
    assert device.current_bytes == 400
    y = x + 1
    assert device.current_bytes == device.peak_bytes == 800
    del x
    assert device.current_bytes == 800
    views.clear()
    assert device.current_bytes == 400
    device.reset_peak()
    del y
    assert (device.current_bytes, device.peak_bytes) == (0, 400)


def test_a_result_that_grows_in_place_is_counted(device: StandIn) -> None:
    x, out = torch.ones(50, device="standin"), torch.empty(0, device="standin")
    torch.add(x, 1, out=out)
    assert out.shape == (50,)
    assert device.current_bytes == 400


def test_the_capacity_is_exact_and_exceeding_it_says_what_is_there() -> None:
    with StandIn(capacity_bytes=1000) as device:
        kept = torch.zeros(200, device="standin")
        small = torch.zeros(50, device="standin")
        assert device.current_bytes == 1000
        with pytest.raises(torch.OutOfMemoryError) as caught:
            torch.zeros(1, device="standin")
        assert is_out_of_memory(caught.value)
        assert "800  empty  float32 200  " in str(caught.value)
        assert "test_standin.py:" in str(caught.value)
        with pytest.raises(torch.OutOfMemoryError):
            kept + 1
        assert device.current_bytes == device.peak_bytes == 1000
        del small
        assert (kept[:40] + 1).sum().item() == 40


def test_caps_and_other_processes_shrink_the_device() -> None:
    with StandIn(capacity_bytes=1000) as device:
        backend = backend_for("standin")
        backend.set_memory_cap(500)
        with pytest.raises(torch.OutOfMemoryError):
            backend.empty(501)
        backend.set_memory_cap(None)
        device.take_elsewhere(700)
        kept = backend.empty(300, label="slot")
        figures = backend.memory()
        assert (figures.total, figures.free, figures.allocated) == (1000, 0, 300)
        with pytest.raises(torch.OutOfMemoryError, match="slot"):
            backend.empty(1)
        assert device.ledger().splitlines()[0].split()[:2] == [str(kept.numel()), "slot"]


def test_a_cycle_keeps_memory_until_it_is_collected(device: StandIn) -> None:
    holder: dict[str, object] = {"tensor": torch.zeros(25, device="standin")}
    holder["self"] = holder
    del holder
    assert device.current_bytes == 100
    gc.collect()
    assert device.current_bytes == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_memory_that_nobody_wrote_holds_nan(device: StandIn, dtype: torch.dtype) -> None:
    x = torch.empty(16, dtype=dtype, device="standin")
    assert x.cpu().float().isnan().all()
    assert x.new_empty(4).cpu().float().isnan().all()
    assert backend_for("standin").empty(8).tolist() == [255] * 8


# -- counters ---------------------------------------------------------------------------------------------


def test_copies_are_counted_to_the_byte(device: StandIn, mode: None) -> None:
    x = torch.ones(10).to("standin")
    y = torch.ones(10).to("standin", torch.bfloat16)
    torch.zeros(5, device="standin")
    y.copy_(torch.ones(10))
    assert device.counters == Counters(
        host_to_device_bytes=40 + 20 + 20, host_to_device_copies=3, allocations=3
    )
    before = device.counters.snapshot()
    x[:4].cpu()
    torch.empty(10).copy_(x)
    assert device.counters - before == Counters(
        device_to_host_bytes=16 + 40, device_to_host_copies=2, host_syncs=2
    )


@pytest.mark.parametrize(
    ("operation", "syncs"),
    [
        (lambda x: x.sum().item(), 1),
        (lambda x: bool(x.sum() > 0), 1),
        (lambda x: x.nonzero(), 1),
        (lambda x: x[x > 0], 1),
        (lambda x: torch.unique(x), 1),
        (lambda x: x.tolist(), 1),
        (lambda x: torch.equal(x, x), 1),
        (lambda x: x.cpu(), 1),
        (lambda x: backend_for("standin").synchronize(), 1),
        (lambda x: x * 2 + x.mean(), 0),
        (lambda x: torch.where(x > 0, x, 0.0), 0),
        (lambda x: x.to(torch.bfloat16), 0),
        (lambda x: x.shape[0], 0),
    ],
)
def test_host_synchronisations_are_counted(
    device: StandIn, mode: None, operation: Callable[[Tensor], object], syncs: int
) -> None:
    x = torch.ones(4, device="standin")
    before = device.counters.snapshot()
    operation(x)
    assert (device.counters - before).host_syncs == syncs


# -- what the device lacks --------------------------------------------------------------------------------

MISSING: dict[str, Callable[[Tensor], object]] = {
    "a float64 factory": lambda x: torch.zeros(2, dtype=torch.float64, device="standin"),
    "double": lambda x: x.double(),
    "float64 from the host": lambda x: torch.ones(2, dtype=torch.float64).to("standin"),
    "float64 accumulation": lambda x: x.sum(dtype=torch.float64),
    "complex view": lambda x: torch.view_as_complex(x.view(2, 2)),
    "fft": lambda x: torch.fft.rfft(x),
    "cast to float8": lambda x: x.to(torch.float8_e4m3fn),
    "cast from float8": lambda x: x.to(torch.uint8).view(torch.float8_e5m2).float(),
    "copy into float8": lambda x: torch.empty(4, dtype=torch.float8_e5m2, device="standin").copy_(x),
}


@pytest.mark.parametrize("name", MISSING)
def test_missing_dtypes_are_refused_where_strict(mode: None, name: str) -> None:
    for strict in (True, False):
        with StandIn(strict_dtypes=strict) as device:
            x = torch.ones(4, device="standin")
            able = capabilities("standin")
            assert able.float64 is able.complex64 is able.float8_cast is (not strict)
            if strict:
                with pytest.raises(UnsupportedOnDeviceError, match=r"float64|complex|float8"):
                    MISSING[name](x)
            else:
                MISSING[name](x)
            assert not able.float8_arithmetic
            assert device.current_bytes == x.nbytes


def test_float8_bytes_travel_and_are_looked_up(device: StandIn) -> None:
    values = torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn)
    table = values.float().to("standin")
    stored = values.to("standin")[16:64].reshape(4, 12)
    assert stored.dtype == torch.float8_e4m3fn
    wide = table[stored.contiguous().view(torch.uint8).to(torch.int32)]
    assert same_bits(wide.cpu(), values[16:64].float().reshape(4, 12))
    assert torch.equal(stored.cpu().view(torch.uint8), values[16:64].view(torch.uint8).reshape(4, 12))
    with pytest.raises(UnsupportedOnDeviceError, match="no float8 arithmetic"):
        stored.abs()


def test_float32_autocast_has_no_effect_and_says_so(device: StandIn) -> None:
    assert not capabilities("standin").float32_autocast
    with pytest.warns(UserWarning, match="target dtype is not supported"):
        torch.autocast("standin", dtype=torch.float32)


def test_storages_cannot_be_exchanged(device: StandIn) -> None:
    x = torch.ones(4, device="standin")
    with pytest.raises(UnsupportedOnDeviceError, match="set_"):
        torch.ops.aten.set_.source_Tensor(x, torch.ones(4, device="standin"))
    with pytest.raises(UnsupportedOnDeviceError, match="host tensor"):
        x.data = torch.ones(4)


def test_errors_of_the_stand_in_are_runtime_errors_as_on_devices() -> None:
    assert issubclass(HazardError, RuntimeError)
    assert issubclass(UnsupportedOnDeviceError, RuntimeError)


def test_gradients_are_those_of_the_cpu() -> None:
    random = torch.Generator().manual_seed(1)
    given = [torch.randn(2, 4, 8, generator=random), torch.randn(8, 8, generator=random)]

    def gradients(device: str) -> list[Tensor]:
        x, weight = (t.detach().to(device).requires_grad_() for t in given)
        q = functional.linear(x, weight).view(2, 4, 2, 4).transpose(1, 2)
        mixed = functional.scaled_dot_product_attention(q, q, q).transpose(1, 2).flatten(2)
        out = functional.rms_norm(mixed, (8,)) @ weight.t()
        torch.autograd.backward(out.square().sum())
        assert x.grad is not None
        assert weight.grad is not None
        return [x.grad.cpu(), weight.grad.cpu()]

    wanted = gradients("cpu")
    with StandIn():
        found = gradients("standin")
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)
