import wave
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from diffsynth.errors import RequestError
from diffsynth.utils.audio import Waveform, read_audio
from diffsynth.utils.media_io_ltx2 import write_video_audio_ltx2


def tone(num_samples: int, rate: int, hz: float = 440.0) -> torch.Tensor:
    time_s = torch.arange(num_samples, dtype=torch.float64) / rate
    return (0.5 * torch.sin(2 * torch.pi * hz * time_s)).float()


def write_wave(path: Path, data: np.ndarray, width: int, rate: int = 8000) -> None:
    """data: interleaved (samples, channels)."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(data.shape[1])
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(data.tobytes())


@pytest.mark.parametrize(
    ("width", "dtype", "offset", "span"),
    [(1, np.uint8, 128, 128), (2, np.int16, 0, 32768), (4, np.int32, 0, 2**31)],
)
def test_integer_samples_are_scaled_and_bytes_are_centred(
    tmp_path: Path, width: int, dtype: type, offset: int, span: int
) -> None:
    expected = torch.tensor([[0.0, 0.5, -0.5, -1.0], [0.25, 0.0, 0.75, -0.25]])
    data: np.ndarray = (expected.T.double().numpy() * span + offset).astype(dtype)
    write_wave(tmp_path / "a.wav", data, width)
    result = read_audio(tmp_path / "a.wav")
    assert result.sampling_rate == 8000
    assert torch.equal(result.samples, expected)


def test_mono_is_doubled(tmp_path: Path) -> None:
    write_wave(tmp_path / "a.wav", np.arange(10, dtype=np.int16)[:, None], 2)
    stereo = read_audio(tmp_path / "a.wav").to_stereo()
    assert stereo.samples.shape == (2, 10)
    assert torch.equal(stereo.samples[0], stereo.samples[1])


def test_more_than_two_channels_are_mixed_down(tmp_path: Path) -> None:
    data = np.zeros((4000, 6), dtype=np.int16)
    data[:, 0] = 8000
    write_wave(tmp_path / "a.wav", data, 2)
    result = read_audio(tmp_path / "a.wav")
    assert result.samples.shape == (2, 4000)
    left, right = result.samples[:, 1000:3000].mean(dim=1).tolist()
    assert left > 0.05
    assert abs(right) < 1e-3


@pytest.mark.parametrize(
    ("start_s", "max_duration_s"), [(0.0, 0.5), (0.25, 0.5), (0.7, None), (0.1001, 0.3333)]
)
def test_a_part_is_exactly_that_part(tmp_path: Path, start_s: float, max_duration_s: float | None) -> None:
    data = np.stack([np.arange(8000, dtype=np.int16)] * 2, axis=1)
    write_wave(tmp_path / "a.wav", data, 2)
    whole = read_audio(tmp_path / "a.wav").samples
    part = read_audio(tmp_path / "a.wav", start_s, max_duration_s).samples
    first = round(start_s * 8000)
    last = 8000 if max_duration_s is None else first + round(max_duration_s * 8000)
    assert torch.equal(part, whole[:, first:last])


def test_a_part_of_compressed_sound_is_in_time(tmp_path: Path) -> None:
    sound = tone(48000, 24000, 300) * torch.linspace(0, 1, 48000)
    video = torch.zeros(48, 16, 16, 3, dtype=torch.uint8)
    write_video_audio_ltx2(video, sound, tmp_path / "a.mp4", 24, 24000)
    whole = read_audio(tmp_path / "a.mp4").samples
    part = read_audio(tmp_path / "a.mp4", 0.7, 0.5).samples
    assert part.shape == (2, 12000)
    assert (whole[0, :48000] - sound).abs().max() < 0.02
    assert (part - whole[:, 16800:28800]).abs().max() < 1e-3


def test_a_track_that_begins_late_keeps_its_place(tmp_path: Path) -> None:
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=10)
        video.width = video.height = 16
        video.pix_fmt = "yuv420p"
        audio = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        for index in range(10):
            frame = av.VideoFrame(16, 16, "yuv420p")
            frame.pts, frame.time_base = index, Fraction(1, 10)
            container.mux(video.encode(frame))
        container.mux(video.encode(None))
        sound = av.AudioFrame.from_ndarray(np.full((1, 4000), 16384, np.int16), format="s16", layout="mono")
        sound.sample_rate, sound.pts, sound.time_base = 8000, 4000, Fraction(1, 8000)
        container.mux(audio.encode(sound))
        container.mux(audio.encode(None))
    samples = read_audio(path).samples
    assert samples.shape == (1, 8000)
    assert torch.equal(samples[0, :4000], torch.zeros(4000))
    assert torch.equal(samples[0, 4000:], torch.full((4000,), 0.5))
    assert torch.equal(read_audio(path, 0.25, 0.5).samples[0], samples[0, 2000:6000])


@pytest.mark.parametrize(
    ("shape", "channels"),
    [((2, 50), 2), ((50, 2), 2), ((1, 50), 1), ((50, 1), 1), ((50,), 1), ((1, 2, 50), 2)],
)
def test_every_accepted_layout(shape: tuple[int, ...], channels: int) -> None:
    waveform = Waveform.of(torch.randn(shape, dtype=torch.float64), 8000)
    assert waveform.samples.shape == (channels, 50)
    assert waveform.samples.dtype == torch.float32
    assert waveform.duration_s == 50 / 8000


def test_samples_last_is_transposed_not_reshaped() -> None:
    samples = torch.arange(6.0).reshape(3, 2)
    assert torch.equal(Waveform.of(samples, 8000).samples, torch.tensor([[0.0, 2, 4], [1, 3, 5]]))


@pytest.mark.parametrize(
    "audio",
    [torch.zeros(3, 50), torch.zeros(2, 0), torch.zeros(2, 2, 50), torch.zeros(2, 50, dtype=torch.int16)],
)
def test_other_layouts_are_refused(audio: torch.Tensor) -> None:
    with pytest.raises(RequestError, match="audio of"):
        Waveform.of(audio, 8000)


def test_waveforms_check_themselves() -> None:
    with pytest.raises(RequestError):
        Waveform(torch.zeros(8), 8000)
    with pytest.raises(RequestError):
        Waveform(torch.zeros(1, 8), 0)
    with pytest.raises(RequestError, match="3 channels"):
        Waveform(torch.zeros(3, 8), 8000).to_stereo()


def test_fit_cuts_and_continues_with_silence() -> None:
    waveform = Waveform(torch.ones(1, 4), 8000)
    assert waveform.fit(3).samples.tolist() == [[1, 1, 1]]
    assert waveform.fit(6).samples.tolist() == [[1, 1, 1, 1, 0, 0]]


def test_resampling_keeps_pitch_and_length() -> None:
    source = Waveform(torch.stack([tone(30000, 30000), tone(30000, 30000, 880)]), 30000)
    result = source.resample(32000)
    assert result.samples.shape == (2, 32000)
    expected = torch.stack([tone(32000, 32000), tone(32000, 32000, 880)])
    assert (result.samples - expected)[:, 500:-500].abs().max() < 2e-3
    assert source.resample(30000) is source


def test_reading_errors_name_the_argument(tmp_path: Path) -> None:
    (tmp_path / "text.wav").write_text("no sound")
    write_video_audio_ltx2(torch.zeros(2, 16, 16, 3, dtype=torch.uint8), None, tmp_path / "silent.mp4")
    write_wave(tmp_path / "a.wav", np.zeros((800, 1), np.int16), 2)
    for name, message in (
        ("text.wav", "cannot be read"),
        ("no.wav", "cannot be read"),
        ("silent.mp4", "no sound track"),
    ):
        with pytest.raises(RequestError, match=f"retake_audio=.*{message}"):
            read_audio(tmp_path / name, argument="retake_audio")
    with pytest.raises(RequestError, match="no sound at 5"):
        read_audio(tmp_path / "a.wav", 5.0)
    with pytest.raises(RequestError, match="start_s=-1"):
        read_audio(tmp_path / "a.wav", -1)
    with pytest.raises(RequestError, match="max_duration_s=0"):
        read_audio(tmp_path / "a.wav", 0, 0)
