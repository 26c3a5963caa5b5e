"""The stages of the video VAE and of the upsampler, at their smallest."""

import json
import math
from pathlib import Path

import pytest
import torch

from diffsynth.loader.key_names import NetworkKind
from diffsynth.loader.load import load_network
from diffsynth.loader.weight_files import WeightFiles
from diffsynth.models.ltx2.upsampler import LatentUpsampler
from diffsynth.models.ltx2.video_vae import VideoVAEConfig
from training.nano import upsampler, video_vae
from training.nano.clips import Scenes
from training.nano.upsampler import Pool, UpsamplerSettings, load_video_vae
from training.nano.video_quality import psnr
from training.nano.video_vae import Batch, Phase, VideoVAE, VideoVAESettings

SMALL = VideoVAESettings(
    latent_channels=8,
    encoder_layers=(0, 1, 0, 0, 0),
    decoder_base_channels=2,
    decoder_layers=(0, 0, 1, 0),
    phases=(Phase(1.0, (Batch(2, 9, 64, 96), Batch(1, 1, 64, 64, side=128))),),
    steps=2,
    warm_up=1,
    learning_rate=0.02,
    statistics_clips=1,
    judged_clips=1,
    judged_sides=(128,),
    report_sides=(64,),
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("nano")
    video_vae.train(SMALL, folder, "cpu")
    return folder


def test_every_parameter_trains(trained: Path) -> None:
    torch.manual_seed(SMALL.seed)
    before = VideoVAE(VideoVAEConfig.from_sections({"vae": video_vae.config_section(SMALL)}))
    halves = zip((before.encoder, before.decoder), load_video_vae(trained, torch.float32, "cpu"), strict=True)
    for old, new in halves:
        assert old.config == new.config
        after = dict(new.named_parameters())
        for name, parameter in old.named_parameters():
            # Far more than the rounding to bfloat16.
            assert (after[name] - parameter).abs().max() > 1e-3, name


def test_latents_of_the_world_are_normal(trained: Path) -> None:
    encoder, decoder = load_video_vae(trained, torch.float32, "cpu")
    assert torch.equal(
        encoder.per_channel_statistics.get_buffer("std-of-means"),
        decoder.per_channel_statistics.get_buffer("std-of-means"),
    )
    sides = video_vae._STATISTICS_SIDES
    scenes = [(side, Scenes.draw(1, seed=(1 << 40) + side)) for side in sides]
    with torch.no_grad():
        latents = [encoder(scene.video(side)).flatten(2) for side, scene in scenes]
    std, mean = torch.std_mean(torch.cat(latents, 2), dim=(0, 2))
    assert mean.abs().max() < 0.05
    assert std.max() < 1.05


def test_the_released_layout(trained: Path) -> None:
    sections = json.loads((trained / "video_vae.json").read_text())
    assert sections["config"]["vae"]["latent_channels"] == 8
    assert sections["quality"].keys() == {"clips_128", "images_128"}
    shapes = WeightFiles(trained / "video_vae.safetensors").shapes
    assert all(key.startswith("vae.") for key in shapes)


def test_full_size_fits() -> None:
    settings = VideoVAESettings()
    with torch.device("meta"):
        vae = VideoVAE(VideoVAEConfig.from_sections({"vae": video_vae.config_section(settings)}))
    assert sum(p.numel() for p in vae.parameters()) <= 3_250_000
    for phase in settings.phases:
        for batch in phase.batches:
            pixels = batch.count * batch.num_frames * batch.height * batch.width
            assert 1e6 <= pixels <= 6e6
            assert batch.height % 32 == batch.width % 32 == batch.num_frames % 8 - 1 == 0


def test_upsampler(trained: Path) -> None:
    settings = UpsamplerSettings(
        pools=(Pool(2, 64, num_frames=9, batch=2),), steps=1, judged_clips=1, num_blocks_per_stage=0
    )
    quality = upsampler.train(settings, trained, "cpu")
    assert quality.keys() == {"clips_128"}
    found = load_network(
        NetworkKind.UPSAMPLER, WeightFiles(trained / "upsampler.safetensors"), dtype=torch.float32
    )
    assert isinstance(found, LatentUpsampler)
    assert found.config.rational_resampler
    assert found(torch.zeros(1, 8, 2, 2, 3)).shape == (1, 8, 2, 4, 6)


def test_signal_to_noise_ratio() -> None:
    pixels = torch.zeros(2, 3, 1, 4, 4)
    again = pixels + torch.tensor([0.2, 0.02])[:, None, None, None, None]
    assert psnr(again, pixels).tolist() == pytest.approx([20 * math.log10(2 / 0.2), 40.0], abs=1e-3)
