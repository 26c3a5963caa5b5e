"""Cost of the video VAE and of the latent upsampler: the stages of a forward pass, walked with sizes only.

Legend: C channels, F frames, H, W height and width, of an activation at the stage at hand.
Where gradients are off the networks overwrite what nobody else reads (see ``video_vae_layers``); the walk
counts storages as they do, so a view of a larger tensor counts as that tensor.
"""

from math import prod

from diffsynth.models.ltx2.upsampler import UpsamplerConfig
from diffsynth.models.ltx2.video_vae_config import (
    RES,
    PaddingMode,
    Stage,
    VideoVAEConfig,
)
from diffsynth.pipelines.costs.cost import Cost

Size = tuple[int, int, int]
"""Frames, height and width."""
KERNEL_3D = 27
KERNEL_2D = 9


class _Walk:
    """An activation on its way through the stages; ``peak`` is the largest number of values alive at a time.

    Args of the constructor:
        channels, size: of the activation.
        padding: of the convolutions within a frame; reflection needs a padded copy.
        held: values that live from start to end, such as the input of the network.
    """

    def __init__(self, channels: int, size: Size, padding: PaddingMode, *, held: int) -> None:
        self.channels = channels
        self.size = size
        self.peak = 0
        self.flops = 0.0
        self._border = 1 if padding == "reflect" else 0
        self._held = held
        self._storage = self.values

    @property
    def values(self) -> int:
        """Of the activation."""
        return self.channels * prod(self.size)

    def saw(self, values: int) -> None:
        """So many values lived beside what is held."""
        self.peak = max(self.peak, self._held + values)

    def convolve(self, channels: int, *, beside: int = 0) -> None:
        """Pad, then convolve: the input until it is padded, the padded copy until the result is there."""
        padded = self._padded()
        self.saw(beside + self._storage + padded)
        self.flops += 2.0 * KERNEL_3D * self.values * channels
        self.channels = channels
        self._storage = self.values
        self.saw(beside + padded + self._storage)

    def residual(self, num_layers: int) -> None:
        """Residual blocks: the input, an activation and its padded copy, or the result in place of either."""
        self.saw(self._storage + self.values + self._padded())
        self.flops += num_layers * 2 * 2.0 * KERNEL_3D * self.values * self.channels

    def up(self, stage: Stage) -> None:
        """Convolution and depth-to-space, the input held to the end."""
        entered, strides = self._storage, stage.strides
        self.convolve(self.channels * prod(strides) // stage.multiplier, beside=entered)
        self.saw(entered + 2 * self._storage)
        self.channels //= prod(strides)
        frames, height, width = self.size
        # Of a doubled time the first frame is cut off, as a view: its storage stays.
        self.size = (strides[0] * frames - (strides[0] - 1), strides[1] * height, strides[2] * width)

    def down(self, stage: Stage) -> None:
        """Space-to-depth of the input as shortcut, convolution, space-to-depth of its result."""
        entered, strides = self._storage, stage.strides
        frames, height, width = self.size
        doubled = 0
        if strides[0] == 2:  # one more copy of the first frame, in a new tensor
            self.size = (frames + 1, height, width)
            doubled = self._storage = self.values
        shortcut = self.values
        self.saw(entered + doubled + shortcut)
        if prod(strides) > stage.multiplier:
            reduced = shortcut * stage.multiplier // prod(strides)
            self.saw(entered + doubled + shortcut + reduced)
            shortcut = reduced
        else:
            shortcut = self.values
        outside = entered if doubled else 0  # where time stays, the caller's tensor is the one that is padded
        padded = self._padded()
        self.saw(outside + self._storage + shortcut + padded)
        self.flops += 2.0 * KERNEL_3D * self.values * self.channels * stage.multiplier / prod(strides)
        self.channels = self.channels * stage.multiplier // prod(strides)
        self.saw(entered + shortcut + padded + self.values)
        self.saw(entered + shortcut + 2 * self.values)
        self._storage = self.values
        self.channels *= prod(strides)
        self.size = (self.size[0] // strides[0], height // strides[1], width // strides[2])

    def finish(self, channels: int) -> None:
        """Norm over the input, the last convolution, and one more copy of its result."""
        self.saw(self._storage + self.values)
        self.convolve(channels)
        self.saw(2 * self._storage)

    def _padded(self) -> int:
        frames, height, width = self.size
        return self.channels * (frames + 2) * (height + 2 * self._border) * (width + 2 * self._border)


def decoder_cost(config: VideoVAEConfig, latent: Size, itemsize: int) -> Cost:
    """Decode a latent of (F', H', W') cells whole; the pixels at the end included."""
    walk = _Walk(
        config.latent_channels, latent, config.decoder_padding, held=config.latent_channels * prod(latent)
    )
    walk.convolve(8 * config.decoder_base_channels)
    for stage in reversed(config.decoder_blocks):
        walk.residual(stage.num_layers) if stage.kind == RES else walk.up(stage)
    walk.finish(config.out_channels * config.patch_size**2)
    return Cost(walk.peak * itemsize, walk.flops)


def encoder_cost(config: VideoVAEConfig, pixels: Size, itemsize: int) -> Cost:
    """Encode (F, H, W) pixels whole, the pixels themselves included."""
    frames, height, width = pixels
    inputs = config.in_channels * prod(pixels)
    patched = (frames, height // config.patch_size, width // config.patch_size)
    walk = _Walk(config.in_channels * config.patch_size**2, patched, config.encoder_padding, held=inputs)
    walk.convolve(config.latent_channels)
    for stage in config.encoder_blocks:
        walk.residual(stage.num_layers) if stage.kind == RES else walk.down(stage)
    walk.finish(config.latent_channels + 1)
    return Cost(walk.peak * itemsize, walk.flops)


def upsampler_cost(config: UpsamplerConfig, latent: Size, itemsize: int) -> Cost:
    """Enlarge a latent of (F', H', W') cells, before and after included.

    At the larger size a residual block holds its input, the result of a convolution and that of its norm;
    around the network the latent is brought to the autoencoder's statistics and back.
    """
    frames, height, width = config.output_size(*latent)
    before, after, mid = prod(latent), frames * height * width, config.mid_channels
    spread = before * config.ratio[0] ** 2 * config.temporal_scale  # cells before a blur thins them out
    values = mid * max(3 * after, before + 2 * spread, 3 * before)
    values = config.in_channels * before + max(values, 3 * config.in_channels * after)
    per_cell = 2.0 * KERNEL_3D * mid * (mid * 2 * config.num_blocks_per_stage + config.in_channels)
    kernel = KERNEL_3D if config.temporal_upsample else KERNEL_2D
    flops = per_cell * (before + after) + 2.0 * kernel * mid * mid * spread
    return Cost(values * itemsize, flops)
