"""Layers shared by the transformer and the text connectors.

Legend: B batch, T query tokens, S key/value tokens, Q query width, C context width, H heads, d head size,
I = H*d inner width.
Source: official ltx-core 1.0.0 (attention, feed-forward, caption projection).
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from diffsynth.models.ltx2.rope import RopeTable, rotate


def rms_norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    """``x / sqrt(mean(x^2) + eps)`` over the last axis, without a weight; any shape, any float dtype."""
    return functional.rms_norm(x, (x.shape[-1],), eps=eps)


def channel_rms(x: Tensor, eps: float) -> Tensor:
    """``sqrt(mean(x^2) + eps)`` over the channels of each position.

    Args:
        x: (B, C, ...), any float dtype; in float16 the squares are summed in float32, which they would leave.
        eps: within the root.

    Returns: (B, 1, ...) in the dtype of ``x``.
    """
    if x.dtype is torch.float16:
        norm = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=torch.float32)
        return norm.square().div_(x.shape[1]).add_(eps).sqrt_().to(x.dtype)
    # Shorter ways (a vector norm, a reciprocal root) round otherwise, and the autoencoders amplify that where
    # a position is close to zero in all channels.
    return x.square().mean(dim=1, keepdim=True).add_(eps).sqrt_()


class RMSNorm(nn.Module):
    """RMS norm over the last axis with a plain weight (not ``1 + weight``)."""

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """Args: x (..., width), any float dtype.  Returns: the same shape and dtype."""
        # A weight that stayed float32 beside bf16 activations would promote the result.
        return functional.rms_norm(x, (x.shape[-1],), self.weight.to(x.dtype), self.eps)


class Attention(nn.Module):
    """Multi-head attention with normalised queries and keys, RoPE and an optional gate per head.

    Parameter names are those of the checkpoint: ``q_norm``, ``k_norm``, ``to_q``, ``to_k``, ``to_v``,
    ``to_out.0`` and, when gated, ``to_gate_logits``.
    """

    def __init__(
        self,
        query_dim: int,
        context_dim: int,
        heads: int,
        head_dim: int,
        *,
        gated: bool,
        eps: float = 1e-6,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.heads = heads
        inner = heads * head_dim
        self.q_norm = RMSNorm(inner, eps)
        self.k_norm = RMSNorm(inner, eps)
        self.to_q = nn.Linear(query_dim, inner, bias=bias)
        self.to_k = nn.Linear(context_dim, inner, bias=bias)
        self.to_v = nn.Linear(context_dim, inner, bias=bias)
        self.to_out = nn.Sequential(nn.Linear(inner, query_dim, bias=bias))
        self.to_gate_logits = nn.Linear(query_dim, heads) if gated else None

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        rope: RopeTable | None = None,
        k_rope: RopeTable | None = None,
        value_passthrough: Tensor | bool = False,
    ) -> Tensor:
        """Attend from ``x`` to ``context``.

        Args:
            x: (B, T, Q) query input; it also drives the gate.
            context: (B, S, C) key and value input; None means ``x`` (self-attention).
            mask: additive, broadcastable to (B, H, T, S), in the dtype of ``x``; None attends everywhere and
                never makes a score matrix.
            rope: rotation of the queries, and of the keys when ``k_rope`` is None.
            k_rope: rotation of the keys.
            value_passthrough: True, or bool (B,) with True for some samples: there the result of the
                attention is replaced by the values (spatio-temporal guidance); self-attention only.

        Returns: (B, T, Q), the dtype of ``x``.
        """
        context = x if context is None else context
        if value_passthrough is True:
            out = self._split(self.to_v(context))
        else:
            q = self._split(self.q_norm(self.to_q(x)))
            k = self._split(self.k_norm(self.to_k(context)))
            if rope is not None:
                q = rotate(q, rope)
                k = rotate(k, rope if k_rope is None else k_rope)
            v = self._split(self.to_v(context))  # last: the norms and rotations above need room
            out = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            if isinstance(value_passthrough, Tensor):
                out = torch.where(value_passthrough[:, None, None, None], v, out)
            del q, k, v  # not needed beside the output projection
        merged = out.transpose(1, 2)  # (B, T, H, d)
        if self.to_gate_logits is not None:
            gate = 2.0 * torch.sigmoid(self.to_gate_logits(x)).unsqueeze(-1)
            merged = merged * gate if torch.is_grad_enabled() else merged.mul_(gate)
        return self.to_out(merged.flatten(2))

    def _split(self, x: Tensor) -> Tensor:
        """(B, T, I) -> (B, H, T, d), a view."""
        return x.view(*x.shape[:-1], self.heads, -1).transpose(1, 2)


class GeluProjection(nn.Module):
    """Linear and tanh-approximated GELU: ``net.0`` of the feed-forward."""

    def __init__(self, dim: int, inner: int, *, bias: bool = True) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, inner, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Args: x (..., dim).  Returns: (..., inner)."""
        return functional.gelu(self.proj(x), approximate="tanh")


class FeedForward(nn.Module):
    """``net.2(gelu_tanh(net.0.proj(x)))``; ``net.1`` stands where training code has its dropout."""

    def __init__(self, dim: int, *, expansion: int = 4, bias: bool = True) -> None:
        super().__init__()
        inner = dim * expansion
        self.net = nn.Sequential(
            GeluProjection(dim, inner, bias=bias), nn.Identity(), nn.Linear(inner, dim, bias=bias)
        )

    def forward(self, x: Tensor, *, chunk_tokens: int | None = None) -> Tensor:
        """Args: x (B, T, dim); chunk_tokens: tokens handled at once, None for all.

        Tokens are independent, so chunks change the memory (the inner activation is ``expansion`` times as
        wide as ``x``) and no value, up to the kernel that the backend chooses for another number of rows.

        Returns: (B, T, dim), the dtype of ``x``.
        """
        if chunk_tokens is None or x.shape[1] <= chunk_tokens:
            return self.net(x)
        pieces = torch.split(x, chunk_tokens, dim=1)
        if torch.is_grad_enabled():
            return torch.cat([self.net(piece) for piece in pieces], dim=1)
        out = torch.empty_like(x)
        for piece, target in zip(pieces, torch.split(out, chunk_tokens, dim=1), strict=True):
            target.copy_(self.net(piece))
        return out


class TextProjection(nn.Module):
    """``linear_2(gelu_tanh(linear_1(text)))``: the caption projection of LTX-2."""

    def __init__(self, text_dim: int, dim: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(text_dim, dim)
        self.linear_2 = nn.Linear(dim, dim)

    def forward(self, text: Tensor) -> Tensor:
        """Args: text (B, S, text_dim).  Returns: (B, S, dim)."""
        return self.linear_2(functional.gelu(self.linear_1(text), approximate="tanh"))
