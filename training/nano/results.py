"""What a stage of training leaves behind: a network in the released layout, and what is known about it."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file
from torch import Tensor, nn


def write_network(
    folder: Path,
    name: str,
    networks: Sequence[nn.Module],
    section: Mapping[str, Any],
    notes: Mapping[str, Any],
    *,
    section_name: str | None = None,
) -> None:
    """Write ``folder/name.safetensors`` (bfloat16, the released keys) and ``folder/name.json``.

    The file alone loads through the ordinary loader: ``section`` is also its metadata.  The JSON holds
    ``config``, the section by its name in a checkpoint, beside the notes.  ``section_name`` is that name
    where it is not ``name``; empty where a file of this kind has its configuration at the top level.
    """
    tensors = {key: value for network in networks for key, value in released_tensors(network).items()}
    section_name = name if section_name is None else section_name
    config = {section_name: section} if section_name else dict(section)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / f"{name}.safetensors", {"config": json.dumps(config)})
    count = sum(t.numel() for t in tensors.values())
    text = json.dumps({"config": config, "parameters": count, **notes}, indent=1)
    (folder / f"{name}.json").write_text(text + "\n")


def released_tensors(network: nn.Module) -> dict[str, Tensor]:
    """The parameters by their keys in a released file, bfloat16, on the CPU."""
    prefixes = cast("Mapping[str, str]", network.KEY_PREFIXES)
    # The longest prefix of the module wins: the empty one fits every name.
    ordered = sorted(prefixes.items(), key=lambda item: -len(item[1]))
    tensors = {}
    for name, value in network.state_dict().items():
        released, own = next(item for item in ordered if name.startswith(item[1]))
        tensors[released + name.removeprefix(own)] = value.detach().to("cpu", torch.bfloat16).contiguous()
    return tensors
