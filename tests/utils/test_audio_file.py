"""Sound alone in a file: exact to 16 bits, with the request, complete or not at all."""

from pathlib import Path

import pytest
import torch

from diffsynth.errors import OutputError, RequestError
from diffsynth.utils.audio import Waveform, read_audio
from diffsynth.utils.audio_file import check_audio_path, write_audio
from diffsynth.utils.metadata import read_request

NOISE = torch.randn(2, 10_001, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)


@pytest.mark.parametrize("suffix", [".wav", ".flac", ".WAV"])
@pytest.mark.parametrize("rate", [24000, 48000])
def test_sound_comes_back(tmp_path: Path, suffix: str, rate: int) -> None:
    path = write_audio(
        Waveform(NOISE, rate), tmp_path / f"a{suffix}", request={"prompt": "größer", "seed": 1}
    )
    found = read_audio(path)
    assert found.sampling_rate == rate
    assert torch.equal(found.samples * 32768, (NOISE * 32767).trunc())
    assert read_request(path) == {"prompt": "größer", "seed": 1}


def test_mono_is_doubled_and_loud_samples_are_clipped(tmp_path: Path) -> None:
    sound = Waveform(torch.tensor([[2.0, -2.0, float("nan"), 0.5]]), 24000)
    found = read_audio(write_audio(sound, tmp_path / "a.wav")).samples * 32768
    assert found.tolist() == [[32767.0, -32767.0, 0.0, 16383.0]] * 2


def test_what_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="is no name for sound alone") as refused:
        check_audio_path(tmp_path / "a.mp4")
    assert refused.value.hint == "a.wav or a.flac"
    with pytest.raises(OutputError):
        write_audio(Waveform(NOISE, 24000), tmp_path / "missing" / "a.wav")
    with pytest.raises(RequestError, match="3 channels"):
        write_audio(Waveform(torch.zeros(3, 10), 24000), tmp_path / "a.wav")
    assert not list(tmp_path.iterdir())
