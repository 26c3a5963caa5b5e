"""Weights: naming them, fetching them, looking into their files, and building networks from them.

Importing this package imports neither torch nor a hub's library; the names that need torch are loaded when
they are first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from diffsynth.loader.key_names import NetworkKind
from diffsynth.loader.model_config import ModelConfig
from diffsynth.loader.recognise import FileReport, Storage, describe, model_version, recognise
from diffsynth.loader.safetensors_file import SafetensorsFile
from diffsynth.loader.weight_files import WeightFiles

if TYPE_CHECKING:
    from diffsynth.loader.load import NetworkWeights, find_network, load_network, sort_networks

__all__ = [
    "FileReport",
    "ModelConfig",
    "NetworkKind",
    "NetworkWeights",
    "SafetensorsFile",
    "Storage",
    "WeightFiles",
    "describe",
    "find_network",
    "load_network",
    "model_version",
    "recognise",
    "sort_networks",
]

_WITH_TORCH = frozenset({"NetworkWeights", "find_network", "load_network", "sort_networks"})


def __getattr__(name: str) -> Any:
    if name in _WITH_TORCH:
        return getattr(import_module("diffsynth.loader.load"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
