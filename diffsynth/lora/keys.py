"""Names of layers in LoRA files: every known spelling, brought to the transformer's own names.

A key reads ``<prefix><layer><ending>``.  Prefixes and endings are grammar; the spelling of a layer is looked
up among the model's own layers, because the underscores of the kohya format cannot be undone by a rule
(``to_out_0``, ``audio_to_video_attn``).
"""

import re
from collections.abc import Collection, Iterator
from enum import StrEnum
from typing import NamedTuple

from diffsynth.errors import CheckpointError


class Role(StrEnum):
    """What a tensor of the file is to its layer ``W [out, in]`` with bias ``b [out]``."""

    DOWN = "A"
    """``A [rank, in]``."""
    UP = "B"
    """``B [out, rank]``."""
    ALPHA = "alpha"
    """A number; the product ``B A`` counts ``alpha / rank`` times."""
    WEIGHT_DIFF = "diff"
    """A full difference of ``W``."""
    BIAS_DIFF = "diff_b"
    """A difference of ``b``."""


class KeyStyle(StrEnum):
    """The tools behind the known spellings."""

    OFFICIAL = "official"
    BARE_PEFT = "bare PEFT"
    DIFFSYNTH = "DiffSynth"
    RAW_PEFT = "raw PEFT"
    COMFYUI = "ComfyUI"
    KOHYA = "kohya"
    DIFFUSERS = "diffusers"


class ParsedKey(NamedTuple):
    """A key taken apart.  ``target`` is the model's name of the layer, None if it has no such layer."""

    target: str | None
    layer: str
    """The layer as the file spells it, without prefix and ending."""
    role: Role
    style: KeyStyle


_PREFIXES = ("base_model.model.", "model.diffusion_model.", "diffusion_model.", "transformer.", "model.")
_KOHYA_PREFIX = "lora_unet_"
_ENDING = re.compile(
    r"(?P<layer>.+)\.(?:"
    r"(?P<factor>lora_A|lora_B|lora_down|lora_up)(?:(?:\.(?P<adapter>[^.].*))?\.weight)?"
    r"|(?P<other>alpha|diff|diff_b))"
)
_ROLE_OF_FACTOR = {"lora_A": Role.DOWN, "lora_down": Role.DOWN, "lora_B": Role.UP, "lora_up": Role.UP}

# Original name -> name in diffusers, of a first or last component of a layer's name.
_DIFFUSERS_TOP = {
    "patchify_proj": "proj_in",
    "audio_patchify_proj": "audio_proj_in",
    "adaln_single": "time_embed",
    "audio_adaln_single": "audio_time_embed",
    "av_ca_video_scale_shift_adaln_single": "av_cross_attn_video_scale_shift",
    "av_ca_audio_scale_shift_adaln_single": "av_cross_attn_audio_scale_shift",
    "av_ca_a2v_gate_adaln_single": "av_cross_attn_video_a2v_gate",
    "av_ca_v2a_gate_adaln_single": "av_cross_attn_audio_v2a_gate",
    "prompt_adaln_single": "prompt_adaln",
    "audio_prompt_adaln_single": "audio_prompt_adaln",
}
_DIFFUSERS_LEAF = {"q_norm": "norm_q", "k_norm": "norm_k"}

# First components of layers that belong to the text side: they are no part of the transformer.
_TEXT_SIDE = (
    "text_embedding_projection",
    "feature_extractor_linear",
    "embeddings_connector",
    "video_embeddings_connector",
    "audio_embeddings_connector",
    "connectors",
    "text_encoder",
)

_UNSUPPORTED = {
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    "hada_": "LoHa",
    "lokr_": "LoKr",
    "oft_": "OFT",
    "boft_": "BOFT",
    "lora_mid": "LoCon with a middle factor",
}


def refuse_other_methods(keys: Collection[str], source: str) -> None:
    """Raise CheckpointError, naming the method, when a key belongs to an adapter that is not a plain LoRA."""
    for key in keys:
        for mark, method in _UNSUPPORTED.items():
            if any(part.startswith(mark) for part in key.split(".")):
                raise CheckpointError(
                    f"{source} is a {method} adapter (key {key}), which is not supported",
                    hint="a plain LoRA of the same subject, or merge the adapter with the tool that made it",
                )


