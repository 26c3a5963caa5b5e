"""How much memory a computation needs, without doing it: its operations run on tensors that hold no data.

Every operation reports the shapes of its results, so the peak of live bytes comes out exactly for the graph
that will run, at any size, in milliseconds.  What an operation allocates inside itself (workspaces of
convolution libraries, allocator rounding) is not seen; callers add a margin for it.
"""

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map_only

from diffsynth.vram.binding import store_of

ResultT = TypeVar("ResultT")


@dataclass
class LiveBytes:
    """Bytes of the storages that are alive, now and at most."""

    now: int = 0
    peak: int = 0
    _known: set[int] = field(default_factory=set)

    def add(self, tensor: Tensor) -> None:
        """Count the storage of a tensor until it dies; views of a known storage cost nothing."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        self._known.add(key)
        size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._release, key, size)

    def _release(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


class _Counting(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, live: LiveBytes) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = live

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_iter(result):
            if isinstance(leaf, Tensor):
                self.live.add(leaf)
        return result


def peak_bytes(run: Callable[..., Any], *arguments: Any, gradients: bool = False) -> int:
    """The most bytes that a computation holds beside its weights.

    Args:
        run: what to compute, for instance a module's ``forward`` or a function over modules; modules it uses
            must have been made without data (:func:`without_data`).
        arguments: its inputs as tensors of any device (only shape and dtype count, meta tensors will do), or
            containers of such; they count as held from start to end.
        gradients: whether operations are recorded, so that ``run`` can go backward.

    Returns:
        Bytes of inputs, intermediates and outputs at the worst moment.
    """
    live = LiveBytes()
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with torch.inference_mode(not gradients), torch.set_grad_enabled(gradients), mode:
        inputs = tree_map_only(Tensor, lambda t: torch.empty(t.shape, dtype=t.dtype), arguments)
        for leaf in tree_iter(inputs):
            if isinstance(leaf, Tensor):
                live.add(leaf)
        with _Counting(live):
            kept = run(*inputs)
    del kept
    return live.peak


def without_data(module: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Give every parameter and buffer of a module the shape it has and no data, in place.

    Args:
        module: usually one that was built on the meta device.
        dtype: of all floating tensors; theirs if None.
    """
    with FakeTensorMode():
        for part in module.modules():
            for name, tensor in [*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)]:
                wanted = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
                store_of(part, name)[name] = torch.empty(tensor.shape, dtype=wanted)
    return module
