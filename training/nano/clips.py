"""Clips of the nano world, drawn on any device.  B clips, F frames, H = W side, S samples.

Lengths are shares of the side, y points down, times are seconds.  Parameters are drawn on the CPU, so that a
seed means the same clips everywhere.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import torch
from torch import Tensor

from diffsynth.nano.world import (
    FRAME_WIDTH,
    FRAMED,
    NUM_FORMS,
    PALETTE,
    PITCHES,
    PLACES,
    PULSE_S,
    SHAPES,
    SOUNDS,
    Description,
    draw_description,
)

# Extents of the shapes around their centroid, for radius 1: half width, above, below.  The three have similar
# areas; the triangle has equal sides and stands on one.
_HALF_SQUARE = 0.9
_CORNER, _FLAT = 1.2, 0.6
_EXTENTS = (
    (1.0, 1.0, 1.0),
    (_HALF_SQUARE, _HALF_SQUARE, _HALF_SQUARE),
    (_CORNER * math.sqrt(3) / 2, _CORNER, _FLAT),
)
_MOVE_S = 1.0
"""What moves arrives after this time."""
_JITTER = 8 / 255
_AMPLITUDE = 0.5
_DECAY_S = 0.05
_ATTACK_S = 0.002
_RADII = (0.17, 0.23)
_TRAVEL = (0.36, 0.50)


@dataclass(frozen=True, eq=False, slots=True)
class Scenes:
    """A batch of clips; every tensor has B as its first dimension and lies on one device."""

    descriptions: list[Description]
    captions: list[str]
    shape: Tensor
    """Index into SHAPES."""
    colour: Tensor
    """(B, 3) in [-1, 1]."""
    background: Tensor
    """(B, 3) in [-1, 1]."""
    radius: Tensor
    start: Tensor
    """(B, 2) x, y of the centroid at 0 s; of the floor for what bounces."""
    travel: Tensor
    """(B, 2) within one second."""
    height: Tensor
    """Of the bounces; 0 for what does not bounce."""
    period: Tensor
    phase: Tensor
    """Of the bounces, in periods: they come at (n - phase) * period."""
    sound_kind: Tensor
    """Index into SOUNDS."""
    pitch_hz: Tensor
    framed: Tensor
    """bool"""

    @classmethod
    def draw(
        cls,
        count: int,
        *,
        seed: int,
        device: torch.device | str = "cpu",
        held_out: bool = False,
        framed: bool = False,
    ) -> Self:
        """Clips of random descriptions: of those that training sees, or of those held out from it."""
        source = random.Random(seed)
        descriptions = [draw_description(source, held_out=held_out) for _ in range(count)]
        return cls.of(descriptions, seed=seed, device=device, framed=framed)

    @classmethod
    def of(
        cls,
        descriptions: Sequence[Description],
        *,
        seed: int,
        device: torch.device | str = "cpu",
        framed: bool = False,
    ) -> Self:
        """One clip for each description, with whatever it does not state drawn at random."""
        count = len(descriptions)
        random_ = torch.Generator().manual_seed(seed)
        forms = torch.randint(NUM_FORMS, (count,), generator=random_).tolist()
        prefix = f"{FRAMED} " if framed else ""
        shape = torch.tensor([SHAPES.index(d.shape) for d in descriptions])
        radius = _uniform((count,), *_RADII, random_)
        start, travel, height = _paths(descriptions, torch.tensor(_EXTENTS)[shape] * radius[:, None], random_)
        scenes = cls(
            descriptions=list(descriptions),
            captions=[prefix + d.caption(form) for d, form in zip(descriptions, forms, strict=True)],
            shape=shape,
            colour=_jittered([d.colour for d in descriptions], random_),
            background=_jittered([d.background for d in descriptions], random_),
            radius=radius,
            start=start,
            travel=travel,
            height=height,
            period=_uniform((count,), 0.34, 0.48, random_),
            phase=_uniform((count,), 0.2, 0.8, random_),
            sound_kind=torch.tensor([SOUNDS.index(d.sound) for d in descriptions]),
            pitch_hz=torch.tensor([0.0 if d.pitch is None else PITCHES[d.pitch] for d in descriptions]),
            framed=torch.full((count,), framed),
        )
        return scenes.to(device)

    def to(self, device: torch.device | str) -> Self:
        """The same clips with their parameters on another device."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        moved: dict[str, Any] = {n: v.to(device) for n, v in values.items() if isinstance(v, Tensor)}
        return replace(self, **moved)

    def __len__(self) -> int:
        return len(self.descriptions)

    def position(self, seconds: Tensor) -> Tensor:
        """Args: seconds (T,), on the device of the clips.
        Returns: (B, T, 2) x, y of the centroid."""
        moved = (seconds / _MOVE_S).clamp(0, 1)
        place_BTD = self.start[:, None] + self.travel[:, None] * moved[None, :, None]
        bounces_BT = (math.pi * (seconds / self.period[:, None] + self.phase[:, None])).sin().abs()
        place_BTD[..., 1] -= self.height[:, None] * bounces_BT
        return place_BTD

    def video(self, side: int, num_frames: int = 25, fps: float = 24.0) -> Tensor:
        """Returns: (B, 3, F, H, W) float32 in [-1, 1]."""
        seconds = torch.arange(num_frames, device=self.radius.device) / fps
        cover = _cover(self.shape, self.radius, self.position(seconds), side)
        picture = torch.lerp(_whole(self.background), _whole(self.colour), cover[:, None])
        return _with_frames(picture, self.framed)

    def sound(self, num_samples: int, sample_rate: int = 16000) -> Tensor:
        """Returns: (B, 2, S) float32: left and right, panned with constant power to where the shape is."""
        device = self.radius.device
        exact = torch.arange(num_samples, device=device, dtype=torch.float64) / sample_rate
        wave = (2 * math.pi * ((exact * self.pitch_hz.double()[:, None]) % 1.0)).sin().float()
        seconds = exact.float()
        wave *= _AMPLITUDE * self._loudness(seconds)
        angle = self.position(seconds)[..., 0] * (math.pi / 2)
        return torch.stack((wave * angle.cos(), wave * angle.sin()), 1)

    def _loudness(self, seconds: Tensor) -> Tensor:
        """(B, T) in [0, 1]."""
        # A pulse ends where the sine is 0; the sample there belongs to the pause, whatever rounding says.
        pulses = ((seconds / PULSE_S + 1e-4).floor() % 2 == 0).float()
        beats = seconds / self.period[:, None] + self.phase[:, None]
        since = (beats % 1.0) * self.period[:, None]
        # The bounce before 0 s was not seen, and is not heard.
        pings = (-since / _DECAY_S).exp() * (since / _ATTACK_S).clamp(max=1.0) * (beats >= 1)
        kinds = torch.stack(
            (torch.ones_like(pings), pulses.expand_as(pings), pings, torch.zeros_like(pings)), 1
        )
        return kinds[torch.arange(len(self), device=pings.device), self.sound_kind]


