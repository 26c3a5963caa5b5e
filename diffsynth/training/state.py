"""What a run needs to go on, and the adapters that it leaves: files by step, never one over another."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffsynth.errors import CheckpointError, RequestError
from diffsynth.training.samples import load_tensors, save_tensors
from diffsynth.utils.files import make_folder

FORMAT = "diffsynth training state 1"
FOLDER = "checkpoints"
_STATE = re.compile(r"training_state_step_(\d+)\.safetensors")
_PARAMETER, _MEAN = "parameter", "mean"
_STEP = "step"

Fingerprint = Mapping[str, Any]
"""Everything that decides the bits of a run, ready for JSON."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingState:
    """A run after ``step`` steps.

    Order, noise levels, noise and learning rate are functions of the step, so the tensors are all there is.

    Attributes:
        step: steps that are done.
        parameters: what is trained, float32.
        optimiser: by name of the parameter what the optimiser keeps of it, such as ``step``, ``exp_avg`` and
            ``exp_avg_sq``; parameters that never had a gradient have none.
        mean: the running mean of the parameters; empty without one.
    """

    step: int
    parameters: Mapping[str, Tensor]
    optimiser: Mapping[str, Mapping[str, Tensor]]
    mean: Mapping[str, Tensor]

    @classmethod
    def of(
        cls,
        step: int,
        parameters: Mapping[str, nn.Parameter],
        optimiser: torch.optim.Optimizer,
        mean: Mapping[str, Tensor],
    ) -> "TrainingState":
        """The state of a run as it is; tensors are shared with it."""
        return cls(
            step=step,
            parameters={name: parameter.detach() for name, parameter in parameters.items()},
            optimiser={
                name: {key: torch.as_tensor(value) for key, value in optimiser.state[parameter].items()}
                for name, parameter in parameters.items()
                if optimiser.state.get(parameter)
            },
            mean=mean,
        )

    def save(self, path: Path, fingerprint: Fingerprint) -> None:
        """Write a file, complete or not at all.

        Raises:
            OutputError: the folder is not writable or the disk is full.
        """
        tensors = {f"{_PARAMETER}:{name}": tensor for name, tensor in self.parameters.items()}
        tensors |= {f"{_MEAN}:{name}": tensor for name, tensor in self.mean.items()}
        for name, values in self.optimiser.items():
            tensors |= {f"{key}:{name}": tensor for key, tensor in values.items()}
        stored, seen = {}, set[int]()
        for name, tensor in tensors.items():
            content = tensor.detach().cpu().contiguous()
            shared = content.data_ptr() in seen  # such as the table that 8-bit states are read by
            seen.add(content.data_ptr())
            stored[name] = content.clone() if shared else content
        metadata = {"format": FORMAT, "step": str(self.step), "fingerprint": json.dumps(fingerprint)}
        save_tensors(path, stored, metadata)

    @classmethod
    def load(cls, path: Path, fingerprint: Fingerprint) -> "TrainingState":
        """Read a file of the same run.

        Raises:
            CheckpointError: it is damaged or something else.
            RequestError: the run was another one; the settings that differ are named.
        """
        tensors, metadata = load_tensors(path, FORMAT, hint="another [output] folder to begin anew")
        differing = _differing(json.loads(metadata["fingerprint"]), json.loads(json.dumps(fingerprint)))
        if differing:
            raise RequestError(
                f"{path.name} belongs to a run with other settings: {', '.join(differing)}",
                hint="the settings of that run, or another [output] folder",
            )
        parts: dict[str, dict[str, Tensor]] = {_PARAMETER: {}, _MEAN: {}}
        optimiser: dict[str, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            kind, _, name = key.partition(":")
            if kind in parts:
                parts[kind][name] = tensor
            else:
                optimiser.setdefault(name, {})[kind] = tensor
        return cls(
            step=int(metadata["step"]),
            parameters=parts[_PARAMETER],
            optimiser=optimiser,
            mean=parts[_MEAN],
        )

    def restore(
        self,
        parameters: Mapping[str, nn.Parameter],
        optimiser: torch.optim.Optimizer,
        mean: dict[str, Tensor],
    ) -> None:
        """Put everything back where :meth:`of` found it.

        Raises:
            CheckpointError: the parameters are others.
        """
        if self.parameters.keys() != parameters.keys():
            raise CheckpointError("the state holds other parameters", hint="another [output] folder")
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(self.parameters[name])
                if name in self.optimiser:
                    optimiser.state[parameter] = {
                        key: _restored(key, value, parameter.device)
                        for key, value in self.optimiser[name].items()
                    }
            for name, value in mean.items():
                value.copy_(self.mean[name])


class Checkpoints:
    """The files of a run in its output folder."""

    def __init__(self, output: Path) -> None:
        self.folder = output / FOLDER

    def state(self, step: int) -> Path:
        """Where the state after a step lies."""
        return self.folder / f"training_state_step_{step:05d}.safetensors"

    def result(self, name: str, step: int, *, mean: bool = False) -> Path:
        """Where what is trained lies after a step, or its running mean; ``name`` is "lora" or "model"."""
        return self.folder / f"{name}_{'mean_' if mean else ''}weights_step_{step:05d}.safetensors"

    def states(self) -> dict[int, Path]:
        """The states that are there, by step, ascending."""
        found = {}
        for path in self.folder.glob("*.safetensors"):
            if match := _STATE.fullmatch(path.name):
                found[int(match[1])] = path
        return dict(sorted(found.items()))

    def start(self, *, resume: bool) -> Path | None:
        """The state to go on from, or None for a new run, for which the folder is made.

        Raises:
            RequestError: a new run over an old one, or nothing to go on from.
            OutputError: the folder cannot be made.
        """
        states = self.states()
        if resume:
            if not states:
                raise RequestError(
                    f"{self.folder} holds no state to go on from", hint="leave --resume out for a new run"
                )
            return states[max(states)]
        if self.folder.is_dir() and any(self.folder.iterdir()):
            raise RequestError(
                f"{self.folder} holds an earlier run", hint="--resume to go on, or another [output] folder"
            )
        make_folder(self.folder)
        return None

    def drop_older_states(self, step: int) -> None:
        """Delete the states before a step: only the newest is ever needed, and they are large."""
        for earlier, path in self.states().items():
            if earlier < step:
                path.unlink(missing_ok=True)


def _restored(key: str, value: Tensor, device: torch.device) -> Tensor | int:
    """As the optimiser had it: AdamW of torch counts steps in a tensor on the host, others in a number."""
    if key != _STEP:
        return value.to(device)
    return value if value.is_floating_point() else int(value)


def _differing(stored: Any, given: Any, name: str = "") -> list[str]:
    """Dotted names of the settings that are not equal."""
    if isinstance(stored, dict) and isinstance(given, dict):
        keys = sorted(stored.keys() | given.keys())
        nested = (_differing(stored.get(k), given.get(k), f"{name}.{k}" if name else k) for k in keys)
        return [item for items in nested for item in items]
    return [] if stored == given else [name]
