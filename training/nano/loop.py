"""Steps of an optimiser with progress, and with a state on disk that a broken run goes on from."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from training.nano.muon import MuonAdamW

_TIMED = 20
"""Steps after which the time of a step is told."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Loop:
    """How long to train, and what to tell."""

    name: str
    steps: int
    """Of a run from the beginning; one that goes on keeps the number it began with."""
    schedule: Callable[[int, int], float]
    """Step and number of steps -> scale of the learning rates."""
    state: Path
    """File of the state of a run that broke off; whoever keeps the result removes it."""
    report: Callable[[], str]
    """What the network is worth at present."""
    report_s: float = 20.0

    def run(self, optimizer: MuonAdamW, loss_at: Callable[[int, int], Tensor]) -> None:
        """Train from the beginning, or from the state of an earlier run.

        Args:
            optimizer: of the network's parameters.
            loss_at: step and number of steps -> loss, a scalar.
        """
        first, steps = self._load(optimizer)
        begun = told = time.monotonic()
        for step in range(first, steps):
            loss = loss_at(step, steps)
            torch.autograd.backward(loss)
            optimizer.step(self.schedule(step, steps))
            done = step + 1 - first
            where = f"{self.name} {step + 1}/{steps}"
            if done in (1, _TIMED):
                value = loss.item()  # waits for the device, so the time is true
                taken = (time.monotonic() - begun) / done
                print(f"{where} loss {value:.4f}, {1000 * taken:.0f} ms/step", flush=True)
            if time.monotonic() - told > self.report_s or step + 1 == steps:
                value, seconds = loss.item(), time.monotonic() - begun
                print(f"{where} loss {value:.4f} {self.report()} {seconds:.0f} s", flush=True)
                self._save(optimizer, step + 1, steps)
                told = time.monotonic()

    def _load(self, optimizer: MuonAdamW) -> tuple[int, int]:
        if not self.state.exists():
            return 0, self.steps
        state = torch.load(self.state, map_location="cpu", weights_only=True)
        optimizer.load_state_dict(state["optimizer"])
        print(f"{self.name}: goes on at step {state['step']} ({self.state})", flush=True)
        return int(state["step"]), int(state["steps"])

    def _save(self, optimizer: MuonAdamW, step: int, steps: int) -> None:
        self.state.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.state.with_suffix(".writing")
        torch.save({"step": step, "steps": steps, "optimizer": optimizer.state_dict()}, temporary)
        temporary.replace(self.state)