def as_uint8(video: Tensor) -> Tensor:
    """(B, 3, F, H, W) in [-1, 1] to (B, F, H, W, 3) uint8, as videos are written and judged."""
    return ((video.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 4, 1)


def dense_video(
    count: int,
    side: int,
    num_frames: int,
    *,
    seed: int,
    device: torch.device | str = "cpu",
    fps: float = 24.0,
) -> Tensor:
    """Crops full of edges, for the video VAE: 1 to 4 overlapping moving shapes, grounds plain or graded.

    Shapes are as large, in pixels, and as fast as in the world at sides from 128 to 256.  A fifth of the
    clips has a white frame.

    Returns: (B, 3, F, H, W) float32 in [-1, 1].
    """
    random_ = torch.Generator().manual_seed(seed)
    seconds = (torch.arange(num_frames) / fps).to(device)
    world = _uniform((count, 1), 128.0, 256.0, random_) / side  # the side of the world, in sides of the crop
    ground = _any_colours(count, random_).to(device)
    slope = (torch.randn(count, 3, 2, generator=random_) * 0.5).to(device)
    slope *= (torch.rand(count, 1, 1, generator=random_) < 0.5).to(device)
    axis = _pixel_centres(side, ground.device) - 0.5
    graded = slope[..., :1, None] * axis + slope[..., 1:, None] * axis[:, None]
    picture = (_whole(ground) + graded[:, :, None]).clamp(-1, 1).repeat(1, 1, num_frames, 1, 1)
    layers = torch.randint(1, 5, (count,), generator=random_)
    for layer in range(4):
        shape = torch.randint(len(SHAPES), (count,), generator=random_).to(device)
        radius = (_uniform((count, 1), *_RADII, random_) * world)[:, 0].to(device)
        middle = _uniform((count, 2), 0.0, 1.0, random_).to(device)
        angle = _uniform((count, 1), 0.0, 2 * math.pi, random_)
        speed = _uniform((count, 1), -0.1, _TRAVEL[1], random_).clamp(min=0) * world
        velocity = (torch.cat((angle.cos(), angle.sin()), 1) * speed).to(device)
        place = middle[:, None] + velocity[:, None] * (seconds - seconds.mean())[None, :, None]
        # Half of them bounce as well.
        height = _uniform((count,), -0.45, 0.45, random_).clamp(min=0) * world[:, 0]
        period, phase = _uniform((count,), 0.34, 0.48, random_), _uniform((count,), 0.0, 1.0, random_)
        beats = seconds / period.to(device)[:, None] + phase.to(device)[:, None]
        place[..., 1] += height.to(device)[:, None] * (0.5 - (math.pi * beats).sin().abs())
        cover = _cover(shape, radius, place, side) * (layer < layers).to(device)[:, None, None, None]
        picture = torch.lerp(picture, _whole(_any_colours(count, random_).to(device)), cover[:, None])
    return _with_frames(picture, (torch.rand(count, generator=random_) < 0.2).to(device))


def _paths(
    descriptions: Sequence[Description], extents: Tensor, random_: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """start (B, 2), travel (B, 2) and height of bounces (B,), such that the shape stays in the picture.

    Args: extents: (B, 3) half width, above, below.
    """
    count = len(descriptions)
    motion = [d.motion for d in descriptions]
    distance = _uniform((count,), *_TRAVEL, random_)
    signs = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
    travel = torch.tensor([signs.get(m, (0, 0)) for m in motion]) * distance[:, None]
    bounce = torch.tensor([m == "bounce" for m in motion])
    height = _uniform((count,), 0.30, 0.45, random_) * bounce
    half, above, below = extents.unbind(1)
    # Sideways the middle of the path is the middle of the picture; what stays in its place, stays there.
    places = [0.5 if d.place is None else PLACES[d.place] for d in descriptions]
    x = torch.tensor(places) + _uniform((count,), -0.01, 0.01, random_)
    x = torch.minimum(torch.maximum(x, half), 1 - half)
    free = torch.rand(count, generator=random_)
    margin = 0.5 * travel[:, 1].abs()
    # Down the picture, from the highest to the lowest possible middle of the path.
    highest, lowest = above + margin, 1 - below - margin
    y = highest + free * (lowest - highest).clamp(min=0)
    still = torch.tensor([m in ("still", "left", "right") for m in motion])
    y = torch.where(still, y.clamp(0.35, 0.65), y)
    y = torch.where(bounce, 1 - below - 0.02 * free, y)
    return torch.stack((x, y), 1) - 0.5 * travel, travel, height


def _cover(shape: Tensor, radius: Tensor, place: Tensor, side: int) -> Tensor:
    """How much of each pixel a shape covers, by the signed distance of its centre.

    Args: shape, radius: (B,).  place: (B, F, 2) of the centroid.
    Returns: (B, F, H, W) in [0, 1].
    """
    centres = _pixel_centres(side, place.device)
    x = (centres - place[..., :1]).abs()[:, :, None, :]
    y = (centres - place[..., 1:])[..., None]
    r = radius[:, None, None, None]
    circle, square = ((shape == SHAPES.index(name))[:, None, None, None] for name in ("circle", "square"))
    triangle = ~(circle | square)
    slant = math.cos(math.pi / 6)
    # Squares and triangles are cut out by lines: max(a(x) + b(y), c(y)).  A circle is sqrt(a(x) + b(y)) - r.
    a = torch.where(circle, x.square(), torch.where(square, x - _HALF_SQUARE * r, slant * x - _FLAT * r))
    b = torch.where(circle, y.square(), -0.5 * y * triangle)
    c = torch.where(circle, -r, torch.where(square, y.abs() - _HALF_SQUARE * r, y - _FLAT * r))
    distance = a + b
    distance = torch.where(circle, distance.clamp(min=0).sqrt() - r, distance)
    return torch.maximum(distance, c).mul_(-side).add_(0.5).clamp_(0, 1)


def _with_frames(picture: Tensor, framed: Tensor) -> Tensor:
    side = picture.shape[-1]
    away = (_pixel_centres(side, picture.device) - 0.5).abs()
    edge = ((torch.maximum(away, away[:, None]) - (0.5 - FRAME_WIDTH)) * side + 0.5).clamp(0, 1)
    white = torch.tensor([value / 127.5 - 1 for value in PALETTE["white"]], device=picture.device)
    return torch.lerp(picture, white[:, None, None, None], edge * _whole(framed.float()[:, None]))


def _whole(values: Tensor) -> Tensor:
    """(B, C) to (B, C, 1, 1, 1)."""
    return values[:, :, None, None, None]


def _pixel_centres(side: int, device: torch.device) -> Tensor:
    return (torch.arange(side, device=device) + 0.5) / side


def _uniform(shape: tuple[int, ...], low: float, high: float, random_: torch.Generator) -> Tensor:
    return low + (high - low) * torch.rand(shape, generator=random_)


def _jittered(colours: Sequence[str], random_: torch.Generator) -> Tensor:
    """(B, 3) in [-1, 1]."""
    exact = torch.tensor([PALETTE[colour] for colour in colours]).reshape(-1, 3) / 255
    jitter = _uniform(tuple(exact.shape), -_JITTER, _JITTER, random_)
    return (exact + jitter).clamp(0, 1) * 2 - 1


def _any_colours(count: int, random_: torch.Generator) -> Tensor:
    """(B, 3) in [-1, 1]: half of them near the palette."""
    names = list(PALETTE)
    near = _jittered(
        [names[n] for n in torch.randint(len(names), (count,), generator=random_).tolist()], random_
    )
    free = _uniform((count, 3), -1.0, 1.0, random_)
    return torch.where(torch.rand(count, 1, generator=random_) < 0.5, near, free)
