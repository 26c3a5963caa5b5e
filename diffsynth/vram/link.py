"""How fast this machine moves bytes and multiplies matrices, and what it takes to begin with.

All of it is measured once, then remembered.

The figures lie in ``machine.json`` beside the packed files, by device name and versions, so that a new driver
or another card is measured anew.  Where something cannot be measured a default stands in, and a log line says
so.  Nothing runs at import.
"""

import contextlib
import json
import logging
import os
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from diffsynth.device import PINNED, Backend, host_memory, measured_context
from diffsynth.vram.cache import default_folder
from diffsynth.vram.planner import Budget

logger = logging.getLogger(__name__)

FILE_NAME = "machine.json"
SYSTEM_BYTES = 2 * 2**30
"""Host memory that stays free for others when no limit is given."""

_LINK_BYTES = 2**27
_DISK_BYTES = 2**27
_PIECE_BYTES = 2**23
_MATRIX_WIDTHS = (512, 1024, 2048, 4096, 8192)
_MATRIX_S = 0.005  # shorter products tell more of the launch than of the device
_REPEATS = 3
_EFFICIENCY = 0.65  # a whole run reaches about two thirds of the rate of one large product


@dataclass(frozen=True, kw_only=True, slots=True)
class MachineFigures:
    """What a machine reaches.

    The defaults are those of a card on PCIe 4.0 x8, an NVMe drive and 15 effective TFLOPS, a small machine.

    Attributes:
        link_bytes_per_s: from page-locked memory to the device.
        disk_bytes_per_s: large reads from the folder of the packed files.
        tflops: dense products of large bf16 matrices, in 10**12 operations per second, as they are reached.
        context_bytes: of the device, which a process takes beside its tensors; 0: as assumed for the device.
    """

    link_bytes_per_s: float = 12.5e9
    disk_bytes_per_s: float = 3.5e9
    tflops: float = 15.0
    context_bytes: float = 0.0


def machine_figures(backend: Backend, *, folder: Path | None = None, measure: bool = True) -> MachineFigures:
    """The figures of this machine: remembered, measured (a second or two), or defaults.

    Args:
        backend: of the device.
        folder: where they are remembered and where the disk is measured; None: beside the packed files.
        measure: whether to measure what is not known.  What fails is tried again next time.
    """
    folder = default_folder().parent if folder is None else folder
    key = machine_key(backend.device)
    known = _read(folder / FILE_NAME)
    values = _figures(known.get(key))
    if measure:
        ways: dict[str, Callable[[], float]] = {}
        if backend.capabilities.context_bytes:  # first: the others load libraries, whose growth it looks for
            ways["context_bytes"] = lambda: measured_context(backend)
        ways |= {
            "link_bytes_per_s": lambda: link_speed(backend, _LINK_BYTES),
            "disk_bytes_per_s": lambda: disk_speed(folder, _DISK_BYTES),
            "tflops": lambda: matrix_speed(backend, _MATRIX_WIDTHS),
        }
        fresh = {name: _tried(name, way) for name, way in ways.items() if name not in values}
        values |= {name: value for name, value in fresh.items() if value is not None}
        if any(value is not None for value in fresh.values()):
            _write(folder / FILE_NAME, {**known, key: values})
    return MachineFigures(**values)


def machine_budget(
    backend: Backend,
    figures: MachineFigures,
    *,
    vram_bytes: int | None = None,
    host_bytes: int | None = None,
    workspaces: bool = True,
) -> Budget:
    """What a plan may use here.

    Args:
        backend: of the device.
        figures: of this machine.
        vram_bytes: limit of the process's device memory; None: no limit.
        host_bytes: limit of its host memory; None: what is free now and what the process holds, less 2 GB.
        workspaces: see :class:`~.planner.Budget`.
    """
    if host_bytes is None:
        host = host_memory()
        host_bytes = max(0, (host.free or 0) + (host.allocated or 0) - SYSTEM_BYTES)
    return Budget(
        vram_bytes=vram_bytes,
        host_bytes=host_bytes,
        link_bytes_per_s=figures.link_bytes_per_s,
        disk_bytes_per_s=figures.disk_bytes_per_s,
        tflops=figures.tflops,
        efficiency=_EFFICIENCY,
        reserve_bytes=max(backend.capabilities.context_bytes, int(figures.context_bytes)),
        workspaces=workspaces,
        pin_limit_bytes=PINNED.limit if backend.capabilities.pinned_memory else 0,
    )


