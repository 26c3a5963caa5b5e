"""Audio front end: from a waveform at any rate to the log mel spectrogram that the audio encoder reads.

B batch, N samples, M frames, K = n_fft // 2 + 1 frequency bins, R resampling phases.
Plain functions, nothing to load: the window, the resampling kernels and the filter bank are formulas.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from diffsynth.errors import CheckpointError, RequestError

LOG_FLOOR = 1e-5
"""Mel magnitudes below this count as silence; ln(1e-5) = -11.51 is the smallest log mel."""

_ZERO_CROSSINGS = 6
_ROLLOFF = 0.99
_PHASES_PER_PASS = 256
_MAX_CHANNELS = 32
_SIDE_GAIN = math.sqrt(0.5)


@dataclass(frozen=True, kw_only=True, slots=True)
class MelConfig:
    """Parameters of the spectrogram; the defaults are those of every released checkpoint.

    ``sampling_rate`` in Hz, ``n_fft`` (also the window length) and ``hop_length`` in samples.
    """

    sampling_rate: int = 16000
    n_fft: int = 1024
    hop_length: int = 160
    mel_bins: int = 64

    def __post_init__(self) -> None:
        for name in ("sampling_rate", "n_fft", "hop_length", "mel_bins"):
            value = getattr(self, name)
            if not isinstance(value, int) or value <= 0:
                raise CheckpointError(
                    f"mel spectrogram: {name}={value!r} is not a positive whole number",
                    hint="the metadata is damaged: `diffsynth inspect FILE`",
                )


def prepare_waveform(waveform: Tensor, rate: int, config: MelConfig) -> Tensor:
    """Bring a recording to what :func:`log_mel` takes: stereo, float32, at ``config.sampling_rate``.

    Mono goes to both sides unchanged.  Of more than two channels the first two are taken as left and right
    and each further one is added to both with gain sqrt(1/2); the sum is divided by the total gain, so that
    it cannot clip.  A reader that knows the true speaker layout should mix down itself.

    Args:
        waveform: (N,), (channels, N) or (B, channels, N), any float dtype, range [-1, 1].
        rate: its sampling rate in Hz.
        config: gives the target rate.

    Returns:
        (B, 2, N') float32 on the same device, N' = ceil(N * target / rate); B is 1 where none was given.

    Raises:
        RequestError: integer samples, no samples, a wrong number of axes or channels, or an impossible rate.
    """
    if not waveform.is_floating_point():
        raise RequestError(
            f"the audio samples are {waveform.dtype}, not floating point",
            hint="divide 16-bit samples by 32768 to bring them to [-1, 1]",
        )
    if waveform.ndim not in (1, 2, 3) or waveform.numel() == 0:
        raise RequestError(
            f"audio of shape {tuple(waveform.shape)} cannot be used",
            hint="a tensor (samples,), (channels, samples) or (batch, channels, samples)",
        )
    x = waveform.float()
    x_BCN = x[(None,) * (3 - x.ndim)]
    channels = x_BCN.shape[1]
    if channels > _MAX_CHANNELS:
        raise RequestError(
            f"audio of shape {tuple(waveform.shape)} would have {channels} channels",
            hint="put channels before samples: waveform.transpose(-1, -2)",
        )
    if channels > 2:
        others_B1N = x_BCN[:, 2:].sum(dim=1, keepdim=True)
        x_BCN = (x_BCN[:, :2] + _SIDE_GAIN * others_B1N) / (1 + _SIDE_GAIN * (channels - 2))
    return resample(x_BCN, rate, config.sampling_rate).expand(-1, 2, -1)


def resample(waveform: Tensor, rate: int, target: int) -> Tensor:
    """Change the sampling rate by Hann-windowed sinc interpolation (6 zero crossings, rolloff 0.99).

    Equal to torchaudio's ``functional.resample`` at its defaults; silence is assumed beyond both ends.  The
    phases are computed in groups that see only the samples they need, so that rates without a common divisor
    (44099 to 16000 Hz) need no kernel of gigabytes.

    Args:
        waveform: (..., N), any float dtype.
        rate: sampling rate of ``waveform`` in Hz.
        target: wanted sampling rate in Hz.

    Returns:
        (..., ceil(N * target / rate)), same dtype and device; arithmetic in float32 (float64 for float64).

    Raises:
        RequestError: a rate is not a positive whole number.
    """
    rate, target = _whole_hz("rate", rate), _whole_hz("target", target)
    if rate == target:
        return waveform
    divisor = math.gcd(rate, target)
    step, phases = rate // divisor, target // divisor
    num_samples = waveform.shape[-1]
    dtype = torch.promote_types(waveform.dtype, torch.float32)
    base = min(step, phases) * _ROLLOFF
    width = math.ceil(_ZERO_CROSSINGS * step / base)
    x_B1N = nn.functional.pad(waveform.reshape(-1, 1, num_samples).to(dtype), (width, width + step))
    periods = -(-num_samples // step)
    outputs = []
    for first in range(0, phases, _PHASES_PER_PASS):
        last = min(first + _PHASES_PER_PASS, phases)
        # Only samples within `width` of a phase weigh anything; the group's first phase begins at `start`.
        start, end = first * step // phases, (last - 1) * step // phases + 2 * width + 2
        kernel = _sinc_kernel(
            range(first, last), range(start - width, end - width), step, phases, base, dtype
        )
        reach = (periods - 1) * step + end
        group_BRP = nn.functional.conv1d(x_B1N[..., start:reach], kernel.to(waveform.device), stride=step)
        outputs.append(group_BRP)
    y_BPR = torch.cat(outputs, dim=1).transpose(1, 2)
    length = -(-phases * num_samples // step)
    y_BN = y_BPR.reshape(y_BPR.shape[0], -1)[:, :length]
    return y_BN.reshape(*waveform.shape[:-1], length).to(waveform.dtype)


def _whole_hz(name: str, value: float) -> int:
    if not value > 0 or value % 1 != 0:
        raise RequestError(
            f"sampling rate {name}={value!r} is not a positive whole number of Hz",
            hint="the rate of the sound file, for instance 48000",
        )
    return int(value)


def _sinc_kernel(
    phases: range, samples: range, step: int, num_phases: int, base: float, dtype: torch.dtype
) -> Tensor:
    """(len(phases), 1, len(samples)): weight of input sample i for the output at phase j / num_phases.

    Evaluated in ``dtype``, on the CPU, in torchaudio's order of operations: at 44.1 kHz float64 would move
    the result by 1e-5, more than the two may differ.
    """
    i = torch.arange(samples.start, samples.stop, dtype=dtype, device="cpu") / step
    j = torch.arange(-phases.start, -phases.stop, -1, dtype=dtype, device="cpu") / num_phases
    t = ((j[:, None, None] + i) * base).clamp_(-_ZERO_CROSSINGS, _ZERO_CROSSINGS)
    window = torch.cos(t * math.pi / _ZERO_CROSSINGS / 2) ** 2
    t = t * math.pi
    sinc = torch.where(t == 0, 1.0, t.sin() / t)
    return sinc * window * (base / step)


def log_mel(waveform: Tensor, config: MelConfig, *, complex_ok: bool = True) -> Tensor:
    """Natural logarithm of the mel magnitude spectrogram (power 1, floor 1e-5), always in float32.

    Args:
        waveform: (..., N) at ``config.sampling_rate``, range [-1, 1], any float dtype.  The encoder's input
            comes from (B, 2, N).
        config: the spectrogram's parameters.
        complex_ok: see :func:`stft_magnitude`.

    Returns:
        (..., 1 + N // hop_length, mel_bins) float32, at least ln(1e-5) = -11.51.

    Raises:
        RequestError: N is not greater than n_fft // 2.
    """
    magnitude = stft_magnitude(waveform, config, complex_ok=complex_ok)
    bank = mel_filter_bank(config).to(magnitude.device)
    return (magnitude.transpose(-1, -2) @ bank).clamp_(min=LOG_FLOOR).log_()


def stft_magnitude(waveform: Tensor, config: MelConfig, *, complex_ok: bool = True) -> Tensor:
    """One-sided short-time Fourier magnitude: periodic Hann window, centred frames, reflect padding.

    Args:
        waveform: (..., N) float; computed in float32 whatever its dtype.
        config: gives n_fft and hop_length.
        complex_ok: whether the waveform's device has complex64; False makes the same sums in real numbers,
            True uses ``torch.stft``.

    Returns:
        (..., n_fft // 2 + 1, 1 + N // hop_length) float32.

    Raises:
        RequestError: N is not greater than n_fft // 2, so the ends cannot be reflected.
    """
    num_samples, half = waveform.shape[-1], config.n_fft // 2
    if num_samples <= half:
        raise RequestError(
            f"{num_samples} audio samples at {config.sampling_rate} Hz are too short for one spectrum",
            hint=f"a soundtrack of more than {half / config.sampling_rate:.3f} s",
        )
    x_BN = waveform.float().reshape(-1, num_samples)
    if complex_ok:
        spectrum = torch.stft(
            x_BN,
            n_fft=config.n_fft,
            hop_length=config.hop_length,
            window=torch.hann_window(config.n_fft, periodic=True, device=waveform.device),
            center=True,
            pad_mode="reflect",
            return_complex=True,
        )
        magnitude_BKM = spectrum.abs()
    else:
        # A matrix product, not a convolution: convolutions may run in TF32, which the floor of 1e-5 shows.
        frames_BMn = nn.functional.pad(x_BN, (half, half), mode="reflect").unfold(
            -1, config.n_fft, config.hop_length
        )
        basis = _fourier_basis(config.n_fft).to(waveform.device)
        real, imaginary = (frames_BMn @ basis).chunk(2, dim=-1)
        magnitude_BKM = (real.square() + imaginary.square()).sqrt_().transpose(-1, -2)
    return magnitude_BKM.reshape(*waveform.shape[:-1], *magnitude_BKM.shape[-2:])


def _fourier_basis(n_fft: int) -> Tensor:
    """(n_fft, 2K) float32: columns are the windowed cosines, then the windowed negative sines."""
    n = torch.arange(n_fft, dtype=torch.float64, device="cpu")
    k = torch.arange(n_fft // 2 + 1, dtype=torch.float64, device="cpu")
    # The product is reduced modulo n_fft while it is still an exact integer.
    angle = torch.outer(n, k).remainder_(n_fft) * (2 * math.pi / n_fft)
    window = 0.5 - 0.5 * torch.cos(2 * math.pi / n_fft * n)
    return (torch.cat([angle.cos(), -angle.sin()], dim=1) * window[:, None]).float()


def mel_filter_bank(config: MelConfig) -> Tensor:
    """Triangular filters on the Slaney mel scale with Slaney area normalisation, from 0 Hz to half the rate.

    The same matrix as ``transformers.audio_utils.mel_filter_bank(norm="slaney", mel_scale="slaney")``.

    Returns:
        (n_fft // 2 + 1, mel_bins) float32 on the CPU.
    """
    nyquist = config.sampling_rate / 2
    bins_K1 = torch.linspace(0, nyquist, config.n_fft // 2 + 1, dtype=torch.float64, device="cpu")[:, None]
    highest = 3 * nyquist / 200 if nyquist < 1000 else 15 + 27 * math.log(nyquist / 1000) / math.log(6.4)
    mel = torch.linspace(0, highest, config.mel_bins + 2, dtype=torch.float64, device="cpu")
    points = torch.where(mel < 15, mel * (200 / 3), 1000 * torch.exp((mel - 15) * (math.log(6.4) / 27)))
    low, centre, high = points[:-2], points[1:-1], points[2:]
    triangles = torch.minimum((bins_K1 - low) / (centre - low), (high - bins_K1) / (high - centre)).clamp_(
        min=0
    )
    return (triangles * (2 / (high - low))).float()
