"""How the weights of every network are stored, and which of them move together.

A policy gives linear weights a format by the part that they belong to.  What is sensitive stays as it is:
everything but the weights of linear layers inside blocks, the gates of attention heads (32 rows each), and
all of the autoencoders, the vocoder and the upsampler.

Files that hold linear weights as float8 e4m3 are followed where nothing else is asked for: those weights are
stored in fp8, which takes their bytes and factors over, and what the file holds in more bits keeps them.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Self

import torch
from torch import nn

from diffsynth.errors import RequestError
from diffsynth.loader import NetworkWeights
from diffsynth.models.ltx2.feature_extractor import FeatureExtractor
from diffsynth.vram.binding import REST, module_layouts
from diffsynth.vram.blocks import BlockLayout, TensorSpec, make_layout
from diffsynth.vram.formats import StorageFormat, as_is

NAMES = ("bf16", "f16", "f32", "fp8", "int8", "int4", "e4m3", "e5m2")
"""What :meth:`Storage.named` knows."""

_BLOCK_LISTS: Mapping[str, re.Pattern[str]] = {
    "dit": re.compile(r"transformer_blocks\.\d+(?=\.)"),
    "text_encoder": re.compile(r"layers\.\d+(?=\.)"),
    "text_encoder_post_modules": re.compile(r"\w+_embeddings_connector\.transformer_1d_blocks\.\d+(?=\.)"),
}
"""Part -> how the names of its blocks look; networks without blocks come and go as a whole."""
ROLES: Mapping[str, tuple[str, ...]] = {
    "dit": ("transformer", "audio"),
    "text_encoder": ("text_encoder",),
    "text_encoder_post_modules": ("connectors",),
}
"""Part -> the fields of :class:`Storage` that are about it."""
_ON_HOST = "embed_tokens"
_GATE = "to_gate_logits"
_PROJECTION = "text_embedding_projection"


@dataclass(frozen=True, kw_only=True, slots=True)
class Storage:
    """Formats of the linear weights inside blocks."""

    transformer: StorageFormat
    """Of the video stream."""
    audio: StorageFormat
    """Of the audio stream and of the attention between the streams, which suffer first from few bits."""
    text_encoder: StorageFormat
    connectors: StorageFormat
    unquantised: frozenset[str] = frozenset()
    """Weights that stay as they are all the same, by their names in the network."""

    @classmethod
    def uniform(cls, format: StorageFormat) -> Self:
        """One format for all."""
        return cls(transformer=format, audio=format, text_encoder=format, connectors=format)

    @classmethod
    def named(cls, name: str) -> Self:
        """A format by name; ``int4`` keeps 8 bits for audio, cross-modal weights and connectors.

        Raises:
            RequestError: no such name; the message lists them.
        """
        if name not in NAMES:
            raise RequestError(f"storage={name!r} is not known", hint=", ".join(NAMES))
        format = StorageFormat(name)
        if format is not StorageFormat.INT4:
            return cls.uniform(format)
        eight = StorageFormat.INT8
        return cls(transformer=format, audio=eight, text_encoder=format, connectors=eight)

    def following(self, part: str, weights: NetworkWeights) -> Self:
        """This policy, but a part whose file holds linear weights of blocks as float8 e4m3 as that file has
        it: those in fp8, the others unquantised."""
        names = frozenset(self._linears(part, weights))
        float8 = frozenset(filter(weights.is_float8, names))
        if not float8:
            return self
        formats = dict.fromkeys(ROLES[part], StorageFormat.FP8)
        return replace(self, unquantised=self.unquantised | (names - float8), **formats)

    def taken_over(self, part: str, weights: NetworkWeights) -> frozenset[str]:
        """Linear weights whose bytes in the file are those that are stored."""
        return frozenset(
            name
            for name in self._linears(part, weights)
            if self.format_of(part, name) is StorageFormat.FP8 and weights.is_float8(name)
        )

    def policy_of(self, part: str, weights: NetworkWeights, dtype: torch.dtype) -> str:
        """A short name for how a part is stored: equal names mean that equal files give equal bytes."""
        words = [str(getattr(self, role)) for role in ROLES.get(part, ())]
        if not self.unquantised.isdisjoint(weights.entries):
            words.append("mixed")
        if self.taken_over(part, weights):
            words.append("verbatim")
        return "-".join(dict.fromkeys([*words, as_is(dtype).value]))

    def format_of(self, part: str, name: str) -> StorageFormat | None:
        """Storage format of the linear weight ``name`` of a part; None: it stays as it is."""
        pattern = _BLOCK_LISTS.get(part)
        match = pattern.match(name) if pattern else None
        if match is None or _GATE in name or name in self.unquantised:
            return None
        if part == "text_encoder":
            return self.text_encoder
        if part == "text_encoder_post_modules":
            return self.connectors
        return self.audio if "audio" in name[match.end() :] else self.transformer

    def _linears(self, part: str, weights: NetworkWeights) -> list[str]:
        """The linear weights of a file that this policy may quantise."""
        return [name for name in weights.matrices if self.format_of(part, name) is not None]


@dataclass(frozen=True, kw_only=True, slots=True)
class PartLayouts:
    """The tensors of one network, grouped by how they move.  Entries bear their names in the module.

    Attributes:
        blocks: by name, in the order of use.
        rest: what is on the device for the whole phase; None if there is nothing.
        host: what never goes to the device: the embedding table, of which rows are gathered.
        slices: of the text projections, one layout per hidden state.
        left_out: tensors that the slices replace.
    """

    blocks: Mapping[str, BlockLayout] = field(default_factory=dict)
    rest: BlockLayout | None = None
    host: Mapping[str, BlockLayout] = field(default_factory=dict)
    slices: tuple[BlockLayout, ...] = ()
    left_out: tuple[str, ...] = ()


def part_layouts(part: str, module: nn.Module, storage: Storage, dtype: torch.dtype) -> PartLayouts:
    """Group the tensors of a network; only names and shapes are read, so meta tensors will do.

    Args:
        part: its name in the pipeline, such as ``dit``.
        module: the network.
        storage: policy.
        dtype: in which the network computes, and in which unquantised tensors are stored.
    """
    pattern = _BLOCK_LISTS.get(part)
    found = (pattern.match(name) for name in module.state_dict()) if pattern else ()
    blocks = tuple(dict.fromkeys(match[0] for match in found if match))
    host = (_ON_HOST,) if part == "text_encoder" else ()
    projections = _projections(module)
    layouts = module_layouts(
        module,
        blocks=blocks,
        host=host,
        left_out=tuple(projections),
        dtype_of=lambda _: dtype,
        format_of=lambda name: storage.format_of(part, name),
    )
    return PartLayouts(
        blocks={name: layouts[name] for name in blocks},
        rest=layouts.get(REST),
        host={name: layouts[name] for name in host},
        slices=_slices(module, projections, dtype),
        left_out=tuple(projections),
    )


def _projections(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the projection weights that are used one hidden state at a time."""
    extractor = getattr(module, _PROJECTION, None)
    if not isinstance(extractor, FeatureExtractor):
        return {}
    return {
        f"{_PROJECTION}.{name}.weight": tuple(layer.weight.shape)
        for name, layer in extractor.named_children()
        if isinstance(layer, nn.Linear)
    }


def _slices(
    module: nn.Module, projections: Mapping[str, tuple[int, ...]], dtype: torch.dtype
) -> tuple[BlockLayout, ...]:
    if not projections:
        return ()
    states = getattr(module, _PROJECTION).config.num_states
    return tuple(
        make_layout(
            {
                f"{name}:{index}": TensorSpec((out, inputs // states), dtype, as_is(dtype))
                for name, (out, inputs) in projections.items()
            }
        )
        for index in range(states)
    )
