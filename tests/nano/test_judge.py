"""Drawn clips are judged right, and an attribute that is changed is judged wrong."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from diffsynth.nano.judge import ATTRIBUTES, Summary, is_framed, judge, judge_all, psnr, read_sound
from diffsynth.nano.world import Description, held_out_descriptions
from training.nano.clips import Scenes, as_uint8

RATE = 24000
SIDEWAYS = "a red circle moves left over a blue background, a high beep"
RESTING = "a red circle stands still on the left over a blue background, a low tone"
BOUNCING = "a white triangle bounces on the right over a green background, a middle ping"


def clip(caption: str, side: int = 64, seed: int = 0) -> tuple[Tensor, Tensor, Description]:
    scenes = Scenes.of([Description.read(caption)], seed=seed)
    return as_uint8(scenes.video(side))[0], scenes.sound(24240, RATE)[0], scenes.descriptions[0]


def wrong(video: Tensor, sound: Tensor, description: Description) -> set[str]:
    verdict = judge(video, sound, RATE, description)
    return {name for name in ATTRIBUTES if getattr(verdict, name) is False}


@pytest.mark.parametrize(
    ("side", "count"),
    [
        (64, 32),
        (128, 104),
        (192, 8),
        (256, 16),
        pytest.param(256, 112, marks=pytest.mark.slow),
        pytest.param(512, 16, marks=pytest.mark.slow),
    ],
)
def test_held_out_clips_are_judged_right(side: int, count: int) -> None:
    every = held_out_descriptions(count, seed=side)
    verdicts = []
    for first in range(0, count, 8):
        scenes = Scenes.of(every[first : first + 8], seed=first)
        sounds = scenes.sound(24240, RATE)
        verdicts += [
            judge(video, sound, RATE, description)
            for video, sound, description in zip(
                as_uint8(scenes.video(side)), sounds, scenes.descriptions, strict=True
            )
        ]
    summary = Summary.of(verdicts)
    assert summary.judged["colour"] == count
    assert all(verdict.right for verdict in verdicts)
    assert set(summary.percent.values()) == {100.0}


@pytest.mark.parametrize(
    ("attribute", "change"),
    [
        ("shape", {"shape": "square"}),
        ("shape", {"shape": "triangle"}),
        ("colour", {"colour": "orange"}),
        ("background", {"background": "purple"}),
        ("motion", {"motion": "right"}),
        ("sound", {"sound": "tone"}),
        ("pitch", {"pitch": "middle"}),
    ],
)
def test_a_word_that_is_not_shown_is_wrong(attribute: str, change: dict[str, str]) -> None:
    video, sound, described = clip(SIDEWAYS)
    assert wrong(video, sound, described) == set()
    assert wrong(video, sound, replace(described, **change)) == {attribute}


@pytest.mark.parametrize("shape", ["circle", "square", "triangle"])
@pytest.mark.parametrize("other", ["circle", "square", "triangle"])
def test_shapes_are_told_apart_after_noise_and_blur(shape: str, other: str) -> None:
    video, sound, described = clip(
        f"a red {shape} moves up in the center over a blue background, silence", 128
    )
    soft = torch.nn.functional.avg_pool2d(video.float().permute(0, 3, 1, 2), 7, 1, 3)
    soft += torch.randn(soft.shape, generator=torch.Generator().manual_seed(0)) * 12
    damaged = soft.clamp(0, 255).round().to(torch.uint8).permute(0, 2, 3, 1)
    assert wrong(damaged, sound, replace(described, shape=other)) == (set() if shape == other else {"shape"})


def test_a_blob_is_no_shape() -> None:
    video, sound, described = clip(RESTING, 64)
    noise = torch.randint(0, 256, video.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert "shape" in wrong(noise, sound, described)
    stretched = torch.nn.functional.interpolate(video.permute(0, 3, 1, 2).float(), (64, 160))[..., 48:112]
    assert "shape" in wrong(stretched.byte().permute(0, 2, 3, 1), sound, described)


def test_motions_and_places_that_differ_from_the_caption_are_wrong() -> None:
    video, sound, described = clip(RESTING)
    assert wrong(video, sound, described) == set()
    assert wrong(video.flip(2), sound, described) == {"place", "pan"}
    still, _, _ = clip(SIDEWAYS)
    assert "motion" in wrong(still[:1].expand_as(still), sound, Description.read(SIDEWAYS))
    for motion, opposite in (("up", "down"), ("down", "up")):
        moving, quiet, said = clip(f"a red circle moves {motion} on the left over a blue background, silence")
        assert wrong(moving, quiet, said) == set()
        assert wrong(moving, quiet, replace(said, motion=opposite)) == {"motion"}
        assert wrong(moving.flip(0), quiet, said) == {"motion"}
        assert wrong(moving, quiet, replace(said, motion="bounce")) == {"motion"}
        assert wrong(moving, quiet, replace(said, motion="still")) == {"motion"}


def test_an_empty_picture_is_wrong_but_for_its_background() -> None:
    video, sound, described = clip(RESTING)
    empty = video[:, :1, :1].expand_as(video)
    assert wrong(empty, sound, described) == {"colour", "shape", "motion", "place", "pan"}


def test_a_sound_that_does_not_follow_is_wrong() -> None:
    for caption in (SIDEWAYS, RESTING):
        video, sound, described = clip(caption)
        mono = sound.norm(dim=0, keepdim=True) / 2**0.5 * sound.sum(0, keepdim=True).sign()
        assert wrong(video, mono.expand(2, -1), described) == {"pan"}
        assert wrong(video, sound.flip(0), described) == {"pan"}


def test_pings_away_from_the_bounces_are_wrong() -> None:
    video, sound, described = clip(BOUNCING)
    assert wrong(video, sound, described) == set()
    late = torch.nn.functional.pad(sound, (int(0.15 * RATE), 0))[:, : sound.shape[1]]
    assert wrong(video, late, described) == {"sync"}
    assert wrong(video, sound + late, described) >= {"sync"}
    first = int(0.5 * RATE)
    assert wrong(video, torch.cat((sound[:, :first], 0 * sound[:, first:]), 1), described) == {"sync"}
    _, tone, said = clip(BOUNCING.replace("ping", "tone"))
    assert "sound" in wrong(video, tone, described)
    assert judge(video, tone, RATE, said).sync is None


def test_silence_is_heard() -> None:
    video, sound, described = clip(RESTING)
    assert wrong(video, 0 * sound, described) == {"sound", "pitch", "pan"}
    quiet = replace(described, sound="silence", pitch=None)
    assert wrong(video, 0 * sound, quiet) == set()
    assert wrong(video, sound, quiet) == {"sound"}
    verdict = judge(video, None, RATE, described)
    assert (verdict.sound, verdict.pitch, verdict.pan, verdict.sync) == (None,) * 4


def test_noise_is_no_sound_of_this_world() -> None:
    _, beep, _ = clip(SIDEWAYS)
    rough = beep.clone()
    rough[:, 3100:5900] = beep[:, :2800]  # the first pause is filled
    assert read_sound(rough, RATE).kind is None


def test_frames_and_first_frames() -> None:
    described = Description.read(BOUNCING)
    framed = Scenes.of([described], seed=1, framed=True)
    video, sound = as_uint8(framed.video(128))[0], framed.sound(16000)[0]
    assert is_framed(video)
    assert not is_framed(clip(BOUNCING)[0])
    assert judge(video, sound, 16000, described, framed=True).right
    assert not judge(video, sound, 16000, described).right
    assert psnr(video, video) == float("inf")
    assert psnr(video, (video.int() + 1).clamp(max=255).byte()) == pytest.approx(48.1, abs=0.1)


def test_a_summary_counts_what_applies() -> None:
    scenes = Scenes.of([Description.read(text) for text in (SIDEWAYS, RESTING, BOUNCING)], seed=2)
    videos, sounds = as_uint8(scenes.video(64)), scenes.sound(16000)
    videos[0] = videos[0].flip(1)
    videos[1] = videos[1].flip(2)
    summary = judge_all(videos, sounds, 16000, scenes.descriptions)
    assert dict(summary.judged) == dict.fromkeys(ATTRIBUTES, 3) | {"place": 2, "sync": 1}
    assert summary.percent["place"] == 50.0
    assert summary.percent["pan"] == pytest.approx(200 / 3)
    assert "place 50" in str(summary)
    assert "pan" not in judge_all(videos, None, 16000, scenes.descriptions).percent
