import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import diffsynth.utils.data.media_io_ltx2 as public
from diffsynth.errors import OutputError, RequestError
from diffsynth.utils.media_io_ltx2 import (
    check_output_path,
    exact_frame_rate,
    read_audio,
    read_video,
    write_video_audio_ltx2,
)


@dataclass
class Facts:
    """What the media library says about a file."""

    video_codec: str
    pix_fmt: str
    num_frames: int
    decoded_frames: int
    fps: Fraction
    video_s: float
    audio_codec: str | None = None
    rate: int | None = None
    channels: int | None = None
    audio_s: float | None = None
    audio_start_s: float | None = None


def facts(path: Path) -> Facts:
    with av.open(str(path)) as container:
        video = container.streams.video[0]
        assert video.duration is not None
        assert video.time_base is not None
        assert video.average_rate is not None
        result = Facts(
            video_codec=video.codec_context.name,
            pix_fmt=str(video.codec_context.pix_fmt),
            num_frames=video.frames,
            decoded_frames=sum(1 for _ in container.decode(video)),
            fps=video.average_rate,
            video_s=float(video.duration * video.time_base),
        )
        if container.streams.audio:
            audio = container.streams.audio[0]
            assert audio.duration is not None
            assert audio.time_base is not None
            result.audio_codec, result.rate = audio.codec_context.name, audio.rate
            result.channels = audio.codec_context.channels
            result.audio_s = float(audio.duration * audio.time_base)
            result.audio_start_s = float((audio.start_time or 0) * audio.time_base)
    return result


def boxes(path: Path) -> list[str]:
    """Names of the top-level boxes of an mp4, in order."""
    data, names, place = path.read_bytes(), [], 0
    while place < len(data):
        names.append(data[place + 4 : place + 8].decode("ascii"))
        place += int.from_bytes(data[place : place + 4], "big")
    return names


def clip(num_frames: int, height: int = 16, width: int = 32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (num_frames, height, width, 3), dtype=torch.uint8, generator=generator)


def tone(num_samples: int, rate: int) -> Tensor:
    return 0.5 * torch.sin(torch.arange(num_samples) * (2 * torch.pi * 440 / rate))


@pytest.mark.parametrize(
    ("fps", "exact"),
    [
        (24, Fraction(24)),
        (25.0, Fraction(25)),
        (30, Fraction(30)),
        (50, Fraction(50)),
        (23.976, Fraction(24000, 1001)),
        (23.98, Fraction(24000, 1001)),
        (29.97, Fraction(30000, 1001)),
        (59.94, Fraction(60000, 1001)),
        (Fraction(24000, 1001), Fraction(24000, 1001)),
        (12.5, Fraction(25, 2)),
    ],
)
def test_frame_rate_and_durations(tmp_path: Path, fps: float | Fraction, exact: Fraction) -> None:
    num_frames, rate = 33, 24000
    num_samples = round(num_frames / float(fps) * rate)
    path = write_video_audio_ltx2(clip(num_frames), tone(num_samples, rate), tmp_path / "a.mp4", fps, rate)
    found = facts(path)
    assert (found.video_codec, found.pix_fmt, found.audio_codec) == ("h264", "yuv420p", "aac")
    assert (found.num_frames, found.decoded_frames, found.fps) == (num_frames, num_frames, exact)
    assert (found.rate, found.channels, found.audio_start_s) == (rate, 2, 0)
    assert found.video_s == pytest.approx(num_frames / exact, abs=1e-4)
    assert found.audio_s is not None
    assert abs(found.audio_s - found.video_s) < 0.1 / fps
    names = boxes(path)
    assert names.index("moov") < names.index("mdat")


@pytest.mark.parametrize("fps", [0, -1, float("nan"), float("inf"), 5000, "24"])
def test_impossible_frame_rates(fps: Any) -> None:
    with pytest.raises(RequestError, match="fps"):
        exact_frame_rate(fps)


@pytest.mark.parametrize("share", [0.0001, 0.5, 1.5])
def test_sound_is_cut_or_continued_to_the_length_of_the_video(
    tmp_path: Path, share: float, caplog: pytest.LogCaptureFixture
) -> None:
    num_samples = max(1, round(2 * 24000 * share))
    path = write_video_audio_ltx2(clip(48), tone(num_samples, 24000), tmp_path / "a.mp4", 24, 24000)
    found = facts(path)
    assert found.audio_s is not None
    assert abs(found.audio_s - 2) < 0.005
    assert ("silence" in caplog.text) is (share < 1)
    assert ("cut by" in caplog.text) is (share > 1)
    samples = read_audio(path).samples[:, :48000]
    assert samples[:, :num_samples].abs().max() > 0.4 or share < 0.01
    if share < 1:
        assert samples[:, num_samples + 2048 :].abs().max() < 0.01


def test_sound_is_in_step_and_clipped(tmp_path: Path) -> None:
    sound = 3 * tone(48000, 24000)
    path = write_video_audio_ltx2(clip(48), sound, tmp_path / "a.mp4", 24, 24000)
    samples = read_audio(path).samples
    assert samples.shape[0] == 2
    error = (samples[0, 1000:47000] - sound[1000:47000].clamp(-1, 1)).abs()
    assert error.max() < 0.15
    assert error.mean() < 0.01


