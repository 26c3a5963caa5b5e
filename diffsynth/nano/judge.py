"""Whether a clip shows and sounds what its caption says.

F frames, H/W pixels, S samples, T windows of sound.  Pictures and sounds are read without knowing the
caption; what was read is then compared with it.  On clips of the nano world as they are drawn every reading
is right; a wrong one is the model's.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise, product

import torch
from torch import Tensor
from torch.nn import functional

from diffsynth.nano.world import FRAME_WIDTH, PALETTE, PITCHES, PLACES, PULSE_S, SHAPES, Description

FPS = 24.0
_SIDE = 128
"""Pictures are read at about this size."""
_WINDOW_S = 0.005
_SILENCE = 0.01
"""RMS, of full scale 1."""
_LOUD = 0.3
"""Of the loudest window: above it a sound is on."""
_FAINTEST = 16.0
"""Distance in RGB (0 to 255) below which nothing stands out from the background."""
_CROP = 0.32
"""Half the side of the crop in which a shape is compared, as a share of the side of the picture."""
_CROP_PX = 40
_POOR_FIT = 0.3
"""Share of a shape's energy that the best template may leave unexplained."""
_OFF_PITCH = 0.08
"""Octaves."""
_OFF_PAN = 0.12
_OFF_BOUNCE_S = 0.07


@dataclass(frozen=True, slots=True)
class Picture:
    """What a video shows."""

    colour: str | None
    """None: nothing stands out from the background."""
    background: str
    shape: str | None
    """None: neither of the shapes."""
    motion: str | None
    place: str | None
    path: Tensor
    """(F, 2): x and y of the centroid in each frame, as shares of the sides; NaN where there is none."""


@dataclass(frozen=True, slots=True)
class Sound:
    """What a sound track holds."""

    kind: str | None
    """None: no sound of this world."""
    pitch_hz: float
    loudness: Tensor
    """(T,) RMS of both channels in windows of 5 ms."""
    pan: Tensor
    """(T,) from 0, left, to 1, right, if panned with constant power."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether each attribute is as described; None where the description says nothing about it."""

    colour: bool | None
    background: bool | None
    shape: bool | None
    motion: bool | None
    place: bool | None
    sound: bool | None
    pitch: bool | None
    pan: bool | None
    """The sound comes from where the shape is, and follows it."""
    sync: bool | None
    """There is a ping at each bounce, and nowhere else."""

    @property
    def right(self) -> bool:
        """Nothing is wrong."""
        return all(getattr(self, name) is not False for name in ATTRIBUTES)


ATTRIBUTES: tuple[str, ...] = tuple(field.name for field in fields(Verdict))


@dataclass(frozen=True, slots=True)
class Summary:
    """Many verdicts."""

    right: Mapping[str, int]
    """By attribute: clips in which it is as described."""
    judged: Mapping[str, int]
    """By attribute: clips whose description says something about it."""

    @classmethod
    def of(cls, verdicts: Iterable[Verdict]) -> "Summary":
        """Count them."""
        every = list(verdicts)
        found = {name: [v for x in every if (v := getattr(x, name)) is not None] for name in ATTRIBUTES}
        return cls(
            {name: sum(values) for name, values in found.items()}, {n: len(v) for n, v in found.items()}
        )

    @property
    def percent(self) -> dict[str, float]:
        """By attribute; what was never judged is left out."""
        return {name: 100 * self.right[name] / n for name, n in self.judged.items() if n}

    def __str__(self) -> str:
        return "  ".join(f"{name} {value:.0f}" for name, value in self.percent.items())


