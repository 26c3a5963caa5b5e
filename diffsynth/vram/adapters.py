"""Adapters (LoRA factors) that travel with the blocks whose layers they change."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from diffsynth.errors import CheckpointError
from diffsynth.vram.blocks import BlockLayout, TensorSpec, Views, make_layout
from diffsynth.vram.formats import as_is
from diffsynth.vram.linear import PlacedAdapter


class Adapter(NamedTuple):
    """What is added to one linear layer: ``y += scale * ((x down^T) up^T + x weight_diff^T + bias_diff)``.

    ``down`` (rank, in) and ``up`` (out, rank) come together or not at all; ``weight_diff`` is (out, in),
    ``bias_diff`` (out,).  ``scale`` includes the strength; with 0 nothing is added, exactly.
    """

    down: Tensor | None
    up: Tensor | None
    scale: float
    weight_diff: Tensor | None = None
    bias_diff: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that are there, by the names of the fields."""
        found = {
            "down": self.down,
            "up": self.up,
            "weight_diff": self.weight_diff,
            "bias_diff": self.bias_diff,
        }
        return {field: tensor for field, tensor in found.items() if tensor is not None}


class Adapters:
    """The adapters of a network, divided into blocks.

    Entries are named ``{layer}:{number}:{field}``; factors are stored in the dtype of the layer.
    """

    def __init__(
        self,
        given: Mapping[str, Sequence[Adapter]],
        places: Mapping[str, tuple[str, torch.dtype]],
        blocks: Sequence[str],
    ) -> None:
        """Lay the blocks out.

        Args:
            given: adapters by layer, in the order in which they are added.
            places: by layer its block and the dtype that it computes in.
            blocks: all blocks in the order of use.
        """
        self.tensors: dict[str, Tensor] = {}
        self._used: dict[str, dict[str, list[tuple[Adapter, dict[str, int]]]]] = {b: {} for b in blocks}
        specs: dict[str, dict[str, TensorSpec]] = {block: {} for block in blocks}
        for layer, adapters in given.items():
            block, dtype = places[layer]
            for number, adapter in enumerate(adapters):
                if adapter.scale == 0:
                    continue
                entries = {}
                for field, tensor in adapter.tensors().items():
                    name = f"{layer}:{number}:{field}"
                    entries[field] = len(specs[block])
                    specs[block][name] = TensorSpec(tuple(tensor.shape), dtype, as_is(dtype))
                    self.tensors[name] = tensor
                self._used[block].setdefault(layer, []).append((adapter, entries))
        self.layouts: dict[str, BlockLayout] = {b: make_layout(s) for b, s in specs.items() if s}
        """By block, in the order of use; blocks without adapters have none."""

    def layers(self) -> list[str]:
        """Layers to which something is added."""
        return [layer for used in self._used.values() for layer in used]

    def placed(self, block: str, tensors: Sequence[Tensor]) -> list[tuple[str, list[PlacedAdapter]]]:
        """Layer and adapters of one block, from its tensors on the device in the order of the entries."""
        return [
            (layer, [_placed(adapter.scale, entries, tensors) for adapter, entries in used])
            for layer, used in self._used[block].items()
        ]


class AdapterContents:
    """One block of adapters on the device; what the layers of each block see is made once per slot."""

    def __init__(self, layout: BlockLayout, views: Views) -> None:
        self._tensors = [views[entry.name][""] for entry in layout.entries]
        self._placed: dict[str, list[tuple[str, list[PlacedAdapter]]]] = {}

    def of(self, block: str, adapters: Adapters) -> list[tuple[str, list[PlacedAdapter]]]:
        """See :meth:`Adapters.placed`."""
        if block not in self._placed:
            self._placed[block] = adapters.placed(block, self._tensors)
        return self._placed[block]


def check_adapters(linear: nn.Module | None, layer: str, adapters: Sequence[Adapter]) -> None:
    """Check that adapters fit the layer that they name.

    Raises:
        CheckpointError: there is no such linear layer, or shapes do not fit it.
    """
    if not isinstance(linear, nn.Linear):
        raise CheckpointError(
            f"an adapter is made for another network: no linear layer {layer} here",
            hint="use an adapter of this model",
        )
    width_in, width_out = linear.in_features, linear.out_features
    for adapter in adapters:
        shapes = {name: tuple(tensor.shape) for name, tensor in adapter.tensors().items()}
        rank = shapes.get("down", (0,))[0]
        fitting = {
            "down": (rank, width_in),
            "up": (width_out, rank),
            "weight_diff": (width_out, width_in),
            "bias_diff": (width_out,),
        }
        if ("down" in shapes) != ("up" in shapes) or any(fitting[n] != s for n, s in shapes.items()):
            raise CheckpointError(
                f"{layer} maps {width_in} to {width_out}, its adapter has the shapes {shapes}",
                hint="use an adapter of this model",
            )


def _placed(scale: float, entries: Mapping[str, int], tensors: Sequence[Tensor]) -> PlacedAdapter:
    found = {field: tensors[number] for field, number in entries.items()}
    up, weight_diff = found.get("up"), found.get("weight_diff")
    return PlacedAdapter(
        scale,
        found.get("down"),
        None if up is None else up.t(),
        None if weight_diff is None else weight_diff.t(),
        found.get("bias_diff"),
    )
