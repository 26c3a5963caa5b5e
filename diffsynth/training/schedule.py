"""Learning rate over the steps: a function of the step alone, so there is no state to go on from."""

import math
from dataclasses import dataclass
from enum import StrEnum

from diffsynth.errors import RequestError


class ScheduleName(StrEnum):
    """Shapes after the warm-up."""

    CONSTANT = "constant"
    LINEAR = "linear"
    COSINE = "cosine"


@dataclass(frozen=True, kw_only=True, slots=True)
class ScheduleConfig:
    """How the learning rate goes.

    Attributes:
        name: one of :class:`ScheduleName`.
        warmup_steps: first the rate rises evenly to its highest value.
        final: share of the highest rate that is left at the end; ``constant`` does not use it.
    """

    name: str = ScheduleName.LINEAR
    warmup_steps: int = 0
    final: float = 0.1

    def check(self, steps: int) -> None:
        """Raise RequestError, naming the setting, for a value that cannot work."""
        if self.name not in list(ScheduleName):
            raise RequestError(f"name={self.name!r} is not known", hint=", ".join(ScheduleName))
        if not 0 <= self.warmup_steps < steps:
            raise RequestError(f"warmup_steps={self.warmup_steps}", hint=f"0 to {steps - 1}")
        if not 0 <= self.final <= 1:
            raise RequestError(f"final={self.final}", hint="a share from 0 to 1")

    def factor(self, step: int, steps: int) -> float:
        """Share of the highest learning rate in ``step`` of ``steps``, counted from 0; in [0, 1]."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if self.name == ScheduleName.CONSTANT:
            return 1.0
        done = (step - self.warmup_steps) / (steps - self.warmup_steps)
        left = 1 - done if self.name == ScheduleName.LINEAR else (1 + math.cos(math.pi * done)) / 2
        return self.final + (1 - self.final) * left
