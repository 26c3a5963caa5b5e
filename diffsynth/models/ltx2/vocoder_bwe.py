"""Two-stage vocoder of LTX-2.3: log mel spectrogram -> stereo at 16 kHz -> bandwidth extension -> 48 kHz.

B batch, C channels, M mel frames, T time steps, S samples, K frequency bins of the inner spectrogram.
Everything is computed in float32 whatever the stored dtype; the stored tensors themselves stay as they are.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from diffsynth.errors import CheckpointError
from diffsynth.models.ltx2.config import Sections, Shapes, parse_section
from diffsynth.models.ltx2.mel import LOG_FLOOR
from diffsynth.models.ltx2.vocoder import (
    KEY_PREFIXES,
    MEL_BINS,
    Generator,
    GeneratorConfig,
    Vocoder,
    dilated_convolutions,
    infer_generator,
    vocoder_section,
)

KAISER_TAPS = 12
_KAISER_RATIO = 2
_SNAKE_EPS = 1e-9
_ZERO_CROSSINGS = 6
_ROLLOFF = 0.99

_GENERATOR_KIND = {"resblock": "AMP1", "activation": "snakebeta", "stereo": True}


@dataclass(frozen=True, kw_only=True, slots=True)
class VocoderBWEConfig:
    """Both generators and the spectrogram between them.

    ``n_fft`` (also the window length) and ``hop_length`` in samples, rates in Hz.
    """

    vocoder: GeneratorConfig
    bwe: GeneratorConfig
    n_fft: int = 512
    hop_length: int = 80
    num_mels: int = MEL_BINS
    input_sampling_rate: int = 16000
    output_sampling_rate: int = 48000

    def __post_init__(self) -> None:
        ratio, rest = divmod(self.output_sampling_rate, self.input_sampling_rate)
        if rest or self.num_mels != MEL_BINS or self.bwe.samples_per_frame != self.hop_length * ratio:
            raise CheckpointError(
                f"vocoder: bandwidth extension from {self.input_sampling_rate} to "
                f"{self.output_sampling_rate} Hz with hop {self.hop_length}, rates "
                f"{self.bwe.upsample_rates} and {self.num_mels} mel bins does not fit together",
                hint="the metadata is damaged: `diffsynth inspect FILE`",
            )

    @property
    def ratio(self) -> int:
        """Output samples for each sample of the first generator."""
        return self.output_sampling_rate // self.input_sampling_rate

    @classmethod
    def from_sections(cls, config: Sections) -> Self:
        """Read the section ``vocoder`` of the metadata.

        Raises:
            CheckpointError: no such section, one of its two parts is missing, an unknown key, or a kind of
                residual block or activation that LTX-2.3 does not have.
        """
        section = vocoder_section(config)
        if section.keys() != {"vocoder", "bwe"}:
            raise CheckpointError(
                f"vocoder metadata: keys {sorted(section)}, expected the two parts ['bwe', 'vocoder']",
                hint="the file is newer than this diffsynth, or another model: `diffsynth inspect FILE`",
            )
        # The window is n_fft long whatever win_size says; the first generator is always limited and the
        # second never, whatever apply_final_activation says.
        ignored = frozenset({"apply_final_activation"})
        first = parse_section(GeneratorConfig, section["vocoder"], ignored=ignored, required=_GENERATOR_KIND)
        generator_keys = {f.name for f in fields(GeneratorConfig)}
        sizes = {key: value for key, value in section["bwe"].items() if key in generator_keys}
        rest = {key: value for key, value in section["bwe"].items() if key not in generator_keys}
        return parse_section(
            cls,
            {**rest, "vocoder": first, "bwe": parse_section(GeneratorConfig, sizes)},
            ignored=ignored | {"win_size"},
            required=_GENERATOR_KIND,
        )

    @classmethod
    def infer(cls, shapes: Shapes) -> Self:
        """Derive the configuration from shapes, by the keys of the file or of the module.

        Rates, dilations, hop and the missing tanh leave no trace: they are those of the released vocoder.

        Raises:
            CheckpointError: the tensors are not those of this vocoder.
        """
        prefix = "vocoder." if "vocoder.vocoder.conv_pre.weight" in shapes else ""
        basis = shapes.get(f"{prefix}mel_stft.stft_fn.forward_basis")
        if basis is None:
            raise CheckpointError(
                "these tensors are not those of a vocoder with bandwidth extension (no mel_stft)",
                hint="see what the file holds: `diffsynth inspect FILE`",
            )
        return cls(
            vocoder=infer_generator(shapes, f"{prefix}vocoder.", use_tanh_at_final=False),
            bwe=infer_generator(shapes, f"{prefix}bwe_generator.", use_tanh_at_final=False),
            n_fft=basis[-1],
        )


class VocoderBWE(nn.Module):
    """The LTX-2.3 vocoder: a generator at 16 kHz, and one that adds what lies above 8 kHz.

    Source: BigVGAN (arXiv 2206.04658) generators as in official ltx-core, in float32 as its newest version.
    """

    KEY_PREFIXES: ClassVar[Mapping[str, str]] = KEY_PREFIXES
    config_class: ClassVar[type[VocoderBWEConfig]] = VocoderBWEConfig

    def __init__(self, config: VocoderBWEConfig) -> None:
        super().__init__()
        self.config = config
        self.vocoder = AMPGenerator(config.vocoder)
        self.bwe_generator = AMPGenerator(config.bwe)
        self.mel_stft = MelSTFT(config.n_fft, config.hop_length, config.num_mels)
        self.output_sampling_rate = config.output_sampling_rate
        """Hz of the waveform."""

    def forward(self, mel: Tensor) -> Tensor:
        """Turn a spectrogram into sound.

        Args:
            mel: (B, 2, M, 64) natural-log mel magnitudes, time on axis 2, any float dtype.

        Returns:
            (B, 2, 480 * M) in [-1, 1] at ``output_sampling_rate``, dtype of ``mel``.

        Raises:
            RequestError: another number of axes, channels or bins.
        """
        low = self.vocoder.limit(self.vocoder(mel.float()))
        num_low = low.shape[-1]
        low = nn.functional.pad(low, (0, -num_low % self.config.hop_length))
        wide = self.bwe_generator(self.mel_stft(low).transpose(2, 3))
        wide.add_(hann_upsample(low, self.config.ratio)).clamp_(-1, 1)
        return wide[..., : num_low * self.config.ratio].to(mel.dtype)


class AMPGenerator(Generator):
    """Generator with anti-aliased snake activations; the caller limits its output where that is wanted."""

    def __init__(self, config: GeneratorConfig) -> None:
        kernel = kaiser_sinc_filter(_KAISER_RATIO, KAISER_TAPS)  # once: there are hundreds of activations
        super().__init__(config, partial(AMPBlock, kernel=kernel), partial(AntiAliasedSnake, kernel=kernel))

    def forward(self, mel: Tensor) -> Tensor:
        """(B, 2, M, 64) float32 log mel -> (B, 2, M * samples_per_frame) float32, not limited."""
        return self.generate(mel)


class AMPBlock(nn.Module):
    """Residual block with an anti-aliased activation before each convolution ("AMP1")."""

    def __init__(self, channels: int, kernel_size: int, dilations: Sequence[int], kernel: Tensor) -> None:
        super().__init__()
        self.convs1 = dilated_convolutions(channels, kernel_size, dilations)
        self.convs2 = dilated_convolutions(channels, kernel_size, [1] * len(dilations))
        self.acts1 = nn.ModuleList(AntiAliasedSnake(channels, kernel) for _ in dilations)
        self.acts2 = nn.ModuleList(AntiAliasedSnake(channels, kernel) for _ in dilations)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, T) float32 -> the same shape, a new tensor."""
        layers = zip(self.acts1, self.convs1, self.acts2, self.convs2, strict=True)
        for act1, conv1, act2, conv2 in layers:
            x = conv2(act2(conv1(act1(x)))).add_(x)
        return x


