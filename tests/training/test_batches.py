"""Which samples make up which batch."""

import torch

from diffsynth.training.batches import BatchPlan, random_source
from diffsynth.training.samples import SampleEntry


def entries(*rows: int) -> list[SampleEntry]:
    return [
        SampleEntry(
            file=f"{number}.safetensors",
            source="clip.mp4",
            caption="a clip",
            video_shape=(128, 2, r, 2),
            audio_shape=None,
            fps=24.0,
        )
        for number, r in enumerate(rows)
    ]


def test_every_sample_once_per_epoch_with_its_like() -> None:
    rows = (2, 3, 2, 2, 3, 2, 2)
    plan = BatchPlan(entries(*rows), batch_size=2, seed=1)
    assert plan.batches_per_epoch == 4
    epochs = [[plan.batch(epoch * 4 + place) for place in range(4)] for epoch in range(3)]
    for epoch in epochs:
        assert sorted(index for batch in epoch for index in batch) == list(range(7))
        assert all(len({rows[index] for index in batch}) == 1 for batch in epoch)
    assert epochs[0] != epochs[1] != epochs[2]


def test_a_batch_does_not_depend_on_those_before() -> None:
    forward = BatchPlan(entries(*[2] * 9), batch_size=2, seed=1)
    in_order = [forward.batch(number) for number in range(15)]
    backward = BatchPlan(entries(*[2] * 9), batch_size=2, seed=1)
    assert [backward.batch(number) for number in reversed(range(15))] == in_order[::-1]
    other = BatchPlan(entries(*[2] * 9), batch_size=2, seed=2)
    assert [other.batch(number) for number in range(15)] != in_order


def test_sources_are_told_apart_by_name() -> None:
    draws = {
        (seed, name, number): float(torch.rand(1, generator=random_source(seed, number, name)))
        for seed in (1, 2)
        for name in ("video noise", "audio noise")
        for number in (0, 1)
    }
    assert len(set(draws.values())) == 8
    assert draws[1, "video noise", 0] == float(torch.rand(1, generator=random_source(1, 0, "video noise")))