def judge(
    video: Tensor,
    sound: Tensor | None,
    sample_rate: int,
    description: Description,
    *,
    fps: float = FPS,
    framed: bool = False,
) -> Verdict:
    """One clip.

    Args:
        video: (F, H, W, 3) uint8, sides of 64 pixels or more.
        sound: (2, S) float in [-1, 1], left and right, from the beginning of the video; None leaves the
            attributes of the sound unjudged.
        sample_rate: of the sound, Hz.
        description: what should be seen and heard.
        fps: of the video.
        framed: whether a white frame surrounds the picture; it is not looked at.
    """
    seen = read_picture(video, framed=framed)
    found: dict[str, bool | None] = dict.fromkeys(ATTRIBUTES)
    for name in ("colour", "background", "shape", "motion", "place"):
        if getattr(description, name) is not None:
            found[name] = getattr(seen, name) == getattr(description, name)
    if sound is not None:
        heard = read_sound(sound, sample_rate)
        found["sound"] = heard.kind == description.sound
        if description.pitch is not None:
            octaves = abs(math.log2(max(heard.pitch_hz, 1.0) / PITCHES[description.pitch]))
            found["pitch"] = heard.kind != "silence" and octaves < _OFF_PITCH
            found["pan"] = heard.kind != "silence" and _pan_follows(seen.path, heard, fps)
        if description.sound == "ping":
            found["sync"] = heard.kind != "silence" and _pings_at_bounces(seen.path, heard, fps)
    return Verdict(**found)


def judge_all(
    videos: Iterable[Tensor],
    sounds: Iterable[Tensor] | None,
    sample_rate: int,
    descriptions: Sequence[Description],
    *,
    fps: float = FPS,
    framed: bool = False,
) -> Summary:
    """Many clips: ``videos`` (B, F, H, W, 3) and ``sounds`` (B, 2, S), or lists; the rest as for one."""
    tracks = [None] * len(descriptions) if sounds is None else sounds
    return Summary.of(
        judge(video, sound, sample_rate, description, fps=fps, framed=framed)
        for video, sound, description in zip(videos, tracks, descriptions, strict=True)
    )


