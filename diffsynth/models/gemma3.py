"""Gemma 3 text model: the prompt's token ids become the 49 hidden states that LTX-2 reads.

D width (3840), n tokens of a prompt, h head width (256), L layers (48).

Source: the Gemma 3 report (arXiv 2503.19786) and the released checkpoint; agrees with ``Gemma3TextModel`` of
transformers.  Only the text part exists here: no vision tower, no projector, no language model head.  Prompts
run without padding and layer-major (one layer at a time, all prompts through it), so that a layer has to be
on the device once however many prompts there are, and no stack of hidden states is ever held.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from diffsynth.models.gemma3_cache import KeyValueCache, first_mask
from diffsynth.models.gemma3_config import Gemma3Config, LayerKind

OnState = Callable[[int, int, Tensor], None]
"""Called with (state index 0..L, prompt index, state [1, n, D])."""


class RopeTable(NamedTuple):
    """Cosine and sine of the angles, [n, h/2] each."""

    cos: Tensor
    sin: Tensor


def rope_table(config: Gemma3Config, kind: LayerKind, positions: Tensor) -> RopeTable:
    """Angles of ``positions`` [n] in float32 whatever the compute dtype: bfloat16 would be off by radians."""
    full = kind == "full_attention"
    base = config.rope_theta_full if full else config.rope_theta_sliding
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    frequencies = 1.0 / base**exponents
    if full:
        frequencies = frequencies / config.rope_factor_full
    angles = positions[:, None].float() * frequencies
    return RopeTable(angles.cos(), angles.sin())


def _rotate(x: Tensor, rope: RopeTable) -> Tensor:
    """Rotate the halves of each head: x [1, heads, n, h]."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * rope.cos - b * rope.sin, b * rope.cos + a * rope.sin), dim=-1)


class RMSNorm(nn.Module):
    """Root mean square norm with the factor ``1 + weight``; float32 inside, rounded once at the end."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last axis; shape and dtype stay."""
        return functional.rms_norm(x.float(), self.weight.shape, 1.0 + self.weight.float(), self.eps).to(
            x.dtype
        )


class SelfAttention(nn.Module):
    """Causal attention with grouped key/value heads; sliding layers see ``sliding_window`` tokens."""

    def __init__(self, config: Gemma3Config, kind: LayerKind) -> None:
        super().__init__()
        self.config = config
        self.window = config.sliding_window if kind == "sliding_attention" else None
        width, head_dim = config.hidden_size, config.head_dim
        self.q_proj = nn.Linear(width, config.num_attention_heads * head_dim, bias=False)
        self.k_proj = nn.Linear(width, config.num_key_value_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(width, config.num_key_value_heads * head_dim, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * head_dim, width, bias=False)
        self.q_norm = RMSNorm(head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(head_dim, config.rms_norm_eps)

    def forward(self, x: Tensor, rope: RopeTable, cache: KeyValueCache | None = None) -> Tensor:
        """Attend within one prompt: x [1, n, D], rope tables [n, h/2] in x's dtype; returns [1, n, D].

        With a cache x continues what the cache holds.
        """
        c = self.config
        q = self.q_proj(x).unflatten(-1, (c.num_attention_heads, c.head_dim)).transpose(1, 2)
        k = self.k_proj(x).unflatten(-1, (c.num_key_value_heads, c.head_dim)).transpose(1, 2)
        v = self.v_proj(x).unflatten(-1, (c.num_key_value_heads, c.head_dim)).transpose(1, 2)
        q, k = _rotate(self.q_norm(q), rope), _rotate(self.k_norm(k), rope)
        if cache is None:
            mask = self._window_mask(x.shape[1], x.device)
        else:
            k, v, mask = cache.extend(k, v)
        # Few backends have fused kernels for grouped heads; the copies are 2 * n * D values.
        group = c.num_attention_heads // c.num_key_value_heads
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        scale = c.query_pre_attn_scalar**-0.5
        causal = mask is None and q.shape[2] == k.shape[2]  # a token that continues a text sees all of it
        out = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale)
        return self.o_proj(out.transpose(1, 2).flatten(-2))

    def _window_mask(self, n: int, device: torch.device) -> Tensor | None:
        """Boolean [n, n] where the window cuts something, else None: plain causality suffices."""
        mask = first_mask(n, self.window, None)
        return None if mask is None else mask.to(device)


class MLP(nn.Module):
    """Gated feed-forward net with the tanh form of GELU."""

    def __init__(self, config: Gemma3Config) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        return self.down_proj(functional.gelu(self.gate_proj(x), approximate="tanh") * self.up_proj(x))


class DecoderLayer(nn.Module):
    """One layer: attention and feed-forward net, each with a norm before and after."""

    def __init__(self, config: Gemma3Config, kind: LayerKind) -> None:
        super().__init__()
        self.kind = kind
        norm = (config.hidden_size, config.rms_norm_eps)
        self.self_attn = SelfAttention(config, kind)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(*norm)
        self.post_attention_layernorm = RMSNorm(*norm)
        self.pre_feedforward_layernorm = RMSNorm(*norm)
        self.post_feedforward_layernorm = RMSNorm(*norm)

    def forward(
        self,
        xs: Sequence[Tensor],
        ropes: Sequence[RopeTable],
        caches: Sequence[KeyValueCache] | None = None,
    ) -> list[Tensor]:
        """Run all prompts in one call, so that whatever brings the layer to the device does so once.

        Prompts run one after another: a result does not depend, not even by rounding, on the company.

        Args:
            xs: one [1, n, D] per prompt; n may differ.
            ropes: the table of this layer's kind for each prompt, in the dtype and on the device of xs.
            caches: what this layer remembers of each prompt, which xs continue; None: xs are the prompts.
        """
        memories = [None] * len(xs) if caches is None else caches
        return [self._one(*each) for each in zip(xs, ropes, memories, strict=True)]

    def _one(self, x: Tensor, rope: RopeTable, cache: KeyValueCache | None) -> Tensor:
        x = x + self.post_attention_layernorm(self.self_attn(self.input_layernorm(x), rope, cache))
        return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))


