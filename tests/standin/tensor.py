"""Tensors of the stand-in: a CPU tensor inside, the device ``standin:0`` outside."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tests.standin.errors import UnsupportedOnDeviceError
from tests.standin.streams import Span

if TYPE_CHECKING:
    from tests.standin.device import StandIn
    from tests.standin.memory import Allocation

DEVICE_TYPE = "standin"


class StandInTensor(Tensor):
    """What a program sees as a tensor on the device.  Made by the stand-in only."""

    inside: Tensor
    allocation: "Allocation"
    owner: "StandIn"

    @staticmethod
    def wrap(inner: Tensor, label: str, owner: "StandIn") -> "StandInTensor":
        """Give ``inner`` the device; counts its storage when it is new, under the name ``label``.

        Raises:
            torch.OutOfMemoryError: the storage does not fit.
            UnsupportedOnDeviceError: the device lacks the dtype.
        """
        owner.check_dtype(inner.dtype, label)
        allocation = owner.memory.adopt(inner, label)
        # As in torch, a view of an ordinary tensor stays ordinary even under inference mode.
        with torch.inference_mode(inner.is_inference()):
            outer: StandInTensor = Tensor._make_wrapper_subclass(
                StandInTensor,
                inner.shape,
                strides=inner.stride(),
                storage_offset=inner.storage_offset(),
                dtype=inner.dtype,
                device=torch.device(DEVICE_TYPE, 0),
                requires_grad=False,
            )
        outer.inside = inner
        outer.allocation = allocation
        outer.owner = owner
        return outer

    def span(self, write: bool) -> Span:
        """The bytes of the storage from the first to the last element."""
        if self.inside.numel() == 0:
            return Span(0, 0, write)
        size = self.inside.element_size()
        low = int(self.inside.storage_offset())
        high = low + sum((n - 1) * s for n, s in zip(self.inside.shape, self.inside.stride(), strict=True))
        return Span(low * size, (high + 1) * size, write)

    # torch's own attributes, answered from the tensor inside

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        from tests.standin.dispatch import dispatch

        return dispatch(func, args, kwargs or {})

    @property
    def data(self) -> Tensor:
        """The tensor without its history; setting it replaces the contents, as ``module.to(dtype)`` does."""
        return self.detach()

    @data.setter
    def data(self, other: Tensor) -> None:
        if not isinstance(other, StandInTensor):
            raise UnsupportedOnDeviceError("the data of a device tensor cannot become a host tensor")
        Tensor.data.__set__(self, other)  # type: ignore[attr-defined]
        self.inside, self.allocation = other.inside, other.allocation

    def data_ptr(self) -> int:
        """An address to tell tensors apart; the host cannot read there on a device."""
        return self.inside.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        """The storage, for identity and size; its bytes are beyond the checks of the stand-in."""
        return self.inside.untyped_storage()

    def is_pinned(self, device: Any = None) -> bool:
        """Device memory is not page-locked host memory."""
        return False

    def tolist(self) -> Any:
        """The values; torch refuses this for tensors of a class of their own."""
        return self.cpu().tolist()

    def __format__(self, spec: str) -> str:
        return format(self.item(), spec) if self.dim() == 0 else repr(self)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"StandInTensor(shape={tuple(self.shape)}, dtype={self.dtype}, {self.allocation.label!r})"
