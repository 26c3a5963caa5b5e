"""Tile plans and tiled runs: plans against their rules, tiled results against whole ones."""

import logging
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from diffsynth.errors import RequestError
from diffsynth.models.ltx2.tiling import (
    EncodeScheme,
    Interval,
    TileConfig,
    blend_weights,
    decode_plan,
    encode_plan,
    split,
)
from diffsynth.models.ltx2.video_tiling import decode_tiles, encode_tiled
from diffsynth.models.ltx2.video_vae import VideoDecoder, VideoEncoder
from tests.models.ltx2.test_video_vae import tiny_config

UNTILED = TileConfig(None, None, None, None)


def cells(size: int, overlap: int, time_size: int, time_overlap: int) -> TileConfig:
    """A tiling given in latent cells."""
    return TileConfig(32 * size, 32 * overlap, 8 * time_size, 8 * time_overlap)


@st.composite
def tilings(draw: st.DrawFn, *, min_size: int = 2, min_overlap: int = 0) -> TileConfig:
    size, time_size = (draw(st.integers(min_size, 6)) for _ in range(2))
    overlap, time_overlap = (draw(st.integers(min_overlap, n - 1)) for n in (size, time_size))
    tiling = cells(size, overlap, time_size, time_overlap)
    whole = draw(st.sampled_from(["neither", "time", "sides"]))
    if whole == "time":
        return replace(tiling, tile_size_in_frames=None, tile_overlap_in_frames=None)
    if whole == "sides":
        return replace(tiling, tile_size_in_pixels=None, tile_overlap_in_pixels=None)
    return tiling


