"""Which entry of which block becomes which tensor of a module.

Entries bear the names that the tensors have in the module's state dict.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from diffsynth.errors import CheckpointError
from diffsynth.vram.blocks import BlockLayout, Entry, TensorSpec, Views, make_layout
from diffsynth.vram.formats import AS_IS, StorageFormat, as_is
from diffsynth.vram.linear import LinearCall, needs_decoding

TensorStore = dict[str, Tensor | None]
"""``_parameters`` or ``_buffers`` of a module."""

REST = "rest"
"""Name of the block with all that belongs to no other."""

_HINT = "clear the cache: `diffsynth cache clear`"


class Contents(NamedTuple):
    """The tensors of one block on the device, in the order of its entries."""

    values: list[Tensor]
    """The first part of each: the tensor itself unless it needs decoding."""
    parts: list[dict[str, Tensor]]
    """All parts of each by suffix."""


def contents_of(layout: BlockLayout, views: Views) -> Contents:
    """What a streamer prepares for :class:`BlockBinding`."""
    parts = [views[entry.name] for entry in layout.entries]
    return Contents([part[""] for part in parts], parts)


class BlockBinding:
    """Puts the tensors of one block into a module and takes them out again."""

    def __init__(self, module: nn.Module, name: str, layout: BlockLayout, *, decodes: bool = True) -> None:
        """Find the place of every entry.

        Args:
            module: the network.
            name: of the block.
            layout: of the block.
            decodes: whether weights of linear layers may need decoding.

        Raises:
            CheckpointError: a tensor has another shape in the module, or is stored in a format that it
                cannot be used from.
        """
        self.name = name
        self.decoded: list[tuple[int, Entry, str]] = []
        """Entries that need decoding: number, entry, name of the linear layer."""
        self._direct: list[tuple[int, TensorStore, str]] = []
        self._absent: list[Tensor] = []
        self._calls: list[tuple[int, LinearCall]] = []
        for number, entry in enumerate(layout.entries):
            owner_name, _, key = entry.name.rpartition(".")
            owner = module.get_submodule(owner_name)
            store = store_of(owner, key)
            absent = store[key]
            assert absent is not None
            if tuple(absent.shape) != entry.shape:
                raise CheckpointError(
                    f"block {name!r}: {entry.name} has shape {entry.shape}, the network needs "
                    f"{tuple(absent.shape)}",
                    hint=_HINT,
                )
            linear_weight = isinstance(owner, nn.Linear) and key == "weight"
            if decodes and linear_weight and needs_decoding(entry):
                self.decoded.append((number, entry, owner_name))
                continue
            if entry.format not in AS_IS or (linear_weight and needs_decoding(entry)):
                raise CheckpointError(
                    f"block {name!r}: {entry.name} is stored as {entry.format}, which only weights of "
                    "linear layers on the device can be",
                    hint=_HINT,
                )
            self._direct.append((number, store, key))
            self._absent.append(absent)

    def use_calls(self, calls: Mapping[str, LinearCall]) -> None:
        """Name the calls that decode this block's weights, by layer."""
        self._calls = [(number, calls[layer]) for number, _, layer in self.decoded]

    def bind(self, contents: Contents) -> None:
        """The module's tensors are those of ``contents`` until :meth:`unbind`."""
        values, parts = contents
        for number, store, key in self._direct:
            store[key] = values[number]
        for number, call in self._calls:
            call.parts = parts[number]

    def unbind(self) -> None:
        """The module's tensors are placeholders without data again."""
        for (_, store, key), absent in zip(self._direct, self._absent, strict=True):
            store[key] = absent
        for _, call in self._calls:
            call.parts = {}


def store_of(owner: nn.Module, key: str) -> TensorStore:
    """The store of ``owner`` that holds the tensor ``key``."""
    # torch types the values of one as nn.Parameter, but reads any tensor from it.
    return cast("TensorStore", owner._parameters) if key in owner._parameters else owner._buffers


def empty_module(module: nn.Module) -> None:
    """Replace all tensors of the state dict by placeholders on the meta device."""
    for name, tensor in module.state_dict(keep_vars=True).items():
        owner_name, _, key = name.rpartition(".")
        owner = module.get_submodule(owner_name)
        # Not empty_like, which imports sympy on the meta device.
        placeholder = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        if isinstance(tensor, nn.Parameter):
            owner._parameters[key] = nn.Parameter(placeholder, requires_grad=False)
        else:
            owner._buffers[key] = placeholder


def check_complete(
    module: nn.Module, layouts: Mapping[str, BlockLayout], left_out: Collection[str], blocks: Sequence[str]
) -> None:
    """Check that blocks and module hold the same tensors.

    Raises:
        CheckpointError: a tensor is missing, unknown, in two blocks, or below a block but not in it.
    """
    found = [entry.name for layout in layouts.values() for entry in layout.entries]
    wanted = set(module.state_dict()) - set(left_out)
    missing, unknown = sorted(wanted - set(found)), sorted(set(found) - wanted)
    if missing or unknown or len(found) != len(set(found)):
        raise CheckpointError(
            f"the blocks do not hold the network: missing {missing[:3]}, unknown {unknown[:3]}, "
            f"{len(found) - len(set(found))} twice",
            hint=_HINT,
        )
    for block in blocks:
        inside = {name for name in wanted if name.startswith(f"{block}.")}
        stray = sorted(inside ^ {entry.name for entry in layouts[block].entries})
        if stray:
            raise CheckpointError(f"block {block!r} and module differ in {stray[:3]}", hint=_HINT)


def module_layouts(
    module: nn.Module,
    *,
    blocks: Sequence[str] = (),
    host: Sequence[str] = (),
    left_out: Collection[str] = (),
    dtype_of: Callable[[str], torch.dtype],
    format_of: Callable[[str], StorageFormat | None],
) -> dict[str, BlockLayout]:
    """Divide a network into blocks: those named, then :data:`REST` with what is left, if anything is.

    Args:
        module: the network; its tensors may lie on the meta device.
        blocks: names of submodules in the order of use.
        host: further submodules, with blocks of their own, that stay on the host.
        left_out: tensors that belong to no block.
        dtype_of: tensor name -> dtype to compute with.
        format_of: name of a linear layer's weight -> its storage format; None: as it is.
    """
    members: dict[str, dict[str, TensorSpec]] = {name: {} for name in (*blocks, *host, REST)}
    for name, tensor in module.state_dict().items():
        if name in left_out:
            continue
        block = next((b for b in (*blocks, *host) if name.startswith(f"{b}.")), REST)
        dtype, format = dtype_of(name), None
        owner_name, _, key = name.rpartition(".")
        if key == "weight" and isinstance(module.get_submodule(owner_name), nn.Linear):
            format = format_of(name)
        members[block][name] = TensorSpec(tuple(tensor.shape), dtype, format or as_is(dtype))
    return {name: make_layout(specs) for name, specs in members.items() if specs}