def machine_key(device: torch.device) -> str:
    """Name of the device, and the versions that its speed may depend on."""
    name = str(device)
    try:
        name = str(torch.get_device_module(device).get_device_name(device))
    except (RuntimeError, AttributeError):
        logger.debug("%s has no name", device)
    return f"{name}, torch {torch.__version__}, CUDA {torch.version.cuda}, ROCm {torch.version.hip}"


def link_speed(backend: Backend, nbytes: int) -> float:
    """Bytes per second of copies to the device, the fastest of a few.

    Raises:
        torch.OutOfMemoryError: or what the backend raises when memory does not suffice.
    """
    source, target = backend.host_buffer(nbytes), backend.empty(nbytes, label="measuring the link")
    stream, done = backend.copy_stream(), backend.event()
    backend.synchronize()

    def copy() -> None:
        backend.copy_async(target, source, stream)
        backend.record(done, stream)
        done.synchronize()

    return nbytes / _fastest(copy)


def disk_speed(folder: Path, nbytes: int) -> float:
    """Bytes per second of large reads from a folder, past the system's file cache.

    Raises:
        OSError: the folder is not writable, or the system cannot read past its cache.
    """
    if not hasattr(os, "posix_fadvise"):
        raise OSError("this system does not read past its file cache")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f".speed.{secrets.token_hex(4)}.part"
    piece = memoryview(os.urandom(_PIECE_BYTES))
    try:
        with path.open("xb", buffering=0) as file:
            for _ in range(max(1, nbytes // _PIECE_BYTES)):
                file.write(piece)
            os.fsync(file.fileno())
        with path.open("rb", buffering=0) as file:
            size = path.stat().st_size
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            started = time.perf_counter()
            buffer = bytearray(_PIECE_BYTES)
            while file.readinto(buffer):
                pass
            return size / (time.perf_counter() - started)
    finally:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def matrix_speed(backend: Backend, widths: Sequence[int]) -> float:
    """10**12 operations per second of a product of square bf16 matrices.

    Args:
        widths: of the matrices, growing; the first whose product takes 5 ms counts, or else the last.

    Raises:
        RuntimeError: the device cannot do it.
    """
    speed = 0.0
    for width in widths:
        seconds = _matrix_seconds(backend, width)
        speed = 2.0 * width**3 / seconds / 1e12
        if seconds > _MATRIX_S:
            break
    return speed


@torch.inference_mode()
def _matrix_seconds(backend: Backend, width: int) -> float:
    a = torch.ones(width, width, dtype=torch.bfloat16, device=backend.device)
    out = torch.empty_like(a)

    def multiply() -> None:
        torch.mm(a, a, out=out)
        backend.synchronize()

    multiply()  # the first call also chooses a kernel
    return _fastest(multiply)


def _fastest(run: Callable[[], None]) -> float:
    times = []
    for _ in range(_REPEATS):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return max(min(times), 1e-9)


def _tried(name: str, measure: Callable[[], float]) -> float | None:
    try:
        return measure()
    except (OSError, RuntimeError) as error:
        logger.info("%s cannot be measured, the default is used: %s", name, error)
        return None


def _figures(values: object) -> dict[str, float]:
    """What was remembered, as far as it makes sense."""
    if not isinstance(values, Mapping):
        return {}
    names = {field.name for field in fields(MachineFigures)}
    return {
        name: float(value)
        for name, value in values.items()
        if name in names and isinstance(value, int | float) and value > 0
    }


def _read(path: Path) -> dict[str, Any]:
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        logger.debug("%s cannot be read and is made anew: %s", path, error)
        return {}
    return known if isinstance(known, dict) else {}


def _write(path: Path, known: Mapping[str, Any]) -> None:
    """All or nothing; that the figures could not be remembered only costs another second next time."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        logger.info("%s could not be written: %s", path, error)
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
