"""Objective and regions, against hand computations."""

import pytest
import torch

from diffsynth.errors import RequestError
from diffsynth.training.conditions import Condition, draw_mask, given_tokens
from diffsynth.training.objective import masked_loss, noisy, velocity

VIDEO_SHAPE = (128, 3, 2, 4)
AUDIO_SHAPE = (8, 6, 16)


def test_noise_and_velocity_lead_back() -> None:
    clean, noise = torch.randn(2, 5, 3), torch.randn(2, 5, 3)
    timesteps = torch.tensor([0.0, 0.3, 1.0, 0.7, 0.0])[None, :, None]
    x = noisy(clean, noise, timesteps)
    assert torch.equal(x[:, 0], clean[:, 0])
    assert torch.equal(x[:, 2], noise[:, 2])
    torch.testing.assert_close(x - timesteps * velocity(clean, noise), clean)


def test_loss_is_the_mean_over_generated_tokens() -> None:
    predicted = torch.zeros(2, 4, 2)
    target = torch.tensor([[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]])[..., None].expand(2, 4, 2)
    mask = torch.tensor([[0.0, 1.0, 1.0, 0.0], [0.0, 0.0, 0.0, 1.0]])[..., None]
    torch.testing.assert_close(masked_loss(predicted, target, mask), torch.tensor([6.5, 64.0]))
    assert masked_loss(predicted, target, torch.zeros(2, 4, 1)).tolist() == [0, 0]


def test_loss_of_bf16_is_taken_in_float32() -> None:
    predicted = torch.full((1, 1, 1), 256.0, dtype=torch.bfloat16)
    loss = masked_loss(predicted, torch.full((1, 1, 1), 255.5), torch.ones(1, 1, 1))
    assert loss.item() == 0.25


def tokens_of(condition: Condition, shape: tuple[int, ...]) -> list[int]:
    return given_tokens(condition, shape).nonzero().flatten().tolist()


@pytest.mark.parametrize(
    ("condition", "shape", "given"),
    [
        (Condition(type="first_frame"), VIDEO_SHAPE, range(8)),
        (Condition(type="prefix", count=2), VIDEO_SHAPE, range(16)),
        (Condition(type="suffix", count=1), VIDEO_SHAPE, range(16, 24)),
        (Condition(type="prefix", modality="audio", count=2), AUDIO_SHAPE, range(2)),
        (Condition(type="suffix", modality="audio", count=4), AUDIO_SHAPE, range(2, 6)),
        (
            Condition(type="spatial_crop", crop=(32, 32, 64, 96)),
            VIDEO_SHAPE,
            (5, 6, 13, 14, 21, 22),
        ),
    ],
)
def test_regions(condition: Condition, shape: tuple[int, ...], given: range | tuple[int, ...]) -> None:
    condition.check()
    assert tokens_of(condition, shape) == list(given)
    mask = draw_mask([condition], shape, 2, torch.Generator())
    kept = torch.ones(mask.shape[1])
    kept[list(given)] = 0
    assert torch.equal(mask, kept.expand(2, -1)[..., None])
    errors = torch.arange(mask.shape[1], dtype=torch.float32)
    others = [float(i) ** 2 for i in range(mask.shape[1]) if i not in given]
    loss = masked_loss(errors.expand(2, -1)[..., None], torch.zeros(2, mask.shape[1], 1), mask)
    torch.testing.assert_close(loss, torch.tensor([sum(others) / len(others)] * 2))


def test_probability_is_drawn_per_sample() -> None:
    half = Condition(type="first_frame", probability=0.5)
    mask = draw_mask([half], VIDEO_SHAPE, 1000, torch.Generator().manual_seed(1))
    given = (mask[:, 0, 0] == 0).float().mean()
    assert 0.45 < float(given) < 0.55
    assert torch.equal(mask[:, :8].amin(1), mask[:, :8].amax(1))
    assert bool((mask[:, 8:] == 1).all())


def test_nothing_given_is_one_expanded_value() -> None:
    mask = draw_mask([], VIDEO_SHAPE, 3, torch.Generator())
    assert mask.shape == (3, 24, 1)
    assert mask.stride(0) == mask.stride(1) == 0


@pytest.mark.parametrize(
    "condition",
    [
        Condition(type="last_frame"),
        Condition(type="first_frame", modality="audio"),
        Condition(type="prefix", count=0),
        Condition(type="prefix", probability=1.1),
        Condition(type="spatial_crop", crop=(0, 0, 33, 32)),
        Condition(type="spatial_crop"),
    ],
)
def test_impossible_conditions(condition: Condition) -> None:
    with pytest.raises(RequestError):
        condition.check()


@pytest.mark.parametrize(
    "condition",
    [
        Condition(type="prefix", count=3),
        Condition(type="spatial_crop", crop=(0, 0, 96, 32)),
    ],
)
def test_conditions_that_do_not_fit_a_clip(condition: Condition) -> None:
    with pytest.raises(RequestError):
        given_tokens(condition, VIDEO_SHAPE)
