"""Trains the vocoder of the LTX-2 kind: mel spectrograms of the world's sounds -> stereo at 24 kHz.

B batch, M mel frames, S = 240 M samples.

One channel is learnt, and both sides of the stored stereo vocoder are that one: every kernel is
block-diagonal, zeros between the sides.  A stereo vocoder trained as such tends to make both sides alike.
"""

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from diffsynth.loader import NetworkKind, WeightFiles, load_network
from diffsynth.models.ltx2.vocoder import MEL_BINS, ResidualBlock, Vocoder, VocoderConfig
from diffsynth.nano.judge import judge_all
from training.nano.loop import Loop
from training.nano.muon import MuonAdamW, learning_rate_scale
from training.nano.results import write_network
from training.nano.sounds import FRAMES_1S, SAMPLES_PER_FRAME, VOCODER_RATE, Sounds

NAME = "vocoder"
_MEAN_MEL = -10.0
_MEL_SCALE = 2.7
"""Mean and deviation of the spectrograms' values: the first convolution takes them out."""

_STFT_SIZES = (512, 1024, 2048)
_WARM_UP = 40
RoundTrip = Callable[[Tensor], Tensor]

_HEARD = ("sound", "pitch", "pan", "sync")
_JUDGED_SIDE = 96
"""Pixels of the pictures beside which the sounds are judged."""


@dataclass(frozen=True, kw_only=True, slots=True)
class VocoderSettings:
    """Sizes and training of the vocoder; ``width`` is that of one side, half of the stored one.

    ``stft_from`` is the step from which magnitudes enter the loss; before a waveform is there, they would
    make silence the best answer.  ``decoded_from`` is the part of the training after which half of the
    spectrograms come through the audio VAE.  ``measured`` is the number of sounds behind the quality.
    """

    width: int = 64
    upsample_rates: tuple[int, ...] = (10, 6, 4)
    upsample_kernel_sizes: tuple[int, ...] = (20, 12, 8)
    resblock_kernel_sizes: tuple[int, ...] = (3, 7)
    resblock_dilation_sizes: tuple[tuple[int, ...], ...] = ((1, 3), (1, 3))
    steps: int = 2500
    batch: int = 6
    frames: int = 48
    learning_rate: float = 2e-3
    stft_from: int = 300
    stft_weight: float = 0.2
    decoded_from: float = 0.6
    log_gains: tuple[float, float] = (-2.0, 0.6)
    measured: int = 128
    seed: int = 0


def config_section(settings: VocoderSettings, *, sides: int = 2) -> dict[str, Any]:
    """The section ``vocoder`` of the checkpoint's metadata, of a network for so many sides."""
    return {
        "resblock": "1",
        "resblock_dilation_sizes": [list(sizes) for sizes in settings.resblock_dilation_sizes],
        "resblock_kernel_sizes": list(settings.resblock_kernel_sizes),
        "stereo": True,
        "upsample_initial_channel": sides * settings.width,
        "upsample_kernel_sizes": list(settings.upsample_kernel_sizes),
        "upsample_rates": list(settings.upsample_rates),
    }


class MonoVocoder(Vocoder):
    """The vocoder for one channel: (B, 1, M, 64) -> (B, 1, S)."""

    num_channels: ClassVar[int] = 1


def initialize(vocoder: Vocoder) -> None:
    """Begin where signals keep their size through all layers, quietly at the end."""
    second: list[nn.Parameter] = []
    for module in vocoder.modules():
        if isinstance(module, nn.Conv1d | nn.ConvTranspose1d):
            # A transposed convolution spreads its taps over the samples of one stride.
            taps = module.in_channels * module.kernel_size[0] / (module.stride[0] if module.transposed else 1)
            nn.init.normal_(module.weight, std=math.sqrt(1.8 / taps))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        if isinstance(module, ResidualBlock):
            second.extend(module.convs2.parameters())
    for kernel in second:
        kernel.data.mul_(0.3)
    pre, post = vocoder.conv_pre, vocoder.conv_post
    pre.weight.data.div_(_MEL_SCALE)
    assert pre.bias is not None  # only the last convolution may be without
    pre.bias.data.copy_(-_MEAN_MEL * pre.weight.data.sum(dim=(1, 2)))
    post.weight.data.mul_(0.3)


