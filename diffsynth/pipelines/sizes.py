"""Sizes of a model: the configuration of every network and the bytes of its blocks in a storage policy."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

from torch import nn

from diffsynth.errors import CheckpointError
from diffsynth.models.gemma3_config import Gemma3Config
from diffsynth.models.gemma3_vision import Gemma3VisionConfig
from diffsynth.models.ltx2.audio_vae_config import AudioVAEConfig
from diffsynth.models.ltx2.connectors import TEXT_LENGTH, TextConnectorsConfig
from diffsynth.models.ltx2.transformer_config import TransformerConfig
from diffsynth.models.ltx2.upsampler import UpsamplerConfig
from diffsynth.models.ltx2.video_vae_config import VideoVAEConfig
from diffsynth.models.ltx2.vocoder import VocoderConfig
from diffsynth.models.ltx2.vocoder_bwe import VocoderBWEConfig
from diffsynth.pipelines.packing import conversion_bytes
from diffsynth.pipelines.parts import NETWORKS, ModelVersion, Parts
from diffsynth.pipelines.released import released_parts
from diffsynth.pipelines.storage import Storage, part_layouts
from diffsynth.vram.blocks import BlockLayout
from diffsynth.vram.formats import FLOAT8_DTYPES, decode_scratch_bytes
from diffsynth.vram.linear import decoded_bytes, needs_decoding

ConfigT = TypeVar("ConfigT")

FLOAT8_VALUES = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockSize:
    """One block: its name, its packed bytes, and the sum of inputs and outputs of its linear layers.

    A LoRA of rank r on all of them has ``r * lora_width`` values.
    """

    name: str
    nbytes: int
    lora_width: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class PartSizes:
    """One network in bytes.

    Attributes:
        blocks: in the order of use.
        rest_bytes: on the device for the whole phase.
        slice_bytes: of the text projections, per hidden state.
        scratch_bytes: for one linear weight on its way to the compute dtype.
        on_disk: whether no block may stay in host memory.
        conversion_bytes: of host memory, while the network is packed.
    """

    blocks: tuple[BlockSize, ...] = ()
    rest_bytes: int = 0
    slice_bytes: tuple[int, ...] = ()
    scratch_bytes: int = 0
    on_disk: bool = False
    conversion_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        """All that ever goes to the device."""
        return self.rest_bytes + sum(block.nbytes for block in self.blocks) + sum(self.slice_bytes)


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSizes:
    """A model without its weights.  Parts that are missing are absent from both mappings."""

    version: ModelVersion
    itemsize: int
    """Bytes per value of the compute dtype."""
    configs: Mapping[str, object]
    parts: Mapping[str, PartSizes]
    has_float64: bool = True
    """Whether samplers that work in float64 find it on the device."""

    def has(self, part: str) -> bool:
        """Whether the part is there."""
        return part in self.parts

    @property
    def transformer(self) -> TransformerConfig:
        """Of the part ``dit``.  This property and the next raise CheckpointError when the part is missing."""
        return self._config("dit", TransformerConfig)

    @property
    def gemma(self) -> Gemma3Config:
        """Of the part ``text_encoder``."""
        return self._config("text_encoder", Gemma3Config)

    @property
    def vision(self) -> Gemma3VisionConfig:
        """Of the part ``picture_encoder``."""
        return self._config("picture_encoder", Gemma3VisionConfig)

    @property
    def connectors(self) -> TextConnectorsConfig:
        """Of the part ``text_encoder_post_modules``."""
        return self._config("text_encoder_post_modules", TextConnectorsConfig)

    @property
    def text_length(self) -> int:
        """Positions of a context; as released where the connectors are missing."""
        return self.connectors.text_length if self.has("text_encoder_post_modules") else TEXT_LENGTH

    @property
    def upsampler(self) -> UpsamplerConfig:
        """Of the part ``upsampler``."""
        return self._config("upsampler", UpsamplerConfig)

    @property
    def vocoder(self) -> VocoderConfig | VocoderBWEConfig:
        """Of the part ``audio_vocoder``."""
        config = self.configs.get("audio_vocoder")
        if isinstance(config, VocoderConfig):
            return config
        return self._config("audio_vocoder", VocoderBWEConfig)

    def video_vae(self, part: str) -> VideoVAEConfig:
        """Of ``video_vae_encoder`` or ``video_vae_decoder``."""
        return self._config(part, VideoVAEConfig)

    def audio_vae(self, part: str) -> AudioVAEConfig:
        """Of ``audio_vae_encoder`` or ``audio_vae_decoder``."""
        return self._config(part, AudioVAEConfig)

    def _config(self, part: str, kind: type[ConfigT]) -> ConfigT:
        config = self.configs.get(part)
        if not isinstance(config, kind):
            raise CheckpointError(f"missing: {part}", hint=f"add a file with {part} to model_configs")
        return config


def model_sizes(parts: Parts, storage: Storage, *, on_disk: Collection[str] = ()) -> ModelSizes:
    """Measure the networks of a pipeline; only names and shapes are read.

    Call it before weights are handed to the memory manager: a module may lose its tensors then.

    Args:
        parts: the networks.
        storage: how their weights are stored.
        on_disk: parts of which no block may stay in host memory.
    """
    modules = {name: getattr(parts, name) for name in NETWORKS if getattr(parts, name) is not None}
    return ModelSizes(
        version=parts.version,
        itemsize=parts.dtype.itemsize,
        configs={name: module.config for name, module in modules.items()},
        parts={
            name: replace(_part_sizes(name, module, parts, storage), on_disk=name in on_disk)
            for name, module in modules.items()
        },
    )


def released_sizes(version: ModelVersion, storage: Storage) -> ModelSizes:
    """Sizes of a released model that computes in bf16; nothing is downloaded."""
    return model_sizes(released_parts(version), storage)


def _part_sizes(name: str, module: nn.Module, parts: Parts, storage: Storage) -> PartSizes:
    layouts = part_layouts(name, module, storage, parts.dtype)
    linear = {f"{path}.weight" for path, layer in module.named_modules() if isinstance(layer, nn.Linear)}
    return PartSizes(
        blocks=tuple(
            BlockSize(name=block, nbytes=layout.nbytes, lora_width=_lora_width(layout, linear))
            for block, layout in layouts.blocks.items()
        ),
        rest_bytes=layouts.rest.nbytes if layouts.rest else 0,
        slice_bytes=tuple(layout.nbytes for layout in layouts.slices),
        scratch_bytes=max((_scratch_bytes(layout) for layout in layouts.blocks.values()), default=0),
        conversion_bytes=conversion_bytes(layouts, parts.dtype),
    )


def _lora_width(layout: BlockLayout, linear: set[str]) -> int:
    """Gates are left out: no LoRA of this family changes them."""
    return sum(sum(e.shape) for e in layout.entries if e.name in linear and "gate" not in e.name)


def _scratch_bytes(layout: BlockLayout) -> int:
    """Of the largest conversion: its result in the compute dtype, and what it needs beside that.

    Devices without float8 arithmetic look its values up in a table.
    """
    return max(
        decoded_bytes(entry)
        + decode_scratch_bytes(entry.format, entry.shape)
        + (FLOAT8_VALUES * entry.dtype.itemsize if entry.parts[0].dtype in FLOAT8_DTYPES else 0)
        if needs_decoding(entry)
        else 0
        for entry in layout.entries
    )
