"""Video VAE, tile plans and latent upsamplers beside the official ones, on random configurations.

Skipped without the official package; to run it: ``pip install --no-deps ltx-core==1.0.0 scipy``, then
``pytest tests/oracle``.
"""

import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffsynth.models.ltx2.tiling import TileConfig, TilePlan, decode_plan, encode_plan
from diffsynth.models.ltx2.upsampler import LatentUpsampler, UpsamplerConfig, upsample_latent
from diffsynth.models.ltx2.video_tiling import decode_tiles, encode_tiled
from diffsynth.models.ltx2.video_vae import PerChannelStatistics, VideoDecoder, VideoEncoder, VideoVAEConfig
from tests.runners.video_vae import rename

vae = pytest.importorskip("ltx_core.model.video_vae.video_vae")
vae_configurators = pytest.importorskip("ltx_core.model.video_vae.model_configurator")
official_tiling = pytest.importorskip("ltx_core.model.video_vae.tiling")
official_upsampler = pytest.importorskip("ltx_core.model.upsampler")
scale_factors = pytest.importorskip("ltx_core.types").VIDEO_SCALE_FACTORS

ORDERS = ("space time all all", "all all all", "time space all all", "all space all time")
"""Resampling stages from pixels to latent; their scales multiply to 8, 8, 8."""


class Draw:
    """Everything random of one comparison."""

    def __init__(self, seed: int) -> None:
        self.pick = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def fill(self, module: nn.Module) -> None:
        """Weights and statistics that keep activations near unit size; the blur of a resampler stays."""
        for parameter in module.parameters():
            width = parameter[0].numel() if parameter.ndim > 1 else 25
            parameter.data.copy_(self.normal(*parameter.shape) * 1.5 / width**0.5)
        for name, buffer in module.named_buffers():
            if name.endswith("-of-means"):
                buffer.copy_(self.normal(*buffer.shape).abs() + 0.5)

    def blocks(self, *, encoder: bool) -> list[list[Any]]:
        stages: list[list[Any]] = []
        for axes in self.pick.choice(ORDERS).split():
            if self.pick.random() < 0.5:
                stages.append(["res_x", {"num_layers": self.pick.choice((1, 2))}])
            if encoder:
                stages.append([f"compress_{axes}_res", {"multiplier": self.pick.choice((1, 2))}])
            else:
                options = {"multiplier": self.pick.choice((1, 2)), "residual": self.pick.random() < 0.5}
                stages.append([f"compress_{axes}", options])
        return [*stages, ["res_x", {"num_layers": 1}]]

    def vae_config(self) -> dict[str, Any]:
        section = {
            "_class_name": "CausalVideoAutoencoder",
            "latent_channels": self.pick.choice((8, 16)),
            "encoder_blocks": self.blocks(encoder=True),
            "decoder_blocks": self.blocks(encoder=False),
            "timestep_conditioning": False,
            "causal_decoder": self.pick.random() < 0.3,
            "decoder_base_channels": 8,
        }
        mode = self.pick.choice((None, "zeros", "reflect"))
        return {"vae": section | ({"spatial_padding_mode": mode} if mode else {})}

    def tiling(self) -> TileConfig:
        size, length = self.pick.randrange(96, 193, 32), self.pick.randrange(24, 49, 8)
        return TileConfig(size, self.pick.randrange(64, size, 32), length, self.pick.randrange(16, length, 8))


def halves(draw: Draw, name: str) -> tuple[nn.Module, nn.Module]:
    """The official encoder or decoder, and ours with its weights under the keys of a checkpoint."""
    config = draw.vae_config()
    ours, key = (VideoEncoder, "encoder") if name == "Encoder" else (VideoDecoder, "decoder")
    configurator = getattr(vae_configurators, f"Video{name}Configurator")
    theirs = configurator.from_config.__func__(getattr(vae, f"Video{name}"), config)
    draw.fill(theirs)
    with torch.device("meta"):
        module = ours(VideoVAEConfig.from_sections(config))
    keys = {k: "vae." if k.startswith("per_channel") else f"vae.{key}." for k in theirs.state_dict()}
    weights = {f"{prefix}{k}": theirs.state_dict()[k].clone() for k, prefix in keys.items()}
    module.load_state_dict(rename(weights, module.KEY_PREFIXES), assign=True)
    return theirs.eval(), module.eval()


def official(tiling: TileConfig) -> Any:
    return official_tiling.TilingConfig(
        official_tiling.SpatialTilingConfig(tiling.tile_size_in_pixels, tiling.tile_overlap_in_pixels),
        official_tiling.TemporalTilingConfig(tiling.tile_size_in_frames, tiling.tile_overlap_in_frames),
    )


