"""What a Gemma 3 text model is made of, as ``config.json`` or the shapes of its parameters say; its keys.

Source: the released checkpoint and the configuration files of transformers, old and new style.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self, cast

from diffsynth.errors import CheckpointError

Shapes = Mapping[str, tuple[int, ...]]
LayerKind = Literal["sliding_attention", "full_attention"]

KEY_PREFIXES: dict[str, str] = {"language_model.model.": "", "model.language_model.": "", "model.": ""}
"""As released, as saved again, as repackaged.  Other parts share some of them: :func:`text_key` tells."""

_TEXT_KEY = re.compile(r"embed_tokens\.|layers\.\d+\.|norm\.")
HINT = "use the folder of google/gemma-3-12b-it-qat-q4_0-unquantized"


def text_key(key: str) -> str | None:
    """Map a key of any Gemma 3 file to the key of the text model; None for all that is not text.

    Vision tower, projector and language model head give None.  Keys of the module itself map to themselves.
    """
    for prefix in (*KEY_PREFIXES, ""):
        if key.startswith(prefix) and _TEXT_KEY.match(key, len(prefix)):
            return key[len(prefix) :]
    return None


@dataclass(frozen=True, kw_only=True, slots=True)
class Gemma3Config:
    """The text part of ``config.json``; defaults are those that the file format defines for absent keys."""

    hidden_size: int
    intermediate_size: int
    layer_kinds: tuple[LayerKind, ...]
    num_attention_heads: int = 8
    num_key_value_heads: int = 4
    head_dim: int = 256
    vocab_size: int = 262_208
    rms_norm_eps: float = 1e-6
    query_pre_attn_scalar: float = 256.0
    sliding_window: int = 4096
    rope_theta_full: float = 1_000_000.0
    rope_theta_sliding: float = 10_000.0
    rope_factor_full: float = 1.0
    """Linear RoPE scaling of the full attention layers: their frequencies are divided by it."""

    @property
    def num_hidden_states(self) -> int:
        """Scaled embedding, outputs of all layers but the last, normed output of the last: L + 1."""
        return len(self.layer_kinds) + 1

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Self:
        """Parse ``config.json``: the whole file or its ``text_config``, in the old or the new key style.

        Keys that are not read here only steer training, generation or the library.  The model type pins
        the architecture, and every key that could change it is checked.

        Raises:
            CheckpointError: another architecture, or a variation of Gemma 3 that is not implemented.
        """
        text = config.get("text_config", config)
        kind = text.get("model_type")
        if kind != "gemma3_text" or config.get("model_type") not in ("gemma3", "gemma3_text"):
            found = config.get("model_type") or config.get("architectures")
            raise CheckpointError(f"the text encoder is not Gemma 3 but {found!r}", hint=HINT)
        _refuse_variations(text)
        missing = [k for k in ("hidden_size", "intermediate_size", "num_hidden_layers") if k not in text]
        if missing:
            raise CheckpointError(f"the Gemma 3 configuration lacks {missing}", hint=HINT)
        optional = (
            *("num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size"),
            *("rms_norm_eps", "query_pre_attn_scalar", "sliding_window"),
        )
        full, sliding = _rope_parameters(text)
        return cls(
            hidden_size=text["hidden_size"],
            intermediate_size=text["intermediate_size"],
            layer_kinds=_layer_kinds(text),
            rope_theta_full=float(full["rope_theta"]),
            rope_theta_sliding=float(sliding["rope_theta"]),
            rope_factor_full=float(full.get("factor", 1.0)),
            **{key: text[key] for key in optional if key in text},
        )

    @classmethod
    def infer(cls, shapes: Shapes) -> Self:
        """From parameter shapes (keys of any file); what leaves no trace in them is as released for 12B.

        Raises:
            CheckpointError: the keys are not those of a Gemma 3 text model.
        """
        found = {text_key(key): shape for key, shape in shapes.items()}
        try:
            vocab_size, hidden_size = found["embed_tokens.weight"]
            (head_dim,) = found["layers.0.self_attn.q_norm.weight"]
            query_width = found["layers.0.self_attn.q_proj.weight"][0]
            key_width = found["layers.0.self_attn.k_proj.weight"][0]
            intermediate_size = found["layers.0.mlp.gate_proj.weight"][0]
        except KeyError as error:
            raise CheckpointError(f"no Gemma 3 text model: {error} is missing", hint=HINT) from None
        num_layers = 1 + max(int(key.split(".")[1]) for key in found if key and key.startswith("layers."))
        return cls(
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
            layer_kinds=_pattern(num_layers, 6),
            num_attention_heads=query_width // head_dim,
            num_key_value_heads=key_width // head_dim,
            head_dim=head_dim,
            vocab_size=vocab_size,
            sliding_window=1024,
            rope_factor_full=8.0,
        )


def _refuse_variations(text: Mapping[str, Any]) -> None:
    """Raise CheckpointError for values that the network below does not implement."""
    implemented: dict[str, tuple[Any, ...]] = {
        "hidden_activation": ("gelu_pytorch_tanh",),
        "attention_bias": (False, None),
        "attn_logit_softcapping": (None,),
        "use_bidirectional_attention": (False, None),
    }
    for key, values in implemented.items():
        if key in text and text[key] not in values:
            raise CheckpointError(f"Gemma 3 with {key}={text[key]!r} is not supported", hint=HINT)


def _rope_parameters(text: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """RoPE of the full and of the sliding layers, from either key style."""
    new_style = text.get("rope_parameters") or {}
    full = {"rope_theta": text.get("rope_theta", 1e6)} | (new_style.get("full_attention") or {})
    full |= text.get("rope_scaling") or {}
    sliding = {"rope_theta": text.get("rope_local_base_freq", 1e4)}
    sliding |= new_style.get("sliding_attention") or {}
    kinds = [rope.get("rope_type", rope.get("type", "default")) for rope in (full, sliding)]
    if kinds[0] not in ("default", "linear") or kinds[1] != "default" or "rope_type" in new_style:
        raise CheckpointError(f"Gemma 3 with RoPE kinds {kinds} is not supported", hint=HINT)
    if kinds[0] == "default":
        full.pop("factor", None)
    return full, sliding


def _layer_kinds(text: Mapping[str, Any]) -> tuple[LayerKind, ...]:
    num_layers: int = text["num_hidden_layers"]
    if text.get("layer_types") is None:
        period = text.get("sliding_window_pattern", text.get("_sliding_window_pattern", 6))
        return _pattern(num_layers, period)
    kinds = tuple(text["layer_types"])
    if len(kinds) != num_layers or not set(kinds) <= {"sliding_attention", "full_attention"}:
        raise CheckpointError(
            f"Gemma 3: layer_types {sorted(set(kinds))} for {len(kinds)} of {num_layers} layers",
            hint=HINT,
        )
    return cast("tuple[LayerKind, ...]", kinds)


def _pattern(num_layers: int, period: int) -> tuple[LayerKind, ...]:
    """Every ``period``-th layer has full attention, the others the sliding window."""
    return tuple("sliding_attention" if (i + 1) % period else "full_attention" for i in range(num_layers))
