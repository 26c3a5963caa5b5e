"""Trains the audio encoder and decoder on mel spectrograms of the world's stereo sounds.

B batch, z latent channels, L latent frames, F latent frequency bins, M mel frames.
"""

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from diffsynth.models.ltx2.audio_vae import AudioDecoder, AudioEncoder
from diffsynth.models.ltx2.audio_vae_config import AudioVAEConfig
from training.nano.loop import Loop
from training.nano.muon import MuonAdamW, learning_rate_scale
from training.nano.results import write_network
from training.nano.sounds import FRAMES_1S, FRAMES_2S, MEL, Sounds

NAME = "audio_vae"
_LOUD = -8.0
"""Log mel above which a bin holds a tone; about 3.5 nats over silence."""
_PEAK = -2.0
"""Log mel of what decides how the sound is heard."""

_MEAN_MEL = -10.5
"""Where the decoder begins; from zero the optimiser would need hundreds of steps to get there."""

_SMALLEST_DEVIATION = 0.15
"""Features that vary less than the noise of training carry nothing; they are not blown up to deviation 1."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AudioVAESettings:
    """Sizes and training of the audio VAE; ``log_gains`` is the range of half the sounds' random gains.

    ``measured`` is the number of sounds behind the statistics and the quality.
    """

    ch: int = 16
    ch_mult: tuple[int, ...] = (1, 2, 4)
    num_res_blocks: int = 1
    z_channels: int = 8
    steps: int = 2500
    batch: int = 8
    learning_rate: float = 2.5e-3
    noise: float = 0.15
    latent_penalty: float = 2e-3
    stereo_weight: float = 4.0
    onset_weight: float = 1.0
    log_gains: tuple[float, float] = (-1.5, 0.4)
    measured: int = 256
    seed: int = 0


def config_section(settings: AudioVAESettings) -> dict[str, Any]:
    """The section ``audio_vae`` of the checkpoint's metadata, as the released files have it."""
    ddconfig = {
        "attn_resolutions": [],
        "causality_axis": "height",
        "ch": settings.ch,
        "ch_mult": list(settings.ch_mult),
        "double_z": True,
        "dropout": 0.0,
        "in_channels": 2,
        "latent_bins": MEL.mel_bins // 2 ** (len(settings.ch_mult) - 1),
        "mel_bins": MEL.mel_bins,
        "mid_block_add_attention": False,
        "norm_type": "pixel",
        "num_res_blocks": settings.num_res_blocks,
        "out_ch": 2,
        "resolution": 256,
        "z_channels": settings.z_channels,
    }
    return {
        "model": {"params": {"ddconfig": ddconfig, "sampling_rate": MEL.sampling_rate}},
        "preprocessing": {
            "mel": {"mel_fmax": MEL.sampling_rate // 2, "mel_fmin": 0, "n_mel_channels": MEL.mel_bins},
            "stft": {
                "causal": True,
                "filter_length": MEL.n_fft,
                "hop_length": MEL.hop_length,
                "win_length": MEL.n_fft,
            },
        },
    }


class AudioVAE(nn.Module):
    """Encoder and decoder together, with noise on the latent between them."""

    def __init__(self, config: AudioVAEConfig) -> None:
        super().__init__()
        self.encoder = AudioEncoder(config)
        self.decoder = AudioDecoder(config)

    def forward(self, mel: Tensor, noise: float = 0.0) -> tuple[Tensor, Tensor]:
        """(B, 2, M, 64) with M = 4L - 3 -> the same spectrogram again, and its latent (B, z, L, F)."""
        latent = self.encoder(mel)
        noisy = latent + noise * torch.randn_like(latent) if noise else latent
        return self.decoder(noisy), latent


def train(settings: AudioVAESettings, folder: Path, device: str) -> dict[str, float]:
    """Train, measure, write ``folder/audio_vae.safetensors`` and ``folder/audio_vae.json``.

    Returns:
        The measured quality of the weights as they are stored, see :func:`measure`.
    """
    torch.manual_seed(settings.seed)
    section = config_section(settings)
    vae = AudioVAE(AudioVAEConfig.from_sections({NAME: section})).to(device)
    nn.init.constant_(cast(Tensor, vae.decoder.conv_out.conv.bias), _MEAN_MEL)
    optimizer = MuonAdamW(
        vae.named_parameters(), lr=settings.learning_rate, adamw_names=("conv_out",), betas=(0.9, 0.95)
    )
    state = folder / f"{NAME}.state"
    begun = time.monotonic()
    loop = Loop(
        name=NAME,
        steps=settings.steps,
        schedule=lambda step, steps: learning_rate_scale(step, steps, warm_up=20, floor=0.02),
        state=state,
        report=lambda: str(measure(vae, device, 16)),
    )
    loop.run(optimizer, lambda step, _: _loss(vae, settings, step, device))
    vae.eval().requires_grad_(False)
    _store_statistics(vae, settings, device)
    for network in (vae.encoder, vae.decoder):  # measured as it will be loaded
        network.bfloat16().float()
    quality = measure(vae, device, settings.measured)
    print(f"{NAME} {quality}", flush=True)
    write_network(
        folder,
        NAME,
        [vae.encoder, vae.decoder],
        section,
        {"settings": asdict(settings), "quality": quality, "seconds": round(time.monotonic() - begun)},
    )
    state.unlink(missing_ok=True)
    return quality


def _loss(vae: AudioVAE, settings: AudioVAESettings, step: int, device: str) -> Tensor:
    """Of one batch; every fourth batch is half as many sounds of twice the length."""
    long = step % 4 == 3
    sounds = Sounds.draw(
        settings.batch // 2 if long else settings.batch,
        seed=settings.seed * 1_000_003 + step,
        device=device,
        gains=settings.log_gains,
        share=0.5,
        balanced=True,
    )
    mel = sounds.mel(FRAMES_2S if long else FRAMES_1S)
    with torch.autocast(torch.device(device).type, torch.bfloat16):
        decoded, latent = vae(mel, settings.noise)
    loss = reconstruction_loss(decoded.float(), mel, settings.stereo_weight, settings.onset_weight)
    return loss + settings.latent_penalty * latent.float().square().mean()


def reconstruction_loss(decoded: Tensor, mel: Tensor, stereo_weight: float, onset_weight: float) -> Tensor:
    """L1, weighted by how loud it is, some squared error, and two differences of errors.

    The difference of the sides' errors keeps the pan: two sides that are both too soft by as much still sound
    from the same place.  Without it the two sides of the decoded sound become equal.  The difference of the
    errors of successive frames keeps onsets sharp.
    """
    error = decoded - mel
    loud = (mel > _LOUD).float()
    weight = 1 + 2 * loud + 4 * mel.clamp(max=0.5).exp()
    plain = (error.abs() * weight).mean() + 0.05 * error.square().mean()
    sides = ((error[:, 0] - error[:, 1]).abs() * loud.amax(dim=1)).mean()
    near = torch.maximum(loud[:, :, 1:], loud[:, :, :-1])
    onsets = ((error[:, :, 1:] - error[:, :, :-1]).abs() * near).mean()
    return plain + stereo_weight * sides + onset_weight * onsets


@torch.no_grad()
def _store_statistics(vae: AudioVAE, settings: AudioVAESettings, device: str) -> None:
    """Mean and deviation of every latent feature over sounds as the world has them, into both networks."""
    sounds = Sounds.draw(settings.measured, seed=settings.seed - 1, device=device)
    latents = vae.encoder(sounds.mel(FRAMES_1S)).transpose(1, 2).flatten(2)
    deviation, mean = torch.std_mean(latents.flatten(0, 1).double(), dim=0)
    for network in (vae.encoder, vae.decoder):
        statistics = network.per_channel_statistics
        statistics.get_buffer("mean-of-means").copy_(mean)
        statistics.get_buffer("std-of-means").copy_(deviation.clamp(min=_SMALLEST_DEVIATION))


@torch.no_grad()
def measure(vae: AudioVAE, device: str, count: int) -> dict[str, float]:
    """Quality on sounds that were not in training.

    Returns:
        ``mel_l1``, the mean absolute error of the log mel in nats; ``loud_l1``, the same where a tone is;
        ``peak_l1``, where it is loudest; ``stereo_l1``, of the difference between the sides where a tone is;
        ``latent_rms`` of the normalised latent.
    """
    mel = Sounds.draw(count, seed=7, device=device, held_out=True).mel(FRAMES_1S)
    decoded, latent = vae(mel)
    error = decoded - mel
    loud = mel > _LOUD
    either = loud.any(dim=1)
    return {
        "mel_l1": float(error.abs().mean()),
        "loud_l1": float(error[loud].abs().mean()),
        "peak_l1": float(error[mel > _PEAK].abs().mean()),
        "stereo_l1": float((error[:, 0] - error[:, 1])[either].abs().mean()),
        "latent_rms": float(latent.square().mean().sqrt()),
    }
