import struct
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from diffsynth.errors import RequestError
from diffsynth.models.ltx2.video_vae import to_uint8
from diffsynth.utils.images import (
    compress_round_trip,
    fit_frames,
    fit_image,
    fit_mask,
    frames_to_images,
    iter_frames,
    load_image,
    probe_video,
    read_video,
)
from diffsynth.utils.media_io_ltx2 import write_video_audio_ltx2


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def smooth(num_frames: int, height: int, width: int) -> Tensor:
    y, x, t = (torch.linspace(0, 1, n) for n in (height, width, num_frames))
    red = 200 * y[None, :, None] + 30 * t[:, None, None] + 0 * x
    green = 200 * x[None, None, :] + 0 * red
    blue = 60 + 0 * red
    return torch.stack([red, green, blue], dim=-1).to(torch.uint8)


def test_rgb_files_are_read_unchanged(tmp_path: Path) -> None:
    image = picture(5, 7)
    image.save(tmp_path / "a.png")
    assert np.array_equal(np.asarray(load_image(tmp_path / "a.png")), np.asarray(image))
    assert np.array_equal(np.asarray(load_image(image)), np.asarray(image))


def test_the_exif_orientation_is_applied(tmp_path: Path) -> None:
    image = picture(4, 6)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise
    image.save(tmp_path / "a.png", exif=exif)
    loaded = load_image(tmp_path / "a.png")
    assert loaded.size == (4, 6)
    assert np.array_equal(np.asarray(loaded), np.rot90(np.asarray(image), -1))


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "1", "CMYK"])
def test_every_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    image = picture(4, 6).convert(mode)
    image.save(tmp_path / "a.tiff")
    assert load_image(tmp_path / "a.tiff").mode == "RGB"


def test_transparency_is_dropped_and_16_bit_grey_is_scaled(tmp_path: Path) -> None:
    Image.new("RGBA", (2, 2), (10, 20, 30, 0)).save(tmp_path / "a.png")
    assert load_image(tmp_path / "a.png").getpixel((0, 0)) == (10, 20, 30)
    palette = Image.new("P", (2, 2))
    palette.putpalette([1, 2, 3] * 256)
    palette.save(tmp_path / "p.png", transparency=bytes([0, 255]))
    assert load_image(tmp_path / "p.png").getpixel((0, 0)) == (1, 2, 3)
    Image.fromarray(np.array([[0, 257 * 100], [65535, 300]], dtype=np.uint16)).save(tmp_path / "g.png")
    assert np.asarray(load_image(tmp_path / "g.png"))[..., 0].tolist() == [[0, 100], [255, 1]]


def test_pictures_that_no_video_can_hold(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="images: a picture of 7x1 is too small"):
        load_image(picture(1, 7), argument="images")
    Image.fromarray(np.ones((4, 4), dtype=np.float32)).save(tmp_path / "f.tiff")
    with pytest.raises(RequestError, match="float"):
        load_image(tmp_path / "f.tiff")


def test_unreadable_pictures_name_the_argument(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no picture")
    picture(64, 64).save(tmp_path / "whole.png")
    (tmp_path / "half.png").write_bytes((tmp_path / "whole.png").read_bytes()[:2000])
    for name in ("text.png", "half.png", "missing.png"):
        with pytest.raises(RequestError, match=r"input_images\[1\]: .*" + name.replace(".", r"\.")):
            load_image(tmp_path / name, argument="input_images[1]")


def test_crop_follows_the_formula() -> None:
    image = picture(6, 10)
    result = fit_image(image, 8, 4)
    assert result.shape == (1, 3, 1, 8, 4)
    assert result.dtype == torch.float32
    # By hand: scale 8/6, 8 x ceil(13.33) = 14, five columns cut on the left; half-pixel centres.
    source = np.asarray(image).astype(np.float64)
    for y, x in ((0, 0), (3, 2), (7, 3)):
        sy, sx = (y + 0.5) * 6 / 8 - 0.5, (x + 5 + 0.5) * 10 / 14 - 0.5
        y0, x0 = int(np.floor(max(sy, 0))), int(np.floor(max(sx, 0)))
        y1, x1 = min(y0 + 1, 5), min(x0 + 1, 9)
        fy, fx = max(sy, 0) - y0, max(sx, 0) - x0
        top = source[y0, x0] * (1 - fx) + source[y0, x1] * fx
        bottom = source[y1, x0] * (1 - fx) + source[y1, x1] * fx
        expected = (top * (1 - fy) + bottom * fy) / 127.5 - 1
        np.testing.assert_allclose(result[0, :, 0, y, x].numpy(), expected, atol=1e-5)


def test_a_picture_of_the_right_size_is_only_scaled() -> None:
    image = picture(8, 6)
    expected = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1
    for mode in ("crop", "stretch"):
        assert torch.equal(fit_image(image, 8, 6, mode)[0, :, 0], expected)


def test_stretch_is_bicubic_and_loses_the_aspect_ratio() -> None:
    image = picture(6, 10)
    resized = image.resize((4, 8), Image.Resampling.BICUBIC)
    expected = torch.from_numpy(np.array(resized)).permute(2, 0, 1).float() / 127.5 - 1
    assert torch.equal(fit_image(image, 8, 4, "stretch")[0, :, 0], expected)


def test_clips_are_fitted_frame_by_frame() -> None:
    images = [picture(6, 10, seed) for seed in range(3)]
    frames = torch.stack([torch.from_numpy(np.array(image)) for image in images])
    result = fit_frames(frames, 8, 4)
    assert result.shape == (1, 3, 3, 8, 4)
    assert torch.equal(result, fit_frames(images, 8, 4))
    assert torch.equal(result[:, :, 1:2], fit_image(images[1], 8, 4))


def test_masks_are_averaged_to_unit_range() -> None:
    frames = torch.tensor([0, 255, 30], dtype=torch.uint8).expand(2, 4, 4, 3)
    torch.testing.assert_close(fit_mask(frames, 4, 4), torch.full((1, 1, 2, 4, 4), 285 / 765))


def test_eight_bit_frames_survive_the_way_to_pixels_and_pil() -> None:
    frames = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16, 1).expand(2, 16, 16, 3)
    images = frames_to_images(frames)
    assert [image.size for image in images] == [(16, 16)] * 2
    # Truncation may lose one step where the way back is a hair under the whole number.
    back = to_uint8(fit_frames(images, 16, 16)[0]).permute(1, 2, 3, 0)
    assert (frames.int() - back.int()).abs().max() <= 1


