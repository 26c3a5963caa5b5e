"""LoRAs: reading every known file layout, applying beside the weights, fusing into them."""

from diffsynth.lora.apply import LoraHandle, LoraStack, linear_shapes
from diffsynth.lora.file import Lora, LoraReport, ReferenceScale, read_lora
from diffsynth.lora.fuse import (
    LoraUpdate,
    WeightedUpdates,
    add_updates_,
    dequantise,
    fuse,
    fuse_bias,
    fuse_scaled,
)

__all__ = [
    "Lora",
    "LoraHandle",
    "LoraReport",
    "LoraStack",
    "LoraUpdate",
    "ReferenceScale",
    "WeightedUpdates",
    "add_updates_",
    "dequantise",
    "fuse",
    "fuse_bias",
    "fuse_scaled",
    "linear_shapes",
    "read_lora",
]