class Gemma3TextModel(nn.Module):
    """Embedding table, decoder layers, final norm.  The table, 2 GB for 12B, may stay on the CPU."""

    def __init__(self, config: Gemma3Config) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, kind) for kind in config.layer_kinds)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def layer(self, index: int) -> DecoderLayer:
        """Decoder layer ``index``, 0..L-1."""
        return cast("DecoderLayer", self.layers[index])

    def embed(
        self, ids: Tensor, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> Tensor:
        """Gather token embeddings where the table lies, send only the rows, and scale them by sqrt(D).

        The factor is rounded to the compute dtype (62.0 for D = 3840 in bfloat16), as in training.

        Args:
            ids: [n] int64, any device.
            device: of the result; the table's if not given.
            dtype: compute dtype of the result; the table's if not given.

        Returns:
            [1, n, D], hidden state 0.
        """
        table = self.embed_tokens.weight
        rows = functional.embedding(ids.to(table.device), table).to(
            device or table.device, dtype or table.dtype
        )
        scale = torch.tensor(self.config.hidden_size**0.5, dtype=rows.dtype).item()
        return (rows * scale)[None]

    def rope_tables(
        self, positions: Tensor, *, device: torch.device, dtype: torch.dtype
    ) -> dict[LayerKind, RopeTable]:
        """Tables of both layer kinds for ``positions`` [n] (on the CPU), rounded to ``dtype`` at the end."""
        tables: dict[LayerKind, RopeTable] = {}
        for kind in dict.fromkeys(self.config.layer_kinds):
            cos, sin = rope_table(self.config, kind, positions)
            tables[kind] = RopeTable(cos.to(device, dtype), sin.to(device, dtype))
        return tables

    def hidden_states(
        self,
        ids: Sequence[Tensor],
        on_state: OnState,
        *,
        length: int = 1024,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Run the prompts through the model and hand over each hidden state as soon as it exists.

        State 0 is the scaled embedding, state i the output of layer i-1, state L the final norm of the
        output of the last layer.  States come layer by layer, within a layer prompt by prompt.

        Args:
            ids: valid token ids [n] of each prompt, without padding, 1 <= n <= length.
            on_state: called with (state index, prompt index, state [1, n, D]).
            length: padded length T that the prompts stand for; they sit at its end, at positions T-n..T-1.
            device: where the layers compute; the device of the final norm if not given.
            dtype: compute dtype; that of the final norm if not given.

        Raises:
            ValueError: a prompt without tokens or with more than ``length``.
        """
        self(ids, on_state, length=length, device=device, dtype=dtype)

    def forward(
        self,
        ids: Sequence[Tensor],
        on_state: OnState,
        *,
        length: int,
        device: torch.device | None,
        dtype: torch.dtype | None,
    ) -> None:
        """See :meth:`hidden_states`, which is the public name."""
        device, dtype = device or self.norm.weight.device, dtype or self.norm.weight.dtype
        lengths = [int(row.numel()) for row in ids]
        if any(not 1 <= n <= length for n in lengths):
            raise ValueError(f"prompts of {lengths} tokens, each must have 1 to {length}")
        tables = self.rope_tables(torch.arange(length), device=device, dtype=dtype)
        xs = [self.embed(row, device=device, dtype=dtype) for row in ids]
        for index, kind in enumerate(self.config.layer_kinds):
            for prompt, x in enumerate(xs):
                on_state(index, prompt, x)
            cos, sin = tables[kind]
            ropes = [RopeTable(cos[length - n :], sin[length - n :]) for n in lengths]
            xs = self.layer(index)(xs, ropes)
        for prompt, x in enumerate(xs):
            on_state(len(self.layers), prompt, self.norm(x))
