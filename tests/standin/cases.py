"""Golden cases on any device: what a runner computes there, to be compared bit by bit with the CPU."""

from importlib import import_module
from pathlib import Path

import torch
from torch import Tensor

from tests.runners.case import Case, Tolerance
from tests.runners.registry import RUNNERS


class RecordingCase(Case):
    """A case whose tensors lie on a device, and that keeps what it is asked to compare."""

    recorded: dict[str, Tensor]

    @classmethod
    def on(cls, path: Path, device: torch.device) -> "RecordingCase":
        """Every tensor moves to ``device``, but float64 positions and sigmas: those live on the host.

        All are copies of their own, also on the CPU: its matrix products depend on how memory is aligned.
        """
        case = cls.load(path)
        assert isinstance(case, RecordingCase)
        case.recorded = {}
        for key, tensor in case.tensors.items():
            if tensor.dtype != torch.float64:
                case.tensors[key] = tensor.to(device, copy=True)
        return case

    def compare(
        self, name: str, actual: Tensor, expected: Tensor, tolerance: Tolerance | None = None
    ) -> None:
        """Keep ``actual`` instead of comparing it."""
        self.recorded[name] = actual.detach().cpu().clone()


def computed_on(path: Path, device: torch.device) -> dict[str, Tensor]:
    """Everything that the case's runner compares, computed on ``device``."""
    case = RecordingCase.on(path, device)
    module, _, function = RUNNERS[case.component].partition(":")
    with torch.inference_mode():
        getattr(import_module(f"tests.runners.{module}"), function)(case)
    return case.recorded


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal in shape, dtype and every bit; NaNs of one pattern are equal."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
