"""What a storage format costs in precision, measured on weights."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffsynth.vram.formats import StorageFormat, decode, effective_format, encode, stored_bytes

_SAMPLES = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class FormatError:
    """How far one weight in one storage format is from the original; errors are relative RMS, 0.01 = 1 %."""

    name: str
    shape: tuple[int, ...]
    format: StorageFormat
    """The one that is used, which may differ from the one asked for: :func:`effective_format`."""
    stored_bytes: int
    weight_error: float
    output_error: float


def relative_error(weight: Tensor, format: StorageFormat) -> float:
    """RMS of what storing changes over RMS of the weight; 0 for a weight of zeros."""
    return _ratio(_stored_float32(weight, format).sub_(weight.float()), weight.float())


def format_report(
    tensors: Iterable[tuple[str, Tensor]], formats: Sequence[StorageFormat], *, seed: int = 0
) -> Iterator[FormatError]:
    """Measure every format on every 2-D tensor; others are passed over, since they are never quantised.

    Args:
        tensors: name and weight (out, in) of linear layers, one after another.
        formats: what to measure.
        seed: of the 64 inputs with independent unit Gaussian entries by which the output error is measured.
    """
    for name, weight in tensors:
        if weight.ndim != 2 or weight.numel() == 0:
            continue
        original = weight.float()
        inputs = torch.randn(_SAMPLES, weight.shape[1], generator=torch.Generator().manual_seed(seed))
        outputs = inputs @ original.T
        for wanted in formats:
            format = effective_format(wanted, weight.shape)
            change = _stored_float32(weight, format, name).sub_(original)
            yield FormatError(
                name=name,
                shape=tuple(weight.shape),
                format=format,
                stored_bytes=stored_bytes(format, weight.shape),
                weight_error=_ratio(change, original),
                output_error=_ratio(inputs @ change.T, outputs),
            )


def _stored_float32(weight: Tensor, format: StorageFormat, name: str = "weight") -> Tensor:
    stored = encode(weight, format, name=name)
    return decode(stored, format, weight.shape, torch.float32, out=torch.empty(weight.shape))


def _ratio(change: Tensor, original: Tensor) -> float:
    norm = float(torch.linalg.vector_norm(original))
    return float(torch.linalg.vector_norm(change)) / norm if norm else 0.0
