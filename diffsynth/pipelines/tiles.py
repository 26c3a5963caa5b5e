"""Tile sizes to choose from when video is decoded or encoded, and what each needs.

The request's own tiles come first; smaller ones follow for devices on which those do not fit, shorter ones
before narrower ones, whose seams are easier to see.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import fields, replace
from functools import partial
from itertools import product

from diffsynth.conditioning.tokens import video_latent_shape
from diffsynth.models.ltx2.tiling import Interval, TileConfig, TilePlan, decode_plan, encode_plan
from diffsynth.models.ltx2.video_vae_config import VideoVAEConfig
from diffsynth.pipelines.costs.cost import Cost
from diffsynth.pipelines.costs.video import Size, decoder_cost, encoder_cost
from diffsynth.request import GenerateRequest
from diffsynth.vram.planner import Choice

SMALLER_PX = (448, 384, 320, 256, 192)
SMALLER_FRAMES = (96, 64, 48, 32)
CELL_PX = 32
CELL_FRAMES = 8
ACCUMULATOR_BYTES = 12
"""Per pixel and frame of one temporal tile: three float32 values, blended on the host."""
CONVERSION_BYTES = 15
"""Of its float32 copy on the way to 8 bits, and of the result."""
FRAME_BYTES = 3
"""Per pixel of a finished frame."""
FLOAT32_PIXEL_BYTES = 12


def tile_configs(request: GenerateRequest) -> Iterator[TileConfig]:
    """The request's own tiles, then smaller ones; whole clips when it is not tiled.

    Overlaps shrink with the tiles, but not below the same share of them.

    Raises:
        RequestError: the request's tiles cannot be cut.
    """
    if not request.tiled:
        yield TileConfig(None, None, None, None)
        return
    own_px, own_frames = request.tile_size_in_pixels, request.tile_size_in_frames
    for px, frames in product(_and_smaller(own_px, SMALLER_PX), _and_smaller(own_frames, SMALLER_FRAMES)):
        overlap_px = _scaled(request.tile_overlap_in_pixels, px, own_px, CELL_PX)
        overlap_frames = _scaled(request.tile_overlap_in_frames, frames, own_frames, CELL_FRAMES)
        if overlap_px < px and overlap_frames < frames:
            yield TileConfig(px, overlap_px, frames, overlap_frames)


def decode_choices(
    request: GenerateRequest, config: VideoVAEConfig, itemsize: int, workspace: float
) -> list[Choice]:
    """Ways to decode the video of a request.

    Args:
        itemsize: bytes per value of the compute dtype.
        workspace: share of the activations that convolutions take besides.
    """
    latent = video_latent_shape(request.num_frames, request.height, request.width)
    picture = request.height * request.width
    found: list[Choice] = []
    for tiling in tile_configs(request):
        plan = decode_plan(latent, tiling)
        cost = _tiled_cost([plan], partial(decoder_cost, config, itemsize=itemsize))
        longest = max(interval.out_stop - interval.out_start for interval in plan.time)
        # Neighbours in time overlap: what is carried over lives beside the next one.
        chunk = picture * longest * (ACCUMULATOR_BYTES + CONVERSION_BYTES)
        frames = picture * request.num_frames * FRAME_BYTES
        found.append(_choice(tiling, cost, workspace, chunk + frames))
    return _in_order(found)


def encode_choices(
    request: GenerateRequest,
    config: VideoVAEConfig,
    clips: Sequence[Size],
    itemsize: int,
    workspace: float,
) -> list[Choice]:
    """Ways to encode clips of (frames, height, width) one after another; see :func:`decode_choices`."""
    found: list[Choice] = []
    host = FLOAT32_PIXEL_BYTES * max(frames * height * width for frames, height, width in clips)
    for tiling in tile_configs(request):
        plans = [encode_plan(clip, tiling) for clip in clips]
        cost = _tiled_cost(plans, partial(encoder_cost, config, itemsize=itemsize))
        found.append(_choice(tiling, cost, workspace, host))
    return _in_order(found)


def _scaled(overlap: int, size: int, own_size: int, multiple: int) -> int:
    """The overlap of a smaller tile: the same share of it, rounded up."""
    return -(-overlap * size // (own_size * multiple)) * multiple


def _in_order(choices: Iterable[Choice]) -> list[Choice]:
    """No choice counts as faster than one before it, so that seams are never preferred for their speed."""
    flops = 0.0
    found = []
    for choice in choices:
        flops = max(flops, choice.flops)
        found.append(replace(choice, flops=flops))
    return found


def _and_smaller(own: int, smaller: Iterable[int]) -> tuple[int, ...]:
    return (own, *(size for size in smaller if size < own))


def _tiled_cost(plans: Iterable[TilePlan], cost_of: Callable[[Size], Cost]) -> Cost:
    """The largest tile decides the memory, all of them the operations."""
    tiles: Counter[Size] = Counter()
    for plan in plans:
        times, heights, widths = (_lengths(axis) for axis in (plan.time, plan.height, plan.width))
        for (time, n), (height, m), (width, k) in product(times.items(), heights.items(), widths.items()):
            tiles[time, height, width] += n * m * k
    costs = {size: cost_of(size) for size in tiles}
    return Cost(
        max(cost.nbytes for cost in costs.values()),
        sum(count * costs[size].flops for size, count in tiles.items()),
    )


def _lengths(axis: Iterable[Interval]) -> Counter[int]:
    return Counter(interval.stop - interval.start for interval in axis)


def _choice(tiling: TileConfig, cost: Cost, workspace: float, host_bytes: int) -> Choice:
    return Choice(
        activation_bytes=cost.nbytes,
        workspace_bytes=int(workspace * cost.nbytes),
        host_bytes=host_bytes,
        flops=cost.flops,
        settings={field.name: getattr(tiling, field.name) for field in fields(tiling)},
    )