def psnr(first: Tensor, second: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of two uint8 pictures or videos of one shape; inf if equal."""
    error = (first.float() - second.float()).square().mean().item()
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


def is_framed(video: Tensor) -> bool:
    """Whether a white frame surrounds the picture.  Means nothing over a white background."""
    frames = _reduced(video)
    outer = _ring(frames, 0, FRAME_WIDTH / 2).median(0).values
    inner = _ring(frames, FRAME_WIDTH + 0.02, FRAME_WIDTH + 0.06).median(0).values
    return _nearest_colour(outer) == "white" and _nearest_colour(inner) != "white"


def read_picture(video: Tensor, *, framed: bool = False) -> Picture:
    """Args and limits as for :func:`judge`."""
    frames = _reduced(video)
    edge = FRAME_WIDTH + 0.02 if framed else 0.0
    ground = _ring(frames, edge, edge + 0.03).median(0).values
    distance = ((frames - ground).square() @ torch.ones(3)).sqrt()
    if framed:
        distance *= _inside(distance, edge)
    most = _quantile(distance, 0.985)
    background = _nearest_colour(ground)
    if most < _FAINTEST:
        nowhere = torch.full((len(frames), 2), torch.nan)
        return Picture(None, background, None, None, None, nowhere)
    colour = frames[distance > 0.8 * most].median(0).values
    path = _centroids(distance > 0.5 * most)
    axis = colour - ground
    cover = ((frames - ground) @ (axis / axis.square().sum())).clamp(0, 1)
    if framed:
        cover *= _inside(cover, edge)
    x = path[:, 0].nanmean().item()
    return Picture(
        colour=_nearest_colour(colour),
        background=background,
        shape=_shape(cover, path),
        motion=_motion(path),
        place=min(PLACES, key=lambda place: abs(PLACES[place] - x)),
        path=path,
    )


def read_sound(sound: Tensor, sample_rate: int) -> Sound:
    """Args and limits as for :func:`judge`."""
    wave = sound.detach().to("cpu", torch.float32)
    length = max(1, round(_WINDOW_S * sample_rate))
    count = wave.shape[1] // length
    windows = wave[:, : count * length].reshape(2, count, length).square().mean(2).sqrt()
    loudness = windows.norm(dim=0)
    power = torch.fft.rfft(wave).abs().square().sum(0)
    power[0] = 0
    pitch_hz = power.argmax().item() * sample_rate / wave.shape[1]
    pan = torch.atan2(windows[1], windows[0]) / (math.pi / 2)
    silent = wave.square().sum(0).mean().sqrt().item() < _SILENCE
    return Sound("silence" if silent else _kind(loudness), pitch_hz, loudness, pan)


def _reduced(video: Tensor) -> Tensor:
    """(F, h, w, 3) float on the CPU, 0 to 255, averaged over squares of pixels."""
    frames, height, width, _ = video.shape
    factor = max(1, min(height, width) // _SIDE)
    cut = video[:, : height // factor * factor, : width // factor * factor].detach().cpu()
    if factor == 1:
        return cut.float()
    squares = cut.reshape(frames, height // factor, factor, width // factor, factor, 3)
    total = torch.zeros(squares[:, :, 0, :, 0].shape)
    for y, x in product(range(factor), repeat=2):  # much faster than a mean over two of six dimensions
        total += squares[:, :, y, :, x]
    return total / factor**2


def _inside(values: Tensor, edge: float) -> Tensor:
    """(H, W) bool: further than ``edge`` from the border."""
    height, width = values.shape[1:3]
    y, x = ((torch.arange(n) + 0.5) / n for n in (height, width))
    return (((y > edge) & (y < 1 - edge))[:, None]) & ((x > edge) & (x < 1 - edge))


def _ring(frames: Tensor, start: float, end: float) -> Tensor:
    """(N, 3): pixels whose distance from the border is between two shares of the side."""
    inner = _inside(frames, end)
    inner[inner.shape[0] // 2, inner.shape[1] // 2] = True
    return frames[:, _inside(frames, start) & ~inner].reshape(-1, 3)


def _nearest_colour(rgb: Tensor) -> str:
    palette = torch.tensor(list(PALETTE.values()), dtype=torch.float32)
    return list(PALETTE)[int((palette - rgb).norm(dim=1).argmin())]


def _quantile(values: Tensor, share: float) -> float:
    flat = values.flatten()
    return flat.kthvalue(max(1, round(share * flat.numel()))).values.item()


def _centroids(mask: Tensor) -> Tensor:
    """(F, H, W) bool to (F, 2) x, y."""
    count = mask.sum((1, 2)).float()
    x, y = ((torch.arange(n) + 0.5) / n for n in (mask.shape[2], mask.shape[1]))
    return torch.stack(((mask.sum(1) * x).sum(1) / count, (mask.sum(2) * y).sum(1) / count), 1)


def _motion(path: Tensor) -> str | None:
    seen = path[~path.isnan().any(1)]
    if len(seen) < 3:
        return None
    dx, dy = (seen[-3:].mean(0) - seen[:3].mean(0)).tolist()
    if abs(dx) > 0.15 and abs(dx) > abs(dy):
        return "right" if dx > 0 else "left"
    # What trembles does not travel.
    y = seen[:, 1].unfold(0, 3, 1).mean(1)
    length = y.diff().abs().sum().item()
    if length <= 0.2:
        return "still"
    if abs(y[-1] - y[0]).item() > 0.75 * length:
        return "down" if dy > 0 else "up"
    return "bounce"


def _shape(cover: Tensor, path: Tensor) -> str | None:
    """Which template fits the mean of all frames best, each moved so that its centroid is in the middle.

    Args: cover: (F, H, W) in [0, 1].  path: (F, 2).
    """
    height, width = cover.shape[1:]
    seen = ~path.isnan().any(1)
    axis = ((torch.arange(_CROP_PX) + 0.5) / _CROP_PX * 2 - 1) * _CROP
    x = path[seen, 0, None] + axis * min(height, width) / width
    y = path[seen, 1, None] + axis * min(height, width) / height
    size = (len(x), _CROP_PX, _CROP_PX)
    grid = torch.stack((x[:, None, :].expand(size), y[:, :, None].expand(size)), -1) * 2 - 1
    crops = functional.grid_sample(cover[seen, None], grid, align_corners=False, padding_mode="border")
    mean = crops.mean((0, 1))
    names, templates = _templates(axis)
    error = (templates - mean.flatten()).square().sum(1)
    best = int(error.argmin())
    return names[best] if error[best] < _POOR_FIT * mean.square().sum() else None


def _templates(axis: Tensor) -> tuple[list[str], Tensor]:
    """Each shape in 11 sizes, 5 places and with 2 kinds of edges: (N,) names and (N, P * P) covers."""
    pixel = axis[1] - axis[0]
    radii = torch.linspace(0.14, 0.26, 11)[:, None, None, None, None]
    shifts = torch.tensor([(0.0, 0.0), (0.015, 0.0), (-0.015, 0.0), (0.0, 0.015), (0.0, -0.015)])
    edges = torch.stack((pixel, 4 * pixel))[None, None, :, None, None]
    x = (axis - shifts[:, :1])[:, None, None, :]
    y = (axis - shifts[:, 1:])[:, None, :, None]
    across = x.abs()
    circle = (x.square() + y.square()).sqrt() - radii
    square = torch.maximum(across, y.abs()) - 0.9 * radii
    slant = math.cos(math.pi / 6)
    triangle = torch.maximum(slant * across - 0.5 * y, y) - 0.6 * radii
    distances = torch.stack([d.expand(-1, 5, 1, -1, -1) for d in (circle, square, triangle)])
    covers = (0.5 - distances / edges).clamp(0, 1)
    each = covers[0, ..., 0, 0].numel()
    return [name for name in SHAPES for _ in range(each)], covers.flatten(4).reshape(len(SHAPES) * each, -1)


def _kind(loudness: Tensor) -> str | None:
    """Args: loudness: (T,), not silent."""
    on = (loudness > _LOUD * loudness.max()).float()
    if on.mean() > 0.85:
        return "tone"
    slot = round(PULSE_S / _WINDOW_S)
    slots = loudness[: len(loudness) // slot * slot].reshape(-1, slot)[:, slot // 5 : -slot // 5].mean(1)
    sounding, pauses = slots[::2], slots[1::2]
    regular = len(pauses) and sounding.min() > max(_LOUD * loudness.max(), 2 * pauses.max())
    if regular and sounding.mean() > 4 * pauses.mean():
        return "beep"
    return "ping" if on.mean() < 0.5 else None


def _pan_follows(path: Tensor, heard: Sound, fps: float) -> bool:
    """Whether the sound comes from the shape, on average and, where that travels sideways, in its change."""
    seconds = (torch.arange(len(heard.pan)) + 0.5) * _WINDOW_S
    frame = (seconds * fps).round().long().clamp(max=len(path) - 1)
    x = path[frame, 0]
    use = (heard.loudness > _LOUD * heard.loudness.max()) & ~x.isnan()
    x, pan = x[use], heard.pan[use]
    if len(x) < 2 or (pan - x).abs().mean() >= _OFF_PAN:
        return False
    third = max(1, len(x) // 3)
    moved, panned = ((v[-third:].mean() - v[:third].mean()).item() for v in (x, pan))
    return abs(moved) < 0.1 or panned / moved > 0.5


def _pings_at_bounces(path: Tensor, heard: Sound, fps: float) -> bool:
    y = path[:, 1].nan_to_num(0.0)
    low = y > 0.5 * (y.max() + y.min())
    inner = [
        n for n in range(1, len(y) - 1) if low[n] and y[n] >= y[n - 1] and y[n] >= y[n + 1] and y[n] > y.min()
    ]
    # Of two equal frames the bounce is between them: either is near enough.
    bounces = [n / fps for n, after in pairwise([*inner, len(y) + 1]) if after - n > 1]
    onsets = _onsets(heard.loudness)
    end = (len(y) - 1) / fps
    last = [end] if low[-1] else []
    heard_all = all(any(abs(b - t) <= _OFF_BOUNCE_S for t in onsets) for b in bounces if b < end - 0.04)
    seen_all = all(any(abs(b - t) <= _OFF_BOUNCE_S for b in bounces + last) for t in onsets if t < end - 0.02)
    return bool(bounces) and heard_all and seen_all


def _onsets(loudness: Tensor) -> list[float]:
    """Seconds at which the sound rises by a third of its peak within 15 ms."""
    before = functional.pad(loudness, (3, 0))[: len(loudness)]
    rises = (loudness - before > _LOUD * loudness.max()).tolist()
    return [n * _WINDOW_S for n, rise in enumerate(rises) if rise and not (n and rises[n - 1])]
