"""Pictures and clips: reading, and fitting to the size of a generation.

Pixels of the networks are float32 in [-1, 1], channels first; pictures of files are uint8, channels last.
"""

import contextlib
import io
import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Literal

import av
import numpy as np
import torch
from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.reformatter import Colorspace
from av.video.stream import VideoStream
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.nn import functional

from diffsynth.errors import RequestError
from diffsynth.utils.files import reason_of, unreadable

FitMode = Literal["crop", "stretch"]
"""crop: fill the size, cut what is over (the official rule); stretch: the aspect ratio is lost."""

MAX_CRF = 51
MIN_SIZE_PX = 2
"""The smallest that H.264 can take."""

BT709 = 1
"""The code of BT.709 for matrix, primaries and transfer in H.264."""


def load_image(source: str | Path | Image.Image, *, argument: str = "image") -> Image.Image:
    """Read a picture as RGB, turned the way its EXIF orientation asks for.

    Transparency is dropped, not blended; 16-bit grey is scaled to 8 bits.

    Raises:
        RequestError: no such file, not a picture, or one under 2 x 2; the message begins with ``argument``.
    """
    try:
        if isinstance(source, Image.Image):
            picture = _to_rgb(ImageOps.exif_transpose(source))
        else:
            with Image.open(source) as image:
                image.load()
                picture = _to_rgb(ImageOps.exif_transpose(image))
    except (OSError, ValueError, SyntaxError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise RequestError(
            f"{argument}: {source} cannot be read as a picture: {reason_of(error)}",
            hint="check the path" if isinstance(error, FileNotFoundError) else "a PNG or JPEG file",
        ) from error
    if min(picture.size) < MIN_SIZE_PX:
        size = f"{picture.width}x{picture.height}"
        raise RequestError(f"{argument}: a picture of {size} is too small", hint="2x2 or more")
    return picture


def compress_round_trip(image: Image.Image, crf: int) -> Image.Image:
    """The picture as it looks after H.264 at its own size: the model knows stills only as frames of videos.

    Args:
        image: RGB, 2 x 2 or more.  An odd last row or column is dropped.
        crf: quality, 0..51, larger is worse; 0 returns the picture as it is.

    Returns: RGB, even width and height.  The exact values depend on the build of libx264.
    Raises RequestError for another ``crf``.
    """
    if not 0 <= crf <= MAX_CRF:
        raise RequestError(f"crf={crf} is outside 0..{MAX_CRF}", hint="33, or 0 for no compression")
    if crf == 0:
        return image
    width, height = image.width // 2 * 2, image.height // 2 * 2
    even = np.asarray(image.convert("RGB"))[:height, :width]
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=1, options={"crf": str(crf), "preset": "veryfast"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        frame = VideoFrame.from_ndarray(np.ascontiguousarray(even), format="rgb24").reformat(format="yuv420p")
        frame.pts, frame.time_base = 0, Fraction(1)
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    buffer.seek(0)
    with av.open(buffer, "r") as container:
        decoded = next(container.decode(video=0))
        return Image.fromarray(decoded.to_ndarray(format="rgb24"))


def fit_image(image: Image.Image, height: int, width: int, mode: FitMode = "crop") -> Tensor:
    """A picture at the size of a generation.

    Args:
        image: converted to RGB if it is not.
        height, width: in pixels.
        mode: ``crop``: bilinear with half-pixel centres and without antialiasing, enlarged or reduced until
            it fills the size, then the centre; ``stretch``: bicubic as in PIL.

    Returns: (1, 3, 1, height, width) float32 in [-1, 1].
    """
    return fit_frames([image], height, width, mode)


def fit_frames(
    frames: Tensor | Sequence[Image.Image], height: int, width: int, mode: FitMode = "crop"
) -> Tensor:
    """A clip at the size of a generation, frame by frame as :func:`fit_image`.

    Args: frames, uint8 (F, H, W, 3) or pictures.
    Returns: (1, 3, F, height, width) float32 in [-1, 1].
    """
    fitted = torch.empty(1, 3, len(frames), height, width)
    for index, frame in enumerate(frames):
        array = frame.numpy(force=True) if isinstance(frame, Tensor) else np.asarray(frame.convert("RGB"))
        fitted[0, :, index] = (
            _stretch(array, height, width) if mode == "stretch" else _crop(array, height, width)
        )
    return fitted.div_(127.5).sub_(1)


def fit_mask(frames: Tensor | Sequence[Image.Image], height: int, width: int) -> Tensor:
    """A mask clip: fitted as ``crop``, channels averaged.  Returns: (1, 1, F, height, width) in [0, 1]."""
    pixels = fit_frames(frames, height, width)
    return pixels.mean(dim=1, keepdim=True).add_(1).div_(2).clamp_(0, 1)


def frames_to_images(frames: Tensor | Iterable[Tensor]) -> list[Image.Image]:
    """uint8 (F, H, W, 3), or an iterable of (H, W, 3), as PIL pictures."""
    return [Image.fromarray(frame.numpy(force=True)) for frame in frames]


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoInfo:
    """What a video file says of itself; height and width in pixels as shown, turned by its orientation."""

    num_frames: int
    fps: Fraction
    height: int
    width: int
    has_audio: bool

    @property
    def duration_s(self) -> float:
        """Length of the video in seconds."""
        return float(self.num_frames / self.fps)


@dataclass(frozen=True, slots=True, eq=False)
class Clip:
    """``frames`` uint8 (F, H, W, 3) and the average frame rate."""

    frames: Tensor
    fps: Fraction


def probe_video(path: str | Path, *, argument: str = "video") -> VideoInfo:
    """Size, frame rate and frame count, which is found by decoding when the file does not state it.

    Raises RequestError, naming ``argument``, when there is no such file, no picture track or no frame.
    """
    with _opened(path, argument) as (container, stream):
        frames = container.decode(stream)
        first = next(frames, None)
        if first is None:
            raise RequestError(f"{argument}={path} holds no frames", hint="another file")
        height, width = first.height, first.width
        if first.rotation in {90, -90}:
            height, width = width, height
        return VideoInfo(
            num_frames=stream.frames or 1 + sum(1 for _ in frames),
            fps=_average_rate(stream, path, argument),
            height=height,
            width=width,
            has_audio=bool(container.streams.audio),
        )


def iter_frames(
    path: str | Path, *, frame_cap: int | None = None, argument: str = "video"
) -> Iterator[Tensor]:
    """Decode in order, at most ``frame_cap`` frames, each uint8 (H, W, 3) RGB, turned by its orientation.

    There is no conversion of the frame rate.  Raises RequestError as :func:`probe_video`.
    """
    if frame_cap is not None and frame_cap < 1:
        raise RequestError(f"{argument}: frame_cap={frame_cap} is below 1", hint="1 or more frames")
    with _opened(path, argument) as (container, stream):
        for frame in islice(container.decode(stream), frame_cap):
            pixels = torch.from_numpy(_rgb(frame))
            turns = 0 if frame.rotation % 90 else frame.rotation // 90
            yield torch.rot90(pixels, turns).contiguous() if turns else pixels


def read_video(path: str | Path, *, frame_cap: int | None = None, argument: str = "video") -> Clip:
    """Read a clip whole.

    Args:
        path: any video that the media library can read.
        frame_cap: read at most so many frames from the start.
        argument: the argument of the request that errors name.

    Returns: frames uint8 (F, H, W, 3) RGB on the CPU and the average frame rate of the file.
    Raises RequestError as :func:`probe_video`.
    """
    with _opened(path, argument) as (_, stream):
        fps = _average_rate(stream, path, argument)
    decoded: deque[Tensor] = deque(iter_frames(path, frame_cap=frame_cap, argument=argument))
    if not decoded:
        raise RequestError(f"{argument}={path} holds no frames", hint="another file")
    frames = torch.empty(len(decoded), *decoded[0].shape, dtype=torch.uint8)
    for target in frames:
        # Freed one by one, so that the clip is not held twice.
        target.copy_(decoded.popleft())
    return Clip(frames, fps)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        # PIL clips 16-bit grey at 255 instead of scaling it.
        return Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("float values, of which PIL does not tell the range")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    # A copy, so that nothing depends on a file that is closed.
    return image.copy() if image.mode == "RGB" else image.convert("RGB")


def _stretch(array: np.ndarray, height: int, width: int) -> Tensor:
    resized = Image.fromarray(array).resize((width, height), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1).float()


def _crop(array: np.ndarray, height: int, width: int) -> Tensor:
    source = torch.from_numpy(np.array(array)).permute(2, 0, 1)[None].float()
    scale = max(height / array.shape[0], width / array.shape[1])
    new_height, new_width = math.ceil(array.shape[0] * scale), math.ceil(array.shape[1] * scale)
    filled = functional.interpolate(source, (new_height, new_width), mode="bilinear", align_corners=False)
    top, left = (new_height - height) // 2, (new_width - width) // 2
    return filled[0, :, top : top + height, left : left + width]


@contextlib.contextmanager
def _opened(path: str | Path, argument: str) -> Iterator[tuple[InputContainer, VideoStream]]:
    try:
        with av.open(str(path), "r") as container:
            if not container.streams.video:
                raise RequestError(f"{argument}={path} has no picture track", hint="a video file")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            yield container, stream
    except (av.FFmpegError, OSError) as error:
        raise unreadable(argument, path, error) from error


def _rgb(frame: VideoFrame) -> np.ndarray:
    """uint8 (H, W, 3) by the colour matrix that the frame names, BT.601 where it names none."""
    if frame.colorspace != BT709:
        return frame.to_ndarray(format="rgb24")
    # Stated on both sides: older versions of the library ignore the label when both are left to it.
    return frame.to_ndarray(
        format="rgb24", src_colorspace=Colorspace.ITU709, dst_colorspace=Colorspace.DEFAULT
    )


def _average_rate(stream: VideoStream, path: str | Path, argument: str) -> Fraction:
    rate = stream.average_rate or stream.guessed_rate
    if not rate:
        raise RequestError(f"{argument}={path} states no frame rate", hint="encode it again")
    return rate
