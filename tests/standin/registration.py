"""Makes torch know the device type ``standin``: once per process, on the first stand-in.

torch has one spare device type for backends written in Python; it gets the name.  Operations on tensors of
the stand-in arrive through the tensors' own dispatch; those that have none yet are registered here.
"""

import functools
from typing import Any

import torch
from torch.utils import backend_registration

from tests.standin.operations import CONVERSIONS, FACTORIES, WHOLE
from tests.standin.tensor import DEVICE_TYPE


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
    from tests.standin.gradients import call_whole

    def kernel(func: Any, *args: Any, **kwargs: Any) -> Any:
        return dispatch(func, args, kwargs)

    def whole(func: Any, *args: Any, **kwargs: Any) -> Any:
        return call_whole(func, args, kwargs)

    library = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]
    ways = ((FACTORIES + CONVERSIONS, "PrivateUse1", kernel), (WHOLE, "AutogradPrivateUse1", whole))
    for names, key, way in ways:
        for full_name in names:
            name, _, overload = full_name.partition(".")
            func = getattr(getattr(torch.ops.aten, name), overload or "default")
            library.impl(full_name, functools.partial(way, func), key)  # type: ignore[no-untyped-call]
    return library
