"""CUDA and ROCm, Ascend NPU, Apple MPS: the only code of the package that calls a device's own library."""

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from diffsynth.device.base import Capabilities, Event, MemoryFigures, Stream, check_copy
from diffsynth.device.context import CONTEXT_BYTES
from diffsynth.device.host import SynchronousBackend, host_pages

logger = logging.getLogger(__name__)

_HOST_REGISTER_PORTABLE = 1  # cudaHostRegisterPortable: locked for every context of the process


class StreamBackend:
    """Verbs of a device whose torch module follows ``torch.cuda``: streams, events, allocator figures."""

    def __init__(self, device: torch.device, api: Any = None) -> None:
        """``api`` is the device's module; None takes the one that torch has for the device's type."""
        self.device = device
        self._api: Any = torch.get_device_module(device) if api is None else api

    def empty(self, nbytes: int, *, label: str = "") -> Tensor:
        """See :meth:`Backend.empty`."""
        return torch.empty(nbytes, dtype=torch.uint8, device=self.device)

    def compute_stream(self) -> Stream:
        """The current stream of the calling thread."""
        return self._api.current_stream(self.device)

    def copy_stream(self) -> Stream:
        """A new stream."""
        return self._api.Stream(device=self.device)

    def copy_async(self, dst: Tensor, src: Tensor, stream: Stream) -> None:
        """See :meth:`Backend.copy_async`; overlaps only when the host side is page-locked."""
        check_copy(dst, src)
        with self._api.stream(stream):
            dst.copy_(src, non_blocking=True)

    def event(self) -> Event:
        """An event without timing, which is cheaper."""
        return self._api.Event()

    def record(self, event: Event, stream: Stream) -> None:
        """See :meth:`Backend.record`."""
        stream.record_event(event)

    def wait(self, stream: Stream, event: Event) -> None:
        """See :meth:`Backend.wait`."""
        stream.wait_event(event)

    def synchronize(self) -> None:
        """See :meth:`Backend.synchronize`."""
        self._api.synchronize(self.device)

    def memory(self) -> MemoryFigures:
        """Figures of the driver and of torch's allocator."""
        free, total = self._api.mem_get_info(self.device)
        return MemoryFigures(
            total=int(total),
            free=int(free),
            allocated=int(self._api.memory_allocated(self.device)),
            peak_allocated=int(self._api.max_memory_allocated(self.device)),
            reserved=int(self._api.memory_reserved(self.device)),
            peak_reserved=int(self._api.max_memory_reserved(self.device)),
        )

    def reset_peak(self) -> None:
        """See :meth:`Backend.reset_peak`."""
        self._api.reset_peak_memory_stats(self.device)

    def empty_cache(self) -> None:
        """See :meth:`Backend.empty_cache`."""
        self._api.empty_cache()

    def set_memory_cap(self, nbytes: int | None) -> None:
        """See :meth:`Backend.set_memory_cap`; counts what the allocator reserves, not the context."""
        self._api.set_per_process_memory_fraction(
            _fraction(nbytes, self._api.mem_get_info(self.device)[1]), self.device
        )


class CudaBackend(StreamBackend):
    """NVIDIA through CUDA, AMD through ROCm (torch gives both the name ``cuda``)."""

    @property
    def capabilities(self) -> Capabilities:
        """Known per architecture; bfloat16 asks torch and does not count emulation."""
        rocm = torch.version.hip is not None
        if rocm:
            name = str(torch.cuda.get_device_properties(self.device).gcnArchName)
            float8_products = name.startswith(("gfx942", "gfx95", "gfx12"))
        else:
            float8_products = torch.cuda.get_device_capability(self.device) >= (8, 9)
        with torch.cuda.device(self.device):
            bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
        return Capabilities(
            float64=True,
            complex64=True,
            bfloat16=bfloat16,
            float8_storage=True,
            float8_cast=True,
            float8_arithmetic=float8_products,
            int8_arithmetic=not rocm and torch.cuda.get_device_capability(self.device) >= (7, 5),
            float32_autocast=True,
            streams=True,
            events=True,
            pinned_memory=True,
            memory_info=True,
            memory_cap=True,
            context_bytes=CONTEXT_BYTES,
            workspaces=True,
        )

    def host_buffer(self, nbytes: int, *, pinned: bool = True) -> Tensor:
        """See :meth:`Backend.host_buffer`.

        Registers plain pages: torch's own page-locked allocator rounds sizes up to a power of two and
        never returns them.
        """
        return host_pages(nbytes, self._register if pinned else None)

    def _register(self, pages: Tensor) -> Callable[[], None]:
        self._api.init()
        runtime = self._api.cudart()
        pointer = pages.data_ptr()
        with torch.cuda.device(self.device):
            status = int(runtime.cudaHostRegister(pointer, pages.numel(), _HOST_REGISTER_PORTABLE))
        if status != 0:
            self._clear_error()
            raise RuntimeError(f"cudaHostRegister failed with error {status}")

        def unregister() -> None:
            failure = int(runtime.cudaHostUnregister(pointer))
            if failure != 0:
                logger.warning("cudaHostUnregister failed with error %d", failure)

        return unregister

    def _clear_error(self) -> None:
        # The runtime keeps the error of a refused registration and would blame the next kernel for it;
        # a kernel of no importance takes the blame here.
        try:
            torch.ones(1, device=self.device)
        except RuntimeError as error:
            logger.debug("cleared after a refused registration: %s", error)


