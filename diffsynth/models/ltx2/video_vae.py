"""Video VAE of LTX-2 (19B) and LTX-2.3 (22B): pixels to latent and back.

Legend: B batch, C latent channels (128), F frames, H, W pixels; F' = 1 + (F-1)/8, H' = H/32, W' = W/32.
Pixels are RGB in [-1, 1] (8-bit: u8 / 127.5 - 1).  Latent frame 0 stands for the first frame alone, latent
frame k >= 1 for frames 8k-7 ... 8k.  Latents are normalised per channel inside the encoder and un-normalised
inside the decoder; nothing is sampled, so both are deterministic.

Source: official ltx-core 1.0.0.
"""

import logging
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from diffsynth.errors import CheckpointError, RequestError
from diffsynth.models.ltx2.video_vae_config import (
    SPATIAL_SCALE,
    TEMPORAL_SCALE,
    PaddingMode,
    Stage,
    VideoVAEConfig,
)
from diffsynth.models.ltx2.video_vae_layers import (
    PerChannelStatistics,
    TemporalPaddedConv3d,
    make_stage,
    norm_silu,
    patchify,
    unpatchify,
)

__all__ = [
    "DECODER_KEY_PREFIXES",
    "ENCODER_KEY_PREFIXES",
    "IGNORED_KEYS",
    "SPATIAL_SCALE",
    "STATISTICS_KEY_PREFIXES",
    "TEMPORAL_SCALE",
    "PerChannelStatistics",
    "Stage",
    "VideoDecoder",
    "VideoEncoder",
    "VideoVAEConfig",
    "drop_trailing_frames",
    "to_uint8",
]

# File prefix -> module prefix.  Files split for other programs drop the leading `vae.`.
_STATISTICS = {
    "vae.per_channel_statistics.": "per_channel_statistics.",
    "per_channel_statistics.": "per_channel_statistics.",
}
ENCODER_KEY_PREFIXES = {"vae.encoder.": "", "encoder.": "", **_STATISTICS}
DECODER_KEY_PREFIXES = {"vae.decoder.": "", "decoder.": "", **_STATISTICS}
STATISTICS_KEY_PREFIXES = dict.fromkeys(_STATISTICS, "")
"""For a :class:`PerChannelStatistics` of its own, as the latent upsampler needs it."""

IGNORED_KEYS = frozenset(
    f"per_channel_statistics.{name}" for name in ("mean-of-stds", "mean-of-stds_over_std-of-means", "channel")
)
"""Keys, after the prefixes above, that the LTX-2 file holds, the LTX-2.3 file does not, and nothing reads:
a loader drops them, every other key must find its place."""

logger = logging.getLogger(__name__)


