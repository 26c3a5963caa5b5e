import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffsynth.conditioning import tokens
from diffsynth.errors import RequestError

GRID = (3, 2, 4)


@settings(deadline=None, max_examples=20)
@given(st.tuples(*(st.integers(1, 4) for _ in range(5))))
def test_video_latents_survive_the_round_trip(shape: tuple[int, int, int, int, int]) -> None:
    latent = torch.arange(torch.Size(shape).numel()).reshape(shape)
    folded = tokens.patchify(latent)
    b, c, f, h, w = shape
    assert folded.shape == (b, f * h * w, c)
    assert torch.equal(tokens.unpatchify(folded, shape), latent)
    assert torch.equal(folded[-1, (f - 1) * h * w + (h - 1) * w], latent[-1, :, f - 1, h - 1, 0])


@settings(deadline=None, max_examples=20)
@given(st.tuples(*(st.integers(1, 4) for _ in range(4))))
def test_audio_latents_survive_the_round_trip(shape: tuple[int, int, int, int]) -> None:
    latent = torch.arange(torch.Size(shape).numel()).reshape(shape)
    folded = tokens.patchify(latent)
    b, c, t, m = shape
    assert folded.shape == (b, t, c * m)
    assert torch.equal(tokens.unpatchify(folded, shape), latent)


def test_masks_unpatchify_with_the_shape_of_their_latent() -> None:
    assert tokens.unpatchify(torch.ones(2, 24, 1), (2, 8, *GRID)).shape == (2, 1, *GRID)
    assert tokens.unpatchify(torch.ones(2, 5, 1), (2, 8, 5, 16)).shape == (2, 1, 5, 1)


def test_anything_else_is_no_latent() -> None:
    with pytest.raises(ValueError, match="not 3"):
        tokens.patchify(torch.zeros(1, 2, 3))


@pytest.mark.parametrize(
    ("size", "grid"), [((121, 512, 768), (16, 16, 24)), ((1, 32, 64), (1, 1, 2)), ((9, 64, 64), (2, 2, 2))]
)
def test_video_sizes(size: tuple[int, int, int], grid: tokens.Grid) -> None:
    assert tokens.video_latent_shape(*size) == grid


def test_less_than_a_cell_is_refused() -> None:
    with pytest.raises(RequestError, match="9 frames of 64x16"):
        tokens.video_latent_shape(9, 16, 64)


@pytest.mark.parametrize(
    ("frames", "fps", "latents"), [(121, 24, 126), (121, 25, 121), (49, 10, 123), (9, 8, 28), (1, 60, 0)]
)
def test_audio_lengths(frames: int, fps: float, latents: int) -> None:
    assert tokens.audio_latent_frames(frames, fps) == latents


def test_the_first_video_frame_stands_alone() -> None:
    positions = tokens.video_positions(GRID, 24.0, batch=2)
    assert positions.shape == (2, 3, 24, 2)
    assert positions.dtype == torch.float32
    frames = (positions[0, 0, ::8] * 24).round()
    assert frames.tolist() == [[0, 1], [1, 9], [9, 17]]
    assert positions[1, 1, 4].tolist() == [32, 64]
    assert positions[1, 2, 3].tolist() == [96, 128]


def test_audio_and_video_share_one_clock() -> None:
    audio = tokens.audio_positions(126)
    assert audio[0, 0, :3].flatten().tolist() == pytest.approx([0, 0.01, 0.01, 0.05, 0.05, 0.09])
    video = tokens.video_positions((16, 1, 1), 24.0)
    assert abs(audio.max() - video[:, 0].max()) < 0.05


def test_shifted_audio_is_the_rest_of_a_longer_one() -> None:
    assert torch.equal(tokens.audio_positions(4, shift=3), tokens.audio_positions(7)[:, :, 3:])
    assert tokens.audio_positions(1, causal=False)[0, 0, 0].tolist() == pytest.approx([0, 0.04])


def test_audio_of_other_scales() -> None:
    audio = tokens.audio_positions(2, mel_per_latent=8, mel_hop=240, sample_rate_hz=24000)
    assert audio[0, 0].tolist() == [pytest.approx([0, 0.01]), pytest.approx([0.01, 0.09])]


@pytest.mark.parametrize(
    ("index", "one_frame", "frames"),
    [
        (16, True, [[16, 17], [24, 25]]),
        (16, False, [[16, 24], [24, 32]]),
        (0, True, [[0, 1], [1, 2]]),
        (0, False, [[0, 1], [1, 9]]),
    ],
)
def test_keyframes_in_time(index: int, one_frame: bool, frames: list[list[int]]) -> None:
    positions = tokens.keyframe_positions((2, 1, 1), 24.0, index, one_frame=one_frame)
    assert (positions[0, 0] * 24).round().tolist() == frames


def test_a_reference_spans_the_area_and_the_time_of_the_target() -> None:
    target = tokens.video_positions((3, 4, 4), 24.0)
    half = tokens.reference_positions((3, 2, 2), 24.0, downscale_factor=2)
    assert torch.equal(half[0, 1:].amax((1, 2)), target[0, 1:].amax((1, 2)))
    sparse = tokens.reference_positions((2, 4, 4), 24.0, temporal_scale_factor=2)
    assert sparse[0, 0].max().item() == pytest.approx(target[0, 0].max().item())
    assert sparse.min() == 0
    assert tokens.reference_frames(17, 2) == [0, 1, 3, 5, 7, 9, 11, 13, 15]
    assert tokens.reference_frames(17, 1) == list(range(17))
    assert tokens.reference_frames(1, 4) == [0]


def test_a_reference_voice_ends_before_the_beginning() -> None:
    positions = tokens.reference_audio_positions(5, batch=2)
    assert positions.shape == (2, 1, 5, 2)
    assert positions.max().item() == pytest.approx(-0.04)
    assert torch.allclose(positions.diff(dim=2), tokens.audio_positions(5).diff(dim=2), atol=1e-6)


@pytest.mark.parametrize(("index", "resolved"), [(0, 0), (8, 8), (-1, 8), (-9, 0)])
def test_frame_indexes_from_the_end(index: int, resolved: int) -> None:
    assert tokens.resolve_frame_index(index, 9) == resolved


@pytest.mark.parametrize("index", [9, -10])
def test_frame_indexes_outside_the_clip(index: int) -> None:
    with pytest.raises(RequestError, match=f"frame index {index} is outside the 9 frames"):
        tokens.resolve_frame_index(index, 9)