class NpuBackend(StreamBackend):
    """Huawei Ascend through torch_npu, whose module follows ``torch.cuda``."""

    @property
    def capabilities(self) -> Capabilities:
        """Facts of CANN 8.3 with torch_npu 2.9 on Atlas 800I A2.

        No float64, no complex64, no float8 of any kind but bytes, autocast to float16 and bfloat16 only.
        """
        return Capabilities(
            bfloat16=True,
            streams=True,
            events=True,
            pinned_memory=True,
            memory_info=True,
            memory_cap=True,
            context_bytes=CONTEXT_BYTES,
            workspaces=True,
        )

    def host_buffer(self, nbytes: int, *, pinned: bool = True) -> Tensor:
        """See :meth:`Backend.host_buffer`.

        torch_npu offers no registration of plain pages, so locked buffers come from its own allocator:
        they may be larger than asked for, and are not counted against the cap on page-locked memory.
        """
        if not pinned or nbytes == 0:
            return host_pages(nbytes)
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)


class MpsBackend(SynchronousBackend):
    """Apple GPUs: one memory for host and device, and one stream."""

    @property
    def capabilities(self) -> Capabilities:
        """No float64; complex64 and float8 are left out, since they depend on the system's version.

        ``torch.mps.Event`` marks only the one stream there is, so ordering needs no events.
        """
        return Capabilities(
            bfloat16=self._has_bfloat16(),
            memory_info=True,
            memory_cap=True,
            workspaces=True,
            # Metal's matrix descriptors count bytes of an array in 32 bits on systems still in use.
            max_tensor_bytes=2**32 - 1,
        )

    def _has_bfloat16(self) -> bool:
        # macOS 13 refuses the dtype; torch has no other question for it.
        try:
            torch.ones(1, dtype=torch.bfloat16, device=self.device)
        except (RuntimeError, TypeError) as error:
            logger.debug("no bfloat16 on %s: %s", self.device, error)
            return False
        return True

    def synchronize(self) -> None:
        """See :meth:`Backend.synchronize`."""
        torch.mps.synchronize()

    def memory(self) -> MemoryFigures:
        """``total`` is what Metal recommends as a working set; peaks are unknown."""
        total = int(torch.mps.recommended_max_memory())
        reserved = int(torch.mps.driver_allocated_memory())
        return MemoryFigures(
            total=total,
            free=max(0, total - reserved),
            allocated=int(torch.mps.current_allocated_memory()),
            reserved=reserved,
        )

    def reset_peak(self) -> None:
        """Nothing to do: the peak is unknown."""

    def empty_cache(self) -> None:
        """See :meth:`Backend.empty_cache`."""
        torch.mps.empty_cache()

    def set_memory_cap(self, nbytes: int | None) -> None:
        """See :meth:`Backend.set_memory_cap`."""
        torch.mps.set_per_process_memory_fraction(_fraction(nbytes, torch.mps.recommended_max_memory()))


def _fraction(nbytes: int | None, total: int) -> float:
    if nbytes is None:
        return 1.0
    if nbytes <= 0:
        raise ValueError(f"a memory cap is positive, got {nbytes}")
    return min(1.0, nbytes / total)
