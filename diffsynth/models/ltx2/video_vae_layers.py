"""Building blocks of the video VAE.

Legend: B batch, C channels, F frames, H height, W width, P product of the strides.
Source: official ltx-core 1.0.0.

Memory: where gradients are off, normalisation, activation and the residual sum overwrite tensors that nobody
else reads.  A block may therefore overwrite its input; the encoder and decoder never pass the caller's own.
"""

from collections.abc import Callable
from math import prod
from typing import Any

import torch
from einops import rearrange, reduce
from torch import Tensor, nn
from torch.nn import functional

from diffsynth.models.ltx2.layers import channel_rms
from diffsynth.models.ltx2.video_vae_config import RES, PaddingMode, Stage, Strides

PIXEL_NORM_EPS = 1e-8


def norm_silu(x: Tensor, *, overwrite: bool) -> Tensor:
    """``silu(x / sqrt(mean(x^2) + 1e-8))``, the mean over the channels of each pixel, in the dtype of ``x``.

    Args:
        x: (B, C, F, H, W), any float dtype.
        overwrite: the caller needs ``x`` no more; it holds the result afterwards unless gradients are on.
    """
    in_place = not torch.is_grad_enabled()
    # The squares are gone before the next convolution, which sets the memory peak.
    root = channel_rms(x, PIXEL_NORM_EPS)
    normed = x.div_(root) if overwrite and in_place else x / root
    return functional.silu(normed, inplace=in_place)


def add(x: Tensor, branch: Tensor) -> Tensor:
    """``x + branch``; written over ``x`` unless gradients are on."""
    return x + branch if torch.is_grad_enabled() else x.add_(branch)


def depth_to_space(x: Tensor, strides: Strides) -> Tensor:
    """(B, C*P, F, H, W) to (B, C, F*p1, H*p2, W*p3); the column phase is the fastest channel index."""
    p1, p2, p3 = strides
    return rearrange(x, "b (c p1 p2 p3) f h w -> b c (f p1) (h p2) (w p3)", p1=p1, p2=p2, p3=p3)


def space_to_depth(x: Tensor, strides: Strides) -> Tensor:
    """Inverse of :func:`depth_to_space`."""
    p1, p2, p3 = strides
    return rearrange(x, "b c (f p1) (h p2) (w p3) -> b (c p1 p2 p3) f h w", p1=p1, p2=p2, p3=p3)


def patchify(pixels: Tensor, size: int) -> Tensor:
    """(B, C, F, H, W) to (B, C*size*size, F, H/size, W/size); here the ROW phase is the fastest index."""
    return rearrange(pixels, "b c f (h q) (w r) -> b (c r q) f h w", q=size, r=size)


def unpatchify(x: Tensor, size: int) -> Tensor:
    """Inverse of :func:`patchify`."""
    return rearrange(x, "b (c r q) f h w -> b c f (h q) (w r)", q=size, r=size)


class PerChannelStatistics(nn.Module):
    """Mean and standard deviation of every latent channel.

    The buffers carry the checkpoint's names, ``mean-of-means`` and ``std-of-means``, hyphens included.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("mean-of-means", torch.zeros(channels))
        self.register_buffer("std-of-means", torch.ones(channels))

    def normalize(self, latent: Tensor) -> Tensor:
        """(B, C, F, H, W) as the networks make it, to zero mean and unit variance per channel."""
        mean, std = self._as(latent)
        return (latent - mean) / std

    def unnormalize(self, latent: Tensor) -> Tensor:
        """(B, C, F, H, W) normalised, back to the scale of the decoder and of the latent upsamplers."""
        mean, std = self._as(latent)
        return latent * std + mean

    def _as(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        mean, std = (
            self.get_buffer(name).to(latent).view(1, -1, 1, 1, 1)
            for name in ("mean-of-means", "std-of-means")
        )
        return mean, std


class TemporalPaddedConv3d(nn.Module):
    """3x3x3 convolution that keeps the shape; beyond both ends of time stand copies of the end frames.

    Used in two steps, ``conv(conv.pad(x))``, so that the caller's unpadded activation can be freed before
    the convolution allocates its result.
    """

    def __init__(self, channels_in: int, channels_out: int, *, causal: bool, padding: PaddingMode) -> None:
        super().__init__()
        self.before, self.after = (2, 0) if causal else (1, 1)
        self.reflect = padding == "reflect"
        border = 0 if self.reflect else 1
        self.conv = nn.Conv3d(channels_in, channels_out, 3, padding=(0, border, border))

    def pad(self, x: Tensor) -> Tensor:
        """(B, C, F, H, W) to a new (B, C, F+2, H, W); with reflect padding (B, C, F+2, H+2, W+2)."""
        # In the layout of the weights, or the convolution would make one more copy.
        layout = _memory_format(self.conv.weight)
        if torch.is_grad_enabled() and x.requires_grad:
            apply: Callable[..., Tensor] = _Padding.apply
            return apply(x, self.before, self.after, self.reflect, layout)
        return _padded(x, self.before, self.after, self.reflect, layout)

    def forward(self, padded: Tensor) -> Tensor:
        """Args: what :meth:`pad` returned.  Returns: (B, channels_out, F, H, W)."""
        return self.conv(padded)


def _padded(x: Tensor, before: int, after: int, reflect: bool, layout: torch.memory_format) -> Tensor:
    border = 1 if reflect else 0
    batch, channels, frames, height, width = x.shape
    shape = (batch, channels, frames + 2, height + 2 * border, width + 2 * border)
    padded = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)
    middle = padded[:, :, before : before + frames]
    if border:
        middle[..., 1:-1, 1:-1] = x
        middle[..., 0, 1:-1], middle[..., -1, 1:-1] = x[..., 1, :], x[..., -2, :]
        middle[..., 0], middle[..., -1] = middle[..., 2], middle[..., -3]
    else:
        middle.copy_(x)
    padded[:, :, :before] = middle[:, :, :1]
    if after:
        padded[:, :, -after:] = middle[:, :, -1:]
    return padded


class _Padding(torch.autograd.Function):
    """:func:`_padded` with its adjoint; left to autograd, every assignment costs copies of the whole."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, before: int, after: int, reflect: bool, layout: torch.memory_format
    ) -> Tensor:
        ctx.before, ctx.after, ctx.reflect = before, after, reflect
        return _padded(x, before, after, reflect, layout)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None]:
        gradient = gradients[0].clone()
        last = gradient.shape[2] - ctx.after
        middle = gradient[:, :, ctx.before : last]
        middle[:, :, 0] += gradient[:, :, : ctx.before].sum(2)
        if ctx.after:
            middle[:, :, -1] += gradient[:, :, last:].sum(2)
        if ctx.reflect:  # the last that was written gives back first
            middle[..., 2] += middle[..., 0]
            middle[..., -3] += middle[..., -1]
            middle[..., 2, :] += middle[..., 0, :]
            middle[..., -3, :] += middle[..., -1, :]
            middle = middle[..., 1:-1, 1:-1]
        return middle, None, None, None, None


