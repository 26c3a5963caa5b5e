"""The optimisers: AdamW of torch, and of bitsandbytes with its state in 8 bits."""

import importlib
import importlib.util
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from diffsynth.errors import RequestError
from diffsynth.training.config import ADAMW, ADAMW_8BIT, TrainingSection

STATE_BYTES: Mapping[str, float] = {ADAMW: 8.0, ADAMW_8BIT: 2.0 + 2 * 4 / 256}
"""Of the state per parameter; in 8 bits two bytes, and two float32 factors for 256 parameters."""


def check_optimiser(training: TrainingSection) -> None:
    """Raise RequestError where the library for the optimiser of a configuration is not installed."""
    if training.optimizer != ADAMW and importlib.util.find_spec("bitsandbytes") is None:
        raise RequestError(
            f"[training] optimizer={training.optimizer!r} needs bitsandbytes, which is not installed",
            hint=f'`pip install bitsandbytes`, or optimizer = "{ADAMW}"',
        )


def make_optimiser(training: TrainingSection, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimiser of a configuration.

    Source: Loshchilov and Hutter, AdamW (arXiv 1711.05101); Dettmers et al., 8-bit optimizers
    (arXiv 2110.02861).

    Raises:
        RequestError: the library for it is not installed.
    """
    how: dict[str, Any] = {
        "lr": training.learning_rate,
        "betas": training.betas,
        "weight_decay": training.weight_decay,
    }
    if training.optimizer == ADAMW:
        return torch.optim.AdamW(parameters, **how)
    check_optimiser(training)
    bitsandbytes = importlib.import_module("bitsandbytes")
    optimiser: torch.optim.Optimizer = bitsandbytes.optim.AdamW8bit(parameters, **how)
    return optimiser
