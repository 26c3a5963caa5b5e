"""Linear layers whose weights are decoded right before use, and to which adapters are added.

A layer stays the same object: hooks on it, its name and its sizes are untouched.  Only its ``forward`` is
replaced on the instance, for as long as the memory manager needs it.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

from diffsynth.device import Backend
from diffsynth.vram.blocks import Entry
from diffsynth.vram.formats import AS_IS, FLOAT8_DTYPES, decode, float8_table

Decode: TypeAlias = Callable[[Mapping[str, Tensor]], Tensor]
"""Stored parts by suffix -> the weight, valid until the next weight is decoded."""


def needs_decoding(entry: Entry) -> bool:
    """Whether the stored tensor is another than the one to compute with."""
    return AS_IS.get(entry.format) != entry.dtype


def decoded_bytes(entry: Entry) -> int:
    """Bytes that the entry takes in the scratch buffer; 0 when it is used as it is stored."""
    return math.prod(entry.shape) * entry.dtype.itemsize if needs_decoding(entry) else 0


class Decoder:
    """One scratch buffer for all decoded weights of a network, and the tables for float8.

    Only one weight lies decoded at a time; operations on one stream follow one another, so the next weight
    is written when the product with the last one is done.
    """

    def __init__(self, backend: Backend, nbytes: int, *, label: str = "decoded weight") -> None:
        """Allocate ``nbytes``, the largest of :func:`decoded_bytes`."""
        self._capabilities = backend.capabilities
        self._device = backend.device
        self._targets: dict[tuple[torch.dtype, tuple[int, ...]], Tensor] = {}
        self._tables: dict[tuple[torch.dtype, torch.dtype], Tensor] = {}
        self._scratch = backend.empty(nbytes, label=label) if nbytes else None

    @property
    def device_bytes(self) -> int:
        """Device memory held now."""
        tables = sum(table.nbytes for table in self._tables.values())
        return tables + (0 if self._scratch is None else self._scratch.numel())

    def bind(self, entry: Entry) -> Decode:
        """What decodes the parts of ``entry``, without an allocation of its size."""
        return partial(
            decode,
            format=entry.format,
            shape=entry.shape,
            dtype=entry.dtype,
            out=self._target(entry),
            float8_cast=self._capabilities.float8_cast,
            table=self._table(entry),
        )

    def _target(self, entry: Entry) -> Tensor:
        key = entry.dtype, entry.shape
        if key not in self._targets:
            assert self._scratch is not None, "the buffer was made for this entry"
            flat = self._scratch[: decoded_bytes(entry)]
            self._targets[key] = flat.view(entry.dtype).view(entry.shape)
        return self._targets[key]

    def _table(self, entry: Entry) -> Tensor | None:
        stored = entry.parts[0].dtype
        if stored not in FLOAT8_DTYPES or self._capabilities.float8_cast:
            return None
        if (stored, entry.dtype) not in self._tables:
            self._tables[stored, entry.dtype] = float8_table(entry.format, entry.dtype, self._device)
        return self._tables[stored, entry.dtype]


class PlacedAdapter(NamedTuple):
    """One adapter of one layer on the device, ready for the product: see :class:`~.adapters.Adapter`."""

    scale: float
    down: Tensor | None
    up_transposed: Tensor | None
    weight_diff_transposed: Tensor | None
    bias_diff: Tensor | None

    def add_to(self, rows: Tensor, inputs: Tensor) -> None:
        """Add the update to the outputs (T, out) of the inputs (T, in), in place."""
        if self.down is not None and self.up_transposed is not None:
            rows.addmm_(functional.linear(inputs, self.down), self.up_transposed, alpha=self.scale)
        if self.weight_diff_transposed is not None:
            rows.addmm_(inputs, self.weight_diff_transposed, alpha=self.scale)
        if self.bias_diff is not None:
            rows.add_(self.bias_diff, alpha=self.scale)


class LinearCall:
    """The ``forward`` of one managed layer.

    ``decode`` is None when the weight is used as it is stored, and then found where ``nn.Linear`` has it.
    """

    def __init__(self, linear: nn.Linear) -> None:
        self._linear = linear
        self._tensors = linear._parameters
        self.decode: Decode | None = None
        self.parts: Mapping[str, Tensor] = {}
        self.adapters: Sequence[PlacedAdapter] = ()

    def install(self) -> None:
        """Take the place of the layer's own ``forward``."""
        self._linear.__dict__["forward"] = self

    def uninstall(self) -> None:
        """Give the layer its own ``forward`` back."""
        self._linear.__dict__.pop("forward", None)

    def __call__(self, x: Tensor) -> Tensor:
        """``x W^T + b`` and the adapters; x (..., in), returns (..., out)."""
        if self.decode is not None and torch.is_grad_enabled() and x.requires_grad:
            output: Tensor = _DecodedProduct.apply(x, self)  # type: ignore[no-untyped-call]
        else:
            output = self.product(x)
        if self.adapters:
            # The output is fresh, and the largest activation of a block: the updates are added in place.
            output = output.contiguous()
            rows = output.view(-1, output.shape[-1])
            inputs = x.to(output.dtype).reshape(-1, x.shape[-1])
            for adapter in self.adapters:
                adapter.add_to(rows, inputs)
        return output

    def weight(self) -> Tensor:
        """(out, in), decoded now if it needs that."""
        weight = self._tensors["weight"] if self.decode is None else self.decode(self.parts)
        assert weight is not None
        return weight

    def product(self, x: Tensor) -> Tensor:
        """``x W^T + b``; x (..., in), returns (..., out)."""
        weight = self.weight()
        bias: Tensor | None = self._tensors["bias"]
        if bias is not None and bias.dtype != weight.dtype:
            bias = bias.to(weight.dtype)
        return functional.linear(x, weight, bias)


class _DecodedProduct(torch.autograd.Function):
    """The product of a :class:`LinearCall` with a gradient for the inputs; the weight has none.

    The buffer that the weight was decoded into holds other weights by then, so backward decodes it again.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, call: LinearCall) -> Tensor:
        ctx.call = call
        return call.product(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (grad,) = grads
        return grad @ ctx.call.weight(), None
