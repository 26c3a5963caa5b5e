"""The audio VAE and the vocoder of the nano family: a step of training, and files that the loader reads."""

import json
import math
from pathlib import Path

import pytest
import torch

from diffsynth.loader import NetworkKind, WeightFiles, load_network
from diffsynth.models.ltx2.audio_vae_config import AudioVAEConfig
from diffsynth.models.ltx2.vocoder import VocoderConfig
from training.nano import audio_vae, vocoder
from training.nano.audio_vae import AudioVAESettings, reconstruction_loss
from training.nano.sounds import FRAMES_1S, MEL, Sounds
from training.nano.vocoder import MonoVocoder, VocoderSettings

TINY_VAE = AudioVAESettings(ch=2, z_channels=2, steps=1, batch=2, measured=32)
TINY_VOCODER = VocoderSettings(
    width=8,
    upsample_rates=(10, 6, 4),
    upsample_kernel_sizes=(20, 12, 8),
    steps=2,
    batch=1,
    frames=12,
    measured=8,
)


def test_the_stereo_vocoder_is_the_mono_one_on_each_side() -> None:
    mono = MonoVocoder(
        VocoderConfig.from_sections({"vocoder": vocoder.config_section(TINY_VOCODER, sides=1)})
    )
    torch.manual_seed(0)
    vocoder.initialize(mono)
    stereo = vocoder.stereo_of(mono, TINY_VOCODER)
    mel = Sounds.draw(2, seed=0, device="cpu").mel(13)
    with torch.no_grad():
        made = stereo(mel)
        for side in range(2):
            alone = mono(mel[:, side : side + 1])
            assert alone.std() > 1e-3
            torch.testing.assert_close(made[:, side : side + 1], alone, atol=1e-6, rtol=1e-5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a tiny audio VAE and a tiny vocoder, as the two stages leave it."""
    path = tmp_path_factory.mktemp("nano")
    audio_vae.train(TINY_VAE, path, "cpu")
    assert vocoder.train(TINY_VOCODER, path, "cpu").keys() == {"true", "decoded"}
    return path


def test_both_stages_write_what_the_loader_reads(folder: Path) -> None:
    files = WeightFiles([folder / "audio_vae.safetensors", folder / "vocoder.safetensors"])
    encoder, decoder, speaker = (
        load_network(kind, files, dtype=torch.float32)
        for kind in (NetworkKind.AUDIO_ENCODER, NetworkKind.AUDIO_DECODER, NetworkKind.VOCODER)
    )
    mel = Sounds.draw(3, seed=1, device="cpu").mel(FRAMES_1S)
    latent = encoder(mel)
    assert latent.shape == (3, 2, 27, 16)
    assert decoder(latent).shape == mel.shape
    assert speaker(mel).shape == (3, 2, 240 * FRAMES_1S)
    notes = json.loads((folder / "audio_vae.json").read_text())
    assert AudioVAEConfig.from_sections(notes["config"]).num_statistics == 32
    assert notes["quality"]["mel_l1"] > 0


def test_statistics_make_the_latent_even(folder: Path) -> None:
    encoder = load_network(
        NetworkKind.AUDIO_ENCODER, WeightFiles(folder / "audio_vae.safetensors"), dtype=torch.float32
    )
    latent = encoder(Sounds.draw(32, seed=2, device="cpu").mel(FRAMES_1S))
    mean = latent.mean(dim=(0, 2))
    assert mean.abs().max() < 0.3
    assert latent.std(dim=(0, 2)).max() < 1.3


def test_gains_change_the_sound_and_its_spectrogram_alike() -> None:
    plain = Sounds.draw(4, seed=3, device="cpu")
    softer = Sounds(plain.scenes, torch.full((4, 2, 2), -1.0))
    torch.testing.assert_close(softer.waveform(20, 24000), plain.waveform(20, 24000) * torch.e**-1)
    loud = plain.mel(20) > -6
    assert loud.any()
    torch.testing.assert_close(softer.mel(20)[loud], plain.mel(20)[loud] - 1, atol=1e-3, rtol=0)
    assert softer.mel(20).shape == (4, 2, 20, MEL.mel_bins)


def test_errors_that_differ_between_sides_or_frames_cost_more() -> None:
    mel = torch.full((1, 2, 5, 64), -4.0)
    error = torch.full((1, 2, 5, 64), 0.2)
    opposite = error * torch.tensor([1.0, -1.0])[:, None, None]
    plain = reconstruction_loss(mel + error, mel, stereo_weight=0.0, onset_weight=0.0)
    torch.testing.assert_close(plain, torch.tensor((3 + 4 * math.exp(-4)) * 0.2 + 0.05 * 0.04))
    torch.testing.assert_close(
        reconstruction_loss(mel + error, mel, stereo_weight=4.0, onset_weight=1.0), plain
    )
    torch.testing.assert_close(
        reconstruction_loss(mel + opposite, mel, stereo_weight=4.0, onset_weight=1.0), plain + 4 * 0.4
    )
    blinking = error * torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0])[:, None]
    torch.testing.assert_close(
        reconstruction_loss(mel + blinking, mel, stereo_weight=4.0, onset_weight=1.0), plain + 0.4
    )


def test_balanced_sounds_ping_often() -> None:
    kinds = [d.sound for d in Sounds.draw(200, seed=0, device="cpu", balanced=True).scenes.descriptions]
    assert 60 < kinds.count("ping") < 100
    assert 10 < kinds.count("silence") < 30
    assert not any(
        d.held_out for d in Sounds.draw(50, seed=1, device="cpu", balanced=True).scenes.descriptions
    )
