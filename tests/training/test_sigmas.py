"""Noise levels against the values of the official trainer."""

import pytest
import torch

from diffsynth.errors import RequestError
from diffsynth.training.sigmas import (
    SigmaConfig,
    length_shift,
    shifted_logit_normal,
    stretched_sigmoid,
)

NORMALS = (-3.0, -2.0, -1.0, 0.0, 1.0, 2.0)
TABLE = {
    126: (0.6285, (0.04836, 0.09105, 0.33275, 0.61928, 0.83517, 0.94875)),
    1024: (0.95, (0.06353, 0.11587, 0.39484, 0.68032, 0.86892, 0.96035)),
    4096: (2.05, (0.15073, 0.22644, 0.59305, 0.82619, 0.93673, 0.98185)),
    14080: (5.625, (0.49647, 0.42793, 0.78832, 0.92394, 0.97425, 0.99282)),
}


@pytest.mark.parametrize("num_tokens", TABLE)
def test_table(num_tokens: int) -> None:
    shift, levels = TABLE[num_tokens]
    assert length_shift(num_tokens) == pytest.approx(shift, abs=1e-4)
    got = stretched_sigmoid(torch.tensor(NORMALS), num_tokens)
    torch.testing.assert_close(got, torch.tensor(levels), atol=1.1e-5, rtol=0)


def test_draws_come_in_their_order() -> None:
    generator = torch.Generator().manual_seed(5)
    normals, uniforms, choice = (
        torch.randn(64, generator=generator),
        torch.rand(64, generator=generator),
        torch.rand(64, generator=generator),
    )
    wanted = torch.where(choice < 0.1, 1e-3 + (1 - 1e-3) * uniforms, stretched_sigmoid(normals, 300))
    assert torch.equal(shifted_logit_normal(64, 300, torch.Generator().manual_seed(5)), wanted)
    assert 0 < int((choice < 0.1).sum()) < 64


def test_every_level_is_trained() -> None:
    levels = shifted_logit_normal(20000, 4096, torch.Generator().manual_seed(0))
    assert 0 <= float(levels.min()) < 0.02
    assert 0.999 < float(levels.max()) <= 1


def test_uniform() -> None:
    draw = SigmaConfig(sampler="uniform", low=0.25, high=0.5).make()
    levels = draw(1000, 4096, torch.Generator().manual_seed(0))
    assert float(levels.min()) >= 0.25
    assert float(levels.max()) <= 0.5
    assert float(levels.mean()) == pytest.approx(0.375, abs=0.01)


@pytest.mark.parametrize(
    "config",
    [
        SigmaConfig(sampler="normal"),
        SigmaConfig(std=0.0),
        SigmaConfig(sampler="uniform", low=0.5, high=0.5),
        SigmaConfig(uniform_share=1.5),
    ],
)
def test_impossible(config: SigmaConfig) -> None:
    with pytest.raises(RequestError):
        config.make()