def stereo_of(mono: MonoVocoder, settings: VocoderSettings) -> Vocoder:
    """The stereo vocoder whose sides are both ``mono``, exactly."""
    stereo = Vocoder(VocoderConfig.from_sections({NAME: config_section(settings)}))
    with torch.no_grad():
        for (name, value), one in zip(stereo.state_dict().items(), mono.state_dict().values(), strict=True):
            value.zero_()
            if name.endswith("bias"):
                value.copy_(one.repeat(2))
            else:
                rows, columns = one.shape[:2]
                value[:rows, :columns] = one
                value[rows:, columns:] = one
    return stereo


def train(settings: VocoderSettings, folder: Path, device: str) -> dict[str, dict[str, float]]:
    """Train, measure, write ``folder/vocoder.safetensors`` and ``folder/vocoder.json``.

    Where ``folder/audio_vae.safetensors`` is, the last part of the training reads half of its spectrograms
    through that.

    Returns:
        The measured quality of the weights as they are stored, see :func:`measure`.
    """
    torch.manual_seed(settings.seed)
    through = vae_round_trip(folder, device)
    section = config_section(settings, sides=1)
    mono = MonoVocoder(VocoderConfig.from_sections({NAME: section}))
    initialize(mono)
    mono.to(device)
    optimizer = MuonAdamW(
        mono.named_parameters(), lr=settings.learning_rate, adamw_names=("",), betas=(0.9, 0.95)
    )
    state = folder / f"{NAME}.state"
    begun = time.monotonic()
    loop = Loop(
        name=NAME,
        steps=settings.steps,
        schedule=lambda step, steps: learning_rate_scale(step, steps, warm_up=_WARM_UP, floor=0.01),
        state=state,
        report=lambda: _report(mono, device),
    )
    loop.run(optimizer, lambda step, steps: _loss(mono, settings, through, step, steps, device))
    stereo = stereo_of(mono, settings).to(device).bfloat16().eval().requires_grad_(False)
    quality = measure(stereo, through, device, settings.measured)
    print(f"{NAME} {quality}", flush=True)
    notes = {"settings": asdict(settings), "quality": quality, "seconds": round(time.monotonic() - begun)}
    write_network(folder, NAME, [stereo], config_section(settings), notes)
    state.unlink(missing_ok=True)
    return quality


def _loss(
    mono: MonoVocoder,
    settings: VocoderSettings,
    through: RoundTrip | None,
    step: int,
    steps: int,
    device: str,
) -> Tensor:
    """Of one batch: relative power of the error, its mean size, and later the error of the magnitudes."""
    decoded = through if step >= settings.decoded_from * steps else None
    mel, wave = _batch(settings, step, device, decoded)
    made = mono(mel)
    loss = _relative_error(made, wave).mean() + 2 * (made - wave).abs().mean()
    if step >= settings.stft_from:
        loss = loss + settings.stft_weight * _stft_error(made, wave)
    return loss


@torch.no_grad()
def _report(mono: MonoVocoder, device: str) -> str:
    sounds = Sounds.draw(16, seed=7, device=device, held_out=True)
    made = mono(sounds.mel(FRAMES_1S).flatten(0, 1)[:, None])
    wave = sounds.waveform(FRAMES_1S, VOCODER_RATE)
    return f"snr {_snr_db(made.view_as(wave), wave):.1f} dB"


def vae_round_trip(folder: Path, device: str) -> RoundTrip | None:
    """The audio VAE of ``folder`` as a function from spectrogram to spectrogram; None where there is none."""
    path = folder / "audio_vae.safetensors"
    if not path.exists():
        return None
    encoder, decoder = (
        load_network(kind, WeightFiles(path), dtype=torch.float32, device=device)
        for kind in (NetworkKind.AUDIO_ENCODER, NetworkKind.AUDIO_DECODER)
    )
    return lambda mel: decoder(encoder(mel))


