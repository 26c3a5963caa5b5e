import json
import math
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor

from diffsynth.errors import CheckpointError, RequestError
from diffsynth.models.ltx2.mel import (
    LOG_FLOOR,
    MelConfig,
    log_mel,
    mel_filter_bank,
    prepare_waveform,
    resample,
    stft_magnitude,
)

LENGTHS = json.loads((Path(__file__).parents[2] / "golden/audio/lengths.json").read_text(encoding="utf-8"))
CONFIG = MelConfig()


def noise(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1), dtype=dtype) * 1.8 - 0.9


def sinc_interpolation(x: Tensor, rate: int, target: int) -> Tensor:
    """The resampler's definition, sample by sample."""
    divisor = math.gcd(rate, target)
    step, phases = rate // divisor, target // divisor
    base = 0.99 * min(step, phases)
    j = torch.arange(-(-phases * len(x) // step), dtype=torch.float64)
    t = (torch.arange(len(x), dtype=torch.float64) / step - j[:, None] / phases) * base
    t = t.clamp(-6, 6)
    return (torch.sinc(t) * torch.cos(t * math.pi / 12) ** 2 * base / step) @ x.double()


@pytest.mark.parametrize("row", LENGTHS["resample_rows"], ids=lambda r: f"{r['rate']}-{r['samples']}")
def test_resampled_lengths(row: dict[str, int]) -> None:
    assert resample(torch.zeros(1, row["samples"]), row["rate"], 16000).shape == (1, row["samples_16k"])


@pytest.mark.parametrize("rate", [48000, 44100, 22050, 8000, 16001, 44099])
def test_resample_is_the_windowed_sinc_sum(rate: int) -> None:
    x = noise(701, dtype=torch.float64)
    torch.testing.assert_close(
        resample(x, rate, 16000), sinc_interpolation(x, rate, 16000), atol=1e-9, rtol=0
    )


def test_resample_in_float32_stays_close_to_the_sum() -> None:
    x = noise(2, 3, 2205)
    y = resample(x, 44100, 16000)
    assert y.shape == (2, 3, 800) and y.dtype == torch.float32
    torch.testing.assert_close(y[1, 2], sinc_interpolation(x[1, 2], 44100, 16000).float(), atol=2e-5, rtol=0)


def test_resample_keeps_dtype_and_returns_the_same_rate_untouched() -> None:
    x = noise(1, 480)
    assert resample(x, 16000, 16000) is x
    half = resample(x.bfloat16(), 48000, 16000)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half, resample(x.bfloat16().float(), 48000, 16000).bfloat16())


@pytest.mark.skipif(find_spec("torchaudio") is None, reason="torchaudio is an extra")
@pytest.mark.parametrize("rate", [48000, 44100, 22050, 8000])
def test_resample_equals_torchaudio(rate: int) -> None:
    try:
        functional = import_module("torchaudio.functional")
    except (ImportError, OSError) as error:  # built for another torch
        pytest.skip(str(error))
    x = noise(2, 4410)
    torch.testing.assert_close(resample(x, rate, 16000), functional.resample(x, rate, 16000))


@pytest.mark.parametrize("rate", [0, -8000, 22050.5, math.nan, math.inf])
def test_impossible_rates(rate: float) -> None:
    with pytest.raises(RequestError, match="rate"):
        resample(torch.zeros(10), rate, 16000)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "config", [CONFIG, MelConfig(n_fft=256, mel_bins=16), MelConfig(sampling_rate=24000, n_fft=600)]
)
def test_filter_bank_equals_the_one_of_transformers(config: MelConfig) -> None:
    from transformers.audio_utils import mel_filter_bank as oracle

    expected = oracle(
        num_frequency_bins=config.n_fft // 2 + 1,
        num_mel_filters=config.mel_bins,
        min_frequency=0.0,
        max_frequency=config.sampling_rate / 2,
        sampling_rate=config.sampling_rate,
        norm="slaney",
        mel_scale="slaney",
    )
    torch.testing.assert_close(mel_filter_bank(config), torch.from_numpy(expected).float(), atol=1e-8, rtol=0)


def test_filter_bank_of_the_released_models() -> None:
    bank = mel_filter_bank(CONFIG)
    assert bank.shape == (513, 64) and int((bank != 0).sum()) == 997
    assert bank.max().item() == pytest.approx(0.0213311523, abs=1e-9)


