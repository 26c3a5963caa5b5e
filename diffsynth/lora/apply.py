"""LoRAs beside their layers: ``y = W x + b + strength * scale * (x A^T) B^T``, with nothing written into W.

Forward hooks add the update to the output of each linear layer, so the base weights may live anywhere, in any
storage format, and may be swapped between calls; removing a LoRA restores the base bit for bit.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

from diffsynth.errors import CheckpointError, RequestError
from diffsynth.lora.file import Lora, LoraReport
from diffsynth.lora.fuse import LoraUpdate, WeightedUpdates


@dataclass(frozen=True, slots=True, eq=False)
class LoraHandle:
    """Names one LoRA of one :class:`LoraStack`; equal to itself only."""

    number: int
    report: LoraReport
    """Keys of the file that matched, and those that did not."""

    @property
    def source(self) -> str:
        """Name of the file."""
        return self.report.source


class LoraStack:
    """The LoRAs that are active on one module; the order of adding is the order of summing.

    The outputs of the layers, which are fresh tensors, are changed in place.  Factors are copied to the
    device and dtype of a layer's output when the layer first runs, and stay there until the LoRA is removed.
    ``max_cached_bytes`` bounds those copies: layers beyond it copy their factors anew at each call, which
    trades time for memory with LoRAs of a high rank.

    With ``hooked=False`` the stack only keeps the books, for a memory manager that brings the factors of
    :meth:`updates` to the device with the weights and applies them there by the same arithmetic.
    """

    def __init__(
        self, module: nn.Module, *, max_cached_bytes: int | None = None, hooked: bool = True
    ) -> None:
        self.module = module
        self._hooked = hooked
        self._cache = _CacheBudget(max_cached_bytes)
        self._layers: dict[str, _LayerHook] = {}
        self._active: dict[LoraHandle, tuple[Lora, float]] = {}
        self._next_number = 0

    def __len__(self) -> int:
        return len(self._active)

    @property
    def active(self) -> dict[LoraHandle, float]:
        """Handles and strengths, in the order of adding."""
        return {handle: strength for handle, (_, strength) in self._active.items()}

    @property
    def loras(self) -> list[Lora]:
        """In the order of adding."""
        return [lora for lora, _ in self._active.values()]

    @property
    def ranks(self) -> list[int]:
        """The largest rank of every LoRA, in the order of adding."""
        return [lora.report.rank for lora, _ in self._active.values()]

    def updates(self, layer: str) -> WeightedUpdates:
        """The updates of one layer with their strengths, for callers that fuse them."""
        loras = self._active.values()
        return [(lora.updates[layer], strength) for lora, strength in loras if layer in lora.updates]

    def add(self, lora: Lora, strength: float = 1.0) -> LoraHandle:
        """Activate a LoRA.

        Raises:
            RequestError: ``strength`` is not a finite number.
            CheckpointError: a layer of the LoRA does not exist in the module; nothing is added then.
        """
        _check_strength(strength)
        layers = dict(self.module.named_modules())
        missing = [name for name in lora.updates if name not in layers]
        if missing:
            raise CheckpointError(
                f"{lora.report.source} was read for another model: no layer {missing[0]} here",
                hint="read the file again for this model",
            )
        handle = LoraHandle(self._next_number, lora.report)
        self._next_number += 1
        self._active[handle] = (lora, strength)
        for name, update in lora.updates.items() if self._hooked else ():
            if name not in self._layers:
                self._layers[name] = _LayerHook(layers[name], self._cache)
            self._layers[name].entries[handle] = _Entry(update, strength)
        return handle

    def set_strength(self, handle: LoraHandle, strength: float) -> None:
        """Change a strength; 0 switches the LoRA off exactly.

        Raises:
            RequestError: ``strength`` is not a finite number, or the LoRA is not active.
        """
        _check_strength(strength)
        lora = self._lora(handle)
        self._active[handle] = (lora, strength)
        for name in lora.updates if self._hooked else ():
            self._layers[name].entries[handle].strength = strength

    def remove(self, handle: LoraHandle) -> None:
        """Deactivate a LoRA, drop its copies and take the hooks of layers off that have no other.

        Raises:
            RequestError: the LoRA is not active.
        """
        lora = self._lora(handle)
        del self._active[handle]
        for name in lora.updates if self._hooked else ():
            layer = self._layers[name]
            layer.drop(handle)
            if not layer.entries:
                layer.detach()
                del self._layers[name]

    def clear(self) -> None:
        """Remove all LoRAs."""
        for handle in list(self._active):
            self.remove(handle)

    def _lora(self, handle: LoraHandle) -> Lora:
        if handle not in self._active:
            raise RequestError(
                f"{handle.source} is not active here", hint="a handle of load_lora, not removed since"
            )
        return self._active[handle][0]

    @contextmanager
    def scoped(self, lora: Lora, strength: float = 1.0) -> Iterator[LoraHandle]:
        """A LoRA for the length of a ``with`` block, gone after it whatever happens inside."""
        handle = self.add(lora, strength)
        try:
            yield handle
        finally:
            if handle in self._active:
                self.remove(handle)


def linear_shapes(module: nn.Module) -> dict[str, tuple[int, int]]:
    """Name -> (out, in) of every linear layer below ``module``, quantised stand-ins for one included.

    Args of :func:`diffsynth.lora.file.read_lora`: the names are its targets, the values its shapes.
    """
    found: dict[str, tuple[int, int]] = {}
    for name, layer in module.named_modules():
        width_in, width_out = getattr(layer, "in_features", None), getattr(layer, "out_features", None)
        if name and isinstance(width_in, int) and isinstance(width_out, int):
            found[name] = (width_out, width_in)
    return found


class _CacheBudget:
    """Bytes that the cached copies of one stack may take, None for any number."""

    def __init__(self, limit: int | None) -> None:
        self._limit = limit
        self._used = 0

    def take(self, amount: int) -> bool:
        if self._limit is not None and self._used + amount > self._limit:
            return False
        self._used += amount
        return True

    def give_back(self, amount: int) -> None:
        self._used -= amount


@dataclass(slots=True)
class _Entry:
    update: LoraUpdate
    strength: float
    placed: LoraUpdate | None = None
    """The update in the device and dtype of the last output, if it was kept."""
    placed_bytes: int = 0


class _LayerHook:
    """The forward hook of one linear layer and the LoRAs that it adds."""

    def __init__(self, layer: nn.Module, budget: _CacheBudget) -> None:
        self.entries: dict[LoraHandle, _Entry] = {}
        self._budget = budget
        self._removable: RemovableHandle = layer.register_forward_hook(self)

    def __call__(self, layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        # The output is fresh, and the largest activation of a block: the updates are added in place.
        output = output.contiguous()
        rows = output.view(-1, output.shape[-1])
        inputs = args[0].to(output.dtype).reshape(-1, args[0].shape[-1])
        for entry in self.entries.values():
            if entry.strength != 0:
                _add(rows, inputs, self._placed(entry, output), entry.strength)
        return output

    def _placed(self, entry: _Entry, output: Tensor) -> LoraUpdate:
        if entry.placed is not None:
            if all(t.device == output.device and t.dtype == output.dtype for t in _tensors(entry.placed)):
                return entry.placed
            self._forget(entry)
        placed = _move(entry.update, output)
        # A tensor that is in place already was not copied and costs nothing.
        pairs = zip(_tensors(placed), _tensors(entry.update), strict=True)
        cost = sum(new.numel() * new.element_size() for new, old in pairs if new is not old)
        if self._budget.take(cost):
            entry.placed, entry.placed_bytes = placed, cost
        return placed

    def _forget(self, entry: _Entry) -> None:
        self._budget.give_back(entry.placed_bytes)
        entry.placed, entry.placed_bytes = None, 0

    def drop(self, handle: LoraHandle) -> None:
        self._forget(self.entries.pop(handle))

    def detach(self) -> None:
        self._removable.remove()


def _add(rows: Tensor, inputs: Tensor, update: LoraUpdate, strength: float) -> None:
    """Add one update to the outputs (T, out) of the inputs (T, in), in place."""
    if update.down is not None and update.up is not None:
        rows.addmm_(functional.linear(inputs, update.down), update.up.t(), alpha=strength * update.scale)
    if update.weight_diff is not None:
        rows.addmm_(inputs, update.weight_diff.t(), alpha=strength)
    if update.bias_diff is not None:
        rows.add_(update.bias_diff, alpha=strength)


def _tensors(update: LoraUpdate) -> list[Tensor]:
    members = (update.down, update.up, update.weight_diff, update.bias_diff)
    return [tensor for tensor in members if tensor is not None]


def _move(update: LoraUpdate, output: Tensor) -> LoraUpdate:
    def to(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(output.device, output.dtype, non_blocking=True)

    return LoraUpdate(
        down=to(update.down),
        up=to(update.up),
        scale=update.scale,
        weight_diff=to(update.weight_diff),
        bias_diff=to(update.bias_diff),
    )


def _check_strength(strength: float) -> None:
    if isinstance(strength, bool) or not isinstance(strength, int | float) or not math.isfinite(strength):
        raise RequestError(f"LoRA strength {strength!r} is not a finite number", hint="a number around 1")
