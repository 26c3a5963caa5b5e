"""Decoding and encoding of long or large clips in overlapping tiles, in bounded memory.

Tiles are decoded or encoded as if each were a whole clip and then blended.  Overlaps shorter than the reach
of the network (about 22 latents in LTX-2, 15 in LTX-2.3, for a decoder) make the result an approximation,
closer the larger the overlap; a clip that fits in one tile is never cut.

Legend: B batch, C latent channels, F frames, H, W pixels, F', H', W' the same in latent cells.
Sources: see ``tiling``.  Values are blended in float32 whatever the network computes in.
"""

import logging
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from diffsynth.errors import RequestError
from diffsynth.models.ltx2.tiling import (
    EncodeScheme,
    Interval,
    Mask,
    TileConfig,
    TilePlan,
    blend_weights,
    decode_plan,
    encode_plan,
)
from diffsynth.models.ltx2.video_vae import SPATIAL_SCALE, check_picture_size, drop_trailing_frames

OnTile = Callable[[int, int], None]
"""Called after every tile with (tiles done, tiles in all); an exception raised in it ends the run."""

logger = logging.getLogger(__name__)


class _Spatial(NamedTuple):
    """A spatial tile and its (h, w) float32 blend weights."""

    rows: Interval
    columns: Interval
    weights: Tensor

    def cut(self, x: Tensor) -> Tensor:
        return x[..., self.rows.start : self.rows.stop, self.columns.start : self.columns.stop]

    def place(self, x: Tensor) -> Tensor:
        rows, columns = self.rows, self.columns
        return x[..., rows.out_start : rows.out_stop, columns.out_start : columns.out_stop]


def decode_tiles(
    decoder: nn.Module,
    latent: Tensor,
    tiling: TileConfig,
    *,
    accumulate_on: torch.device | None = None,
    on_tile: OnTile | None = None,
) -> Iterator[Tensor]:
    """Decode a latent as a stream of chunks that follow one another in time.

    At any time one buffer of the full picture size lives, over the frames of one temporal tile, 12 bytes per
    pixel and frame.  Drop each chunk before asking for the next, or two such buffers live.

    Args:
        decoder: a ``VideoDecoder``, or anything that maps a normalised latent to pixels as it does.
        latent: (B, C, F', H', W') normalised, on the device and in the dtype that ``decoder`` computes in.
        tiling: sizes and overlaps.
        accumulate_on: where tiles are blended and chunks arrive; None for the device of ``latent``.  The CPU
            keeps the buffer out of device memory at the price of one copy per tile.
        on_tile: progress.

    Returns:
        An iterator over pixels (B, 3, f, 32 H', 32 W'), float32, not clamped.  ``f`` differs and may be 0;
        all together are 1 + 8 (F'-1) frames.  If one tile holds all, the only chunk is the plain decode.

    Raises:
        RequestError: a tile would be narrower than the decoder can pad (before anything is decoded).
    """
    _, _, frames, height, width = latent.shape
    plan = decode_plan((frames, height, width), tiling)
    smallest = min(interval.stop - interval.start for interval in (*plan.height, *plan.width))
    if smallest < getattr(decoder, "min_cells", 1) <= min(height, width):
        raise RequestError(
            f"tile_overlap_in_pixels={tiling.tile_overlap_in_pixels} leaves a last tile of"
            f" {SPATIAL_SCALE * smallest} pixels, too narrow for this decoder",
            hint=f"tile_overlap_in_pixels={SPATIAL_SCALE} or more",
        )
    device = latent.device if accumulate_on is None else accumulate_on
    return _decode_stream(decoder, latent, plan, device, _counter(plan.num_tiles, on_tile))


def _decode_stream(
    decoder: nn.Module, latent: Tensor, plan: TilePlan, device: torch.device, report: Callable[[], None]
) -> Iterator[Tensor]:
    if plan.num_tiles == 1:
        pixels = decoder(latent).to(device).float()
        report()
        yield pixels
        return
    spatial = _spatial_weights(plan, device)
    carry: Tensor | None = None
    for index, weights in enumerate(blend_weights(plan.time)):
        interval = plan.time[index]
        part = latent[:, :, interval.start : interval.stop]
        pixels = _decode_interval(decoder, part, plan, spatial, report)
        pixels.mul_(_column(weights, device))
        if carry is not None:
            pixels[:, :, : carry.shape[2]].add_(carry)
        last = index + 1 == len(plan.time)
        # What lies before the next interval is final.  The rest is copied, so that the buffer can go.
        final = (interval.out_stop if last else plan.time[index + 1].out_start) - interval.out_start
        carry = pixels[:, :, final:].clone()
        chunk = pixels[:, :, :final]
        del pixels
        yield chunk
        del chunk


