"""Configuration of the transformer, from the checkpoint's metadata or from its shapes."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Self

from diffsynth.errors import CheckpointError
from diffsynth.models.ltx2.config import Sections, Shapes, parse_section
from diffsynth.models.ltx2.rope import GridPrecision, RopeLayout

FILE_PREFIX = "model.diffusion_model."

# The section "transformer" also configures the text connectors and the caption projection before them.
_TEXT_SIDE = frozenset(
    f"{stream}connector_{name}"
    for stream in ("", "audio_")
    for name in (
        "apply_gated_attention",
        "attention_head_dim",
        "learnable_registers_std",
        "norm_output",
        "num_attention_heads",
        "num_layers",
        "num_learnable_registers",
        "positional_embedding_max_pos",
    )
) | {
    "caption_proj_input_norm",
    "caption_projection_first_linear",
    "caption_projection_second_linear",
    "text_encoder_norm_type",
    "text_length",
    "use_embeddings_connector",
}

# Keys of the training code and of position making (done before the tokens arrive).
_WITHOUT_EFFECT = frozenset(
    {
        "_diffusers_version",
        "causal_temporal_positioning",
        "cross_attention_norm",
        "dropout",
        "norm_num_groups",
        "num_embeds_ada_norm",
    }
)

# The only values that this network implements.
_REQUIRED: dict[str, Any] = {
    "_class_name": "AVTransformer3DModel",
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "attention_type": "default",
    "audio_ff_bias": True,
    "av_cross_ada_norm": True,
    "double_self_attention": False,
    "ff_bias": True,
    "norm_elementwise_affine": False,
    "num_vector_embeds": None,
    "only_cross_attention": False,
    "positional_embedding_type": "rope",
    "qk_norm": "rms_norm",
    "share_ff": False,
    "standardization_norm": "rms_norm",
    "upcast_attention": False,
    "use_audio_video_cross_attention": True,
    "use_keyframes_abs_pos_embedding": False,
    "use_linear_projection": False,
    "use_middle_indices_grid": True,
    "use_prompt_adaln_single": True,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class TransformerConfig:
    """As the section ``transformer`` states it; a default is what the format means by an absent key.

    ``has_audio`` is no key: it says whether the file holds the audio stream.
    """

    num_layers: int
    num_attention_heads: int
    attention_head_dim: int
    in_channels: int
    out_channels: int
    cross_attention_dim: int
    caption_channels: int
    norm_eps: float
    positional_embedding_theta: float
    positional_embedding_max_pos: tuple[int, ...]
    timestep_scale_multiplier: float = 1000
    audio_num_attention_heads: int = 32
    audio_attention_head_dim: int = 64
    audio_in_channels: int = 128
    audio_out_channels: int = 128
    audio_cross_attention_dim: int = 2048
    audio_positional_embedding_max_pos: tuple[int, ...] = (20,)
    av_ca_timestep_scale_multiplier: float = 1
    rope_type: str = RopeLayout.INTERLEAVED
    frequencies_precision: str = GridPrecision.FLOAT32
    apply_gated_attention: bool = False
    cross_attention_adaln: bool = False
    caption_proj_before_connector: bool = False
    has_audio: bool = True

    def __post_init__(self) -> None:
        known_rope = self.rope_type in set(RopeLayout) and self.frequencies_precision in set(GridPrecision)
        if not known_rope:
            raise CheckpointError(
                f"TransformerConfig: rope_type={self.rope_type!r} with "
                f"frequencies_precision={self.frequencies_precision!r} is not supported",
                hint="the file is newer than this diffsynth: `diffsynth inspect FILE`",
            )
        if self.has_audio and self.audio_num_attention_heads != self.num_attention_heads:
            raise CheckpointError(
                f"TransformerConfig: {self.audio_num_attention_heads} audio heads beside "
                f"{self.num_attention_heads} video heads; they share the cross-modal rotation",
                hint="the file belongs to another model: `diffsynth inspect FILE`",
            )

    @property
    def width(self) -> int:
        """Hidden width of the video stream."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def audio_width(self) -> int:
        """Hidden width of the audio stream, and the inner width of cross-modal attention."""
        return self.audio_num_attention_heads * self.audio_attention_head_dim

    @property
    def modulation_rows(self) -> int:
        """Rows of a block's table: three each for self-attention, feed-forward and, in LTX-2.3, text."""
        return 9 if self.cross_attention_adaln else 6

    @classmethod
    def from_sections(cls, config: Sections, keys: Iterable[str] | None = None) -> Self:
        """From the parsed JSON of the metadata key ``config``.

        Args: keys: names of the tensors of the file; given, they tell a file without the audio stream, whose
            metadata is the same.
        Raises: CheckpointError for a missing section, an unknown key or a value that is not implemented.
        """
        if "transformer" not in config:
            raise CheckpointError(
                f"the metadata has no section 'transformer', only {sorted(config)}",
                hint="the file holds another part of the model: `diffsynth inspect FILE`",
            )
        section = config["transformer"]
        if "has_audio" in section:
            raise CheckpointError("TransformerConfig: unknown keys ['has_audio']")
        parsed = parse_section(cls, section, ignored=_TEXT_SIDE | _WITHOUT_EFFECT, required=_REQUIRED)
        if keys is None:
            return parsed
        return replace(parsed, has_audio=_holds_audio(keys))

    @classmethod
    def infer(cls, shapes: Shapes) -> Self:
        """From shapes alone; what leaves no trace in them has the value of the released checkpoints.

        Args: shapes: parameter name, with or without the file prefix, to shape.
        Raises: CheckpointError when a key that the network needs is absent.
        """
        own = {name.removeprefix(FILE_PREFIX): tuple(shape) for name, shape in shapes.items()}
        blocks = [int(m[1]) for m in (re.match(r"transformer_blocks\.(\d+)\.", name) for name in own) if m]
        try:
            return cls(
                num_layers=max(blocks, default=-1) + 1,
                has_audio=_holds_audio(own),
                caption_channels=own.get("caption_projection.linear_1.weight", (0, 3840))[1],
                norm_eps=1e-6,
                positional_embedding_theta=10000.0,
                positional_embedding_max_pos=(20, 2048, 2048),
                av_ca_timestep_scale_multiplier=1000.0,
                rope_type=RopeLayout.SPLIT,
                frequencies_precision=GridPrecision.FLOAT64,
                apply_gated_attention="transformer_blocks.0.attn1.to_gate_logits.weight" in own,
                cross_attention_adaln="prompt_adaln_single.linear.weight" in own,
                caption_proj_before_connector="caption_projection.linear_1.weight" not in own,
                **_stream_sizes(own, ""),
                **(_stream_sizes(own, "audio_") if _holds_audio(own) else {}),
            )
        except (KeyError, ValueError) as error:
            raise CheckpointError(
                f"not an LTX-2 transformer: {error!r} while reading its shapes",
                hint="the file holds another model or only a part of it: `diffsynth inspect FILE`",
            ) from error


def _holds_audio(names: Iterable[str]) -> bool:
    return any(name.removeprefix(FILE_PREFIX).startswith("audio_patchify_proj.") for name in names)


def _stream_sizes(shapes: Shapes, prefix: str) -> dict[str, Any]:
    """Sizes of one stream; the number of heads shows only in the gates, and is 32 in the released files."""
    block = f"transformer_blocks.0.{prefix}"
    width, in_channels = shapes[f"{prefix}patchify_proj.weight"]
    (heads, *_) = shapes.get(f"{block}attn1.to_gate_logits.weight", (32,))
    return {
        f"{prefix}num_attention_heads": heads,
        f"{prefix}attention_head_dim": width // heads,
        f"{prefix}in_channels": in_channels,
        f"{prefix}out_channels": shapes[f"{prefix}proj_out.weight"][0],
        f"{prefix}cross_attention_dim": shapes[f"{block}attn2.to_k.weight"][1],
    }
