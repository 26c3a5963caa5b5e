"""Checkpoints in float8 as official files have them: some linear weights in e4m3 with a factor."""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from tests.loader.headers import Entries
from tests.pipelines.tiny import DEV, sections, tensors, write_checkpoint

PREFIX = "model.diffusion_model."
LAYERS = ("to_q", "to_k", "to_v", "to_out.0", "net.0.proj", "net.2")


def is_float8(key: str) -> bool:
    """The rule of the official files, for the three blocks of the tiny model: the first stays in bf16."""
    return _block(key) in (1, 2)


def is_float8_in_part(key: str) -> bool:
    """Blocks that hold both: feed-forwards of the first, attentions of the others."""
    return (_block(key) == 0) == (".net." in key) if _block(key) is not None else False


def in_float8(
    state: Mapping[str, Tensor], chosen: Callable[[str], bool] = is_float8, *, per_row: bool = False
) -> dict[str, Tensor]:
    """A checkpoint with the chosen linear weights in e4m3; largest value of each (row): 448."""
    made: dict[str, Tensor] = {}
    for key, value in state.items():
        if not chosen(key):
            made[key] = value
            continue
        weight = value.float()
        largest = weight.abs().amax(dim=1) if per_row else weight.abs().amax()
        scale = largest / 448
        made[key] = (weight / (scale[:, None] if per_row else scale)).to(torch.float8_e4m3fn)
        made[f"{key}_scale"] = scale
        made[f"{key.removesuffix('weight')}input_scale"] = torch.tensor(0.0157)
    return made


def write_float8(file: Path, chosen: Callable[[str], bool] = is_float8, *, per_row: bool = False) -> Path:
    """The tiny checkpoint, see :func:`in_float8`."""
    return write_checkpoint(file, in_float8(tensors(DEV), chosen, per_row=per_row), sections())


def official_float8(entries: Entries) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Key -> (dtype, shape) of an official fp8 file, from those of the bf16 one: blocks 1 to 42."""
    made: dict[str, tuple[str, tuple[int, ...]]] = {}
    for key, (dtype, shape) in entries.items():
        chosen = (_block(key) or 0) in range(1, 43)
        made[key] = ("F8_E4M3" if chosen else dtype, shape)
        if chosen:
            made[f"{key}_scale"] = ("F32", ())
            made[f"{key.removesuffix('weight')}input_scale"] = ("F32", ())
    return made


def in_file(state: Mapping[str, Tensor], name: str) -> tuple[Tensor, Tensor | None]:
    """The stored tensor of the transformer's parameter ``name``, and its factor."""
    key = f"{PREFIX}{name}"
    return state[key], state.get(f"{key}_scale")


def _block(key: str) -> int | None:
    """Number of the block for the weight of a layer that official files quantise, else None."""
    head = f"{PREFIX}transformer_blocks."
    if not key.startswith(head) or not key.endswith(tuple(f"{layer}.weight" for layer in LAYERS)):
        return None
    return int(key.removeprefix(head).split(".")[0])
