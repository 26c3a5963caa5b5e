"""Latent upsamplers of LTX-2 and LTX-2.3: small networks that enlarge a video latent between two stages.

Legend: B batch, C latent channels (128), F latent frames, H, W latent cells, N = B*F.
Source: official ltx-core 1.0.0; the AdaIN filter is diffusers' (0.42.1).

The group norms take their statistics over the whole clip: a latent must never be upsampled in pieces.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from diffsynth.errors import CheckpointError
from diffsynth.models.ltx2.config import Sections, Shapes, parse_section
from diffsynth.models.ltx2.video_vae_layers import PerChannelStatistics

KEY_PREFIXES = {"": ""}
"""The files hold one network and no prefix."""

NORM_GROUPS = 32
_RATIONAL: Mapping[float, tuple[int, int]] = {0.75: (3, 4), 1.5: (3, 2), 2.0: (2, 1), 4.0: (4, 1)}
_OTHER_MODEL = "the file belongs to another model: `diffsynth inspect FILE`"


@dataclass(frozen=True, kw_only=True, slots=True)
class UpsamplerConfig:
    """As the file states it, made definite: fields that its variant does not read hold their neutral value.

    The temporal file says ``rational_resampler: true, spatial_scale: 1.0``, neither of which it means; here
    it has ``rational_resampler=False, spatial_scale=1.0``.
    """

    in_channels: int = 128
    mid_channels: int = 512
    num_blocks_per_stage: int = 4
    spatial_upsample: bool = True
    temporal_upsample: bool = False
    spatial_scale: float = 2.0
    """Growth of height and width: 1 for temporal, 2 for pixel shuffle, else 0.75, 1.5, 2 or 4."""
    rational_resampler: bool = False
    """Pixel shuffle up, blur and decimate down."""

    @classmethod
    def from_sections(cls, config: Sections) -> Self:
        """Read the metadata ``config``; the fields of an upsampler file stand at its top level.

        Raises:
            CheckpointError: an unknown key, neither axis upsampled, or a scale without resampler.
        """
        required = {"_class_name": "LatentUpsampler", "dims": 3}
        return parse_section(cls, config, required=required)._definite()

    @classmethod
    def infer(cls, shapes: Shapes) -> Self:
        """Reconstruct the configuration from parameter shapes, for files without metadata.

        Raises:
            CheckpointError: the keys are not those of a latent upsampler.
        """
        try:
            return cls(**_infer(shapes))._definite()
        except KeyError as error:
            raise CheckpointError(
                f"no latent upsampler: key {error} is missing", hint=_OTHER_MODEL
            ) from error

    @property
    def temporal_scale(self) -> int:
        """2 where F frames become 2F - 1, else 1."""
        return 2 if self.temporal_upsample else 1

    def output_size(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """Latent (F, H, W) after the upsampler, from latent (F, H, W) before."""
        up, down = self.ratio
        return (
            self.temporal_scale * (frames - 1) + 1,
            (up * height - 1) // down + 1,
            (up * width - 1) // down + 1,
        )

    @property
    def ratio(self) -> tuple[int, int]:
        """Numerator and denominator of ``spatial_scale``."""
        return (1, 1) if self.spatial_scale == 1.0 else _RATIONAL[self.spatial_scale]

    def _definite(self) -> Self:
        """Reset what the variant does not read, and refuse what no variant can do."""
        if not self.spatial_upsample and not self.temporal_upsample:
            raise CheckpointError("the latent upsampler enlarges neither space nor time", hint=_OTHER_MODEL)
        if not self.spatial_upsample:
            return replace(self, spatial_scale=1.0, rational_resampler=False)
        if self.temporal_upsample or not self.rational_resampler:
            return replace(self, spatial_scale=2.0, rational_resampler=False)
        if self.spatial_scale not in _RATIONAL:
            raise CheckpointError(
                f"spatial_scale={self.spatial_scale} of the latent upsampler is none of {sorted(_RATIONAL)}",
                hint=_OTHER_MODEL,
            )
        return replace(self, spatial_scale=float(self.spatial_scale))


class ResidualBlock(nn.Module):
    """Two convolutions with group norms; the second activation comes after the sum."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv3d(channels, channels, 3, padding=1)
        self.norm1 = nn.GroupNorm(NORM_GROUPS, channels)
        self.conv2 = nn.Conv3d(channels, channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(NORM_GROUPS, channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, F, H, W), same shape and dtype."""
        h = self.conv1(x)
        h = self.norm1(h)
        h = _silu(h)
        h = self.conv2(h)
        h = self.norm2(h)
        return _silu(h + x if torch.is_grad_enabled() else h.add_(x))


class Shuffle(nn.Module):
    """Channels to a finer grid; the index is (channel, frame phase, row phase, column phase)."""

    def __init__(self, *, time: int = 1, space: int = 1) -> None:
        super().__init__()
        self.time, self.space = time, space

    def forward(self, x: Tensor) -> Tensor:
        """(N, C*space^2, H, W) to (N, C, H*space, W*space), or the same with frames in front of H."""
        if x.ndim == 4:
            return functional.pixel_shuffle(x, self.space)
        return rearrange(
            x, "b (c t p q) f h w -> b c (f t) (h p) (w q)", t=self.time, p=self.space, q=self.space
        )


class BlurDownsample(nn.Module):
    """Binomial 5x5 blur of every channel, then every ``stride``-th sample; stride 1 does nothing at all."""

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.stride = stride
        row = (1, 4, 6, 4, 1)
        # Not by tensor arithmetic: on the meta device that imports a compiler, which takes seconds.
        self.register_buffer("kernel", torch.tensor([[[[a * b / 256 for b in row] for a in row]]]))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, C, (H-1)//stride + 1, (W-1)//stride + 1)."""
        if self.stride == 1:
            return x
        channels = x.shape[1]
        kernel = self.get_buffer("kernel").to(x.dtype).expand(channels, 1, 5, 5)
        return functional.conv2d(x, kernel, stride=self.stride, padding=2, groups=channels)


class RationalResampler(nn.Module):
    """Per frame: convolution and pixel shuffle by the numerator, blur and decimation by the denominator."""

    def __init__(self, channels: int, ratio: tuple[int, int]) -> None:
        super().__init__()
        up, down = ratio
        self.conv = nn.Conv2d(channels, up**2 * channels, 3, padding=1)
        self.shuffle = Shuffle(space=up)
        self.blur_down = BlurDownsample(down)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, F, H, W) to (B, C, F, (H*up - 1)//down + 1, (W*up - 1)//down + 1)."""
        batch = x.shape[0]
        x = rearrange(x, "b c f h w -> (b f) c h w")
        x = self.conv(x)
        x = self.shuffle(x)
        x = self.blur_down(x)
        return rearrange(x, "(b f) c h w -> b c f h w", b=batch)


class LatentUpsampler(nn.Module):
    """Enlarges an un-normalised latent; :func:`upsample_latent` wraps it for normalised ones."""

    KEY_PREFIXES = KEY_PREFIXES

    def __init__(self, config: UpsamplerConfig) -> None:
        super().__init__()
        self.config = config
        mid = config.mid_channels
        self.initial_conv = nn.Conv3d(config.in_channels, mid, 3, padding=1)
        self.initial_norm = nn.GroupNorm(NORM_GROUPS, mid)
        self.res_blocks = nn.ModuleList(ResidualBlock(mid) for _ in range(config.num_blocks_per_stage))
        self.upsampler = _upsampler(config)
        self.post_upsample_res_blocks = nn.ModuleList(
            ResidualBlock(mid) for _ in range(config.num_blocks_per_stage)
        )
        self.final_conv = nn.Conv3d(mid, config.in_channels, 3, padding=1)

    def forward(self, latent: Tensor) -> Tensor:
        """Enlarge a whole clip.

        Args:
            latent: (B, C, F, H, W), NOT normalised, dtype and device of the weights.

        Returns:
            (B, C, F2, H2, W2) with ``config.output_size(F, H, W)``, not normalised, same dtype.
        """
        x = self.initial_conv(latent)
        x = self.initial_norm(x)
        x = _silu(x)
        for block in self.res_blocks:
            x = block(x)
        x = self._upsample(x)
        for block in self.post_upsample_res_blocks:
            x = block(x)
        return self.final_conv(x)

    def _upsample(self, x: Tensor) -> Tensor:
        if self.config.temporal_upsample:
            # Latent frame 0 stands for a single pixel frame, so its first half goes.
            return self.upsampler(x)[:, :, 1:]
        if self.config.rational_resampler:
            return self.upsampler(x)
        batch = x.shape[0]
        x = self.upsampler(rearrange(x, "b c f h w -> (b f) c h w"))
        return rearrange(x, "(b f) c h w -> b c f h w", b=batch)


def upsample_latent(upsampler: LatentUpsampler, statistics: PerChannelStatistics, latent: Tensor) -> Tensor:
    """Enlarge a normalised latent.

    Args:
        upsampler: on the latent's device, in its dtype.
        statistics: those of the video VAE of the main checkpoint.
        latent: (B, C, F, H, W) normalised, as the diffusion model makes it.

    Returns:
        (B, C, F2, H2, W2) normalised, see :meth:`UpsamplerConfig.output_size`.
    """
    return statistics.normalize(upsampler(statistics.unnormalize(latent)))


def adain_filter(latent: Tensor, reference: Tensor, factor: float) -> Tensor:
    """Give the channels of ``latent`` the mean and deviation they have in ``reference``.

    Args:
        latent: (B, C, F, H, W), the raw output of the upsampler, not normalised.
        reference: (B, C, any, any, any), its raw input.
        factor: 0 leaves the latent, 1 matches the reference; in between, and beyond, linear.
    """
    std, mean = torch.std_mean(latent, dim=(2, 3, 4), keepdim=True)
    wanted_std, wanted_mean = torch.std_mean(reference, dim=(2, 3, 4), keepdim=True)
    matched = (latent - mean) / std * wanted_std + wanted_mean
    return torch.lerp(latent, matched, factor)


def _silu(x: Tensor) -> Tensor:
    """SiLU, written over ``x`` unless gradients are on."""
    return functional.silu(x, inplace=not torch.is_grad_enabled())


def _upsampler(config: UpsamplerConfig) -> nn.Module:
    mid = config.mid_channels
    if config.rational_resampler:
        return RationalResampler(mid, config.ratio)
    if not config.temporal_upsample:
        return nn.Sequential(nn.Conv2d(mid, 4 * mid, 3, padding=1), Shuffle(space=2))
    space = 2 if config.spatial_upsample else 1
    return nn.Sequential(nn.Conv3d(mid, 2 * space**2 * mid, 3, padding=1), Shuffle(time=2, space=space))


def _infer(shapes: Shapes) -> dict[str, Any]:
    """Fields of the configuration; KeyError for a missing key."""
    initial = shapes["initial_conv.weight"]
    if len(initial) != 5:
        raise CheckpointError("a latent upsampler with 2-D convolutions is not supported", hint=_OTHER_MODEL)
    mid = initial[0]
    blocks = {key.split(".")[1] for key in shapes if key.startswith("res_blocks.")}
    values: dict[str, Any] = {
        "in_channels": initial[1],
        "mid_channels": mid,
        "num_blocks_per_stage": len(blocks),
    }
    if "upsampler.blur_down.kernel" in shapes:
        rows = shapes["upsampler.conv.weight"][0]
        scales = {4 * mid: 2.0, 9 * mid: 1.5, 16 * mid: 4.0}
        if rows in scales:
            return {**values, "rational_resampler": True, "spatial_scale": scales[rows]}
    else:
        weight = shapes["upsampler.0.weight"]
        match len(weight), weight[0] / mid:
            case 4, 4.0:
                return values
            case 5, 2.0:
                return {**values, "spatial_upsample": False, "temporal_upsample": True}
            case 5, 8.0:
                return {**values, "temporal_upsample": True}
    raise CheckpointError(
        "the upsampling layer of the latent upsampler has no known width", hint=_OTHER_MODEL
    )