class VideoEncoder(nn.Module):
    """Pixels to the normalised mean of the latent Gaussian; causal in time."""

    KEY_PREFIXES = ENCODER_KEY_PREFIXES

    def __init__(self, config: VideoVAEConfig) -> None:
        super().__init__()
        if not config.encoder_blocks:
            raise CheckpointError("the file holds no video encoder", hint="a full LTX-2 checkpoint")
        self.config = config
        padding = config.encoder_padding
        self.min_cells = _min_cells(padding)
        channels = config.latent_channels
        patch_channels = config.in_channels * config.patch_size**2
        self.per_channel_statistics = PerChannelStatistics(config.latent_channels)
        self.conv_in = TemporalPaddedConv3d(patch_channels, channels, causal=True, padding=padding)
        self.down_blocks = nn.ModuleList()
        for stage in config.encoder_blocks:
            block, channels = make_stage(channels, stage, causal=True, padding=padding, up=False)
            self.down_blocks.append(block)
        # One more channel than the latent has: a log-variance shared by all, which nothing uses.
        self.conv_out = TemporalPaddedConv3d(
            channels, config.latent_channels + 1, causal=True, padding=padding
        )

    def forward(self, pixels: Tensor) -> Tensor:
        """Encode a clip or an image (F = 1).

        Args:
            pixels: (B, 3, F, H, W) in [-1, 1], dtype and device of the weights.  H and W are multiples of 32;
                if F is not 8k+1, the last frames are dropped with a logged warning.

        Returns:
            (B, C, F', H', W'), same dtype: about zero mean and unit variance per channel.

        Raises:
            RequestError: H or W is not a multiple of 32, or 32 where the encoder pads by reflection.
        """
        check_picture_size(pixels)
        _check_cells("encoder", [size // SPATIAL_SCALE for size in pixels.shape[-2:]], self.min_cells)
        x = patchify(drop_trailing_frames(pixels), self.config.patch_size)
        x = self.conv_in.pad(x)
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        x = self.conv_out.pad(norm_silu(x, overwrite=True))
        x = self.conv_out(x)
        return self.per_channel_statistics.normalize(x[:, :-1])

    def encode(self, pixels: Tensor) -> Tensor:
        """The same as calling the module."""
        return self(pixels)


class VideoDecoder(nn.Module):
    """Normalised latent to pixels; not causal in the released files."""

    KEY_PREFIXES = DECODER_KEY_PREFIXES

    min_cells: int
    """Smallest height and width of a latent: padding by reflection needs two cells to mirror."""

    def __init__(self, config: VideoVAEConfig) -> None:
        super().__init__()
        if not config.decoder_blocks:
            raise CheckpointError("the file holds no video decoder", hint="a full LTX-2 checkpoint")
        self.config = config
        causal, padding = config.causal_decoder, config.decoder_padding
        self.min_cells = _min_cells(padding)
        channels = 8 * config.decoder_base_channels
        self.per_channel_statistics = PerChannelStatistics(config.latent_channels)
        self.conv_in = TemporalPaddedConv3d(config.latent_channels, channels, causal=causal, padding=padding)
        self.up_blocks = nn.ModuleList()
        for stage in reversed(config.decoder_blocks):
            block, channels = make_stage(channels, stage, causal=causal, padding=padding, up=True)
            self.up_blocks.append(block)
        patch_channels = config.out_channels * config.patch_size**2
        self.conv_out = TemporalPaddedConv3d(channels, patch_channels, causal=causal, padding=padding)

    def forward(self, latent: Tensor) -> Tensor:
        """Decode a latent, whole; see ``video_tiling`` for pieces.

        Args:
            latent: (B, C, F', H', W') normalised, dtype and device of the weights.

        Returns:
            (B, 3, 1 + 8 (F'-1), 32 H', 32 W'), same dtype, in about [-1, 1], not clamped.

        Raises:
            RequestError: the latent is one cell high or wide and the decoder pads by reflection.
        """
        _check_cells("decoder", latent.shape[-2:], self.min_cells)
        x = self.per_channel_statistics.unnormalize(latent)
        x = self.conv_in.pad(x)
        x = self.conv_in(x)
        for block in self.up_blocks:
            x = block(x)
        x = self.conv_out.pad(norm_silu(x, overwrite=True))
        x = self.conv_out(x)
        return unpatchify(x, self.config.patch_size)

    def decode(self, latent: Tensor) -> Tensor:
        """The same as calling the module."""
        return self(latent)


def drop_trailing_frames(pixels: Tensor) -> Tensor:
    """Cut (B, C, F, H, W) to the largest 8k+1 frames, with a logged warning if any frame goes."""
    extra = (pixels.shape[2] - 1) % TEMPORAL_SCALE
    if extra:
        kept = pixels.shape[2] - extra
        logger.warning("%d frames are not 8k+1: the last %d are dropped, %d stay", kept + extra, extra, kept)
        pixels = pixels[:, :, :kept]
    return pixels


def check_picture_size(pixels: Tensor) -> None:
    """Raise RequestError unless (B, C, F, H, W) has H and W that are multiples of 32."""
    height, width = pixels.shape[-2:]
    if height % SPATIAL_SCALE or width % SPATIAL_SCALE:
        lower = [max(SPATIAL_SCALE, size - size % SPATIAL_SCALE) for size in (width, height)]
        raise RequestError(
            f"width={width}, height={height} are not both multiples of {SPATIAL_SCALE}",
            hint=f"{lower[0]}x{lower[1]}",
        )


def _min_cells(padding: PaddingMode) -> int:
    """Smallest height and width of a latent: padding by reflection needs two cells to mirror."""
    return 2 if padding == "reflect" else 1


def _check_cells(part: str, cells: Sequence[int], smallest: int) -> None:
    """Raise RequestError when a latent of ``cells`` (H', W') is smaller than ``part`` can pad."""
    if min(cells) < smallest:
        height, width = (SPATIAL_SCALE * size for size in cells)
        raise RequestError(
            f"{width}x{height} is too small: this {part} pads by reflection and needs two latent cells",
            hint=f"height and width of at least {smallest * SPATIAL_SCALE}",
        )


def to_uint8(pixels: Tensor) -> Tensor:
    """8-bit pixels: ``clamp((x + 1) / 2, 0, 1) * 255`` in float32, then truncated, not rounded.

    The official code computes in the decoder's dtype; in bfloat16, whose steps are 1 from 128 up, that in
    effect rounds.  In float32 the result does not depend on the decoder's dtype beyond the decoder itself.

    Args:
        pixels: any shape, any float dtype, [-1, 1]; values beyond are clamped.

    Returns:
        Same shape and device, uint8.
    """
    wide = pixels.to(torch.float32, copy=True)
    return wide.add_(1).div_(2).clamp_(0, 1).mul_(255).to(torch.uint8)
