"""Embeddings connectors: small bidirectional transformers between the text features and the diffusion model.

n valid tokens of a prompt, T context length (1024 as released), R learned registers (128), W width, H heads,
d head size.

Every context has T positions: the n features first, then registers instead of padding.

Source: official ltx-core 1.0.0; agrees with the text connectors of diffusers 0.42.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn

from diffsynth.errors import CheckpointError
from diffsynth.models.ltx2.config import Sections, Shapes, parse_section
from diffsynth.models.ltx2.feature_extractor import FeatureExtractor, FeatureExtractorConfig, PromptFeatures
from diffsynth.models.ltx2.layers import Attention, FeedForward, rms_norm
from diffsynth.models.ltx2.rope import GridPrecision, RopeLayout, RopeTable, rope_table

KEY_PREFIXES: dict[str, str] = {
    "text_embedding_projection.": "text_embedding_projection.",
    "model.diffusion_model.video_embeddings_connector.": "video_embeddings_connector.",
    "model.diffusion_model.audio_embeddings_connector.": "audio_embeddings_connector.",
    "video_embeddings_connector.": "video_embeddings_connector.",
    "audio_embeddings_connector.": "audio_embeddings_connector.",
}

# Keys of the ``transformer`` section that concern the diffusion transformer alone (or only training).
_TRANSFORMER_KEYS = frozenset(
    {
        *("_class_name", "_diffusers_version", "apply_gated_attention", "attention_bias", "attention_type"),
        *("audio_cross_attention_dim", "audio_ff_bias", "audio_in_channels", "audio_out_channels"),
        *("audio_positional_embedding_max_pos", "av_ca_timestep_scale_multiplier", "av_cross_ada_norm"),
        *("causal_temporal_positioning", "cross_attention_adaln", "cross_attention_dim"),
        *("audio_connector_learnable_registers_std", "connector_learnable_registers_std"),
        *("cross_attention_norm", "double_self_attention", "dropout", "ff_bias", "in_channels"),
        *("norm_elementwise_affine", "norm_eps", "norm_num_groups", "num_embeds_ada_norm", "num_layers"),
        *("num_vector_embeds", "only_cross_attention", "out_channels", "positional_embedding_max_pos"),
        *("positional_embedding_type", "share_ff", "timestep_scale_multiplier", "upcast_attention"),
        *("use_audio_video_cross_attention", "use_keyframes_abs_pos_embedding"),
        *("use_linear_projection", "use_middle_indices_grid", "use_prompt_adaln_single"),
    }
)

# What the connectors implement; the norms of the connectors use 1e-6 whatever ``norm_eps`` says.
_REQUIRED = {
    "activation_fn": "gelu-approximate",
    "audio_connector_norm_output": True,
    "connector_norm_output": True,
    "positional_embedding_theta": 10000.0,
    "qk_norm": "rms_norm",
    "standardization_norm": "rms_norm",
    "use_embeddings_connector": True,
}

_HINT = "the file is newer than this diffsynth, or another model: `diffsynth inspect FILE`"

TEXT_LENGTH = 1024
"""Positions of a context in the released models, which state them nowhere."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ConnectorConfig:
    """One connector.  What leaves no trace in shapes defaults to the values of both released models."""

    num_layers: int
    num_heads: int
    head_dim: int
    num_registers: int
    gated: bool
    max_pos: int = 4096
    rope_layout: RopeLayout = RopeLayout.SPLIT
    rope_precision: GridPrecision = GridPrecision.FLOAT64

    @property
    def width(self) -> int:
        """W, of features in and context out."""
        return self.num_heads * self.head_dim


