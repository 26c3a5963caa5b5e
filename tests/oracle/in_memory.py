"""What the official networks made, as a golden case that lies in no file."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from tests.runners.case import Case


def compare(
    runner: Callable[[Case], None], stated: Mapping[str, Any], tensors: Mapping[str, Tensor], tolerance: float
) -> None:
    """Run a component's runner on metadata and tensors, absolute and relative tolerance alike."""
    meta = {**stated, "tolerance": {"atol": tolerance, "rtol": tolerance}}
    case = Case(Path("in memory"), meta, {key: tensor.clone() for key, tensor in tensors.items()})
    runner(case)
    case.finish()
