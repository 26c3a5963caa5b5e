"""LoRA on a frozen transformer, for training."""

import difflib
import math
from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from diffsynth.errors import RequestError
from diffsynth.lora import LoraUpdate

ATTENTION_TARGETS = ("to_k", "to_q", "to_v", "to_out.0")
"""All attention projections, of both streams and between them."""


class LoraLayer(nn.Module):
    """What is added to one linear layer: ``scale * up(down(x))``; nothing at the start, as ``up`` is zero.

    The factors are float32 whatever the base computes in: steps of a learning rate of 1e-4 would be lost in
    bf16.  They are rounded to the dtype of ``x`` where they are used.

    Source: Hu et al., LoRA (arXiv 2106.09685).
    """

    def __init__(self, width_in: int, width_out: int, rank: int, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.down = nn.Parameter(torch.empty(rank, width_in, dtype=torch.float32))
        self.up = nn.Parameter(torch.zeros(width_out, rank, dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        """Args: x (..., in).  Returns: (..., out), the dtype of ``x``."""
        inner = functional.linear(x, self.down.to(x.dtype)) * self.scale  # where it is narrow
        return functional.linear(inner, self.up.to(x.dtype))


class TrainableLora:
    """Factors beside the target layers of a network, whose own weights and names stay as they are.

    The layers call them by hooks; :meth:`detach` takes the hooks away.
    """

    def __init__(
        self,
        network: nn.Module,
        targets: Sequence[str],
        *,
        rank: int,
        alpha: float,
        generator: torch.Generator,
        device: torch.device | None = None,
    ) -> None:
        """
        Args:
            network: it is frozen here.
            targets: names of linear layers, or their last parts: ``to_k`` takes every ``....to_k``,
                ``attn1.to_k`` only the one of the self-attention of the video.
            rank: of every pair of factors.
            alpha: the product counts ``alpha / rank`` times.
            generator: on the CPU; draws ``down``.
            device: of the factors; None: where each layer is.

        Raises:
            RequestError: a target that no layer answers to, or no targets.
        """
        network.requires_grad_(False)
        self.layers: dict[str, LoraLayer] = {}
        self._handles = []
        for name, base in chosen_layers(network, targets).items():
            layer = LoraLayer(base.in_features, base.out_features, rank, alpha / rank)
            # As PEFT starts them: uniform with the bound 1 / sqrt(in).
            bound = 1 / math.sqrt(base.in_features)
            with torch.no_grad():
                layer.down.copy_((torch.rand(layer.down.shape, generator=generator) * 2 - 1) * bound)
            wanted = base.weight.device if device is None else device
            self.layers[name] = layer if layer.down.device == wanted else layer.to(wanted)
            self._handles.append(base.register_forward_hook(partial(_add, self.layers[name])))

    def parameters(self) -> dict[str, nn.Parameter]:
        """By ``<layer>.down`` and ``<layer>.up``, in the order of the layers of the network."""
        return {
            f"{name}.{factor}": parameter
            for name, layer in self.layers.items()
            for factor, parameter in layer.named_parameters()
        }

    def updates(self, values: Mapping[str, Tensor] | None = None) -> dict[str, LoraUpdate]:
        """What factors do to each layer: these, or ``values`` by the names of :meth:`parameters`."""
        values = self.parameters() if values is None else values
        return {
            name: LoraUpdate(
                down=values[f"{name}.down"].detach(), up=values[f"{name}.up"].detach(), scale=layer.scale
            )
            for name, layer in self.layers.items()
        }

    def detach(self) -> None:
        """Leave the network as it was."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


def _add(layer: LoraLayer, base: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return output + layer(inputs[0])


def chosen_layers(network: nn.Module, targets: Sequence[str]) -> dict[str, nn.Linear]:
    """The linear layers that the targets mean, by name, in the order of the network.

    Raises:
        RequestError: a target that no layer answers to, or no targets.
    """
    linears = {name: m for name, m in network.named_modules() if isinstance(m, nn.Linear)}
    if not targets:
        raise RequestError("targets is empty", hint=f"targets={list(ATTENTION_TARGETS)}")
    for target in targets:
        if not any(_means(target, name) for name in linears):
            ends = {name.split(".", 2)[-1] for name in linears} | {
                name.rsplit(".", 1)[-1] for name in linears
            }
            near = difflib.get_close_matches(target, sorted(ends), n=3, cutoff=0.3)
            raise RequestError(f"no linear layer is called {target!r}", hint=", ".join(near))
    return {name: m for name, m in linears.items() if any(_means(target, name) for target in targets)}


def _means(target: str, name: str) -> bool:
    return name == target or name.endswith(f".{target}")