class LayerTable:
    """Finds the model's layer behind each key of a file."""

    def __init__(self, targets: Collection[str]) -> None:
        """Args: targets, the names of the model's linears, such as ``transformer_blocks.0.attn1.to_q``."""
        self._by_alias: dict[str, str] = {}
        self._by_flat_alias: dict[str, str | None] = {}
        for target in targets:
            for alias in _aliases(target):
                self._by_alias[alias] = target
                flat = alias.replace(".", "_")
                # Two layers of one flat name cannot be told apart: neither is ever guessed.
                known = self._by_flat_alias.setdefault(flat, target)
                if known != target:
                    self._by_flat_alias[flat] = None
        # The model's own names win over other spellings of other layers.
        self._by_alias.update({target: target for target in targets})
        self._targets = frozenset(targets)
        self._tops = {alias.split(".", 1)[0] for alias in self._by_alias} | set(_TEXT_SIDE)

    def parse(self, key: str) -> ParsedKey | None:
        """The parts of ``key``, or None when its ending is unknown."""
        match = _ENDING.fullmatch(key)
        if match is None:
            return None
        factor, adapter = match["factor"], match["adapter"]
        role = _ROLE_OF_FACTOR[factor] if factor else Role(match["other"])
        if match["layer"].startswith(_KOHYA_PREFIX):
            layer = match["layer"].removeprefix(_KOHYA_PREFIX)
            return ParsedKey(self._by_flat_alias.get(layer), layer, role, KeyStyle.KOHYA)
        layer, prefixes = self._strip(match["layer"])
        target = self._by_alias.get(layer)
        renamed = target is not None and layer not in self._targets and not layer.endswith(".to_out")
        return ParsedKey(target, layer, role, _style(prefixes, factor, adapter, renamed=renamed))

    def is_text_side(self, key: str) -> bool:
        """Whether ``key`` belongs to the text encoder or its connectors: no part of the transformer."""
        if key.startswith(_KOHYA_PREFIX):
            return key.removeprefix(_KOHYA_PREFIX).startswith(_TEXT_SIDE)
        return key.startswith("lora_te") or self._strip(key)[0].split(".", 1)[0] in _TEXT_SIDE

    def _strip(self, layer: str) -> tuple[str, set[str]]:
        found: set[str] = set()
        while prefix := next((p for p in _PREFIXES if self._fits(p, layer)), None):
            layer = layer.removeprefix(prefix)
            found.add(prefix)
        return layer, found

    def _fits(self, prefix: str, layer: str) -> bool:
        """``transformer.`` is a prefix only in front of a name that the model or the text side knows."""
        if not layer.startswith(prefix):
            return False
        return prefix != "transformer." or layer.removeprefix(prefix).split(".", 1)[0] in self._tops


def _aliases(target: str) -> Iterator[str]:
    """Other spellings of a layer: its name in diffusers, and both without the index after ``to_out``."""
    first, *rest = target.split(".")
    renamed = [_DIFFUSERS_TOP.get(first, first), *rest]
    renamed[-1] = _DIFFUSERS_LEAF.get(renamed[-1], renamed[-1])
    for name in (target, ".".join(renamed)):
        yield name
        if name.endswith(".to_out.0"):
            yield name.removesuffix(".0")


def _style(prefixes: set[str], factor: str | None, adapter: str | None, *, renamed: bool) -> KeyStyle:
    if factor in {"lora_down", "lora_up", None}:
        return KeyStyle.COMFYUI
    if "base_model.model." in prefixes:
        return KeyStyle.RAW_PEFT
    if adapter is not None:
        return KeyStyle.DIFFSYNTH
    if renamed or "transformer." in prefixes:
        return KeyStyle.DIFFUSERS
    return KeyStyle.OFFICIAL if prefixes else KeyStyle.BARE_PEFT