def assert_close(actual: Tensor, expected: Tensor) -> None:
    """Within the tolerance of the golden cases."""
    torch.testing.assert_close(actual, expected, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("seed", range(10))
@torch.inference_mode()
def test_encoder(seed: int) -> None:
    draw = Draw(seed)
    theirs, ours = halves(draw, "Encoder")
    frames, tiling = draw.pick.choice((1, 9, 17, 12)), draw.tiling()
    pixels = draw.normal(draw.pick.choice((1, 2)), 3, frames, 64, 32 * draw.pick.choice((2, 3))).clamp(-1, 1)
    assert_close(ours(pixels), theirs(pixels))
    wide = draw.normal(1, 3, draw.pick.choice((1, 41)), 64, 224).clamp(-1, 1)
    assert_close(encode_tiled(ours, wide, tiling), theirs.tiled_encode(wide, official(tiling)))


@pytest.mark.parametrize("seed", range(10))
@torch.inference_mode()
def test_decoder(seed: int) -> None:
    draw = Draw(seed)
    theirs, ours = halves(draw, "Decoder")
    channels, tiling = ours.config.latent_channels, draw.tiling()
    latent = draw.normal(draw.pick.choice((1, 2)), channels, draw.pick.choice((1, 2, 3)), 3, 2)
    assert_close(ours(latent), theirs(latent))
    long = draw.normal(1, channels, draw.pick.choice((1, 6)), 2, draw.pick.choice((4, 5)))
    expected = list(theirs.tiled_decode(long, official(tiling)))
    actual = list(decode_tiles(ours, long, tiling))
    assert [chunk.shape for chunk in actual] == [chunk.shape for chunk in expected]
    assert_close(torch.cat(actual, 2), torch.cat(expected, 2))


@pytest.mark.parametrize("seed", range(10))
def test_plans_at_real_sizes(seed: int) -> None:
    draw = Draw(seed)
    size, frames = draw.pick.randrange(96, 1025, 32), draw.pick.randrange(24, 161, 8)
    tiling = TileConfig(size, draw.pick.randrange(0, size, 32), frames, draw.pick.randrange(0, frames, 8))
    cells = (draw.pick.randint(1, 60), draw.pick.randint(1, 70), draw.pick.randint(1, 70))
    decoder = SimpleNamespace(video_downscale_factors=scale_factors)
    latent = torch.empty(1, 1, *cells, device="meta")
    compare_plans(
        decode_plan(cells, tiling), vae.VideoDecoder._prepare_tiles(decoder, latent, official(tiling))
    )
    clip = (8 * cells[0] - 7, 32 * cells[1], 32 * cells[2])
    video = torch.empty(1, 3, *clip, device="meta")
    compare_plans(encode_plan(clip, tiling), vae.prepare_tiles_for_encoding(video, official(tiling)))


def compare_plans(plan: TilePlan, tiles: list[Any]) -> None:
    for axis, intervals in enumerate((plan.time, plan.height, plan.width), 2):
        rows = {
            (
                t.in_coords[axis].start,
                t.in_coords[axis].stop,
                t.out_coords[axis].start,
                t.out_coords[axis].stop,
            ): (t.masks_1d[axis])
            for t in tiles
        }
        assert [(i.start, i.stop, i.out_start, i.out_stop) for i in intervals] == list(rows)
        for interval, mask in zip(intervals, rows.values(), strict=True):
            torch.testing.assert_close(torch.tensor(interval.mask), mask, atol=1e-6, rtol=0)


VARIANTS: list[dict[str, Any]] = [
    {},
    *({"rational_resampler": True, "spatial_scale": scale} for scale in (0.75, 1.5, 2.0, 4.0)),
    {"spatial_upsample": False, "temporal_upsample": True, "rational_resampler": True, "spatial_scale": 1.0},
    {"temporal_upsample": True},
]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@torch.inference_mode()
def test_upsampler(variant: dict[str, Any]) -> None:
    draw = Draw(0)
    config = {"in_channels": 4, "mid_channels": 64, "num_blocks_per_stage": 1} | variant
    configurator = official_upsampler.LatentUpsamplerConfigurator
    theirs = configurator.from_config.__func__(official_upsampler.LatentUpsampler, config)
    ours, statistics = LatentUpsampler(UpsamplerConfig.from_sections(config)), PerChannelStatistics(4)
    draw.fill(theirs)
    draw.fill(statistics)
    ours.load_state_dict(theirs.state_dict())
    encoder = SimpleNamespace(per_channel_statistics=vae.PerChannelStatistics(4))
    encoder.per_channel_statistics.load_state_dict(statistics.state_dict())
    for shape in ((2, 4, 3, 4, 5), (1, 4, 1, 1, 3)):
        latent = draw.normal(*shape)
        expected = official_upsampler.upsample_video(latent, encoder, theirs)
        assert_close(upsample_latent(ours, statistics, latent), expected)
