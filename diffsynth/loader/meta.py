"""Networks without weights."""

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


@contextmanager
def without_weights() -> Iterator[None]:
    """Modules that are built inside lie on the meta device: names, shapes and dtypes, and no values."""
    collecting = gc.isenabled()
    gc.disable()  # all of the many objects stay: to search them again and again takes half of the time
    try:
        with torch.device("meta"), _NoInitialValues():
            yield
    finally:
        if collecting:
            gc.enable()


class _NoInitialValues(TorchFunctionMode):
    """New layers draw no initial values: on the meta device that imports a compiler, which takes seconds."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"]
        return func(*args, **kwargs)
