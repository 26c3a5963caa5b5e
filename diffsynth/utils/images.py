"""Pictures and frames: reading, fitting to the size of a generation, and back to 8 bits.

Pixels of the networks are float32 in [-1, 1], channels first; pictures of files are uint8, channels last.
"""

import io
import math
from collections.abc import Iterable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Literal

import av
import numpy as np
import torch
from av.video.frame import VideoFrame
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.nn import functional

from diffsynth.errors import RequestError

FitMode = Literal["crop", "stretch"]
"""crop: fill the size, cut what is over (the official rule); stretch: the aspect ratio is lost."""

MAX_CRF = 51


def load_image(source: str | Path | Image.Image, *, argument: str = "image") -> Image.Image:
    """Read a picture as RGB, turned the way its EXIF orientation asks for.

    Transparency is dropped, not blended; 16-bit grey is scaled to 8 bits.

    Raises:
        RequestError: no such file, or not a picture; the message begins with ``argument``.
    """
    try:
        if isinstance(source, Image.Image):
            return _to_rgb(ImageOps.exif_transpose(source))
        with Image.open(source) as image:
            image.load()
            return _to_rgb(ImageOps.exif_transpose(image))
    except (OSError, ValueError, SyntaxError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise RequestError(
            f"{argument}: {source} cannot be read as a picture: {error}", hint="a PNG or JPEG file"
        ) from error


def compress_round_trip(image: Image.Image, crf: int) -> Image.Image:
    """The picture as it looks after H.264 at its own size: the model knows stills only as frames of videos.

    Args:
        image: RGB.  An odd last row or column is dropped.
        crf: quality, 0..51, larger is worse; 0 returns the picture as it is.

    Returns: RGB, even width and height.  The exact values depend on the build of libx264.
    Raises RequestError for another ``crf`` and for pictures under 2 x 2.
    """
    if not 0 <= crf <= MAX_CRF:
        raise RequestError(f"crf={crf} is outside 0..{MAX_CRF}", hint="33, or 0 for no compression")
    if crf == 0:
        return image
    width, height = image.width // 2 * 2, image.height // 2 * 2
    if not width or not height:
        raise RequestError(f"a picture of {image.width}x{image.height} is too small", hint="2x2 or more")
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
        mode: ``crop``: bilinear with half-pixel centres and without antialiasing, enlarged or reduced until it
            fills the size, then the centre; ``stretch``: bicubic as in PIL.

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


def pixels_to_uint8(pixels: Tensor) -> Tensor:
    """Decoded pixels as 8-bit frames, truncated in float32 (in bf16 the same rule would round).

    Args: pixels (3, F, H, W) or (1, 3, F, H, W) in [-1, 1], any float dtype and device.
    Returns: (F, H, W, 3) uint8 on the same device.
    """
    if pixels.ndim == 5:
        pixels = pixels.squeeze(0)
    scaled = pixels.float().add(1).div_(2).clamp_(0, 1).mul_(255)
    return scaled.to(torch.uint8).permute(1, 2, 3, 0).contiguous()


def frames_to_images(frames: Tensor | Iterable[Tensor]) -> list[Image.Image]:
    """uint8 (F, H, W, 3), or an iterable of (H, W, 3), as PIL pictures."""
    return [Image.fromarray(frame.numpy(force=True)) for frame in frames]


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        # PIL clips 16-bit grey at 255 instead of scaling it.
        return Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8)).convert("RGB")
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
