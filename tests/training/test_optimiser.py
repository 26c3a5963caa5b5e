"""Optimisers, and states of optimisers that the trainer does not know."""

import importlib.util
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from diffsynth.errors import RequestError
from diffsynth.training.config import TrainingSection
from diffsynth.training.optimiser import make_optimiser
from diffsynth.training.state import TrainingState


class Counting(torch.optim.Optimizer):
    """Keeps bytes and a plain number, as optimisers in 8 bits do."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        super().__init__(parameters, {"lr": 0.1})
        self.table = torch.linspace(-1, 1, 256)

    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    state.update(
                        step=0, state1=torch.zeros_like(parameter, dtype=torch.uint8), qmap1=self.table
                    )
                state["step"] += 1
                state["state1"] += 3
                with torch.no_grad():
                    parameter -= 0.1 * parameter.grad * state["qmap1"][state["state1"].long()]


def test_a_state_holds_whatever_the_optimiser_keeps(tmp_path: Path) -> None:
    def made() -> tuple[dict[str, nn.Parameter], Counting]:
        parameters = {name: nn.Parameter(torch.ones(4)) for name in ("one", "two")}
        return parameters, Counting(parameters.values())

    def advance(parameters: dict[str, nn.Parameter], optimiser: Counting) -> None:
        for number, parameter in enumerate(parameters.values()):
            parameter.grad = torch.full((4,), 1.0 + number)
        optimiser.step()

    parameters, optimiser = made()
    advance(parameters, optimiser)
    TrainingState.of(1, parameters, optimiser, {}).save(tmp_path / "state", {"a": 1})
    advance(parameters, optimiser)
    others, other = made()
    TrainingState.load(tmp_path / "state", {"a": 1}).restore(others, other, {})
    advance(others, other)
    for name, parameter in parameters.items():
        assert torch.equal(others[name], parameter)
        state = other.state[others[name]]
        assert (state["step"], state["state1"].dtype) == (2, torch.uint8)


def test_adamw_of_the_configuration() -> None:
    section = TrainingSection(learning_rate=0.5, betas=(0.8, 0.9), weight_decay=0.25)
    optimiser = make_optimiser(section, [nn.Parameter(torch.ones(2))])
    assert isinstance(optimiser, torch.optim.AdamW)
    (group,) = optimiser.param_groups
    assert (group["lr"], group["betas"], group["weight_decay"]) == (0.5, (0.8, 0.9), 0.25)


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is not None, reason="bitsandbytes is installed")
def test_a_missing_library_is_named_with_the_way_out() -> None:
    with pytest.raises(
        RequestError, match=r"'adamw8bit' needs bitsandbytes.*Try: `pip install bitsandbytes`"
    ):
        make_optimiser(TrainingSection(optimizer="adamw8bit"), [nn.Parameter(torch.ones(2))])


@pytest.mark.gpu
@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
def test_eight_bits() -> None:
    parameter = nn.Parameter(torch.ones(8192, device="cuda"))
    optimiser = make_optimiser(TrainingSection(optimizer="adamw8bit"), [parameter])
    parameter.grad = torch.ones_like(parameter)
    optimiser.step()
    assert bool((parameter < 1).all())
    held = sum(v.nbytes for v in optimiser.state[parameter].values() if isinstance(v, torch.Tensor))
    assert held < 4 * parameter.numel()
