"""The device room on the machine at hand; the CUDA part runs where a CUDA device is (``-m gpu``)."""

import gc
import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor

from diffsynth.device import (
    Backend,
    PinnedBudget,
    available_devices,
    backend_for,
    best_device,
    capabilities,
    exact_float32,
    host_memory,
    is_out_of_memory,
    register_backend,
    resolve_device,
    unregister_backend,
)
from diffsynth.device.accelerators import NpuBackend, StreamBackend
from diffsynth.device.host import CpuBackend, host_pages
from diffsynth.errors import RequestError

CPU = torch.device("cpu")


# -- which device -----------------------------------------------------------------------------------------


def test_nothing_named_gives_the_best_there_is() -> None:
    assert best_device().type == available_devices()[0]
    assert resolve_device(None) == resolve_device("auto") == best_device()
    assert available_devices()[-1] == "cpu"


@pytest.mark.parametrize("name", ["cpu", "CPU", "cpu:0", torch.device("cpu"), torch.device("cpu", 0)])
def test_the_cpu_has_one_name(name: str | torch.device) -> None:
    resolved = resolve_device(name)
    assert resolved == torch.zeros(1).device
    assert resolved.index is None


@pytest.mark.parametrize("name", ["xpu", "gpu", "meta", "cpu:x", "cuda:-1", "", "cpu:1"])
def test_an_unknown_device_is_refused_with_the_choices(name: str) -> None:
    with pytest.raises(RequestError, match="device=") as caught:
        resolve_device(name)
    assert "cpu" in caught.value.hint


@pytest.mark.parametrize("name", ["cuda", "npu", "mps"])
def test_a_known_device_that_is_absent_says_why(name: str) -> None:
    if name in available_devices():
        pytest.skip(f"this machine has {name}")
    with pytest.raises(RequestError, match=r"device='.*': (the package|this build|torch finds none)"):
        resolve_device(name)


