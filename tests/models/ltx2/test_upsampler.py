"""The latent upsamplers: configuration, keys, shapes, and relations between the variants."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from diffsynth.errors import CheckpointError
from diffsynth.models.ltx2.upsampler import (
    BlurDownsample,
    LatentUpsampler,
    UpsamplerConfig,
    adain_filter,
    upsample_latent,
)
from diffsynth.models.ltx2.video_vae import PerChannelStatistics

MANIFEST = Path(__file__).parents[2] / "manifest"
COMMON = {"_class_name": "LatentUpsampler", "in_channels": 128, "num_blocks_per_stage": 4, "dims": 3}
SPATIAL = COMMON | {"mid_channels": 1024, "spatial_upsample": True, "temporal_upsample": False}
FILES: dict[str, dict[str, Any]] = {
    "ltx-2-spatial-upscaler-x2": SPATIAL | {"spatial_scale": 2.0, "rational_resampler": True},
    "ltx-2.3-spatial-upscaler-x2": SPATIAL | {"spatial_scale": 2.0, "rational_resampler": False},
    "ltx-2.3-spatial-upscaler-x1.5": SPATIAL | {"spatial_scale": 1.5, "rational_resampler": True},
    "ltx-2.3-temporal-upscaler-x2": COMMON
    | {
        "mid_channels": 512,
        "spatial_upsample": False,
        "temporal_upsample": True,
        "spatial_scale": 1.0,
        "rational_resampler": True,
    },
}


def tiny(**changes: Any) -> LatentUpsampler:
    config = {"in_channels": 4, "mid_channels": 32, "num_blocks_per_stage": 1} | changes
    torch.manual_seed(0)
    return LatentUpsampler(UpsamplerConfig.from_sections(config)).eval()


VARIANTS: list[dict[str, Any]] = [
    {},
    *({"rational_resampler": True, "spatial_scale": scale} for scale in (0.75, 1.5, 2.0, 4.0)),
    {"spatial_upsample": False, "temporal_upsample": True},
    {"temporal_upsample": True},
]


@pytest.mark.parametrize("name", FILES)
def test_keys_and_shapes_are_those_of_the_released_files(name: str) -> None:
    text = (MANIFEST / f"{name}.json").read_text(encoding="utf-8")
    shapes = {key: tuple(shape) for key, (_, shape) in json.loads(text).items()}
    config = UpsamplerConfig.from_sections(FILES[name])
    with torch.device("meta"):
        module = LatentUpsampler(config)
    assert {key: tuple(value.shape) for key, value in module.state_dict().items()} == shapes
    assert UpsamplerConfig.infer(shapes) == config
    assert (config.spatial_scale, config.temporal_scale) == {
        "x1.5": (1.5, 1),
        "temporal-x2": (1.0, 2),
        "spatial-x2": (2.0, 1),
    }["x1.5" if "x1.5" in name else "temporal-x2" if "temporal" in name else "spatial-x2"]


def test_fields_that_a_variant_does_not_read_do_not_count() -> None:
    bare = {key: SPATIAL[key] for key in SPATIAL.keys() - {"spatial_scale", "rational_resampler"}}
    assert UpsamplerConfig.from_sections(bare) == UpsamplerConfig.from_sections(
        FILES["ltx-2.3-spatial-upscaler-x2"]
    )
    temporal = UpsamplerConfig.from_sections(FILES["ltx-2.3-temporal-upscaler-x2"])
    assert not temporal.rational_resampler


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"_class_name": "Other"}, "_class_name"),
        ({"dims": 2}, "dims"),
        ({"something_new": 1}, "something_new"),
        ({"spatial_scale": 3.0, "rational_resampler": True}, "spatial_scale=3.0"),
        ({"spatial_upsample": False}, "neither space nor time"),
    ],
)
def test_other_configurations_are_refused(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(CheckpointError, match=reason):
        UpsamplerConfig.from_sections(SPATIAL | changes)


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({}, "initial_conv.weight"),
        ({"initial_conv.weight": (32, 4, 3, 3)}, "2-D"),
        ({"initial_conv.weight": (32, 4, 3, 3, 3)}, "upsampler.0.weight"),
        ({"initial_conv.weight": (32, 4, 3, 3, 3), "upsampler.0.weight": (96, 32, 3, 3)}, "no known width"),
    ],
)
def test_infer_refuses_other_files(keys: dict[str, tuple[int, ...]], reason: str) -> None:
    with pytest.raises(CheckpointError, match=reason):
        UpsamplerConfig.infer(keys)


@pytest.mark.parametrize("changes", VARIANTS)
@torch.inference_mode()
def test_output_size_is_what_comes_out(changes: dict[str, Any]) -> None:
    module = tiny(**changes)
    for size in ((1, 2, 3), (3, 5, 4)):
        assert module(torch.randn(2, 4, *size)).shape == (2, 4, *module.config.output_size(*size))


@pytest.mark.parametrize("changes", VARIANTS)
def test_infer_recognises_every_variant(changes: dict[str, Any]) -> None:
    module = tiny(**changes)
    shapes = {key: tuple(value.shape) for key, value in module.state_dict().items()}
    if changes.get("spatial_scale") == 0.75:  # same shapes as 1.5, which is the released one
        assert UpsamplerConfig.infer(shapes).spatial_scale == 1.5
    else:
        assert UpsamplerConfig.infer(shapes) == module.config


@torch.inference_mode()
def test_both_ways_to_double_compute_the_same_function() -> None:
    shuffle, rational = tiny(), tiny(rational_resampler=True)
    state = {
        key.replace("upsampler.0.", "upsampler.conv."): value for key, value in shuffle.state_dict().items()
    }
    kernel = {"upsampler.blur_down.kernel": torch.full((1, 1, 5, 5), 9.0)}  # never used at a whole factor
    rational.load_state_dict(state | kernel, strict=True)
    latent = torch.randn(1, 4, 2, 3, 4)
    assert torch.equal(rational(latent), shuffle(latent))


def test_blur_is_the_binomial_kernel_and_keeps_a_constant() -> None:
    blur = BlurDownsample(2)
    row = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0]) / 16
    assert torch.equal(blur.get_buffer("kernel"), (row[:, None] * row)[None, None])
    image = torch.ones(1, 3, 9, 9)
    torch.testing.assert_close(blur(image)[..., 1:-1, 1:-1], image[..., :3, :3])


@torch.inference_mode()
def test_temporal_variant_drops_the_first_half_frame() -> None:
    module = tiny(spatial_upsample=False, temporal_upsample=True)
    shuffled: list[Tensor] = []
    module.upsampler.register_forward_hook(lambda _module, _args, result: shuffled.append(result.clone()))
    entered: list[Tensor] = []
    module.post_upsample_res_blocks[0].register_forward_pre_hook(
        lambda _module, args: entered.append(args[0].clone())
    )
    module(torch.randn(1, 4, 3, 2, 2))
    assert shuffled[0].shape[2] == 6
    assert torch.equal(entered[0], shuffled[0][:, :, 1:])


def test_working_in_place_changes_neither_the_result_nor_the_input() -> None:
    for changes in VARIANTS:
        module, latent = tiny(**changes), torch.randn(1, 4, 2, 3, 2)
        kept = latent.clone()
        with torch.inference_mode():
            fast = module(latent)
        assert torch.equal(latent, kept)
        assert torch.equal(module(latent), fast)


@torch.inference_mode()
def test_upsampling_happens_between_the_statistics() -> None:
    module, statistics = tiny(), PerChannelStatistics(4)
    statistics.get_buffer("mean-of-means").copy_(torch.tensor([1.0, -2.0, 0.5, 0.0]))
    statistics.get_buffer("std-of-means").copy_(torch.tensor([2.0, 0.5, 1.0, 3.0]))
    latent = torch.randn(1, 4, 2, 2, 2)
    raw = module(statistics.unnormalize(latent))
    assert torch.equal(upsample_latent(module, statistics, latent), statistics.normalize(raw))
    assert not torch.allclose(upsample_latent(module, statistics, latent), module(latent))


def test_adain_takes_over_mean_and_deviation() -> None:
    reference, latent = torch.randn(2, 3, 2, 3, 3) * 4 + 2, torch.randn(2, 3, 2, 6, 6)
    matched = adain_filter(latent, reference, 1.0)
    for statistic in (torch.mean, torch.std):
        torch.testing.assert_close(statistic(matched, (2, 3, 4)), statistic(reference, (2, 3, 4)))
    torch.testing.assert_close(adain_filter(latent, reference, 0.0), latent)
    half = adain_filter(latent, reference, 0.5)
    assert functional.mse_loss(half, (latent + matched) / 2) < 1e-10