@pytest.mark.parametrize("row", LENGTHS["encoder_rows"][:6], ids=lambda r: str(r["samples_16k"]))
def test_mel_frames(row: dict[str, int]) -> None:
    mel = log_mel(torch.zeros(1, 2, row["samples_16k"]), CONFIG)
    assert mel.shape == (1, 2, row["mel_frames"], 64)
    torch.testing.assert_close(mel, torch.full_like(mel, math.log(LOG_FLOOR)))


@pytest.mark.parametrize("config", [CONFIG, MelConfig(n_fft=256, hop_length=80, mel_bins=16)])
def test_real_numbers_equal_complex_ones(config: MelConfig) -> None:
    x = noise(2, 2, 3000)
    torch.testing.assert_close(
        stft_magnitude(x, config, complex_ok=False),
        stft_magnitude(x, config, complex_ok=True),
        atol=2e-5,
        rtol=1e-5,
    )
    torch.testing.assert_close(
        log_mel(x, config, complex_ok=False), log_mel(x, config, complex_ok=True), atol=1e-4, rtol=0
    )


def test_a_tone_lands_in_its_mel_bin() -> None:
    tone = torch.sin(2 * math.pi * 1000 * torch.arange(8000) / 16000)
    peak = log_mel(tone, CONFIG)[25].argmax().item()
    assert mel_filter_bank(CONFIG)[64].argmax().item() == peak


def test_low_precision_waveforms_are_analysed_in_float32() -> None:
    x = noise(1, 2, 1600).half()
    mel = log_mel(x, CONFIG)
    assert mel.dtype == torch.float32
    torch.testing.assert_close(mel, log_mel(x.float(), CONFIG))


def test_too_short_for_one_spectrum() -> None:
    assert log_mel(torch.zeros(1, 2, 513), CONFIG).shape[2] == 4
    for complex_ok in (True, False):
        with pytest.raises(RequestError, match=r"512 audio samples.*0\.032 s"):
            log_mel(torch.zeros(1, 2, 512), CONFIG, complex_ok=complex_ok)


def test_prepare_mono_and_stereo() -> None:
    mono = noise(9600)
    stereo = prepare_waveform(mono, 48000, CONFIG)
    assert stereo.shape == (1, 2, 3200) and stereo.dtype == torch.float32
    assert torch.equal(stereo[:, 0], stereo[:, 1])
    assert torch.equal(prepare_waveform(mono[None, None], 48000, CONFIG), stereo)
    pair = noise(2, 900)
    assert torch.equal(prepare_waveform(pair, 16000, CONFIG), pair[None])
    assert prepare_waveform(pair.bfloat16(), 16000, CONFIG).dtype == torch.float32


def test_prepare_mixes_more_channels_down_without_clipping() -> None:
    x = torch.zeros(1, 4, 10)
    x[0, :, 0] = torch.tensor([1.0, 0, 0, 0])
    x[0, :, 1] = torch.tensor([0, 0, 1.0, 0])
    x[0, :, 2] = 1.0
    y = prepare_waveform(x, 16000, CONFIG)[0]
    total = 1 + 2 * math.sqrt(0.5)
    side = math.sqrt(0.5) / total
    torch.testing.assert_close(y[:, 0], torch.tensor([1 / total, 0]))
    torch.testing.assert_close(y[:, 1], torch.tensor([side, side]))
    torch.testing.assert_close(y[:, 2], torch.ones(2))


@pytest.mark.parametrize(
    ("waveform", "reason"),
    [
        (torch.zeros(2, 900, dtype=torch.int16), "floating"),
        (torch.zeros(900, 2), "900 channels"),
        (torch.zeros(2, 0), "cannot be used"),
        (torch.zeros(1, 1, 2, 900), "cannot be used"),
    ],
)
def test_prepare_refuses(waveform: Tensor, reason: str) -> None:
    with pytest.raises(RequestError, match=reason):
        prepare_waveform(waveform, 16000, CONFIG)


def test_config_refuses_nonsense() -> None:
    with pytest.raises(CheckpointError, match="hop_length"):
        MelConfig(hop_length=0)
