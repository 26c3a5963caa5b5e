"""Watching the transformer from outside, for the intermediates of the golden cases."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from diffsynth.models.ltx2.layers import Attention, FeedForward
from diffsynth.models.ltx2.rope import RopeLayout, RopeTable, rotate
from diffsynth.models.ltx2.transformer import LTX2Transformer, PassState, StreamState, TransformerBlock
from tests.runners.case import Case

STREAMS = ("video", "audio")


def rotated(x: Tensor, table: RopeTable) -> Tensor:
    """Rotate (B, T, I)."""
    heads = table.cos.shape[1]
    return rotate(x.reshape(*x.shape[:-1], heads, -1).transpose(1, 2), table).transpose(1, 2).flatten(2)


def as_recorded(table: Tensor, layout: RopeLayout) -> Tensor:
    """The reference keeps interleaved tables as (B, T, W) with every entry twice."""
    if layout is RopeLayout.SPLIT:
        return table
    return table.transpose(1, 2).flatten(2).repeat_interleave(2, dim=-1)


def from_recorded(table: Tensor, layout: RopeLayout, heads: int) -> Tensor:
    """Inverse of :func:`as_recorded`: (B, H, T, d/2)."""
    if layout is RopeLayout.SPLIT:
        return table
    return table[..., ::2].unflatten(-1, (heads, -1)).transpose(1, 2)


@dataclass
class BlockRecorder:
    """Watches a block from outside: inputs and outputs of its modules, and the hidden states between them."""

    network: TransformerBlock
    state: PassState
    seen: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, module in self.network.named_children():
            if isinstance(module, Attention | FeedForward):
                module.register_forward_pre_hook(self._before(name), with_kwargs=True)
                module.register_forward_hook(self._after(name), with_kwargs=True)
            if isinstance(module, Attention):
                for part, child in module.named_children():
                    child.register_forward_hook(self._part(f"{name}.{part}"))
        table = getattr(self.network, "scale_shift_table_a2v_ca_video", None)
        for name, stream in (("a2v_gate", self.state.video), ("v2a_gate", self.state.audio)):
            if stream is not None and stream.cross_gate is not None and table is not None:
                self.seen[name] = stream.cross_gate.row(0, table[4])
            table = getattr(self.network, "scale_shift_table_a2v_ca_audio", None)

    def _before(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
            self._residuals(name)
            self.seen[f"{name}.in"] = args[0].clone()
            if len(args) > 1:
                self.seen[f"{name}.context"] = args[1].clone()

        return hook

    def _residuals(self, name: str) -> None:
        """Hidden states as the sub-step before ``name`` left them."""
        video, audio = self.state.video, self.state.audio
        left_by = {
            "attn2": [("video_after_attn1", video)],
            "audio_attn2": [("audio_after_attn1", audio)],
            "audio_attn1": [("video_after_attn2", video)],
            "audio_to_video_attn": [("audio_after_attn2", audio)],
            "video_to_audio_attn": [("video_after_a2v", video)],
            "ff": [("video_after_attn2", video), ("audio_after_v2a", audio)],
        }
        for key, stream in left_by.get(name, []):
            if stream is not None and key not in self.seen:
                self.seen[key] = stream.hidden.clone()

    def _after(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any], out: Tensor) -> None:
            self.seen[f"{name}.out"] = out.clone()
            tables = {"q": kwargs.get("rope"), "k": kwargs.get("k_rope") or kwargs.get("rope")}
            for part, table in tables.items():
                if table is not None and f"{name}.{part}_norm" in self.seen:
                    self.seen[f"{name}.{part}_rope"] = rotated(self.seen[f"{name}.{part}_norm"], table)

        return hook

    def _part(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
            self.seen[name] = out.clone()

        return hook


def recorded_order(case: Case, seen: dict[str, Tensor]) -> list[str]:
    """Names of ``mid/`` in the order in which they were computed; each of them must have been."""
    recorded = case.group("mid/")
    unknown = recorded.keys() - seen.keys()
    assert not unknown, f"intermediates that this network does not compute: {sorted(unknown)}"
    return [name for name in seen if name in recorded]


def record_network(network: LTX2Transformer, run: Callable[[], None]) -> dict[str, Tensor]:
    """Run once and collect the prepared streams and the hidden states after every block."""
    seen: dict[str, Tensor] = {}

    def before(module: nn.Module, args: tuple[list[PassState]]) -> None:
        for stream, state in named_streams(args[0][0]):
            seen.update({f"{stream}_{name}": value for name, value in stream_mids(state).items()})

    def after(index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[list[PassState]], out: None) -> None:
            for stream, state in named_streams(args[0][0]):
                seen[f"block{index}_{stream}_out"] = state.hidden.clone()

        return hook

    blocks = network.transformer_blocks
    handles = [blocks[0].register_forward_pre_hook(before)]
    handles += [module.register_forward_hook(after(index)) for index, module in enumerate(blocks)]
    run()
    for handle in handles:
        handle.remove()
    return seen


def named_streams(state: PassState) -> list[tuple[str, StreamState]]:
    pairs = zip(STREAMS, (state.video, state.audio), strict=True)
    return [(name, stream) for name, stream in pairs if stream is not None]


def stream_mids(state: StreamState) -> dict[str, Tensor]:
    """The prepared tensors of a stream under the names of the cases.

    Modulations are in their plain form, with one row where all tokens or all samples share it.
    """
    mids = {"hidden_in": state.hidden.clone(), "context": state.context}
    mids["adaln_modulation"] = state.modulation.expand()
    mids["embedded_timestep"] = state.embedded.expand()[..., : state.hidden.shape[-1]]
    if state.prompt is not None:
        mids["prompt_modulation"] = state.prompt.expand()
    if state.cross_scale_shift is not None:
        mids["cross_scale_shift_modulation"] = state.cross_scale_shift.expand()
    if state.cross_gate is not None:
        mids["cross_gate_modulation"] = state.cross_gate.expand()
    for name, table in (("rope", state.rope), ("cross_rope", state.cross_rope)):
        if table is not None:
            mids[f"{name}_cos"] = as_recorded(table.cos, table.layout)
            mids[f"{name}_sin"] = as_recorded(table.sin, table.layout)
    for name, bias in (
        ("self_attention_bias", state.attention_bias),
        ("context_bias", state.context_bias),
    ):
        if bias is not None:
            mids[name] = bias
    return mids
