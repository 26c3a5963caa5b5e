import math

import pytest
import torch

from diffsynth.nano.world import PALETTE, Description
from tests.standin import StandIn
from training.nano.clips import Scenes, as_uint8, dense_video


def scene(caption: str, *, framed: bool = False, count: int = 1) -> Scenes:
    return Scenes.of([Description.read(caption)] * count, seed=3, framed=framed)


def test_a_seed_means_the_same_clips() -> None:
    first, again, other = (Scenes.draw(3, seed=seed) for seed in (5, 5, 6))
    assert first.captions == again.captions != other.captions
    assert [d.held_out for d in first.descriptions] == [False] * 3
    assert torch.equal(first.video(32, 9), again.video(32, 9))
    assert torch.equal(first.sound(1600), again.sound(1600))
    assert all(d.held_out for d in Scenes.draw(3, seed=5, held_out=True).descriptions)
    assert torch.equal(dense_video(2, 32, 3, seed=1), dense_video(2, 32, 3, seed=1))


def test_a_clip_shows_its_words() -> None:
    clips = scene("a red circle moves left over a blue background, a high beep")
    video = clips.video(64)
    assert video.shape == (1, 3, 25, 64, 64)
    assert video.dtype == torch.float32
    assert video.abs().max() <= 1
    rgb = (video[0] + 1) * 127.5
    torch.testing.assert_close(
        rgb[:, :, 0, 0], torch.tensor(PALETTE["blue"]).float()[:, None].expand(3, 25), atol=8.01, rtol=0
    )
    x, y = (clips.position(torch.tensor([0.0, 0.5]))[0, :, axis] for axis in (0, 1))
    assert x[0] > x[1] and y[0] == y[1]
    for frame, seconds in ((0, 0.0), (12, 0.5)):
        at = clips.position(torch.tensor([seconds]))[0, 0]
        column, row = (int(value * 64) for value in at)
        torch.testing.assert_close(
            rgb[:, frame, row, column], torch.tensor(PALETTE["red"]).float(), atol=8.01, rtol=0
        )


@pytest.mark.parametrize("side", [48, 96])
@pytest.mark.parametrize(
    ("shape", "area"), [("circle", math.pi), ("square", 3.24), ("triangle", 0.75 * 3**0.5 * 1.44)]
)
def test_areas_and_centroids_do_not_depend_on_the_side(shape: str, area: float, side: int) -> None:
    clips = scene(f"a white {shape} bounces in the center over a black background, silence", count=4)
    video = clips.video(side)[:, 0]
    ground = video[:, :1, :1, :1]
    colour = clips.colour[:, :1, None, None]
    cover = (video - ground) / (colour - ground)
    torch.testing.assert_close(
        cover.mean((2, 3)), (area * clips.radius**2)[:, None].expand(4, 25), rtol=0.02, atol=1e-3
    )
    centres = (torch.arange(side) + 0.5) / side
    y = (cover.sum(3) * centres).sum(2) / cover.sum((2, 3))
    torch.testing.assert_close(y, clips.position(torch.arange(25) / 24)[..., 1], rtol=0, atol=0.005)


def test_shapes_stay_in_the_picture() -> None:
    clips = Scenes.draw(300, seed=2)
    x, y = clips.position(torch.arange(25) / 24).unbind(-1)
    slack = clips.radius[:, None] * torch.tensor([[1, 0.9, 1.2 * 3**0.5 / 2]])[0, clips.shape][:, None]
    assert (x - slack).min() > -0.001 and (x + slack).max() < 1.001
    above, below = (
        torch.tensor(v)[clips.shape][:, None] * clips.radius[:, None] for v in ([1, 0.9, 1.2], [1, 0.9, 0.6])
    )
    assert (y - above).min() > -0.005 and (y + below).max() < 1.005


@pytest.mark.parametrize("rate", [16000, 24000])
def test_tones_are_exact_at_any_rate(rate: int) -> None:
    clips = scene("a red circle stands still on the right over a blue background, a middle tone")
    sound = clips.sound(rate, rate)
    assert sound.shape == (1, 2, rate)
    assert sound[0, :, 0].abs().max() == 0
    period = rate // 100  # every pitch repeats after 10 ms
    torch.testing.assert_close(sound[..., period:], sound[..., :-period], atol=1e-4, rtol=0)
    left, right = sound[0].square().sum(1).sqrt()
    x = clips.position(torch.zeros(1))[0, 0, 0]
    assert torch.atan2(right, left) / (math.pi / 2) == pytest.approx(float(x), abs=1e-3)


def test_beeps_pulse_and_pings_begin_at_bounces() -> None:
    beep = scene("a red circle moves up in the center over a blue background, a low beep").sound(16000)[0, 0]
    on = beep.reshape(8, 2000).square().mean(1)
    assert torch.equal(on > 1e-3, torch.tensor([True, False] * 4))
    clips = scene("a red circle bounces in the center over a blue background, a low ping")
    ping = clips.sound(16000)[0].norm(dim=0)
    bounces = [float((n - clips.phase) * clips.period) for n in range(1, 5)]
    assert ping[: int(bounces[0] * 16000)].abs().max() == 0
    for bounce in [b for b in bounces if b < 0.95]:
        at = int(bounce * 16000)
        assert ping[at : at + 400].max() > 0.25
        low = clips.position(torch.tensor([bounce]))[0, 0, 1]
        assert low == pytest.approx(float(clips.start[0, 1]), abs=1e-3)


def test_silence_and_frames() -> None:
    assert not scene("a red circle moves up in the center over a blue background, silence").sound(800).any()
    plain = scene("a red circle moves up in the center over a blue background, silence")
    framed = scene("a red circle moves up in the center over a blue background, silence", framed=True)
    assert framed.captions[0] == f"framed {plain.captions[0]}"
    border = framed.video(100, 1)[0, :, 0, :8]
    assert border.min() > 0.9
    torch.testing.assert_close(
        framed.video(100, 1)[..., 10:90, 10:90], plain.video(100, 1)[..., 10:90, 10:90]
    )


def test_dense_clips_differ_and_move() -> None:
    video = dense_video(6, 64, 9, seed=0)
    assert video.shape == (6, 3, 9, 64, 64)
    assert video.abs().max() <= 1
    assert ((video[:, :, 0] - video[:, :, -1]).abs().amax((1, 2, 3)) > 0.1).float().mean() > 0.6


def test_every_device_draws_the_same_clips() -> None:
    clips = Scenes.draw(4, seed=7)
    with StandIn(capacity_bytes=10**9, seed=1, strict_dtypes=False):
        there = Scenes.draw(4, seed=7, device="standin")
        video, sound = there.video(32, 5).cpu(), there.sound(1600).cpu()
        whole = as_uint8(there.video(32, 5)).cpu()
        dense = dense_video(3, 32, 5, seed=2, device="standin").cpu()
    torch.testing.assert_close(video, clips.video(32, 5))
    torch.testing.assert_close(sound, clips.sound(1600))
    assert torch.equal(whole, as_uint8(clips.video(32, 5)))
    torch.testing.assert_close(dense, dense_video(3, 32, 5, seed=2))
