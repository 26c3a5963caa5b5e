"""Audio VAE of LTX-2 and LTX-2.3: stereo log mel spectrogram <-> normalised latent.

B batch, z latent channels, C channels, M mel frames, L latent frames, F latent frequency bins.
Pictures are (B, C, time, frequency): time is the height, and the networks are causal along it.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar

import torch
from torch import Tensor, nn

from diffsynth.errors import RequestError
from diffsynth.models.ltx2.audio_vae_config import AudioVAEConfig
from diffsynth.models.ltx2.layers import channel_rms

__all__ = ["DECODER_KEY_PREFIXES", "ENCODER_KEY_PREFIXES", "AudioDecoder", "AudioEncoder", "AudioVAEConfig"]

ENCODER_KEY_PREFIXES: Mapping[str, str] = MappingProxyType(
    {
        "audio_vae.encoder.": "",
        "audio_vae.per_channel_statistics.": "per_channel_statistics.",
    }
)
DECODER_KEY_PREFIXES: Mapping[str, str] = MappingProxyType(
    {
        "audio_vae.decoder.": "",
        "audio_vae.per_channel_statistics.": "per_channel_statistics.",
    }
)

MEL_FRAMES_PER_LATENT_FRAME = 4
"""Every latent frame but the first stands for 4 mel frames, the first one for a single one."""

_PIXEL_NORM_EPS = 1e-6


class AudioEncoder(nn.Module):
    """Log mel spectrogram -> normalised latent: convolutional, causal in time, no sampling.

    Source: official ltx-core 1.0.0, ``AudioEncoder``.
    """

    KEY_PREFIXES: ClassVar[Mapping[str, str]] = ENCODER_KEY_PREFIXES

    def __init__(self, config: AudioVAEConfig) -> None:
        super().__init__()
        self.config = config
        widths = config.widths
        self.conv_in = CausalConv2d(config.in_channels, config.ch, 3)
        self.down = nn.ModuleList(
            EncoderLevel(
                widths[i - 1] if i else config.ch,
                width,
                config.num_res_blocks,
                downsample=i < len(widths) - 1,
            )
            for i, width in enumerate(widths)
        )
        self.mid = MiddleBlocks(widths[-1])
        self.norm_out = PixelNorm()
        self.conv_out = CausalConv2d(widths[-1], 2 * config.z_channels, 3)
        self.per_channel_statistics = PerChannelStatistics(config.num_statistics)

    def encode(self, mel: Tensor) -> Tensor:
        """Encode a spectrogram.

        Args:
            mel: (B, 2, M, mel_bins) natural-log mel magnitudes of :func:`~diffsynth.models.ltx2.mel.log_mel`,
                in the dtype of the weights.

        Returns:
            (B, z, L, F) with L = ceil(M / 4): the mean of the posterior, normalised, same dtype.

        Raises:
            RequestError: a wrong number of axes, channels or mel bins.
        """
        return self(mel)

    def forward(self, mel: Tensor) -> Tensor:
        """Same as :meth:`encode`."""
        wanted = (self.config.in_channels, self.config.mel.mel_bins)
        if mel.ndim != 4 or (mel.shape[1], mel.shape[3]) != wanted:
            raise RequestError(
                f"the audio encoder cannot read a spectrogram of shape {tuple(mel.shape)}",
                hint=f"(batch, {wanted[0]}, frames, {wanted[1]}); prepare_waveform makes stereo of mono",
            )
        x = self.conv_in(mel)
        for level in self.down:
            x = level(x)
        moments = self.conv_out(nn.functional.silu(self.norm_out(self.mid(x))))
        return self.per_channel_statistics.normalize(moments[:, : self.config.z_channels])


class AudioDecoder(nn.Module):
    """Normalised latent -> log mel spectrogram: convolutional and causal in time.

    Decoding the first frames of a latent gives the first frames of its spectrogram.
    Source: official ltx-core 1.0.0, ``AudioDecoder``.
    """

    KEY_PREFIXES: ClassVar[Mapping[str, str]] = DECODER_KEY_PREFIXES

    def __init__(self, config: AudioVAEConfig) -> None:
        super().__init__()
        self.config = config
        widths = config.widths
        self.conv_in = CausalConv2d(config.z_channels, widths[-1], 3)
        self.mid = MiddleBlocks(widths[-1])
        # Listed finest first, as the checkpoint numbers them; run from the coarsest.
        self.up = nn.ModuleList(
            DecoderLevel(
                widths[min(i + 1, len(widths) - 1)], width, config.num_res_blocks + 1, upsample=i > 0
            )
            for i, width in enumerate(widths)
        )
        self.norm_out = PixelNorm()
        self.conv_out = CausalConv2d(widths[0], config.out_ch, 3)
        self.per_channel_statistics = PerChannelStatistics(config.num_statistics)

    def decode(self, latent: Tensor) -> Tensor:
        """Decode a latent.

        Args:
            latent: (B, z, L, F) normalised, in the dtype of the weights, L >= 1.

        Returns:
            (B, 2, 4L - 3, mel_bins) natural-log mel magnitudes, about -11.5 to 1, same dtype.

        Raises:
            RequestError: a wrong number of axes, channels or bins, or no frame.
        """
        return self(latent)

    def forward(self, latent: Tensor) -> Tensor:
        """Same as :meth:`decode`."""
        wanted = (self.config.z_channels, self.config.latent_bins)
        if latent.ndim != 4 or (latent.shape[1], latent.shape[3]) != wanted or latent.shape[2] == 0:
            raise RequestError(
                f"the audio decoder cannot read a latent of shape {tuple(latent.shape)}",
                hint=f"(batch, {wanted[0]}, frames, {wanted[1]}) with at least one frame",
            )
        x = self.mid(self.conv_in(self.per_channel_statistics.denormalize(latent)))
        for level in reversed(self.up):
            x = level(x)
        mel = self.conv_out(nn.functional.silu(self.norm_out(x)))
        frames = max(MEL_FRAMES_PER_LATENT_FRAME * (latent.shape[2] - 1) + 1, 1)
        return _fit(mel, frames, self.config.mel.mel_bins)


class CausalConv2d(nn.Module):
    """Convolution that sees no later time: time is padded before only, frequency on both sides."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size)
        around = kernel_size - 1
        self.padding = (around // 2, around - around // 2, around, 0)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, time, frequency) -> (B, C', time, frequency)."""
        return self.conv(nn.functional.pad(x, self.padding) if any(self.padding) else x)


class PixelNorm(nn.Module):
    """Divides by the root mean square over the channels (axis 1), position by position; no parameters."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, ...) -> the same shape, dtype and device."""
        return x / channel_rms(x, _PIXEL_NORM_EPS)


class ResnetBlock(nn.Module):
    """Two causal 3x3 convolutions, each after pixel norm and SiLU, beside a shortcut."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm1 = PixelNorm()
        self.conv1 = CausalConv2d(in_channels, out_channels, 3)
        self.norm2 = PixelNorm()
        self.conv2 = CausalConv2d(out_channels, out_channels, 3)
        same = in_channels == out_channels
        self.nin_shortcut = nn.Identity() if same else CausalConv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, time, frequency) -> (B, out_channels, time, frequency)."""
        h = self.conv1(nn.functional.silu(self.norm1(x)))
        h = self.conv2(nn.functional.silu(self.norm2(h)))
        return self.nin_shortcut(x) + h


class MiddleBlocks(nn.Module):
    """The two blocks at the coarsest level; the attention that could stand between them is never there."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels)
        self.block_2 = ResnetBlock(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, time, frequency) -> the same shape."""
        return self.block_2(self.block_1(x))


class Downsample(nn.Module):
    """Halves both axes: T -> ceil(T / 2), frequency -> half, with a strided convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, T, f) -> (B, C, ceil(T / 2), f // 2)."""
        return self.conv(nn.functional.pad(x, (0, 1, 2, 0)))


class Upsample(nn.Module):
    """Doubles both axes by repetition, convolves, and drops the first time row: T -> 2T - 1."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = CausalConv2d(channels, channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, T, f) -> (B, C, 2T - 1, 2f)."""
        return self.conv(nn.functional.interpolate(x, scale_factor=2.0, mode="nearest"))[:, :, 1:]


class EncoderLevel(nn.Module):
    """One resolution of the encoder: residual blocks, then the downsampler of all but the last level."""

    def __init__(self, in_channels: int, channels: int, num_blocks: int, *, downsample: bool) -> None:
        super().__init__()
        self.block = nn.ModuleList(
            ResnetBlock(channels if i else in_channels, channels) for i in range(num_blocks)
        )
        self.downsample = Downsample(channels) if downsample else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, T, f) -> (B, channels, ceil(T / 2), f // 2), or the same picture size."""
        for block in self.block:
            x = block(x)
        return self.downsample(x)


class DecoderLevel(nn.Module):
    """One resolution of the decoder: residual blocks, then the upsampler of all but the finest level."""

    def __init__(self, in_channels: int, channels: int, num_blocks: int, *, upsample: bool) -> None:
        super().__init__()
        self.block = nn.ModuleList(
            ResnetBlock(channels if i else in_channels, channels) for i in range(num_blocks)
        )
        self.upsample = Upsample(channels) if upsample else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, T, f) -> (B, channels, 2T - 1, 2f), or the same picture size."""
        for block in self.block:
            x = block(x)
        return self.upsample(x)


class PerChannelStatistics(nn.Module):
    """Mean and standard deviation of every latent feature, numbered channel * F + bin, or one for all."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.register_buffer("mean-of-means", torch.zeros(num_features))
        self.register_buffer("std-of-means", torch.ones(num_features))

    def normalize(self, latent: Tensor) -> Tensor:
        """(B, z, L, F) of the autoencoder -> (B, z, L, F) with mean 0 and deviation 1, same dtype."""
        return (latent - self._picture("mean-of-means", latent)) / self._picture("std-of-means", latent)

    def denormalize(self, latent: Tensor) -> Tensor:
        """(B, z, L, F) as the transformer sees it -> (B, z, L, F) of the autoencoder, same dtype."""
        return latent * self._picture("std-of-means", latent) + self._picture("mean-of-means", latent)

    def _picture(self, name: str, latent: Tensor) -> Tensor:
        values = self.get_buffer(name).to(latent.dtype).expand(latent.shape[1] * latent.shape[3])
        return values.view(1, latent.shape[1], 1, latent.shape[3])


def _fit(mel: Tensor, frames: int, bins: int) -> Tensor:
    """Crop or zero-pad at the end to (B, C, frames, bins); nothing happens at the released shapes."""
    mel = mel[:, :, :frames, :bins]
    missing = (0, bins - mel.shape[3], 0, frames - mel.shape[2])
    return nn.functional.pad(mel, missing) if any(missing) else mel