def _batch(
    settings: VocoderSettings, step: int, device: str, decoded: RoundTrip | None
) -> tuple[Tensor, Tensor]:
    """Spectrograms (B, 1, M, 64) and their sounds (B, 1, S): a window of each side of some sounds."""
    frames = settings.frames
    sounds = Sounds.draw(
        settings.batch,
        seed=settings.seed * 1_000_003 + step,
        device=device,
        gains=settings.log_gains,
        drifting=0.5,
        balanced=True,
    )
    mel = sounds.mel(FRAMES_1S)
    if decoded is not None and step % 2:
        with torch.no_grad():
            mel = decoded(mel)
    wave = sounds.waveform(FRAMES_1S, VOCODER_RATE)
    first = int(torch.randint(FRAMES_1S - frames + 1, ()))
    samples = slice(first * SAMPLES_PER_FRAME, (first + frames) * SAMPLES_PER_FRAME)
    return mel[:, :, first : first + frames].reshape(-1, 1, frames, MEL_BINS), wave[..., samples].reshape(
        -1, 1, frames * SAMPLES_PER_FRAME
    )


def _relative_error(made: Tensor, wave: Tensor) -> Tensor:
    """(B, 1) power of the error over that of the sound, with a little added so that silence counts too."""
    return (made - wave).square().mean(dim=-1) / (wave.square().mean(dim=-1) + 0.003)


def _stft_error(made: Tensor, wave: Tensor) -> Tensor:
    """Mean absolute difference of linear magnitudes over those of the sound, averaged over three windows."""
    total = made.new_zeros(())
    for size in _STFT_SIZES:
        window = torch.hann_window(size, device=made.device)
        made_abs, wave_abs = (
            torch.view_as_real(
                torch.stft(x.flatten(0, 1), size, size // 4, window=window, return_complex=True)
            )
            .square()
            .sum(dim=-1)
            .add(1e-7)
            .sqrt()
            for x in (made, wave)
        )
        total = total + (made_abs - wave_abs).abs().mean() / (wave_abs.mean() + 1e-3)
    return total / len(_STFT_SIZES)


@torch.no_grad()
def measure(
    vocoder: Vocoder, through: RoundTrip | None, device: str, count: int
) -> dict[str, dict[str, float]]:
    """Quality on sounds that were not in training.

    Returns:
        ``true`` for spectrograms as they are and ``decoded`` for those that went through the audio VAE:
        ``snr_db``, the mean over sounds that are not silent of the ratio of sound to error, and the
        percentage of sounds of which the judge reads ``sound``, ``pitch``, ``pan`` and ``sync`` as they were.
    """
    sounds = Sounds.draw(count, seed=7, device=device, held_out=True)
    mel, wave = sounds.mel(FRAMES_1S), sounds.waveform(FRAMES_1S, VOCODER_RATE)
    video = (sounds.scenes.video(_JUDGED_SIDE) * 127.5 + 127.5).round().to(torch.uint8).permute(0, 2, 3, 4, 1)
    spectrograms = {"true": mel} if through is None else {"true": mel, "decoded": through(mel)}
    quality: dict[str, dict[str, float]] = {}
    for name, spectrogram in spectrograms.items():
        made = vocoder(spectrogram)
        heard = judge_all(video, made, VOCODER_RATE, sounds.scenes.descriptions).percent
        quality[name] = {"snr_db": _snr_db(made, wave)}
        quality[name] |= {key: heard[key] for key in _HEARD if key in heard}
    return quality


def _snr_db(made: Tensor, wave: Tensor) -> float:
    """Over both sides together; the last 512 samples are those of a cut spectrum and do not count."""
    made, wave = made[..., :-512].flatten(1), wave[..., :-512].flatten(1)
    signal, error = wave.square().mean(dim=1), (made - wave).square().mean(dim=1)
    heard = signal > 1e-6
    return float((10 * (signal[heard] / error[heard]).log10()).mean())