def encode_tiled(
    encoder: nn.Module,
    pixels: Tensor,
    tiling: TileConfig,
    scheme: EncodeScheme = "official",
    *,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
    on_tile: OnTile | None = None,
) -> Tensor:
    """Encode a clip tile by tile.

    Args:
        encoder: a ``VideoEncoder``, or anything that maps pixels to a normalised latent as it does.
        pixels: (B, 3, F, H, W) in [-1, 1], anywhere, for instance in host memory: only tiles move.
        tiling: sizes and overlaps; the sizes in frames are unused in the scheme ``diffsynth``.
        scheme: ``official`` bounds memory in space and time, ``diffsynth`` in space (see ``encode_plan``).
        device: where the encoder computes; None for the device of its first parameter.
        dtype: in which it computes; None for the dtype of its first parameter.
        on_tile: progress.

    Returns:
        (B, C, F', H', W') normalised, on ``device`` in ``dtype``.

    Raises:
        RequestError: H or W is not a multiple of 32, or tiles smaller than the overlap that the scheme needs.
    """
    check_picture_size(pixels)
    pixels = drop_trailing_frames(pixels)
    device = next(encoder.parameters()).device if device is None else device
    dtype = next(encoder.parameters()).dtype if dtype is None else dtype
    size = (pixels.shape[2], pixels.shape[3], pixels.shape[4])
    plan = encode_plan(size, tiling, scheme)
    report = _counter(plan.num_tiles, on_tile)
    if plan.num_tiles == 1:
        latent = encoder(pixels.to(device, dtype))
        report()
        return latent
    if scheme == "official" and tiling.for_official_encode(size) != tiling:
        logger.warning("tile overlaps raised to the encoder's minimum of 64 pixels and 16 frames")
    spatial = _spatial_weights(plan, device)
    out_size = tuple(axis[-1].out_stop for axis in (plan.time, plan.height, plan.width))
    total: Tensor | None = None
    for interval, weights in zip(plan.time, blend_weights(plan.time), strict=True):
        column = _column(weights, device)
        for tile in spatial:
            part = tile.cut(pixels[:, :, interval.start : interval.stop])
            part = encoder(part.to(device, dtype))
            report()
            if total is None:
                total = part.new_zeros((*part.shape[:2], *out_size), dtype=torch.float32)
            target = tile.place(total[:, :, interval.out_start : interval.out_stop])
            target.addcmul_(part, tile.weights * column)
    assert total is not None
    return total.to(dtype)


def _decode_interval(
    decoder: nn.Module, latent: Tensor, plan: TilePlan, spatial: list[_Spatial], report: Callable[[], None]
) -> Tensor:
    """All spatial tiles of one temporal interval, blended: (B, 3, f, H, W) float32 where the weights are."""
    total: Tensor | None = None
    for tile in spatial:
        # The decoder's own dtype crosses the bus; it is widened where it is summed.
        pixels = decoder(tile.cut(latent)).to(tile.weights.device)
        report()
        if len(spatial) == 1:
            return pixels.float()
        if total is None:
            out_size = (plan.height[-1].out_stop, plan.width[-1].out_stop)
            total = pixels.new_zeros((*pixels.shape[:3], *out_size), dtype=torch.float32)
        tile.place(total).addcmul_(pixels, tile.weights)
        del pixels  # or it would still live while the next tile is decoded
    assert total is not None
    return total


def _spatial_weights(plan: TilePlan, device: torch.device) -> list[_Spatial]:
    """Spatial tiles, width fastest."""
    heights = [_tensor(weights, device) for weights in blend_weights(plan.height)]
    widths = [_tensor(weights, device) for weights in blend_weights(plan.width)]
    return [
        _Spatial(rows, columns, torch.outer(h, w))
        for rows, h in zip(plan.height, heights, strict=True)
        for columns, w in zip(plan.width, widths, strict=True)
    ]


def _tensor(weights: Mask, device: torch.device) -> Tensor:
    return torch.tensor(weights, dtype=torch.float32, device=device)


def _column(weights: Mask, device: torch.device) -> Tensor:
    """Weights of frames, to multiply (B, C, F, H, W)."""
    return _tensor(weights, device).view(-1, 1, 1)


def _counter(total: int, on_tile: OnTile | None) -> Callable[[], None]:
    done = 0

    def report() -> None:
        nonlocal done
        done += 1
        if on_tile is not None:
            on_tile(done, total)

    return report