@dataclass(frozen=True, kw_only=True, slots=True)
class _Section:
    """The keys that are read, with the defaults of the file format (those of the official code)."""

    caption_channels: int
    text_length: int | None = None
    num_attention_heads: int = 32
    attention_head_dim: int = 128
    audio_num_attention_heads: int = 32
    audio_attention_head_dim: int = 64
    rope_type: str = "interleaved"
    frequencies_precision: str = "float32"
    connector_num_attention_heads: int = 30
    connector_attention_head_dim: int = 128
    connector_num_layers: int = 2
    connector_num_learnable_registers: int = 128
    connector_positional_embedding_max_pos: tuple[int, ...] = (1,)
    connector_apply_gated_attention: bool = False
    audio_connector_num_attention_heads: int | None = None
    audio_connector_attention_head_dim: int | None = None
    audio_connector_num_layers: int | None = None
    audio_connector_num_learnable_registers: int | None = None
    audio_connector_positional_embedding_max_pos: tuple[int, ...] | None = None
    audio_connector_apply_gated_attention: bool | None = None
    caption_proj_before_connector: bool | None = None
    caption_proj_input_norm: bool | None = None
    caption_projection_first_linear: bool | None = None
    caption_projection_second_linear: bool | None = None
    text_encoder_norm_type: str | None = None

    def is_separate(self) -> bool:
        """Whether the checkpoint has the LTX-2.3 form.  Raises CheckpointError when it has neither."""
        marks = (
            self.caption_proj_before_connector,
            self.caption_proj_input_norm,
            self.caption_projection_first_linear,
            self.caption_projection_second_linear,
        )
        form = {(None,) * 4: False, (True, False, False, False): True}.get(marks)
        norms = ("per_token_rms", None) if form else (None,)
        if form is None or self.text_encoder_norm_type not in norms:
            raise CheckpointError(
                f"unknown text path: caption_proj* {marks}, norm {self.text_encoder_norm_type!r}", hint=_HINT
            )
        return form

    def length(self) -> int:
        """Positions of a context.  Raises CheckpointError when registers do not fill what is stated."""
        if self.text_length is None:
            return TEXT_LENGTH
        for registers in (self.connector(audio=audio).num_registers for audio in (False, True)):
            if self.text_length < 1 or self.text_length % registers:
                raise CheckpointError(
                    f"a text length of {self.text_length} for {registers} registers", hint=_HINT
                )
        return self.text_length

    def connector(self, *, audio: bool) -> ConnectorConfig:
        """One connector; the audio keys fall back to the plain ones field by field."""

        def value(name: str) -> int:
            own = getattr(self, f"audio_connector_{name}") if audio else None
            return getattr(self, f"connector_{name}") if own is None else own

        max_pos = self.connector_positional_embedding_max_pos
        if audio and self.audio_connector_positional_embedding_max_pos is not None:
            max_pos = self.audio_connector_positional_embedding_max_pos
        if len(max_pos) != 1 or value("num_learnable_registers") < 1:
            raise CheckpointError("a connector needs registers and positions on one axis", hint=_HINT)
        if self.rope_type not in list(RopeLayout) or self.frequencies_precision not in list(GridPrecision):
            raise CheckpointError(f"unknown RoPE {self.rope_type}, {self.frequencies_precision}", hint=_HINT)
        return ConnectorConfig(
            num_layers=value("num_layers"),
            num_heads=value("num_attention_heads"),
            head_dim=value("attention_head_dim"),
            num_registers=value("num_learnable_registers"),
            gated=bool(value("apply_gated_attention")),
            max_pos=max_pos[0],
            rope_layout=RopeLayout(self.rope_type),
            rope_precision=GridPrecision(self.frequencies_precision),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class TextConnectorsConfig:
    """Feature extractor and both connectors.

    ``text_length`` is T: a diffusion transformer reads as many positions as it was trained with.
    """

    features: FeatureExtractorConfig
    video: ConnectorConfig
    audio: ConnectorConfig
    text_length: int = TEXT_LENGTH

    def __post_init__(self) -> None:
        """Raises CheckpointError when a connector does not fit the features it receives."""
        feature_widths = (self.features.video_width, self.features.audio_width)
        if feature_widths != (self.video.width, self.audio.width):
            widths = (self.video.width, self.audio.width)
            raise CheckpointError(
                f"text features {feature_widths} and connectors {widths} differ", hint=_HINT
            )

    @classmethod
    def from_sections(cls, config: Sections, shapes: Shapes | None = None) -> Self:
        """From the ``transformer`` section of the checkpoint's metadata.

        Args:
            config: the parsed metadata.
            shapes: of the checkpoint (file or module keys).  No section states how many hidden states the
                projection reads; without shapes it is the released 49.

        Raises:
            CheckpointError: no such section, an unknown key, or a value that is not implemented.
        """
        if "transformer" not in config:
            raise CheckpointError("the metadata has no section 'transformer'", hint=_HINT)
        section = parse_section(
            _Section, config["transformer"], ignored=_TRANSFORMER_KEYS, required=_REQUIRED
        )
        hidden_size, separate = section.caption_channels, section.is_separate()
        widths = (hidden_size, hidden_size)
        if separate:
            widths = (
                section.num_attention_heads * section.attention_head_dim,
                section.audio_num_attention_heads * section.audio_attention_head_dim,
            )
        num_states = 49 if shapes is None else _num_states(_module_keys(shapes), hidden_size)
        return cls(
            features=FeatureExtractorConfig(
                hidden_size=hidden_size,
                num_states=num_states,
                separate=separate,
                video_width=widths[0],
                audio_width=widths[1],
            ),
            video=section.connector(audio=False),
            audio=section.connector(audio=True),
            text_length=section.length(),
        )

    @classmethod
    def infer(cls, shapes: Shapes) -> Self:
        """From parameter shapes (file or module keys); what leaves no trace in them is as released.

        Raises:
            CheckpointError: keys are missing, or the sizes are not those of a released model.
        """
        found = _module_keys(shapes)
        separate = "text_embedding_projection.video_aggregate_embed.weight" in found
        stem = "text_embedding_projection."
        names = ("video_aggregate_embed", "audio_aggregate_embed") if separate else ("aggregate_embed",)
        weights = [_shape(found, f"{stem}{name}.weight") for name in names]
        hidden_size = weights[0][1] // 49 if separate else weights[0][0]
        features = FeatureExtractorConfig(
            hidden_size=hidden_size,
            num_states=_num_states(found, hidden_size),
            separate=separate,
            video_width=weights[0][0],
            audio_width=weights[-1][0],
        )
        video, audio = (
            _infer_connector(found, f"{stream}_embeddings_connector.") for stream in ("video", "audio")
        )
        return cls(features=features, video=video, audio=audio)


def _module_keys(shapes: Shapes) -> dict[str, tuple[int, ...]]:
    """Shapes below the known prefixes, with the keys of :class:`TextConnectors`."""
    return {
        module + key.removeprefix(file): tuple(shape)
        for key, shape in shapes.items()
        for file, module in KEY_PREFIXES.items()
        if key.startswith(file)
    }


def _shape(shapes: Mapping[str, tuple[int, ...]], key: str) -> tuple[int, ...]:
    if key not in shapes:
        raise CheckpointError(f"no text connectors: {key} is missing", hint=_HINT)
    return shapes[key]


def _num_states(shapes: Mapping[str, tuple[int, ...]], hidden_size: int) -> int:
    """Hidden states that the projection reads: its input width over the text width."""
    stem = "text_embedding_projection."
    name = "video_aggregate_embed" if f"{stem}video_aggregate_embed.weight" in shapes else "aggregate_embed"
    inputs = _shape(shapes, f"{stem}{name}.weight")[1]
    if inputs % hidden_size:
        raise CheckpointError(f"text projection: {inputs} inputs do not divide by {hidden_size}", hint=_HINT)
    return inputs // hidden_size


def _infer_connector(shapes: Mapping[str, tuple[int, ...]], prefix: str) -> ConnectorConfig:
    num_registers, width = _shape(shapes, f"{prefix}learnable_registers")
    blocks = {key.split(".")[2] for key in shapes if key.startswith(f"{prefix}transformer_1d_blocks.")}
    gate = shapes.get(f"{prefix}transformer_1d_blocks.0.attn1.to_gate_logits.weight")
    # Only gates count heads; the connectors without gates are those of LTX-2, whose heads are 128 wide.
    num_heads = width // 128 if gate is None else gate[0]
    if not num_heads or width % num_heads:
        raise CheckpointError(f"{prefix} a width of {width} does not tell the number of heads", hint=_HINT)
    return ConnectorConfig(
        num_layers=len(blocks),
        num_heads=num_heads,
        head_dim=width // num_heads,
        num_registers=num_registers,
        gated=gate is not None,
    )


class ConnectorBlock(nn.Module):
    """Pre-norm self-attention without mask, then feed-forward; the norms have no weights."""

    def __init__(self, config: ConnectorConfig) -> None:
        super().__init__()
        width = config.width
        self.attn1 = Attention(width, width, config.num_heads, config.head_dim, gated=config.gated)
        self.ff = FeedForward(width)

    def forward(self, xs: Sequence[Tensor], rope: RopeTable) -> list[Tensor]:
        """Run all rows in one call, one after another: memory and rounding of a row are those of it alone.

        Args:
            xs: one [1, T, W] per prompt.
            rope: of the T positions, the same for all rows.
        """
        return [self._one(x, rope) for x in xs]

    def _one(self, x: Tensor, rope: RopeTable) -> Tensor:
        x = x + self.attn1(rms_norm(x), rope=rope)
        return x + self.ff(rms_norm(x))


class EmbeddingsConnector(nn.Module):
    """Features of a prompt's tokens -> context of fixed length for one stream."""

    def __init__(self, config: ConnectorConfig) -> None:
        super().__init__()
        self.config = config
        self.learnable_registers = nn.Parameter(torch.zeros(config.num_registers, config.width))
        self.transformer_1d_blocks = nn.ModuleList(ConnectorBlock(config) for _ in range(config.num_layers))

    def with_registers(self, features: Tensor, length: int) -> Tensor:
        """Fill up to ``length``: position p beyond the n features holds register p mod R.

        Args:
            features: [n, W], n <= length.
            length: T, a multiple of R.

        Returns:
            [1, T, W], dtype and device of the features.
        """
        num_registers = self.config.num_registers
        if length % num_registers or len(features) > length:
            raise ValueError(
                f"length={length} must be a multiple of {num_registers} and hold {len(features)} tokens"
            )
        registers = self.learnable_registers.to(features).repeat(length // num_registers, 1)
        return torch.cat((features, registers[len(features) :]))[None]

    def rope(self, length: int, device: torch.device) -> RopeTable:
        """Rotation of positions 0..T-1, [1, H, T, d/2] float32; made on the CPU: the same on every device."""
        c = self.config
        fractions = (torch.arange(length, dtype=torch.float32) / c.max_pos)[None, :, None]
        table = rope_table(
            fractions, width=c.width, heads=c.num_heads, layout=c.rope_layout, precision=c.rope_precision
        )
        return RopeTable(table.cos.to(device), table.sin.to(device), table.layout)

    def forward(self, features: Sequence[Tensor], length: int) -> list[Tensor]:
        """Contexts of some prompts, independent of each other.

        Args:
            features: one [n, W] per prompt in the compute dtype, valid tokens only; n may differ.
            length: T, a multiple of the number of registers.

        Returns:
            One [1, T, W] per prompt.  All positions are valid: no mask goes with them.
        """
        xs = [self.with_registers(row, length) for row in features]
        rope = self.rope(length, xs[0].device)
        for block in self.transformer_1d_blocks:
            xs = block(xs, rope)
        return [rms_norm(x) for x in xs]


class Contexts(NamedTuple):
    """What the diffusion transformer reads for one prompt: video [1, T, Wv], audio [1, T, Wa]."""

    video: Tensor
    audio: Tensor


class TextConnectors(nn.Module):
    """All of the text path that lies in the LTX-2 checkpoint: feature extractor and both connectors."""

    def __init__(self, config: TextConnectorsConfig) -> None:
        super().__init__()
        self.config = config
        self.text_embedding_projection = FeatureExtractor(config.features)
        self.video_embeddings_connector = EmbeddingsConnector(config.video)
        self.audio_embeddings_connector = EmbeddingsConnector(config.audio)

    def forward(self, features: Sequence[PromptFeatures], length: int) -> list[Contexts]:
        """Run both connectors.  Args: features in the compute dtype, one per prompt; length: T."""
        video = self.video_embeddings_connector([row.video for row in features], length)
        audio = self.audio_embeddings_connector([row.audio for row in features], length)
        return [Contexts(*pair) for pair in zip(video, audio, strict=True)]
