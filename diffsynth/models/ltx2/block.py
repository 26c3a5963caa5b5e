"""One block of the dual-stream transformer.

Legend: B batch, T tokens of a stream, D hidden width.  v video, a audio.
Source: official ltx-core 1.0.0.

Rows of the tables: ``scale_shift_table`` 0 shift, 1 scale, 2 gate of self-attention; 3, 4, 5 the same of the
feed-forward; 6, 7, 8 the same of text attention (LTX-2.3).  The two cross-modal tables put scale *before*
shift: 0 scale, 1 shift for audio-to-video; 2 scale, 3 shift for video-to-audio; 4 gate of what the stream
receives.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from diffsynth.models.ltx2.layers import Attention, FeedForward, rms_norm
from diffsynth.models.ltx2.modulation import Modulation, add_residual, modulate
from diffsynth.models.ltx2.streams import PassState, SkipKind, StreamState
from diffsynth.models.ltx2.transformer_config import TransformerConfig


class Rows(NamedTuple):
    """Row numbers of one modulated sub-step."""

    shift: int
    scale: int
    gate: int


SELF_ATTENTION = Rows(0, 1, 2)
FEED_FORWARD = Rows(3, 4, 5)
TEXT_ATTENTION = Rows(6, 7, 8)
# Rows of a stream's cross-modal table when it takes part in each direction; the gate is its row 4.
AUDIO_TO_VIDEO = Rows(1, 0, 4)
VIDEO_TO_AUDIO = Rows(3, 2, 4)


class CrossSide(NamedTuple):
    """A stream in the exchange: its state, its hidden state normalised before it, its cross-modal table."""

    stream: StreamState
    normed: Tensor
    table: Tensor


class TransformerBlock(nn.Module):
    """Self-attention and text attention per stream, exchange between the streams, feed-forward per stream.

    Parameter names are those of the checkpoint below ``transformer_blocks.{index}.``.
    """

    def __init__(self, config: TransformerConfig, index: int) -> None:
        super().__init__()
        self.index = index
        self.norm_eps = config.norm_eps
        heads, width, text = config.num_attention_heads, config.width, config.cross_attention_dim
        gated, eps = config.apply_gated_attention, config.norm_eps

        def attention(query_dim: int, context_dim: int, head_dim: int) -> Attention:
            return Attention(query_dim, context_dim, heads, head_dim, gated=gated, eps=eps)

        def table(rows: int, dim: int) -> nn.Parameter:
            return nn.Parameter(torch.zeros(rows, dim))

        self.attn1 = attention(width, width, config.attention_head_dim)
        self.attn2 = attention(width, text, config.attention_head_dim)
        self.ff = FeedForward(width)
        self.scale_shift_table = table(config.modulation_rows, width)
        self.prompt_scale_shift_table = table(2, text) if config.cross_attention_adaln else None
        if not config.has_audio:
            return
        audio, audio_text = config.audio_width, config.audio_cross_attention_dim
        self.audio_attn1 = attention(audio, audio, config.audio_attention_head_dim)
        self.audio_attn2 = attention(audio, audio_text, config.audio_attention_head_dim)
        self.audio_ff = FeedForward(audio)
        self.audio_scale_shift_table = table(config.modulation_rows, audio)
        self.audio_prompt_scale_shift_table = table(2, audio_text) if config.cross_attention_adaln else None
        self.audio_to_video_attn = attention(width, audio, config.audio_attention_head_dim)
        self.video_to_audio_attn = attention(audio, width, config.audio_attention_head_dim)
        self.scale_shift_table_a2v_ca_video = table(5, width)
        self.scale_shift_table_a2v_ca_audio = table(5, audio)

    def forward(self, states: Sequence[PassState]) -> None:
        """Advance every pass by this block, one after another at the memory of one.

        One call serves all passes, so whoever brings the weights of a block brings them once per step.  The
        states are changed; their ``hidden`` in place when no gradient is recorded.
        """
        for state in states:
            self._advance(state)

    def _advance(self, state: PassState) -> None:
        video, audio, skips = state.video, state.audio, state.skips
        if video is not None and video.enabled:
            skipped = skips.at(SkipKind.VIDEO_SELF_ATTN, self.index)
            self._attend_self(video, self.attn1, self.scale_shift_table, skipped)
            self._attend_text(video, self.attn2, self.scale_shift_table, self.prompt_scale_shift_table)
        if audio is not None and audio.enabled:
            skipped = skips.at(SkipKind.AUDIO_SELF_ATTN, self.index)
            self._attend_self(audio, self.audio_attn1, self.audio_scale_shift_table, skipped)
            tables = self.audio_scale_shift_table, self.audio_prompt_scale_shift_table
            self._attend_text(audio, self.audio_attn2, *tables)
        if video is not None and audio is not None:
            self._exchange(video, audio, state)
        if video is not None and video.enabled:
            self._feed_forward(video, self.ff, self.scale_shift_table, state.chunk_tokens)
        if audio is not None and audio.enabled:
            self._feed_forward(audio, self.audio_ff, self.audio_scale_shift_table, state.chunk_tokens)

    def _normed(self, stream: StreamState) -> Tensor:
        """The pre-norm.  Callers hand it on without naming it, so that it is freed before the peak."""
        return rms_norm(stream.hidden, self.norm_eps)

    def _modulated(self, x: Tensor, modulation: Modulation, table: Tensor, rows: Rows) -> Tensor:
        """``x`` times one plus its scale row, plus its shift row; (B, T, D)."""
        scale = modulation.row(rows.scale, table[rows.scale], one_plus=True)
        return modulate(x, scale, modulation.row(rows.shift, table[rows.shift]))

    def _attend_self(
        self, stream: StreamState, attention: Attention, table: Tensor, skipped: Tensor | bool
    ) -> None:
        update = attention(
            self._modulated(self._normed(stream), stream.modulation, table, SELF_ATTENTION),
            mask=stream.attention_bias,
            rope=stream.rope,
            value_passthrough=skipped,
        )
        gate = stream.modulation.row(SELF_ATTENTION.gate, table[SELF_ATTENTION.gate])
        stream.hidden = add_residual(stream.hidden, update, gate)

    def _attend_text(
        self, stream: StreamState, attention: Attention, table: Tensor, prompt_table: Tensor | None
    ) -> None:
        """LTX-2 attends with the bare norm to the bare text; LTX-2.3 modulates both and gates the result."""
        query, context, gate = self._normed(stream), stream.context, None
        if stream.prompt is not None and prompt_table is not None:
            query = self._modulated(query, stream.modulation, table, TEXT_ATTENTION)
            scale = stream.prompt.row(1, prompt_table[1], one_plus=True)
            context = modulate(context, scale, stream.prompt.row(0, prompt_table[0]))
            gate = stream.modulation.row(TEXT_ATTENTION.gate, table[TEXT_ATTENTION.gate])
        update = attention(query, context, mask=stream.context_bias)
        stream.hidden = add_residual(stream.hidden, update, gate)

    def _exchange(self, video: StreamState, audio: StreamState, state: PassState) -> None:
        """Audio-to-video and video-to-audio attention.

        Both read the hidden states as they are now: video-to-audio does not see what video receives here.
        """
        to_video = state.skips.at(SkipKind.A2V_CROSS_ATTN, self.index) if video.enabled else True
        to_audio = state.skips.at(SkipKind.V2A_CROSS_ATTN, self.index) if audio.enabled else True
        if to_video is True and to_audio is True:
            return
        video_side = CrossSide(video, self._normed(video), self.scale_shift_table_a2v_ca_video)
        audio_side = CrossSide(audio, self._normed(audio), self.scale_shift_table_a2v_ca_audio)
        if to_video is not True:
            self._listen(self.audio_to_video_attn, video_side, audio_side, AUDIO_TO_VIDEO, to_video)
        if to_audio is not True:
            self._listen(self.video_to_audio_attn, audio_side, video_side, VIDEO_TO_AUDIO, to_audio)

    def _listen(
        self,
        attention: Attention,
        listener: CrossSide,
        speaker: CrossSide,
        rows: Rows,
        skipped: Tensor | bool,
    ) -> None:
        """One direction of the exchange; the listener's hidden state grows by what it hears."""
        stream = listener.stream
        assert stream.cross_gate is not None, "a pass with both streams has cross-modal gates"
        update = attention(
            self._cross_input(listener, rows),
            self._cross_input(speaker, rows),
            rope=stream.cross_rope,
            k_rope=speaker.stream.cross_rope,
        )
        if isinstance(skipped, Tensor):
            update = update.masked_fill(skipped[:, None, None], 0.0)
        gate = stream.cross_gate.row(0, listener.table[rows.gate])
        stream.hidden = add_residual(stream.hidden, update, gate)

    def _cross_input(self, side: CrossSide, rows: Rows) -> Tensor:
        assert side.stream.cross_scale_shift is not None, "a pass with both streams has their modulation"
        return self._modulated(side.normed, side.stream.cross_scale_shift, side.table, rows)

    def _feed_forward(
        self, stream: StreamState, network: FeedForward, table: Tensor, chunk_tokens: int | None
    ) -> None:
        modulated = self._modulated(self._normed(stream), stream.modulation, table, FEED_FORWARD)
        update = network(modulated, chunk_tokens=chunk_tokens)
        gate = stream.modulation.row(FEED_FORWARD.gate, table[FEED_FORWARD.gate])
        stream.hidden = add_residual(stream.hidden, update, gate)