class AntiAliasedSnake(nn.Module):
    """Snake activation at twice the rate, so that the harmonics it creates do not fold back."""

    def __init__(self, channels: int, kernel: Tensor) -> None:
        super().__init__()
        self.upsample = KaiserUpsample(kernel)
        self.act = SnakeBeta(channels)
        self.downsample = KaiserDownsample(kernel)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, T) float32 -> the same shape."""
        return self.downsample(self.act(self.upsample(x)))


class SnakeBeta(nn.Module):
    """x + sin(a x)^2 / b with a = exp(alpha), b = exp(beta) per channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.zeros(channels))
        self.beta = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, T) float32 -> the same shape."""
        frequency, magnitude = self.alpha.float().exp()[:, None], self.beta.float().exp()[:, None]
        # The reciprocal, not the quotient: a hundred of these in a row amplify the rounding.
        return (x * frequency).sin_().square_().mul_(1.0 / (magnitude + _SNAKE_EPS)).add_(x)


class KaiserUpsample(nn.Module):
    """Doubles the rate with the filter of the checkpoint; ``kernel`` stands there until one is loaded."""

    def __init__(self, kernel: Tensor) -> None:
        super().__init__()
        self.register_buffer("filter", kernel.clone())

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, T) float32 -> (B, C, 2T)."""
        return kaiser_upsample(x, self.get_buffer("filter").float(), _KAISER_RATIO)


