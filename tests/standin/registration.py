"""Makes torch know the device type ``standin``.  Once per process, on the first stand-in; nothing else changes.

torch has one spare device type for backends written in Python; it gets the name.  Operations on tensors of
the stand-in arrive through the tensors' own dispatch; those that have none yet are registered here.
"""

import functools
from typing import Any

import torch
from torch.utils import backend_registration

from tests.standin.tensor import DEVICE_TYPE

# Undivided on real devices, but cut into pieces by torch when autograd is not switched off altogether
# (``no_grad`` instead of ``inference_mode``); the pieces would round and use memory differently.
_WHOLE = ("scaled_dot_product_attention", "linear", "matmul", "rms_norm")

# Factory functions, which have no tensor to dispatch on.  torch composes the other ones of these.
_FACTORIES = (
    "empty.memory_format",
    "empty_strided",
    "arange",
    "arange.start",
    "arange.start_step",
    "eye",
    "eye.m",
)

# What ``torch.tensor(data, device=...)`` and indexing by lists fill the new tensor with.
_CONVERSIONS = ("_copy_from",)


class _Module:
    """What torch looks for under ``torch.standin``."""

    def is_available(self) -> bool:
        return _is_open()

    def is_initialized(self) -> bool:
        return True

    def device_count(self) -> int:
        return int(_is_open())

    def current_device(self) -> int:
        return 0

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        """The device has no generator of its own."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        from tests.standin.device import StandIn

        narrow = [torch.float16, torch.bfloat16]
        return narrow if StandIn.current().strict_dtypes else [*narrow, torch.float32]


def _is_open() -> bool:
    from tests.standin.device import StandIn

    return StandIn.is_open()


class _Hooks(backend_registration._DummyPrivateUse1Hook):
    def is_available(self) -> bool:
        return _is_open()


@functools.cache
def register_once() -> torch.library.Library:
    """Register; the library lives as long as the process."""
    backend_registration._setup_privateuseone_for_python_backend(
        DEVICE_TYPE, backend_module=_Module(), hook=_Hooks()
    )
    from tests.standin.dispatch import dispatch

    def kernel(func: Any, *args: Any, **kwargs: Any) -> Any:
        return dispatch(func, args, kwargs)

    library = torch.library.Library("aten", "IMPL")
    for names, key in ((_FACTORIES + _CONVERSIONS, "PrivateUse1"), (_WHOLE, "AutogradPrivateUse1")):
        for full_name in names:
            name, _, overload = full_name.partition(".")
            func = getattr(getattr(torch.ops.aten, name), overload or "default")
            library.impl(full_name, functools.partial(kernel, func), key)
    return library
