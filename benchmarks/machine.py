"""The machine in words, for every file of results."""

import platform
from datetime import UTC, datetime
from typing import Any

import psutil
import torch

from diffsynth import __version__
from diffsynth.device import backend_for


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Processor, memory, accelerator and versions."""
    name = "CPU"
    if device.type != "cpu":
        name = torch.get_device_module(device.type).get_device_name(device)
    total = backend_for(device).memory().total
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "device": name,
        "device_memory_gb": None if total is None else round(total / 1e9, 1),
        "processor": platform.processor() or platform.machine(),
        "cores": psutil.cpu_count(logical=True),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffsynth": __version__,
    }