class KaiserDownsample(nn.Module):
    """Halves the rate with the filter of the checkpoint; ``kernel`` stands there until one is loaded."""

    def __init__(self, kernel: Tensor) -> None:
        super().__init__()
        self.lowpass = LowPass(kernel)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, 2T) float32 -> (B, C, T)."""
        return kaiser_downsample(x, self.lowpass.get_buffer("filter").float(), _KAISER_RATIO)


class LowPass(nn.Module):
    """Holder of the filter under the name that the checkpoint gives it."""

    def __init__(self, kernel: Tensor) -> None:
        super().__init__()
        self.register_buffer("filter", kernel.clone())


class MelSTFT(nn.Module):
    """Causal log mel spectrogram of the 16 kHz waveform, by the bases of the checkpoint."""

    def __init__(self, n_fft: int, hop_length: int, num_mels: int) -> None:
        super().__init__()
        self.stft_fn = STFTBasis(n_fft, hop_length)
        self.register_buffer("mel_basis", torch.zeros(num_mels, n_fft // 2 + 1))

    def forward(self, waveform: Tensor) -> Tensor:
        """(B, 2, S) float32 -> (B, 2, num_mels, S / hop_length) natural-log mel magnitudes."""
        magnitude = self.stft_fn(waveform.flatten(0, 1))
        mel = self.get_buffer("mel_basis").float() @ magnitude
        return mel.clamp_(min=LOG_FLOOR).log_().unflatten(0, waveform.shape[:2])


class STFTBasis(nn.Module):
    """Magnitude spectrogram by a stored basis: n_fft // 2 + 1 real rows, then as many imaginary ones."""

    def __init__(self, n_fft: int, hop_length: int) -> None:
        super().__init__()
        self.hop_length = hop_length
        rows = 2 * (n_fft // 2 + 1)
        self.register_buffer("forward_basis", torch.zeros(rows, 1, n_fft))
        # In every file, and of no use here: nothing is ever transformed back.
        self.register_buffer("inverse_basis", torch.zeros(rows, 1, n_fft))

    def forward(self, waveform: Tensor) -> Tensor:
        """(B * 2, S) float32, S a multiple of the hop -> (B * 2, K, S / hop_length)."""
        basis = self.get_buffer("forward_basis").float()
        n_fft = basis.shape[-1]
        # Zeros on the left only: no frame sees later samples.
        padded = nn.functional.pad(waveform, (n_fft - self.hop_length, 0))
        # In whole float32, see exact_float32: TF32 would show in the logarithm of what is nearly silent.
        spectrum = nn.functional.conv1d(padded[:, None], basis, stride=self.hop_length)
        real, imaginary = spectrum.chunk(2, dim=1)
        return (real.square() + imaginary.square()).sqrt_()


def kaiser_sinc_filter(ratio: int, taps: int) -> Tensor:
    """Low-pass filter of the anti-aliased activations, as the original code computes it.

    Released checkpoints store it (rounded to bfloat16) and the stored one counts; this is the value before
    any checkpoint is loaded.

    Returns:
        (1, 1, taps) float32, even, of sum 1: cutoff 0.5 / ratio, half width 0.6 / ratio.  It lies on the
        default device.
    """
    half = taps // 2
    attenuation = 2.285 * (half - 1) * math.pi * (4 * 0.6 / ratio) + 7.95
    if attenuation > 50:
        beta = 0.1102 * (attenuation - 8.7)
    elif attenuation >= 21:
        beta = 0.5842 * (attenuation - 21) ** 0.4 + 0.07886 * (attenuation - 21)
    else:
        beta = 0.0
    # Computed on the CPU: on the meta device such arithmetic imports a compiler, which takes seconds.
    window = torch.kaiser_window(taps, periodic=False, beta=beta, device="cpu")
    time = torch.arange(taps, device="cpu") - half + (0.0 if taps % 2 else 0.5)
    kernel = window * torch.sinc(time / ratio)
    return (kernel / kernel.sum()).view(1, 1, taps).to(torch.get_default_device())


def kaiser_upsample(x: Tensor, kernel: Tensor, ratio: int) -> Tensor:
    """Raise the rate ``ratio`` times, ends replicated: (B, C, T) float32 -> (B, C, T * ratio).

    ``kernel`` is (1, 1, taps) and of sum 1.
    """
    taps, channels = kernel.shape[-1], x.shape[1]
    pad = taps // ratio - 1
    left = pad * ratio + (taps - ratio) // 2
    right = pad * ratio + (taps - ratio + 1) // 2
    x = nn.functional.pad(x, (pad, pad), mode="replicate")
    weight = (kernel * ratio).expand(channels, -1, -1)
    y = nn.functional.conv_transpose1d(x, weight, stride=ratio, groups=channels)
    return y[..., left : y.shape[-1] - right]


def kaiser_downsample(x: Tensor, kernel: Tensor, ratio: int) -> Tensor:
    """Lower the rate ``ratio`` times, ends replicated: (B, C, T) float32 -> (B, C, T / ratio)."""
    taps, channels = kernel.shape[-1], x.shape[1]
    x = nn.functional.pad(x, (taps // 2 - (1 - taps % 2), taps // 2), mode="replicate")
    return nn.functional.conv1d(x, kernel.expand(channels, -1, -1), stride=ratio, groups=channels)


def hann_sinc_filter(ratio: int) -> Tensor:
    """Interpolation filter of the bandwidth extension; it is in no checkpoint.

    Returns:
        (1, 1, 14 * ratio + 1) float32 on the CPU, of sum about 1: sinc with rolloff 0.99 under a Hann window
        over 6 zero crossings.
    """
    width = math.ceil(_ZERO_CROSSINGS / _ROLLOFF)
    taps = torch.arange(2 * width * ratio + 1, dtype=torch.float32, device="cpu")
    time = (taps / ratio - width) * _ROLLOFF
    window = torch.cos(time.clamp(-_ZERO_CROSSINGS, _ZERO_CROSSINGS) * math.pi / _ZERO_CROSSINGS / 2) ** 2
    return (torch.sinc(time) * window * (_ROLLOFF / ratio)).view(1, 1, -1)


def hann_upsample(x: Tensor, ratio: int) -> Tensor:
    """Raise the rate ``ratio`` times, ends replicated: (B, C, T) float32 -> (B, C, T * ratio)."""
    kernel = hann_sinc_filter(ratio).to(x.device)
    taps, channels = kernel.shape[-1], x.shape[1]
    width = (taps - 1) // (2 * ratio)
    x = nn.functional.pad(x, (width, width), mode="replicate")
    weight = (kernel * ratio).expand(channels, -1, -1)
    y = nn.functional.conv_transpose1d(x, weight, stride=ratio, groups=channels)
    return y[..., 2 * width * ratio : y.shape[-1] - (taps - ratio)]


def vocoder_class(
    sections: Sections | None = None, keys: Iterable[str] = ()
) -> type[Vocoder] | type[VocoderBWE]:
    """Which vocoder a checkpoint holds; its configuration class is the attribute ``config_class``.

    Args:
        sections: the parsed metadata, which decides where it has a section ``vocoder``.
        keys: the tensor names of the file, which decide otherwise.

    Raises:
        CheckpointError: neither shows a vocoder.
    """
    section = (sections or {}).get("vocoder")
    if section:
        return VocoderBWE if "bwe" in section else Vocoder
    names = [key for key in keys if key.startswith("vocoder.")]
    if not names:
        raise CheckpointError("no vocoder in this file", hint="the full checkpoint, or its vocoder file")
    return VocoderBWE if any(name.startswith("vocoder.bwe_generator.") for name in names) else Vocoder
