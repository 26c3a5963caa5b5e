"""The LTX-2 / LTX-2.3 transformer: from noisy audio and video tokens to their velocities.

Legend: B batch, T tokens of a stream, S text tokens, C token width, D hidden width, H heads.
Source: official ltx-core 1.0.0 and the official monorepo 1.2.0 (cross-modal timesteps); HaCohen et al., LTX-2
(arXiv 2601.03233).

A forward pass has three parts: preparation (embeddings, tables, modulation), the blocks, the output heads.
``forward_passes`` runs any number of passes block by block, so that all of them share one traversal of the
weights; passes that share input tensors also share what the preparation makes of them.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from diffsynth.models.ltx2.block import TransformerBlock
from diffsynth.models.ltx2.layers import TextProjection
from diffsynth.models.ltx2.modulation import AdaLNSingle, modulate
from diffsynth.models.ltx2.preparation import Preparation, StreamNetworks
from diffsynth.models.ltx2.streams import (
    CrossTimestep,
    Modality,
    Pass,
    PassState,
    Perturbation,
    Perturbations,
    SkipKind,
    StreamState,
)
from diffsynth.models.ltx2.transformer_config import FILE_PREFIX, TransformerConfig

__all__ = [
    "EXCLUDED_PREFIXES",
    "KEY_PREFIXES",
    "CrossTimestep",
    "LTX2Transformer",
    "Modality",
    "Pass",
    "PassState",
    "Perturbation",
    "Perturbations",
    "SkipKind",
    "StreamState",
    "TransformerBlock",
    "TransformerConfig",
]

KEY_PREFIXES = {FILE_PREFIX: ""}
"""File prefix -> module prefix."""

EXCLUDED_PREFIXES = (
    f"{FILE_PREFIX}video_embeddings_connector.",
    f"{FILE_PREFIX}audio_embeddings_connector.",
)
"""Keys below the file prefix that belong to the text side."""

Velocities = tuple[Tensor | None, Tensor | None]
"""Velocity of video and of audio, (B, T, C) each; None for a stream that is absent or has no tokens."""


class LTX2Transformer(nn.Module):
    """The denoising network of both checkpoints; parameter names are those of the checkpoint."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        width, rows = config.width, config.modulation_rows
        self.patchify_proj = nn.Linear(config.in_channels, width)
        self.adaln_single = AdaLNSingle(width, rows)
        self.scale_shift_table = nn.Parameter(torch.zeros(2, width))
        self.proj_out = nn.Linear(width, config.out_channels)
        self.caption_projection = self._text_projection(width)
        self.prompt_adaln_single = self._prompt_adaln(width)
        if config.has_audio:
            self._add_audio(config)
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(config, index) for index in range(config.num_layers)
        )

    def _add_audio(self, config: TransformerConfig) -> None:
        width, audio = config.width, config.audio_width
        self.audio_patchify_proj = nn.Linear(config.audio_in_channels, audio)
        self.audio_adaln_single = AdaLNSingle(audio, config.modulation_rows)
        self.audio_scale_shift_table = nn.Parameter(torch.zeros(2, audio))
        self.audio_proj_out = nn.Linear(audio, config.audio_out_channels)
        self.audio_caption_projection = self._text_projection(audio)
        self.audio_prompt_adaln_single = self._prompt_adaln(audio)
        self.av_ca_video_scale_shift_adaln_single = AdaLNSingle(width, 4)
        self.av_ca_audio_scale_shift_adaln_single = AdaLNSingle(audio, 4)
        self.av_ca_a2v_gate_adaln_single = AdaLNSingle(width, 1)
        self.av_ca_v2a_gate_adaln_single = AdaLNSingle(audio, 1)

    def _text_projection(self, width: int) -> TextProjection | None:
        before = self.config.caption_proj_before_connector
        return None if before else TextProjection(self.config.caption_channels, width)

    def _prompt_adaln(self, width: int) -> AdaLNSingle | None:
        return AdaLNSingle(width, 2) if self.config.cross_attention_adaln else None

    def forward(
        self,
        video: Modality | None,
        audio: Modality | None,
        perturbations: Perturbations | None = None,
        *,
        cross_timestep: CrossTimestep = CrossTimestep.TOKENWISE,
        chunk_tokens: int | None = None,
    ) -> Velocities:
        """One pass; see :meth:`forward_passes`, which gives the same bits for it among others."""
        one = Pass(video=video, audio=audio, perturbations=perturbations)
        return self.forward_passes([one], cross_timestep=cross_timestep, chunk_tokens=chunk_tokens)[0]

    def forward_passes(
        self,
        passes: Sequence[Pass],
        *,
        cross_timestep: CrossTimestep = CrossTimestep.TOKENWISE,
        chunk_tokens: int | None = None,
    ) -> list[Velocities]:
        """Run several passes in one traversal of the blocks.

        Inside a block the passes follow one another, so the working memory is that of one pass; every
        further pass adds its hidden states (2*D bytes per token in bf16).

        Args:
            passes: what to run; see :class:`Pass` about sharing.
            cross_timestep: source of the cross-modal modulation.
            chunk_tokens: tokens that a feed-forward handles at once, None for all.

        Returns: per pass the velocity ``noise - x0`` of video and audio, (B, T, C), dtype of the latent;
            None for a stream that is absent or has no tokens.

        Raises:
            RequestError: audio for a network without audio, or perturbations that fit neither the batch nor
                the number of blocks.
        """
        preparation = Preparation(self.config, *self._stream_networks(), cross_timestep, chunk_tokens)
        states = [preparation.state(item) for item in passes]
        for block in self.transformer_blocks:
            block(states)
        return [self._velocities(state) for state in states]

    def _stream_networks(self) -> tuple[StreamNetworks, StreamNetworks | None]:
        """The modules outside the blocks that prepare video, and audio if the network has it."""
        has_audio = self.config.has_audio
        video = StreamNetworks(
            width=self.config.width,
            max_pos=self.config.positional_embedding_max_pos,
            patchify=self.patchify_proj,
            adaln=self.adaln_single,
            prompt_adaln=self.prompt_adaln_single,
            text=self.caption_projection,
            cross_scale_shift=self.av_ca_video_scale_shift_adaln_single if has_audio else None,
            cross_gate=self.av_ca_a2v_gate_adaln_single if has_audio else None,
        )
        if not has_audio:
            return video, None
        return video, StreamNetworks(
            width=self.config.audio_width,
            max_pos=self.config.audio_positional_embedding_max_pos,
            patchify=self.audio_patchify_proj,
            adaln=self.audio_adaln_single,
            prompt_adaln=self.audio_prompt_adaln_single,
            text=self.audio_caption_projection,
            cross_scale_shift=self.av_ca_audio_scale_shift_adaln_single,
            cross_gate=self.av_ca_v2a_gate_adaln_single,
        )

    def _velocities(self, state: PassState) -> Velocities:
        video, audio = state.video, state.audio
        return (
            None if video is None else self._head(video, self.scale_shift_table, self.proj_out),
            None if audio is None else self._head(audio, self.audio_scale_shift_table, self.audio_proj_out),
        )

    def _head(self, stream: StreamState, table: Tensor, projection: nn.Module) -> Tensor:
        """LayerNorm without weights, shift (row 0) and scale (row 1) from the timestep embedding, linear."""
        normed = functional.layer_norm(stream.hidden, stream.hidden.shape[-1:], eps=self.config.norm_eps)
        scale = stream.embedded.row(1, table[1], one_plus=True)
        return projection(modulate(normed, scale, stream.embedded.row(0, table[0])))