def test_sound_that_is_not_finite_is_said_and_silenced(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_video_audio_ltx2(clip(24), torch.full((2, 24000), torch.nan), tmp_path / "a.mp4", 24, 24000)
    assert "not finite" in caplog.text
    assert read_audio(path).samples.abs().max() < 1e-3


class Carrier:
    def __init__(self, waveform: Tensor, sampling_rate: int) -> None:
        self.waveform, self.sampling_rate = waveform, sampling_rate


@pytest.mark.parametrize(
    ("audio", "stated", "expected"),
    [
        (tone(48000, 48000), None, 48000),  # 1 s by the length of the video
        (tone(23990, 24000), None, 24000),  # a little short
        (tone(24050, 24000), None, 24000),  # a little long
        (Carrier(tone(24000, 24000), 24000), None, 24000),
        (Carrier(tone(24000, 24000), 24000), 48000, 48000),
        (tone(24000, 24000).numpy(), 44100, 44100),
        (torch.stack([tone(24000, 24000)] * 2).bfloat16(), 24000, 24000),
        (tone(16000, 16000)[:, None].expand(-1, 2), 16000, 16000),
    ],
)
def test_rates(
    tmp_path: Path, audio: Any, stated: int | None, expected: int, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_video_audio_ltx2(clip(24), audio, tmp_path / "a.mp4", 24, stated)
    assert facts(path).rate == expected
    assert ("its pitch is off" in caplog.text) is (isinstance(audio, Carrier) and stated is not None)


@pytest.mark.parametrize(("stated", "num_samples"), [(30000, 30000), (None, 30000), (192000, 192000)])
def test_rates_that_aac_lacks_are_resampled_and_said(
    tmp_path: Path, stated: int | None, num_samples: int, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_video_audio_ltx2(clip(24), tone(num_samples, num_samples), tmp_path / "a.mp4", 24, stated)
    rate = {30000: 32000, 192000: 96000}[num_samples]
    assert facts(path).rate == rate
    assert f"resampled to {rate} Hz" in caplog.text
    samples = read_audio(path).samples[0, :rate]
    assert (samples - tone(rate, rate))[1000:-3000].abs().max() < 0.05


def test_a_stream_needs_the_rate(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="audio_sample_rate"):
        write_video_audio_ltx2(iter([clip(24)]), tone(24000, 24000), tmp_path / "a.mp4")
    chunks = [clip(9), clip(8, seed=1), clip(7, seed=2)]
    known = write_video_audio_ltx2(chunks, tone(24000, 24000), tmp_path / "a.mp4")
    assert facts(known).rate == 24000


def test_every_form_of_video_gives_the_same_file(tmp_path: Path) -> None:
    frames = clip(9)
    forms: list[Any] = [
        frames,
        frames.numpy(),
        [Image.fromarray(frame.numpy()) for frame in frames],
        iter([frames[:4], frames[4:8].numpy(), frames[8]]),
        (frame for frame in frames),
    ]
    contents = []
    for index, form in enumerate(forms):
        path = write_video_audio_ltx2(form, None, tmp_path / f"{index}.mp4", crf=0)
        found = facts(path)
        assert (found.num_frames, found.audio_codec) == (9, None)
        contents.append(read_video(path).frames)
    assert all(torch.equal(content, contents[0]) for content in contents)


def test_a_stream_is_consumed_as_the_file_grows(tmp_path: Path) -> None:
    alive: list[int] = []

    def chunks() -> Iterator[Tensor]:
        for index in range(6):
            alive.append(index)
            if index == 5:
                (part,) = tmp_path.glob(".a.mp4.*.part")
                assert part.stat().st_size > 0
            yield clip(16, 64, 64, seed=index)

    write_video_audio_ltx2(chunks(), None, tmp_path / "a.mp4", crf=0)
    assert alive == list(range(6))


def test_colours_survive_and_are_labelled(tmp_path: Path) -> None:
    colours = torch.tensor([[200, 30, 40], [20, 180, 60], [10, 40, 220], [128, 128, 128]], dtype=torch.uint8)
    frames = colours.repeat_interleave(16, 0).expand(3, 32, 64, 3)
    path = write_video_audio_ltx2(frames, None, tmp_path / "a.mp4")
    read = read_video(path).frames
    for index in range(4):
        error = read[:, 8:24, 16 * index + 4 : 16 * index + 12].float().mean((0, 1, 2)) - colours[index]
        assert error.abs().max() < 3
    with av.open(str(path)) as container:
        context = container.streams.video[0].codec_context
        assert (context.colorspace, context.color_primaries, context.color_trc, context.color_range) == (
            1,
            1,
            1,
            1,
        )


def test_quality_sets_the_size(tmp_path: Path) -> None:
    frames = clip(9, 64, 64)
    sizes = []
    options: tuple[dict[str, Any], ...] = ({"crf": 0}, {}, {"video_quality": 8}, {"crf": 10}, {"crf": 40})
    for index, option in enumerate(options):
        sizes.append(write_video_audio_ltx2(frames, None, tmp_path / f"{index}.mp4", **option).stat().st_size)
    assert sizes[0] > sizes[1] == sizes[2] == sizes[3] > sizes[4]
    for option in ({"crf": 52}, {"video_quality": 11}):
        with pytest.raises(RequestError, match="outside"):
            write_video_audio_ltx2(frames, None, tmp_path / "x.mp4", **option)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("height", "width", "hint"),
    [(15, 32, "32x14 or 32x16"), (16, 33, "32x16 or 34x16"), (15, 33, "32x14 or 34x16")],
)
def test_odd_sizes_are_refused_with_the_nearest_even_ones(
    tmp_path: Path, height: int, width: int, hint: str
) -> None:
    with pytest.raises(RequestError, match=f"{width}x{height}") as caught:
        write_video_audio_ltx2(clip(2, height, width), None, tmp_path / "a.mp4")
    assert caught.value.hint == hint
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "video",
    [
        None,
        [],
        torch.zeros(0, 16, 16, 3, dtype=torch.uint8),
        torch.zeros(2, 16, 16, 3),
        torch.zeros(2, 3, 16, 16, dtype=torch.uint8),
        [clip(1), clip(1, 32, 32)],
    ],
)
def test_impossible_videos(tmp_path: Path, video: Any) -> None:
    with pytest.raises(RequestError, match="video"):
        write_video_audio_ltx2(video, None, tmp_path / "a.mp4")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("rate", [0, -5, 24000.5])
def test_impossible_rates(tmp_path: Path, rate: Any) -> None:
    with pytest.raises(RequestError, match="audio_sample_rate"):
        write_video_audio_ltx2(clip(2), tone(100, 24000), tmp_path / "a.mp4", 24, rate)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_interrupted_writing_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    def broken() -> Iterator[Tensor]:
        yield clip(60)
        raise error

    path = tmp_path / "a.mp4"
    with pytest.raises(error):
        write_video_audio_ltx2(broken(), tone(24000, 24000), path, 24, 24000)
    assert list(tmp_path.iterdir()) == []
    write_video_audio_ltx2(clip(3), None, path)
    before = path.read_bytes()
    with pytest.raises(error):
        write_video_audio_ltx2(broken(), None, path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_the_output_path_is_checked_before_any_work(tmp_path: Path) -> None:
    for path, error in (
        (tmp_path / "a.avi", RequestError),
        (tmp_path / "a", RequestError),
        (tmp_path / "nowhere" / "a.mp4", OutputError),
    ):
        with pytest.raises(error, match=f"output_path=.*{path.name}") as caught:
            check_output_path(path)
        assert caught.value.hint
        consumed = iter([clip(1)])
        with pytest.raises(error):
            write_video_audio_ltx2(consumed, None, path)
        assert next(consumed) is not None
    assert check_output_path(str(tmp_path / "a.mp4")) == tmp_path / "a.mp4"
    assert list(tmp_path.iterdir()) == []


@contextmanager
def file_size_limit(num_bytes: int) -> Iterator[None]:
    """Writing beyond the limit fails as on a full disk."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.skipif(sys.platform == "win32", reason="has no limit of this kind")
def test_a_file_that_cannot_grow_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    size = write_video_audio_ltx2(clip(8, 64, 64), tone(8000, 24000), path, 24, 24000).stat().st_size
    path.unlink()
    for limit in (100, size // 2, size - 1000, size - 1):
        with pytest.raises(OutputError, match=r"output_path=.*a\.mp4") as caught, file_size_limit(limit):
            write_video_audio_ltx2(clip(8, 64, 64), tone(8000, 24000), path, 24, 24000)
        assert "free space" in caught.value.hint
        assert list(tmp_path.iterdir()) == []
    with file_size_limit(size):
        write_video_audio_ltx2(clip(8, 64, 64), tone(8000, 24000), path, 24, 24000)
    assert facts(path).decoded_frames == 8


@pytest.mark.skipif(sys.platform == "win32" or os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=96k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        outcomes = []
        for num_frames in range(1, 22, 3):
            path = disk / "a.mp4"
            try:
                write_video_audio_ltx2(clip(num_frames, 64, 64), None, path, crf=0)
            except OutputError as error:
                assert "free space" in error.hint
                assert list(disk.iterdir()) == []
                outcomes.append("full")
            else:
                assert facts(path).decoded_frames == num_frames
                path.unlink()
                outcomes.append("fits")
        assert outcomes == sorted(outcomes)
        assert set(outcomes) == {"fits", "full"}
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_the_public_import_path_is_the_same_function() -> None:
    assert public.write_video_audio_ltx2 is write_video_audio_ltx2
    assert public.read_video is read_video


def test_nothing_is_written_outside_the_final_name(tmp_path: Path) -> None:
    write_video_audio_ltx2(np.zeros((2, 16, 16, 3), np.uint8), None, tmp_path / "a.mp4")
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]