def test_the_round_trip_degrades_a_little_and_more_with_crf() -> None:
    image = Image.fromarray(smooth(1, 33, 47)[0].numpy())
    errors = []
    for crf in (10, 33, 51):
        result = compress_round_trip(image, crf)
        assert result.size == (46, 32)
        assert result.mode == "RGB"
        difference = np.asarray(result).astype(float) - np.asarray(image)[:32, :46]
        errors.append(np.abs(difference).mean())
    assert 0 < errors[0] < errors[1] < errors[2]
    assert errors[0] < 3


def test_the_round_trip_is_skipped_at_zero_and_bounded() -> None:
    image = picture(5, 7)
    assert compress_round_trip(image, 0) is image
    for crf in (-1, 52):
        with pytest.raises(RequestError, match="crf"):
            compress_round_trip(image, crf)


@pytest.fixture
def video(tmp_path: Path) -> Path:
    return write_video_audio_ltx2(smooth(9, 32, 48), None, tmp_path / "a.mp4", 29.97)


def test_reading_a_clip(video: Path) -> None:
    clip = read_video(video)
    assert clip.frames.shape == (9, 32, 48, 3)
    assert clip.frames.dtype == torch.uint8
    assert clip.fps == Fraction(30000, 1001)
    assert (clip.frames.int() - smooth(9, 32, 48).int()).abs().float().mean() < 3
    assert torch.equal(read_video(video, frame_cap=4).frames, clip.frames[:4])
    assert torch.equal(torch.stack(list(iter_frames(video))), clip.frames)


def test_probing_a_clip(video: Path) -> None:
    info = probe_video(video)
    assert (info.num_frames, info.fps, info.height, info.width) == (9, Fraction(30000, 1001), 32, 48)
    assert not info.has_audio
    assert info.duration_s == pytest.approx(9 * 1001 / 30000)


def test_frames_are_counted_where_the_container_does_not(video: Path, tmp_path: Path) -> None:
    import av

    path = tmp_path / "a.mkv"
    with av.open(str(video)) as source, av.open(str(path), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                target.mux(packet)
    assert probe_video(path).num_frames == 9


def test_phone_videos_are_turned(video: Path) -> None:
    upright = read_video(video).frames
    data = bytearray(video.read_bytes())
    # The matrix of the track header: 90 degrees clockwise instead of the identity.
    place = data.index(b"tkhd") + 4 + 40
    data[place : place + 36] = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 32 << 16, 0, 1 << 30)
    video.write_bytes(data)
    assert (probe_video(video).height, probe_video(video).width) == (48, 32)
    assert torch.equal(read_video(video).frames, torch.rot90(upright, -1, (1, 2)))


def test_unreadable_clips_name_the_argument(tmp_path: Path, video: Path) -> None:
    (tmp_path / "text.mp4").write_text("no video")
    for reader in (read_video, probe_video):
        for name in ("text.mp4", "missing.mp4"):
            with pytest.raises(RequestError, match=f"retake_video=.*{name}"):
                reader(tmp_path / name, argument="retake_video")
    with pytest.raises(RequestError, match="frame_cap"):
        read_video(video, frame_cap=0)
