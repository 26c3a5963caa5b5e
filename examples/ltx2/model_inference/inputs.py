"""Pictures, clips and a tune that are drawn or computed here, so that every script runs at once.

They stand in for files of yours: wherever a script passes one of these, a path does as well.
"""

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFilter, ImageOps

Settings = Mapping[str, int]
"""With height, width and num_frames."""

FIRST_FRAME = Path(__file__).parents[1] / "first_frame.png"
SAMPLING_RATE = 48000
FRAME_RATE = 24


def closer(share: float, width: int = 768, height: int = 512) -> Image.Image:
    """The first frame with the camera closer to the boat: 0 shows all, 1 half of it."""
    with Image.open(FIRST_FRAME) as picture:
        right, bottom = picture.size
        box = (
            0.1 * share * right,
            0.45 * share * bottom,
            (1 - 0.4 * share) * right,
            (1 - 0.05 * share) * bottom,
        )
        return picture.convert("RGB").resize((width, height), Image.Resampling.BICUBIC, box)


def clip(settings: Settings) -> list[Image.Image]:
    """The camera glides towards the boat."""
    height, width, num_frames = _shape(settings)
    return [closer(frame / num_frames, width, height) for frame in range(num_frames)]


def depth_clip(settings: Settings) -> list[Image.Image]:
    """A depth map, near is bright: a ball comes along a floor."""
    height, width, num_frames = _shape(settings)
    frames = []
    floor = Image.linear_gradient("L").resize((width, height)).convert("RGB")
    for frame in range(num_frames):
        picture, share = floor.copy(), (frame + 1) / num_frames
        x, y, radius = width / 2, height * (0.5 + share / 8), height * (0.1 + share / 4)
        grey = round(96 + 159 * share)
        ImageDraw.Draw(picture).ellipse((x - radius, y - radius, x + radius, y + radius), (grey,) * 3)
        frames.append(picture)
    return frames


def edge_clip(settings: Settings) -> list[Image.Image]:
    """White edges on black of the clip above."""
    frames = []
    for frame in clip(settings):
        edges = frame.convert("L").filter(ImageFilter.FIND_EDGES).point(lambda grey: 255 * (grey > 40))
        frames.append(ImageOps.expand(ImageOps.crop(edges, 1), 1).convert("RGB"))
    return frames


def track_clip(settings: Settings) -> list[Image.Image]:
    """Tracked points on black, each with a colour of its own: they drift to the right and bob."""
    height, width, num_frames = _shape(settings)
    frames = []
    for frame in range(num_frames):
        picture = Image.new("RGB", (width, height))
        draw, drift = ImageDraw.Draw(picture), width * frame / num_frames / 4
        for point in range(24):
            x = width * (0.1 + 0.1 * (point % 6)) + drift
            y = height * (0.3 + 0.15 * (point // 6)) + 0.02 * height * math.sin(frame / 4)
            colour = (255 - 10 * point, 10 * point, 128 + 5 * point)
            draw.ellipse((x - 4, y - 4, x + 4, y + 4), colour)
        frames.append(picture)
    return frames


def tune(settings: Settings) -> torch.Tensor:
    """(2, samples) at 48 kHz: a music box plays four notes a second up and down a scale."""
    time_s = torch.arange(settings["num_frames"] * SAMPLING_RATE // FRAME_RATE) / SAMPLING_RATE
    step = (time_s * 4).long() % 14
    degree = torch.where(step < 8, step, 14 - step)
    pitch_hz = 523.25 * 2 ** (torch.tensor([0, 2, 4, 5, 7, 9, 11, 12])[degree] / 12)
    since_note_s = time_s % 0.25
    note = torch.sin(2 * torch.pi * pitch_hz * since_note_s) * torch.exp(-8 * since_note_s)
    return (0.4 * note).expand(2, -1).contiguous()


def _shape(settings: Settings) -> tuple[int, int, int]:
    return settings["height"], settings["width"], settings["num_frames"]
