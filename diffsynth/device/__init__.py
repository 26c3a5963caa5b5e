"""The one place that knows CUDA and ROCm, Ascend NPU, Apple MPS and the CPU apart.

The rest of the package asks three questions here and never a device's name:

* which device: :func:`best_device`, :func:`resolve_device`;
* what it can do: :func:`capabilities`;
* how bytes get there: :func:`backend_for`, whose :class:`Backend` has streams, events, page-locked host
  buffers and memory figures, with a synchronous fallback for devices without streams.

Nothing here touches a device at import; ``torch_npu`` is imported only where an NPU is asked for, or
installed and looked for.
"""

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from diffsynth.device.accelerators import CudaBackend, MpsBackend, NpuBackend
from diffsynth.device.base import Backend, Capabilities, Event, MemoryFigures, Stream
from diffsynth.device.context import CONTEXT_BYTES, measured_context
from diffsynth.device.host import PINNED, CpuBackend, PinnedBudget, host_memory
from diffsynth.errors import MemoryBudgetError, RequestError

__all__ = [
    "CONTEXT_BYTES",
    "PINNED",
    "Backend",
    "Capabilities",
    "Event",
    "MemoryFigures",
    "PinnedBudget",
    "Stream",
    "available_devices",
    "backend_for",
    "best_device",
    "capabilities",
    "exact_float32",
    "host_memory",
    "is_out_of_memory",
    "measured_context",
    "out_of_memory_told",
    "register_backend",
    "resolve_device",
    "unregister_backend",
]

BackendFactory = Callable[[torch.device], Backend]

_PREFERENCE = ("cuda", "npu", "mps", "cpu")
# Backends of further device types, for as long as their owner keeps them registered.
_registered: dict[str, BackendFactory] = {}


def register_backend(device_type: str, factory: BackendFactory) -> None:
    """Make ``device_type`` known, until :func:`unregister_backend`.

    It becomes valid for :func:`resolve_device` and :func:`backend_for`; :func:`best_device` never picks it.

    Args:
        device_type: a type that ``torch.device`` accepts and this module does not serve.
        factory: makes the backend of one device of that type.

    Raises:
        ValueError: the type is served by this module or registered already.
    """
    if device_type in _PREFERENCE or device_type in _registered:
        raise ValueError(f"{device_type!r} has a backend already")
    _registered[device_type] = factory


def unregister_backend(device_type: str) -> None:
    """Forget a type that :func:`register_backend` made known."""
    del _registered[device_type]


def available_devices() -> tuple[str, ...]:
    """Device types that work here now, best first; registered types come last."""
    return tuple(name for name in _PREFERENCE if _is_available(name)) + tuple(_registered)


def best_device() -> torch.device:
    """The device to use when none is asked for: CUDA or ROCm, then NPU, then MPS, then the CPU."""
    return _with_index(next(name for name in _PREFERENCE if _is_available(name)), None)


def resolve_device(device: str | torch.device | None) -> torch.device:
    """Turn what a user wrote into a device that works here.

    Args:
        device: for instance "cuda", "cuda:1", "npu:0", "mps", "cpu"; None or "auto" is the best there is.

    Returns:
        The device, with the index that tensors on it carry (none on the CPU).

    Raises:
        RequestError: the type is unknown, or not available on this machine, or the index is too large.
    """
    if device is None or device == "auto":
        return best_device()
    name, _, number = str(device).strip().lower().partition(":")
    known = name in _PREFERENCE or name in _registered
    if not known or (number and not number.isdecimal()):
        raise RequestError(f"device={str(device)!r} is not a device", hint=_choices())
    if not _is_available(name):
        raise RequestError(f"device={str(device)!r}: {_why_not(name)}", hint=_choices())
    index = int(number) if number else None
    count = torch.get_device_module(name).device_count() if name in ("cuda", "npu") else 1
    if index is not None and index >= count:
        raise RequestError(f"device={str(device)!r}: this machine has {count} of them", hint=_choices())
    return _with_index(name, index)


def backend_for(device: str | torch.device) -> Backend:
    """The verbs of one device: make it once, and hand it to whoever moves bytes.

    Raises:
        RequestError: as :func:`resolve_device`.
    """
    resolved = resolve_device(device)
    if resolved.type in _registered:
        return _registered[resolved.type](resolved)
    if resolved.type == "cuda":
        return CudaBackend(resolved)
    if resolved.type == "npu":
        return NpuBackend(resolved)
    if resolved.type == "mps":
        return MpsBackend(resolved)
    return CpuBackend(resolved)


def capabilities(device: str | torch.device) -> Capabilities:
    """What the device can do.

    Raises:
        RequestError: as :func:`resolve_device`.
    """
    return backend_for(device).capabilities


@contextmanager
def exact_float32() -> Iterator[None]:
    """Inside, float32 convolutions and products on CUDA keep their whole mantissa.

    By default convolutions take the shorter TF32 one, whose error adds up along the hundred convolutions of a
    vocoder.  The setting is the process's own and comes back afterwards.
    """
    cudnn: Any = torch.backends.cudnn  # its type hints lack `conv`
    settings: tuple[Any, ...] = (cudnn.conv, torch.backends.cuda.matmul)
    before = [setting.fp32_precision for setting in settings]
    for setting in settings:
        setting.fp32_precision = "ieee"
    try:
        yield
    finally:
        for setting, precision in zip(settings, before, strict=True):
            setting.fp32_precision = precision


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device ran out of memory: torch's own error on CUDA, plain RuntimeErrors elsewhere."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and "out of memory" in str(error).lower()


@contextmanager
def out_of_memory_told(hint: str, what: str = "") -> Iterator[None]:
    """Within the ``with`` block a device without memory is told with what needs less.

    Args:
        hint: settings to try.
        what: the device ran out of memory in, for the message.

    Raises:
        MemoryBudgetError: instead of what the device's library raises.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        place, first = f" in {what}" if what else "", str(error).splitlines()[0]
        raise MemoryBudgetError(f"the device ran out of memory{place}: {first}", hint=hint) from error


def _is_available(name: str) -> bool:
    if name == "cuda":
        return torch.cuda.is_available()
    if name == "npu":
        return _npu_available()
    if name == "mps":
        return torch.backends.mps.is_available()
    return name == "cpu" or name in _registered


def _npu_available() -> bool:
    if importlib.util.find_spec("torch_npu") is None:
        return False
    importlib.import_module("torch_npu")  # its import is what makes torch know the device
    return bool(torch.get_device_module("npu").is_available())


def _why_not(name: str) -> str:
    if name == "npu" and importlib.util.find_spec("torch_npu") is None:
        return "the package torch_npu is not installed"
    if name == "cuda" and torch.version.cuda is None and torch.version.hip is None:
        return "this build of torch has no CUDA or ROCm"
    return "torch finds none on this machine"


def _with_index(name: str, index: int | None) -> torch.device:
    # Tensors carry an index on every type but the CPU, and devices with and without one compare unequal.
    if name == "cpu":
        return torch.device("cpu")
    if index is None and name in ("cuda", "npu"):
        index = int(torch.get_device_module(name).current_device())
    return torch.device(name, index or 0)


def _choices() -> str:
    return f"one of {', '.join(available_devices())}"
