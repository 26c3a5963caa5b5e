"""Muon for matrices and kernels, AdamW for the rest, and what goes with them: schedule, running average.

A kernel (out, in, ...) counts as the matrix (out, in * ...).  Matrices of one shape are orthogonalised
together, so a step launches few device kernels however many layers a network has.

Source: K. Jordan et al., "Muon: an optimizer for hidden layers in neural networks" (2024); the scale of the
update from J. Liu et al., "Muon is scalable for LLM training" (2025).
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5


class MuonAdamW:
    """One optimiser for a whole network; keeps float32 masters of parameters in narrower dtypes."""

    def __init__(
        self,
        parameters: Iterable[tuple[str, nn.Parameter]],
        *,
        lr: float,
        adamw_lr: float | None = None,
        weight_decay: float = 0.0,
        adamw_names: Iterable[str] = (),
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.99),
    ) -> None:
        """Sort the parameters by how they are trained.

        Args:
            parameters: as ``module.named_parameters()`` gives them; those without gradients are left out.
            lr: length of an update of Muon, relative to that of AdamW.
            adamw_lr: of the parameters that AdamW trains; None means ``lr``.
            weight_decay: decoupled, of what Muon trains.
            adamw_names: whose name contains one of these goes to AdamW (embeddings, last layers), as does
                everything of one dimension.
            momentum: of Muon, Nesterov.
            betas: of AdamW.
        """
        self.lr, self.adamw_lr = lr, lr if adamw_lr is None else adamw_lr
        self.weight_decay, self.momentum = weight_decay, momentum
        self._parameters = [(name, p) for name, p in parameters if p.requires_grad]
        # A detached view of a float32 parameter shares its memory: no copy, and nothing to write back.
        self._masters = [p.detach().float() for _, p in self._parameters]
        self._shapes: dict[tuple[int, int], list[int]] = {}
        self._rest: list[int] = []
        fragments = tuple(adamw_names)
        for index, (name, p) in enumerate(self._parameters):
            if p.ndim < 2 or any(fragment in name for fragment in fragments):
                self._rest.append(index)
            else:
                self._shapes.setdefault((len(p), p[0].numel()), []).append(index)
        self._momenta: dict[tuple[int, int], Tensor] = {}
        self._adamw = self._make_adamw(betas) if self._rest else None

    def _make_adamw(self, betas: tuple[float, float]) -> torch.optim.AdamW:
        parameters = [nn.Parameter(self._masters[index]) for index in self._rest]
        return torch.optim.AdamW(parameters, lr=self.adamw_lr, betas=betas, weight_decay=0.0)

    @torch.no_grad()
    def step(self, scale: float = 1.0) -> None:
        """Update every parameter that has a gradient and drop the gradients.

        Args:
            scale: of both learning rates, as :func:`learning_rate_scale` gives it.
        """
        for shape, indices in self._shapes.items():
            self._muon(shape, indices, scale * self.lr)
        if self._adamw is not None:
            group = self._adamw.param_groups[0]
            group["lr"] = scale * self.adamw_lr
            for index, parameter in zip(self._rest, group["params"], strict=True):
                gradient = self._parameters[index][1].grad
                parameter.grad = None if gradient is None else gradient.float()
            self._adamw.step()
        narrow = [i for i, (_, p) in enumerate(self._parameters) if p.dtype != torch.float32]
        if narrow:
            torch._foreach_copy_([self._parameters[i][1] for i in narrow], [self._masters[i] for i in narrow])
        for _, parameter in self._parameters:
            parameter.grad = None

    def state_dict(self) -> dict[str, Any]:
        """Everything that a later run needs to go on from here, the parameters included."""
        adamw = None if self._adamw is None else self._adamw.state_dict()
        return {"masters": self._masters, "momenta": self._momenta, "adamw": adamw}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a :meth:`state_dict` of an optimiser over the same parameters; they change too."""
        torch._foreach_copy_(self._masters, list(state["masters"]))
        torch._foreach_copy_([p for _, p in self._parameters], self._masters)
        self._momenta = {shape: m.to(self._masters[0].device) for shape, m in state["momenta"].items()}
        if self._adamw is not None:
            self._adamw.load_state_dict(state["adamw"])

    def _muon(self, shape: tuple[int, int], indices: list[int], lr: float) -> None:
        """One step of the matrices of one shape; one without a gradient counts as having zeros."""
        gradients = [self._parameters[index][1].grad for index in indices]
        if all(gradient is None for gradient in gradients):
            return
        gradient = torch.stack(
            [
                (torch.zeros_like(self._masters[index]) if g is None else g.float()).reshape(shape)
                for index, g in zip(indices, gradients, strict=True)
            ]
        )
        momentum = self._momenta.setdefault(shape, torch.zeros_like(gradient))
        momentum.lerp_(gradient, 1 - self.momentum)
        update = orthogonalize(gradient.lerp_(momentum, self.momentum))
        masters = [self._masters[index] for index in indices]
        if self.weight_decay:
            torch._foreach_mul_(masters, 1 - lr * self.weight_decay)
        # Root mean square .2 of a full-rank update, about that of AdamW: one learning rate serves both.
        length = 0.2 * math.sqrt(max(shape))
        updates = [one.view(m.shape) for one, m in zip(update.float(), masters, strict=True)]
        torch._foreach_add_(masters, updates, alpha=-lr * length)


def orthogonalize(matrices: Tensor) -> Tensor:
    """The nearest matrices whose singular values are all about one, by Newton-Schulz iterations.

    Args:
        matrices: (N, rows, columns), any float dtype.

    Returns:
        Same shape; singular values in about [.7, 1.2]; bfloat16 on CUDA, else float32.
    """
    x = matrices.to(torch.bfloat16 if matrices.is_cuda else torch.float32)
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    a, b, c = _COEFFICIENTS
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def learning_rate_scale(
    step: int, steps: int, *, warm_up: int = 0, flat: float = 0.0, floor: float = 0.0
) -> float:
    """Warm-up from 0, then 1, then a cosine.

    Args:
        step: from 0 to ``steps`` - 1.
        steps: of the whole training.
        warm_up: steps over which the scale rises.
        flat: fraction of all steps before the cosine begins.
        floor: where the cosine would end at ``steps``.
    """
    rise = min(1.0, (step + 1) / warm_up) if warm_up else 1.0
    phase = max(0.0, (step / steps - flat) / (1 - flat))
    return rise * (floor + (1 - floor) * (1 + math.cos(math.pi * phase)) / 2)


class Average:
    """A running average of a network's parameters, in float32."""

    def __init__(self, module: nn.Module, decay: float = 0.998) -> None:
        self._decay, self._count = decay, 0
        self._parameters = list(module.parameters())
        self._averages = [p.detach().float().clone() for p in self._parameters]

    @torch.no_grad()
    def update(self) -> None:
        """Take in the parameters as they are now; the first steps count more, so the start is forgotten."""
        self._count += 1
        decay = min(self._decay, self._count / (self._count + 9))
        torch._foreach_lerp_(self._averages, [p.float() for p in self._parameters], 1 - decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the parameters and their averages; a second call undoes the first."""
        for parameter, average in zip(self._parameters, self._averages, strict=True):
            current = parameter.float().clone()
            parameter.copy_(average)
            average.copy_(current)

    def state_dict(self) -> dict[str, Any]:
        """Everything that a later run needs to go on from here."""
        return {"count": self._count, "averages": self._averages}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a :meth:`state_dict` of an average over the same parameters."""
        self._count = int(state["count"])
        torch._foreach_copy_(self._averages, list(state["averages"]))