def _memory_format(weight: Tensor) -> torch.memory_format:
    last = torch.channels_last_3d
    if weight.is_contiguous(memory_format=last) and not weight.is_contiguous():
        return last
    return torch.contiguous_format


class ResidualBlock(nn.Module):
    """norm, SiLU, conv1, norm, SiLU, conv2, plus the input."""

    def __init__(self, channels: int, *, causal: bool, padding: PaddingMode) -> None:
        super().__init__()
        self.conv1 = TemporalPaddedConv3d(channels, channels, causal=causal, padding=padding)
        self.conv2 = TemporalPaddedConv3d(channels, channels, causal=causal, padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, F, H, W), same shape; overwrites ``x`` unless gradients are on."""
        h = self.conv1.pad(norm_silu(x, overwrite=False))
        h = self.conv1(h)
        h = self.conv2.pad(norm_silu(h, overwrite=True))
        h = self.conv2(h)
        return add(x, h)


class ResidualStage(nn.Module):
    """``res_x``: residual blocks in sequence."""

    def __init__(self, channels: int, num_layers: int, *, causal: bool, padding: PaddingMode) -> None:
        super().__init__()
        self.res_blocks = nn.ModuleList(
            ResidualBlock(channels, causal=causal, padding=padding) for _ in range(num_layers)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, F, H, W), same shape; overwrites ``x`` unless gradients are on."""
        for block in self.res_blocks:
            x = block(x)
        return x


class DownBlock(nn.Module):
    """Space-to-depth after a convolution, plus a shortcut of averaged space-to-depth channels.

    A block that halves time puts one more copy of the first frame in front, so T (odd) becomes (T + 1) / 2.
    """

    def __init__(self, channels: int, stage: Stage, *, padding: PaddingMode) -> None:
        super().__init__()
        self.strides = stage.strides
        phases = prod(stage.strides)
        self.group = phases // stage.multiplier
        channels_out = channels * stage.multiplier
        self.conv = TemporalPaddedConv3d(channels, channels_out // phases, causal=True, padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, F, H, W) to (B, C*multiplier, F/p1 rounded up, H/p2, W/p3)."""
        if self.strides[0] == 2:
            x = torch.cat((x[:, :, :1], x), dim=2)
        shortcut = space_to_depth(x, self.strides)
        if self.group > 1:
            shortcut = reduce(shortcut, "b (c g) f h w -> b c f h w", "mean", g=self.group)
        x = self.conv.pad(x)
        x = self.conv(x)
        return add(space_to_depth(x, self.strides), shortcut)


class UpBlock(nn.Module):
    """Depth-to-space after a convolution, with or without a depth-to-space shortcut.

    A block that doubles time drops the first resulting frame, so T becomes 2T - 1.
    """

    def __init__(self, channels: int, stage: Stage, *, causal: bool, padding: PaddingMode) -> None:
        super().__init__()
        self.strides = stage.strides
        phases = prod(stage.strides)
        self.repeats = phases // stage.multiplier if stage.residual else 0
        channels_out = phases * channels // stage.multiplier
        self.conv = TemporalPaddedConv3d(channels, channels_out, causal=causal, padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, F, H, W) to (B, C/multiplier, 2F - 1 or F, H*p2, W*p3)."""
        h = self.conv.pad(x)
        h = self.conv(h)
        h = self._expand(h)
        if self.repeats:
            # The shortcut's channel list is repeated end to end; broadcasting spares the repeated copy.
            lists = h.view(h.shape[0], self.repeats, -1, *h.shape[2:])
            h = add(lists, self._expand(x).unsqueeze(1)).flatten(1, 2)
        return h

    def _expand(self, x: Tensor) -> Tensor:
        x = depth_to_space(x, self.strides)
        return x[:, :, 1:] if self.strides[0] == 2 else x


def make_stage(
    channels: int, stage: Stage, *, causal: bool, padding: PaddingMode, up: bool
) -> tuple[nn.Module, int]:
    """The module of one stage, and the channels after it."""
    if stage.kind == RES:
        return ResidualStage(channels, stage.num_layers, causal=causal, padding=padding), channels
    if up:
        return UpBlock(channels, stage, causal=causal, padding=padding), channels // stage.multiplier
    return DownBlock(channels, stage, padding=padding), channels * stage.multiplier