lengths = st.integers(1, 14)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"tile_size_in_pixels": 500}, r"tile_size_in_pixels=500 .*32 .*Try: 480"),
        ({"tile_size_in_pixels": 32, "tile_overlap_in_pixels": 0}, r"tile_size_in_pixels=32 .*64.*Try: 64"),
        ({"tile_overlap_in_pixels": 100}, r"tile_overlap_in_pixels=100 .*Try: 96"),
        ({"tile_overlap_in_pixels": -32}, r"tile_overlap_in_pixels=-32 .*Try: 0"),
        ({"tile_overlap_in_pixels": 512}, r"tile_overlap_in_pixels=512 is not smaller .*Try: .*=128"),
        ({"tile_size_in_frames": 20}, r"tile_size_in_frames=20 .*8 .*Try: 16"),
        ({"tile_overlap_in_frames": 200}, r"tile_overlap_in_frames=200 is not smaller"),
        ({"tile_size_in_frames": None}, r"tile_overlap_in_frames is given but tile_size_in_frames is not"),
        ({"tile_overlap_in_pixels": None}, r"tile_size_in_pixels is given .*height and width whole"),
    ],
)
def test_settings_that_cannot_work_are_refused_with_a_way_out(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(RequestError, match=reason):
        replace(TileConfig(), **changes)


def test_the_example_of_121_frames_at_768x512() -> None:
    tiling = cells(16, 2, 8, 3)
    plan = decode_plan((16, 16, 24), tiling)
    assert [(i.start, i.stop) for i in plan.time] == [(0, 8), (4, 13), (9, 16)]
    assert [(i.out_start, i.out_stop) for i in plan.time] == [(0, 57), (32, 97), (72, 121)]
    assert [(i.start, i.stop) for i in plan.height] == [(0, 11), (9, 16)]
    assert [(i.out_start, i.out_stop) for i in plan.width] == [(0, 512), (448, 768)]
    assert plan.time[1].mask[0] == 0.0
    assert plan.num_tiles == 12
    encode = encode_plan((121, 512, 768), tiling)
    assert [(i.start, i.stop) for i in encode.time] == [(0, 65), (40, 105), (80, 121)]
    assert [(i.out_start, i.out_stop) for i in encode.time] == [(0, 9), (5, 14), (10, 16)]


@settings(deadline=None)
@given(length=st.integers(1, 200), size=st.integers(2, 40), data=st.data())
def test_split_covers_the_axis_and_always_advances(length: int, size: int, data: st.DataObject) -> None:
    overlap = data.draw(st.integers(0, size - 1))
    intervals = split(length, size, overlap)
    assert intervals[0][0] == 0
    assert intervals[-1][1] == length
    for (start, stop), (following, _) in pairwise(intervals):
        assert stop - start == size
        assert start < following == stop - overlap
    if len(intervals) > 1:
        assert overlap < intervals[-1][1] - intervals[-1][0] <= size


def check_weights(axis: tuple[Interval, ...], length: int) -> None:
    total = [0.0] * length
    for interval, weights in zip(axis, blend_weights(axis), strict=True):
        assert len(interval.mask) == len(weights) == interval.out_stop - interval.out_start
        for position, weight in enumerate(weights, interval.out_start):
            total[position] += weight
    assert total == pytest.approx([1.0] * length)
    assert [i.out_start for i in axis] == sorted(i.out_start for i in axis)
    assert [i.out_stop for i in axis] == sorted(i.out_stop for i in axis)


@settings(deadline=None)
@given(frames=lengths, height=lengths, width=lengths, tiling=tilings())
def test_decode_weights_add_to_one_everywhere(
    frames: int, height: int, width: int, tiling: TileConfig
) -> None:
    plan = decode_plan((frames, height, width), tiling)
    check_weights(plan.time, 1 + 8 * (frames - 1))
    check_weights(plan.height, 32 * height)
    check_weights(plan.width, 32 * width)
    if tiling.tile_size_in_pixels is not None and max(height, width) * 32 <= tiling.tile_size_in_pixels:
        assert len(plan.height) == len(plan.width) == 1


@pytest.mark.parametrize("scheme", ["official", "diffsynth"])
@settings(deadline=None)
@given(frames=lengths, height=lengths, width=lengths, tiling=tilings(min_size=3, min_overlap=2))
def test_encode_weights_add_to_one_everywhere(
    scheme: EncodeScheme, frames: int, height: int, width: int, tiling: TileConfig
) -> None:
    plan = encode_plan((1 + 8 * (frames - 1), 32 * height, 32 * width), tiling, scheme)
    check_weights(plan.time, frames)
    check_weights(plan.height, height)
    check_weights(plan.width, width)
    assert all((i.stop - i.start) % 8 == 1 for i in plan.time)
    assert all((i.stop - i.start) % 32 == 0 for i in (*plan.height, *plan.width))
    if scheme == "official":
        assert {w for i in (*plan.time, *plan.height, *plan.width) for w in i.mask} <= {0.0, 1.0}


def test_encode_in_feathered_tiles_takes_a_short_side_whole() -> None:
    plan = encode_plan((9, 32, 320), cells(4, 2, 2, 1), "diffsynth")
    assert [(i.start, i.stop) for i in plan.height] == [(0, 32)]
    assert len(plan.width) == 4


def test_a_feathered_tile_that_stops_short_of_the_border_fades_there_too() -> None:
    # 304 pixels are nine latents and a half, 208 are six and a half: the halves are in no tile.
    plan = encode_plan((1, 208, 304), cells(6, 2, 2, 1), "diffsynth")
    assert [(i.start, i.stop) for i in plan.width] == [(0, 192), (128, 288)]
    assert plan.width[1].mask == pytest.approx((1 / 3, 2 / 3, 1, 2 / 3, 1 / 3))
    assert [(i.start, i.stop) for i in plan.height] == [(0, 192), (128, 192)]
    without_overlap = encode_plan((1, 208, 304), cells(6, 0, 2, 1), "diffsynth")
    assert [(i.start, i.stop) for i in without_overlap.height] == [(0, 192)]


class LocalDecoder(nn.Module):
    """Reach zero: a pixel depends on its own latent alone, so tiled must equal whole everywhere."""

    def forward(self, latent: Tensor) -> Tensor:
        pixels = latent[:, :3].repeat_interleave(8, 2)[:, :, 7:]
        return pixels.repeat_interleave(32, -1).repeat_interleave(32, -2)


class LocalEncoder(nn.Module):
    """Reach zero: a latent depends on one pixel."""

    def forward(self, pixels: Tensor) -> Tensor:
        return pixels[:, :, ::8, ::32, ::32].clone()


@settings(max_examples=30, deadline=None)
@given(size=st.tuples(st.integers(1, 9), st.integers(1, 5), st.integers(1, 7)), tiling=tilings())
@example(size=(5, 4, 5), tiling=cells(3, 2, 3, 2))
@torch.inference_mode()
def test_blending_and_alignment_are_exact_for_a_local_decoder(
    size: tuple[int, int, int], tiling: TileConfig
) -> None:
    latent = torch.arange(1.0, 1 + torch.Size(size).numel()).view(1, 1, *size).expand(1, 3, *size)
    chunks = list(decode_tiles(LocalDecoder(), latent, tiling))
    whole = LocalDecoder()(latent)
    assert sum(chunk.shape[2] for chunk in chunks) == 1 + 8 * (size[0] - 1)
    torch.testing.assert_close(torch.cat(chunks, dim=2), whole, atol=0, rtol=1e-6)


@settings(max_examples=40, deadline=None)
@given(
    size=st.tuples(st.integers(1, 9), st.integers(1, 8), st.integers(1, 8)),
    tiling=tilings(min_size=3, min_overlap=2),
    scheme=st.sampled_from(["official", "diffsynth"]),
)
@torch.inference_mode()
def test_blending_and_alignment_are_exact_for_a_local_encoder(
    size: tuple[int, int, int], tiling: TileConfig, scheme: EncodeScheme
) -> None:
    pixels = LocalDecoder()(
        torch.arange(1.0, 1 + torch.Size(size).numel()).view(1, 1, *size).expand(1, 3, *size)
    )
    cpu = torch.device("cpu")
    latent = encode_tiled(LocalEncoder(), pixels, tiling, scheme, device=cpu, dtype=torch.float32)
    torch.testing.assert_close(latent, LocalEncoder()(pixels), atol=0, rtol=1e-6)


# The decoder below reaches 1 + 1 + 1/2 + 1/4 + 1/8 latents, so a tile border this far away changes nothing.
REACH_CELLS = 3


def make_decoder(*, reflect: bool = False) -> VideoDecoder:
    torch.manual_seed(1)
    config = tiny_config(reflect=reflect)
    shallow = tuple(stage for stage in config.decoder_blocks if stage.kind != "res_x")
    return VideoDecoder(replace(config, decoder_blocks=shallow))


def clean(axis: tuple[Interval, ...], length: int, margin: int) -> Tensor:
    """Output positions that lie further than ``margin`` from every inner border of every tile over them."""
    result = torch.ones(length, dtype=torch.bool)
    for i in axis:
        if i.out_start > 0:
            result[i.out_start : i.out_start + margin] = False
        if i.out_stop < length:
            result[max(0, i.out_stop - margin) : i.out_stop] = False
    return result


@settings(max_examples=6, deadline=None)
@given(
    size=st.tuples(st.integers(1, 10), st.integers(2, 5), st.integers(2, 10)),
    overlap=st.integers(1, 7),
    time_overlap=st.integers(0, 7),
    reflect=st.booleans(),
)
@example(size=(11, 3, 11), overlap=3, time_overlap=3, reflect=True)
@example(size=(9, 9, 2), overlap=7, time_overlap=7, reflect=False)
@example(size=(1, 3, 10), overlap=1, time_overlap=0, reflect=False)
@torch.inference_mode()
def test_tiled_equals_whole_in_the_interior(
    size: tuple[int, int, int], overlap: int, time_overlap: int, reflect: bool
) -> None:
    decoder, tiling = make_decoder(reflect=reflect), cells(8, overlap, 8, time_overlap)
    latent = torch.randn(1, 8, *size)
    whole = decoder(latent)
    tiled = torch.cat(list(decode_tiles(decoder, latent, tiling)), dim=2)
    assert tiled.shape == whole.shape
    plan = decode_plan(size, tiling)
    t = clean(plan.time, whole.shape[2], 8 * REACH_CELLS + 1)
    h = clean(plan.height, whole.shape[3], 32 * REACH_CELLS)
    w = clean(plan.width, whole.shape[4], 32 * REACH_CELLS)
    interior = [video[:, :, t][..., h, :][..., w] for video in (tiled, whole)]
    torch.testing.assert_close(*interior, atol=1e-5, rtol=1e-5)


@torch.inference_mode()
def test_the_interior_is_not_empty_and_the_seams_do_differ() -> None:
    decoder, tiling, latent = make_decoder(), cells(8, 3, 8, 3), torch.randn(1, 8, 11, 3, 11)
    plan = decode_plan((11, 3, 11), tiling)
    assert clean(plan.time, 81, 8 * REACH_CELLS + 1).sum() > 10
    assert clean(plan.width, 352, 32 * REACH_CELLS).sum() > 100
    tiled = torch.cat(list(decode_tiles(decoder, latent, tiling)), dim=2)
    assert (tiled - decoder(latent)).abs().max() > 1e-3


@torch.inference_mode()
def test_a_clip_that_fits_in_one_tile_is_decoded_plainly() -> None:
    decoder, latent = make_decoder(reflect=True), torch.randn(1, 8, 3, 4, 3)
    for tiling in (cells(4, 1, 3, 1), UNTILED):
        (chunk,) = decode_tiles(decoder, latent, tiling)
        assert torch.equal(chunk, decoder(latent))


@torch.inference_mode()
def test_chunks_come_one_by_one_and_may_be_empty() -> None:
    decoder, latent, seen = make_decoder(), torch.randn(1, 8, 5, 2, 2), list[tuple[int, int]]()
    stream = decode_tiles(
        decoder,
        latent,
        cells(2, 1, 3, 2),
        accumulate_on=torch.device("cpu"),
        on_tile=lambda done, total: seen.append((done, total)),
    )
    assert next(stream).shape == (1, 3, 0, 64, 64)
    assert seen == [(1, 3)]
    assert [chunk.shape[2] for chunk in stream] == [8, 25]
    assert seen == [(1, 3), (2, 3), (3, 3)]


@torch.inference_mode()
def test_a_bfloat16_decoder_is_blended_in_float32() -> None:
    decoder, latent = make_decoder().bfloat16(), torch.randn(1, 8, 4, 3, 4).bfloat16()
    for tiling in (cells(2, 1, 2, 1), UNTILED):
        assert {chunk.dtype for chunk in decode_tiles(decoder, latent, tiling)} == {torch.float32}


def test_tiles_too_narrow_for_reflection_are_refused_before_decoding() -> None:
    latent = torch.randn(1, 8, 1, 5, 4)
    with pytest.raises(RequestError, match=r"tile_overlap_in_pixels=0 .*Try: tile_overlap_in_pixels=32"):
        decode_tiles(make_decoder(reflect=True), latent, cells(2, 0, 2, 0))
    with torch.inference_mode():
        (chunk,) = decode_tiles(make_decoder(), latent, cells(2, 0, 2, 0))
    assert chunk.shape == (1, 3, 1, 160, 128)


@torch.inference_mode()
def test_encode_moves_tiles_to_the_encoder_and_equals_it_when_one_tile_holds_all() -> None:
    torch.manual_seed(2)
    encoder = VideoEncoder(tiny_config()).bfloat16()
    pixels = torch.rand(1, 3, 17, 64, 160) * 2 - 1
    whole = encoder(pixels.bfloat16())
    assert torch.equal(encode_tiled(encoder, pixels, TileConfig()), whole)
    tiled = encode_tiled(encoder, pixels, cells(4, 2, 3, 2))
    assert tiled.dtype == torch.bfloat16
    assert tiled.shape == whole.shape
    assert (tiled - whole).float().abs().mean() < 0.5 * whole.float().std()


@torch.inference_mode()
def test_encode_raises_short_overlaps_aloud_and_refuses_short_tiles(caplog: pytest.LogCaptureFixture) -> None:
    encoder = VideoEncoder(tiny_config())
    pixels = torch.zeros(1, 3, 33, 64, 160)
    with caplog.at_level(logging.WARNING):
        short = encode_tiled(encoder, pixels, cells(3, 1, 3, 1))
    assert "overlaps raised" in caplog.text
    assert torch.equal(short, encode_tiled(encoder, pixels, cells(3, 2, 3, 2)))
    caplog.clear()
    with pytest.raises(RequestError, match=r"tile_size_in_pixels=64 is too small to encode.*Try: .*=96"):
        encode_tiled(encoder, pixels, cells(2, 1, 3, 1))
    with pytest.raises(RequestError, match=r"tile_size_in_frames=16 is too small to encode.*Try: .*=24"):
        encode_tiled(encoder, pixels, cells(3, 1, 2, 1))
    # Only an axis that is cut needs its overlap.
    assert encode_tiled(encoder, pixels[:, :, :9, :, :64], cells(2, 1, 2, 1)).shape == (1, 8, 2, 2, 2)
    assert not caplog.records
    with pytest.raises(RequestError, match="multiples of 32"):
        encode_tiled(encoder, pixels[..., :50], cells(3, 2, 3, 2))
