"""The four states of the public API, translated: what they say about storage formats and tiers.

| field                                        | meaning here                                              |
|----------------------------------------------|-----------------------------------------------------------|
| ``offload_dtype``, ``onload_dtype``,         | storage format of the linear weights inside blocks: the   |
| ``preparing_dtype``                          | first that is given; float8 dtypes are plain casts        |
| ``offload_device="disk"``                    | streamed blocks stay on the disk, none is kept in RAM     |
| ``offload_device="cpu"``                     | streamed blocks are kept in RAM as far as the host limit  |
|                                              | allows                                                    |
| ``onload_device``, ``preparing_device``      | nothing: what is resident and what streams is planned     |
| ``computation_device``, ``computation_dtype``| must agree with ``device`` and ``torch_dtype``            |

A configuration with none of them leaves everything to the plan, and the format to the default.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch

from diffsynth.errors import RequestError
from diffsynth.loader import ModelConfig, NetworkKind, NetworkWeights
from diffsynth.pipelines.assemble import PART_OF
from diffsynth.pipelines.storage import ROLES, Storage
from diffsynth.vram.formats import StorageFormat, as_is

_FORMAT_STATES = ("offload", "onload", "preparing")


def asks_for_management(config: ModelConfig) -> bool:
    """Whether a configuration says anything that only the memory manager can do."""
    on_disk = "disk" in (config.offload_device, config.onload_device)
    return on_disk or _format(config) not in (
        None,
        *map(as_is, (torch.bfloat16, torch.float16, torch.float32)),
    )


def storage_for(
    default: Storage,
    configs: Mapping[NetworkKind, ModelConfig],
    followed: Mapping[NetworkKind, NetworkWeights],
) -> Storage:
    """``default`` with the formats that configurations state for their networks.

    Networks of ``followed`` for which none is stated are stored as :meth:`Storage.following` says.
    """
    stated: dict[str, StorageFormat] = {}
    for kind, config in configs.items():
        part, format = PART_OF.get(kind, ""), _format(config)
        if format is not None:
            stated |= dict.fromkeys(ROLES.get(part, ()), format)
        elif kind in followed:
            default = default.following(part, followed[kind])
    return replace(default, **stated)  # type: ignore[arg-type]


def kept_on_disk(configs: Mapping[NetworkKind, ModelConfig]) -> frozenset[NetworkKind]:
    """Networks of which no block may stay in host memory."""
    return frozenset(kind for kind, config in configs.items() if config.offload_device == "disk")


def check_states(configs: Iterable[ModelConfig], device: torch.device, dtype: torch.dtype) -> None:
    """Check that the computation states say what the pipeline does.

    Raises:
        RequestError: they name another device or dtype.
    """
    for config in configs:
        stated = config.computation_device
        if stated is not None and torch.device(stated).type != device.type:
            raise RequestError(
                f"computation_device={stated!s} differs from device={device!s}",
                hint=f"device={stated!r}, or computation_device={device.type!r}",
            )
        if config.computation_dtype not in (None, dtype):
            raise RequestError(
                f"computation_dtype={config.computation_dtype} differs from torch_dtype={dtype}",
                hint="the same dtype for both",
            )


def _format(config: ModelConfig) -> StorageFormat | None:
    for state in _FORMAT_STATES:
        dtype = getattr(config, f"{state}_dtype")
        if isinstance(dtype, torch.dtype):
            return as_is(dtype)
    return None