def test_importing_the_room_touches_no_device() -> None:
    code = (
        "import sys, diffsynth.device, torch\n"
        "assert 'torch_npu' not in sys.modules\n"
        "assert not torch.cuda.is_initialized()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_registered_type_is_known_until_it_is_unregistered() -> None:
    made: list[torch.device] = []

    def factory(device: torch.device) -> Backend:
        made.append(device)
        return CpuBackend(device)

    register_backend("vulkan", factory)
    try:
        assert available_devices()[-1] == "vulkan"
        assert best_device().type != "vulkan"
        assert isinstance(backend_for("vulkan"), CpuBackend)
        assert made == [torch.device("vulkan", 0)]
        with pytest.raises(ValueError, match="already"):
            register_backend("vulkan", factory)
    finally:
        unregister_backend("vulkan")
    with pytest.raises(RequestError):
        resolve_device("vulkan")
    with pytest.raises(ValueError, match="already"):
        register_backend("cuda", factory)


def test_out_of_memory_is_recognised_on_every_backend() -> None:
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert is_out_of_memory(RuntimeError("NPU out of memory. Tried to allocate 2.00 GiB"))
    assert is_out_of_memory(RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"))
    assert not is_out_of_memory(RuntimeError("shape mismatch"))
    assert not is_out_of_memory(ValueError("out of memory of what was said"))


# -- what it can do ---------------------------------------------------------------------------------------


def test_what_the_cpu_claims_it_does() -> None:
    able = capabilities("cpu")
    assert able.float64 and torch.ones(2, dtype=torch.float64).sum() == 2
    assert able.complex64 and torch.fft.rfft(torch.ones(4)).dtype == torch.complex64
    assert (
        able.bfloat16
        and (torch.ones(2, 2, dtype=torch.bfloat16) @ torch.ones(2)[:, None].bfloat16()).sum() == 4
    )
    assert able.float8_cast and torch.tensor([0.5]).to(torch.float8_e4m3fn).float().item() == 0.5
    assert not (able.streams or able.events or able.pinned_memory or able.memory_cap)


def test_npu_lacks_what_the_port_found_missing() -> None:
    able = NpuBackend(torch.device("cpu"), api=SimpleNamespace()).capabilities
    assert able.bfloat16 and able.streams and able.events and able.pinned_memory
    assert not (able.float64 or able.complex64 or able.float32_autocast)
    assert not (able.float8_storage or able.float8_cast or able.float8_arithmetic)


# -- the CPU backend --------------------------------------------------------------------------------------


def test_the_cpu_backend_copies_bytes_in_program_order() -> None:
    backend = backend_for("cpu")
    source = backend.host_buffer(8)
    source.copy_(torch.arange(8, dtype=torch.uint8))
    target = backend.empty(8, label="slot")
    stream, event = backend.copy_stream(), backend.event()
    backend.copy_async(target, source, stream)
    source.zero_()
    backend.record(event, stream)
    backend.wait(backend.compute_stream(), event)
    assert event.query()
    event.synchronize()
    backend.synchronize()
    assert target.tolist() == list(range(8))


@pytest.mark.parametrize(
    ("dst", "src"),
    [
        (torch.empty(4), torch.empty(5)),
        (torch.empty(4), torch.empty(4, dtype=torch.bfloat16)),
        (torch.empty(4, 2), torch.empty(2, 4).t()),
    ],
)
def test_a_copy_that_would_convert_is_refused(dst: Tensor, src: Tensor) -> None:
    with pytest.raises(ValueError, match="a copy"):
        backend_for("cpu").copy_async(dst, src, None)


def test_a_memory_cap_is_positive() -> None:
    with pytest.raises(ValueError, match="positive"):
        backend_for("cpu").set_memory_cap(0)
    backend_for("cpu").set_memory_cap(None)


# -- host memory ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nbytes", [0, 1, 4096, 4097, 1_000_003])
def test_host_buffers_are_exact_and_aligned(nbytes: int) -> None:
    buffer = host_pages(nbytes)
    assert buffer.shape == (nbytes,)
    assert buffer.dtype == torch.uint8
    assert nbytes == 0 or buffer.data_ptr() % 4096 == 0
    buffer.fill_(7)
    assert buffer.sum().item() == 7 * nbytes


def test_host_memory_returns_to_the_system() -> None:
    process = psutil.Process()
    nbytes = 64 << 20
    before = process.memory_info().rss
    view = host_pages(nbytes).fill_(1)[: nbytes // 2].view(torch.int32)
    assert process.memory_info().rss - before > nbytes * 0.9
    del view
    assert process.memory_info().rss - before < nbytes * 0.1


class FakeDriver:
    """Locks pages on paper, and can refuse."""

    def __init__(self, refuse: bool = False) -> None:
        self.locked: set[int] = set()
        self.refuse = refuse

    def pin(self, pages: Tensor) -> Callable[[], None]:
        if self.refuse:
            raise RuntimeError("the driver said no")
        pointer = pages.data_ptr()
        self.locked.add(pointer)
        return lambda: self.locked.remove(pointer)


def test_pages_are_unlocked_when_the_last_view_dies() -> None:
    driver, budget = FakeDriver(), PinnedBudget(10_000)
    buffer = host_pages(5000, driver.pin, budget)
    assert driver.locked == {buffer.data_ptr()}
    assert budget.used == 5000
    view = buffer[100:200].view(torch.float32)
    del buffer
    gc.collect()
    assert budget.used == 5000
    assert len(driver.locked) == 1
    del view
    gc.collect()
    assert budget.used == 0
    assert not driver.locked


def test_beyond_the_cap_memory_is_pageable_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    driver, budget = FakeDriver(), PinnedBudget(8000)
    with caplog.at_level(logging.WARNING):
        kept = [host_pages(5000, driver.pin, budget) for _ in range(3)]
    assert len(driver.locked) == 1
    assert budget.used == 5000
    assert all(buffer.numel() == 5000 for buffer in kept)
    (record,) = caplog.records
    assert "5000 of 8000 bytes are locked" in record.getMessage()


def test_a_refusal_of_the_driver_is_survived_and_said(caplog: pytest.LogCaptureFixture) -> None:
    driver, budget = FakeDriver(refuse=True), PinnedBudget(8000)
    with caplog.at_level(logging.WARNING):
        buffer = host_pages(100, driver.pin, budget)
    assert buffer.fill_(3).sum().item() == 300
    assert budget.used == 0
    assert "the driver said no" in caplog.text


def test_the_cap_is_a_share_of_this_machine() -> None:
    total = host_memory().total
    assert total is not None
    assert 0.3 * total < PinnedBudget().limit < 0.6 * total


def test_host_memory_figures_are_of_this_process_and_machine() -> None:
    figures = host_memory()
    assert figures.total is not None and figures.free is not None and figures.allocated is not None
    assert 0 < figures.free <= figures.total <= psutil.virtual_memory().total
    assert 10 << 20 < figures.allocated < figures.total
    assert figures.peak_allocated is None


# -- a backend with streams, over a module that only takes notes ------------------------------------------


class FakeModule:
    """The part of ``torch.cuda`` that the stream backend calls."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.active: Any = None

    def Stream(self, device: torch.device) -> SimpleNamespace:  # noqa: N802
        return SimpleNamespace(
            device=device,
            record_event=lambda event: self.calls.append(("record", event)),
            wait_event=lambda event: self.calls.append(("wait", event)),
        )

    def Event(self) -> object:  # noqa: N802
        return object()

    @contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        self.calls.append(("enter", stream))
        yield
        self.calls.append(("leave", stream))

    def mem_get_info(self, device: torch.device) -> tuple[int, int]:
        return 600, 1000

    def memory_allocated(self, device: torch.device) -> int:
        return 10

    def max_memory_allocated(self, device: torch.device) -> int:
        return 20

    def memory_reserved(self, device: torch.device) -> int:
        return 30

    def max_memory_reserved(self, device: torch.device) -> int:
        return 40

    def set_per_process_memory_fraction(self, fraction: float, device: torch.device) -> None:
        self.calls.append(("fraction", fraction))


def test_a_stream_backend_speaks_the_dialect_of_torch_cuda() -> None:
    module = FakeModule()
    backend = StreamBackend(CPU, api=module)
    stream, event = backend.copy_stream(), backend.event()
    target = torch.zeros(3)
    backend.copy_async(target, torch.ones(3), stream)
    backend.record(event, stream)
    backend.wait(stream, event)
    assert target.tolist() == [1, 1, 1]
    assert [call[0] for call in module.calls] == ["enter", "leave", "record", "wait"]
    assert module.calls[0][1] is stream
    assert module.calls[2][1] is event
    memory = backend.memory()
    assert (memory.free, memory.total, memory.allocated, memory.peak_allocated) == (600, 1000, 10, 20)
    assert (memory.reserved, memory.peak_reserved) == (30, 40)


@pytest.mark.parametrize(("cap", "fraction"), [(250, 0.25), (5000, 1.0), (None, 1.0)])
def test_a_cap_in_bytes_becomes_a_fraction(cap: int | None, fraction: float) -> None:
    module = FakeModule()
    StreamBackend(CPU, api=module).set_memory_cap(cap)
    assert module.calls == [("fraction", fraction)]
    with pytest.raises(ValueError, match="positive"):
        StreamBackend(CPU, api=module).set_memory_cap(-1)


# -- CUDA -------------------------------------------------------------------------------------------------


@pytest.fixture
def cuda() -> Iterator[Backend]:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    backend = backend_for("cuda")
    yield backend
    backend.set_memory_cap(None)
    backend.empty_cache()


@pytest.mark.gpu
def test_cuda_host_buffers_are_pinned_and_exact(cuda: Backend) -> None:
    from diffsynth.device import PINNED

    used = PINNED.used
    buffer = cuda.host_buffer(10_000_019)
    assert buffer.is_pinned()
    assert PINNED.used - used == 10_000_019
    assert not cuda.host_buffer(4096, pinned=False).is_pinned()
    del buffer
    gc.collect()
    assert PINNED.used == used


@pytest.mark.gpu
def test_cuda_survives_a_refused_registration(cuda: Backend) -> None:
    from diffsynth.device.accelerators import CudaBackend

    assert isinstance(cuda, CudaBackend)
    pages = host_pages(8192)
    unregister = cuda._register(pages)
    with pytest.raises(RuntimeError, match="cudaHostRegister"):
        cuda._register(pages)  # registered already
    unregister()
    assert torch.ones(3, device=cuda.device).sum().item() == 3


@pytest.mark.gpu
def test_cuda_copies_on_a_side_stream_in_the_order_of_events(cuda: Backend) -> None:
    nbytes = 32 << 20
    source = cuda.host_buffer(nbytes)
    slot = cuda.empty(nbytes, label="slot")
    copy, compute = cuda.copy_stream(), cuda.compute_stream()
    filled, free = cuda.event(), cuda.event()
    cuda.record(free, compute)
    for value in range(1, 9):
        source.fill_(value)
        cuda.wait(copy, free)
        cuda.copy_async(slot, source, copy)
        cuda.record(filled, copy)
        cuda.wait(compute, filled)
        total = slot.to(torch.int64).sum()
        cuda.record(free, compute)
        filled.synchronize()  # before the host overwrites the source
        assert total.item() == value * nbytes
    assert filled.query()


@pytest.mark.gpu
def test_cuda_keeps_under_the_cap(cuda: Backend) -> None:
    cuda.empty_cache()
    cuda.set_memory_cap(256 << 20)
    cuda.reset_peak()
    kept = cuda.empty(100 << 20)
    with pytest.raises(torch.OutOfMemoryError) as caught:
        cuda.empty(200 << 20)
    assert is_out_of_memory(caught.value)
    figures = cuda.memory()
    assert figures.peak_reserved is not None and kept.numel() <= figures.peak_reserved <= 256 << 20
    assert figures.free is not None and figures.total is not None and 0 < figures.free < figures.total


@pytest.mark.gpu
def test_cuda_does_what_it_claims(cuda: Backend) -> None:
    able, device = cuda.capabilities, cuda.device
    assert able.float64 and torch.ones(2, dtype=torch.float64, device=device).sum().item() == 2
    assert able.float8_cast and torch.ones(2, device=device).to(torch.float8_e4m3fn).float().sum().item() == 2
    if able.float8_arithmetic:
        a = torch.ones(16, 16, device=device).to(torch.float8_e4m3fn)
        one = torch.ones((), device=device)
        product = torch._scaled_mm(a, a.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16)
        assert product[0, 0].item() == 16
    if able.int8_arithmetic:
        b = torch.ones(32, 32, dtype=torch.int8, device=device)
        assert torch._int_mm(b, b)[0, 0].item() == 32


def test_exact_float32_is_in_force_inside_only() -> None:
    conv = torch.backends.cudnn.conv
    before = conv.fp32_precision
    with pytest.raises(KeyError), exact_float32():
        assert conv.fp32_precision == "ieee"
        raise KeyError
    assert conv.fp32_precision == before
