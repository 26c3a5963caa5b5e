"""Tile plans of the video VAE: pure arithmetic, no tensors.

A plan cuts time, height and width separately; the tiles are the product of the three lists of intervals.  An
interval says which part of the input a tile reads, where its output goes, and with which weight (mask) every
output position counts.  Masks are separable: a tile's mask is the outer product of its three.

Sources: decode and "official" encode are those of ltx-core 1.0.0; "diffsynth" encode is DiffSynth-Studio's.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from diffsynth.errors import RequestError
from diffsynth.models.ltx2.video_vae_config import SPATIAL_SCALE, TEMPORAL_SCALE

EncodeScheme = Literal["official", "diffsynth"]
Mask = tuple[float, ...]

MIN_ENCODE_OVERLAP_PX = 64
MIN_ENCODE_OVERLAP_FRAMES = 16


@dataclass(frozen=True, slots=True)
class TileConfig:
    """Tile sizes and overlaps.  A pair of None leaves that axis (height and width, or time) whole.

    Raises:
        RequestError: sizes that are no multiples of 32 pixels or 8 frames, tiles under 64 pixels or 16
            frames, an overlap as large as the tile, or half a pair.
    """

    tile_size_in_pixels: int | None = 512
    tile_overlap_in_pixels: int | None = 128
    tile_size_in_frames: int | None = 128
    tile_overlap_in_frames: int | None = 24

    def __post_init__(self) -> None:
        _check_pair("pixels", self.tile_size_in_pixels, self.tile_overlap_in_pixels, SPATIAL_SCALE)
        _check_pair("frames", self.tile_size_in_frames, self.tile_overlap_in_frames, TEMPORAL_SCALE)

    def for_official_encode(self, pixel_size: tuple[int, int, int]) -> "TileConfig":
        """The overlaps that the official encoder tiling uses for a clip (F, H, W).

        Where the clip is cut at all, they are raised to 64 pixels and 16 frames.

        Raises:
            RequestError: a tile is not larger than its raised overlap, so tiles would never advance.
        """
        frames, *sides = pixel_size
        tiling = self
        size, overlap = self.tile_size_in_pixels, self.tile_overlap_in_pixels
        if size is not None and overlap is not None and max(sides) > size:
            raised = _raised("pixels", size, max(overlap, MIN_ENCODE_OVERLAP_PX), SPATIAL_SCALE)
            tiling = replace(tiling, tile_overlap_in_pixels=raised)
        size, overlap = self.tile_size_in_frames, self.tile_overlap_in_frames
        if size is not None and overlap is not None and frames > size:
            raised = _raised("frames", size, max(overlap, MIN_ENCODE_OVERLAP_FRAMES), TEMPORAL_SCALE)
            tiling = replace(tiling, tile_overlap_in_frames=raised)
        return tiling


@dataclass(frozen=True, kw_only=True, slots=True)
class Interval:
    """One tile along one axis; ``stop`` and ``out_stop`` are exclusive."""

    start: int
    stop: int
    out_start: int
    out_stop: int
    mask: Mask
    """Weight of every output position, ``out_stop - out_start`` values in [0, 1]."""


@dataclass(frozen=True, slots=True)
class TilePlan:
    """Intervals along the three axes."""

    time: tuple[Interval, ...]
    height: tuple[Interval, ...]
    width: tuple[Interval, ...]

    @property
    def num_tiles(self) -> int:
        """Tiles in all; 1 means that nothing is cut."""
        return len(self.time) * len(self.height) * len(self.width)


def blend_weights(axis: Sequence[Interval]) -> list[Mask]:
    """The masks of one axis, scaled so that at every output position they add to 1.

    Tiles are a full product of intervals, so the sum of all masks is the product of three sums, and dividing
    the accumulated values by it is the same as scaling every mask beforehand: no weight buffer is needed.
    """
    total = [0.0] * max(interval.out_stop for interval in axis)
    for interval in axis:
        for position, weight in enumerate(interval.mask, interval.out_start):
            total[position] += weight
    return [
        tuple(weight / total[position] for position, weight in enumerate(interval.mask, interval.out_start))
        for interval in axis
    ]


def decode_plan(latent_size: tuple[int, int, int], tiling: TileConfig) -> TilePlan:
    """How a latent (F', H', W') is cut; input in latent cells, output in frames and pixels.

    On time, every interval but the first reads one latent more in front and gives its first frame the weight
    0: that frame was decoded without its past.  The short side of the picture gets proportionally smaller
    tiles than the long side.
    """
    frames, height, width = latent_size
    size, overlap = tiling.tile_size_in_pixels, tiling.tile_overlap_in_pixels
    sides = []
    for length in (height, width):
        if size is None or overlap is None:
            sides.append(_whole(length, SPATIAL_SCALE * length))
            continue
        margin = overlap // SPATIAL_SCALE
        cells = round(size // SPATIAL_SCALE * length / max(height, width))
        sides.append(_decode_side(length, max(2, margin + 1, cells), margin))
    if tiling.tile_size_in_frames is None or tiling.tile_overlap_in_frames is None:
        time = _whole(frames, 1 + TEMPORAL_SCALE * (frames - 1))
    else:
        time = _decode_time(
            frames,
            tiling.tile_size_in_frames // TEMPORAL_SCALE,
            tiling.tile_overlap_in_frames // TEMPORAL_SCALE,
        )
    return TilePlan(time, *sides)


def encode_plan(
    pixel_size: tuple[int, int, int], tiling: TileConfig, scheme: EncodeScheme = "official"
) -> TilePlan:
    """How a clip (F = 8k+1, H, W) is cut; input in frames and pixels, output in latent cells.

    * ``official``: space and time, masks of 0 and 1, no blending; overlaps raised as
      :meth:`TileConfig.for_official_encode` says.
    * ``diffsynth``: space only, linear ramps.

    Raises:
        RequestError: see :meth:`TileConfig.for_official_encode`.
    """
    frames, height, width = pixel_size
    whole_time = _whole(frames, 1 + (frames - 1) // TEMPORAL_SCALE)
    if scheme == "official":
        tiling = tiling.for_official_encode(pixel_size)
    size, overlap = tiling.tile_size_in_pixels, tiling.tile_overlap_in_pixels
    if size is None or overlap is None or max(height, width) <= size:
        sides = [_whole(length, length // SPATIAL_SCALE) for length in (height, width)]
    else:
        cut = _official_side if scheme == "official" else _feathered_side
        sides = [cut(length, size, overlap) for length in (height, width)]
    if scheme == "diffsynth" or tiling.tile_size_in_frames is None or tiling.tile_overlap_in_frames is None:
        return TilePlan(whole_time, *sides)
    return TilePlan(_official_time(frames, tiling.tile_size_in_frames, tiling.tile_overlap_in_frames), *sides)


def split(length: int, size: int, overlap: int) -> list[tuple[int, int]]:
    """Intervals [start, stop) of ``size`` that overlap by ``overlap``.

    The last may be shorter, but is longer than the overlap.  A length that fits in one tile stays whole.
    """
    if length <= size:
        return [(0, length)]
    step = size - overlap
    count = -(-(length - overlap) // step)
    return [(i * step, length if i == count - 1 else i * step + size) for i in range(count)]


def _whole(length: int, out_length: int) -> tuple[Interval, ...]:
    return (Interval(start=0, stop=length, out_start=0, out_stop=out_length, mask=(1.0,) * out_length),)


def _decode_side(length: int, size: int, overlap: int) -> tuple[Interval, ...]:
    intervals = []
    for start, stop in split(length, size, overlap):
        left = _rising(SPATIAL_SCALE * overlap if start > 0 else 0)
        right = _rising(SPATIAL_SCALE * overlap if stop < length else 0)[::-1]
        out_start, out_stop = SPATIAL_SCALE * start, SPATIAL_SCALE * stop
        mask = _mask(out_stop - out_start, left, right)
        intervals.append(Interval(start=start, stop=stop, out_start=out_start, out_stop=out_stop, mask=mask))
    return tuple(intervals)


def _decode_time(length: int, size: int, overlap: int) -> tuple[Interval, ...]:
    intervals = []
    for first, stop in split(length, size, overlap):
        start = first - 1 if first > 0 else 0
        # One latent more in front: the ramp covers its single frame, with weight 0, and 8 frames per latent.
        ramp = 1 + TEMPORAL_SCALE * overlap
        left = tuple(k / ramp for k in range(ramp)) if first > 0 else ()
        right = _rising(TEMPORAL_SCALE * overlap if stop < length else 0)[::-1]
        out_start, out_stop = TEMPORAL_SCALE * start, TEMPORAL_SCALE * (stop - 1) + 1
        mask = _mask(out_stop - out_start, left, right)
        intervals.append(Interval(start=start, stop=stop, out_start=out_start, out_stop=out_stop, mask=mask))
    return tuple(intervals)


def _official_side(length: int, size: int, overlap: int) -> tuple[Interval, ...]:
    """Every latent comes from exactly one tile: the seam lies one latent before a tile's end."""
    intervals = []
    for start, stop in split(length, size, overlap):
        left = (0.0,) * (overlap // SPATIAL_SCALE - 1 if start > 0 else 0)
        right = (0.0,) * (1 if stop < length else 0)
        out_start, out_stop = start // SPATIAL_SCALE, stop // SPATIAL_SCALE
        mask = _mask(out_stop - out_start, left, right)
        intervals.append(Interval(start=start, stop=stop, out_start=out_start, out_stop=out_stop, mask=mask))
    return tuple(intervals)


def _official_time(length: int, size: int, overlap: int) -> tuple[Interval, ...]:
    """Every interval but the last is one frame longer, so that all have 8k+1 frames.

    That way one latent per seam comes from two tiles and is their mean.
    """
    intervals = []
    for start, end in split(length, size, overlap):
        stop = end + 1 if end < length else end
        left = (0.0,) * (1 + (overlap - 1) // TEMPORAL_SCALE if start > 0 else 0)
        out_start, out_stop = start // TEMPORAL_SCALE, (stop - 1) // TEMPORAL_SCALE + 1
        mask = _mask(out_stop - out_start, left, ())
        intervals.append(Interval(start=start, stop=stop, out_start=out_start, out_stop=out_stop, mask=mask))
    return tuple(intervals)


def _feathered_side(length: int, size: int, overlap: int) -> tuple[Interval, ...]:
    intervals = []
    margin = overlap // SPATIAL_SCALE
    for start in range(0, max(length - overlap, 1), size - overlap):
        stop = start + min(size, length - start) // SPATIAL_SCALE * SPATIAL_SCALE
        if stop == start:  # a rest narrower than one latent
            continue
        out_start, out_stop = start // SPATIAL_SCALE, stop // SPATIAL_SCALE
        ramp = _rising(margin) if margin < out_stop - out_start else ()
        mask = _mask(out_stop - out_start, ramp if start > 0 else (), ramp[::-1] if stop < length else ())
        intervals.append(Interval(start=start, stop=stop, out_start=out_start, out_stop=out_stop, mask=mask))
    return tuple(intervals)


def _rising(length: int) -> Mask:
    return tuple((k + 1) / (length + 1) for k in range(length))


def _mask(length: int, left: Mask, right: Mask) -> Mask:
    """Ones with a ramp at either end; where the ramps meet they multiply."""
    weights = [1.0] * length
    for k, weight in enumerate(left):
        weights[k] *= weight
    for k, weight in enumerate(right, length - len(right)):
        weights[k] *= weight
    return tuple(weights)


def _check_pair(unit: str, size: int | None, overlap: int | None, multiple: int) -> None:
    """Raise RequestError for a pair of numbers that cannot make a plan."""
    size_name, overlap_name = f"tile_size_in_{unit}", f"tile_overlap_in_{unit}"
    if size is None and overlap is None:
        return
    if size is None or overlap is None:
        given, absent = (overlap_name, size_name) if size is None else (size_name, overlap_name)
        raise RequestError(
            f"{given} is given but {absent} is not",
            hint=f"give both, or neither to leave {'height and width' if unit == 'pixels' else 'time'} whole",
        )
    smallest = 2 * multiple
    if size < smallest or size % multiple:
        nearest = max(smallest, size - size % multiple)
        raise RequestError(
            f"{size_name}={size} is not a multiple of {multiple} from {smallest} up", hint=str(nearest)
        )
    if overlap < 0 or overlap % multiple:
        nearest = max(0, overlap - overlap % multiple)
        raise RequestError(f"{overlap_name}={overlap} is not a multiple of {multiple}", hint=str(nearest))
    if overlap >= size:
        raise RequestError(
            f"{overlap_name}={overlap} is not smaller than {size_name}={size}",
            hint=f"{overlap_name}={size // (4 * multiple) * multiple}, or a larger tile",
        )


def _raised(unit: str, size: int, overlap: int, multiple: int) -> int:
    if overlap >= size:
        raise RequestError(
            f"tile_size_in_{unit}={size} is too small to encode: neighbours overlap by {overlap} {unit}",
            hint=f"tile_size_in_{unit}={overlap + multiple} or more",
        )
    return overlap
