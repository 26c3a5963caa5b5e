import math

import pytest
import torch

from diffsynth.models.ltx2.modulation import (
    AdaLNSingle,
    Modulation,
    add_residual,
    distinct_timesteps,
    modulate,
    sinusoid,
)


def test_sinusoid_begins_with_cosines() -> None:
    values = sinusoid(torch.tensor([0.0, 1.0]))
    assert values.shape == (2, 256)
    torch.testing.assert_close(values[0], torch.cat([torch.ones(128), torch.zeros(128)]))
    lowest = 10000 ** (-127 / 128)
    expected = torch.tensor([math.cos(1), math.cos(lowest), math.sin(1), math.sin(lowest)])
    torch.testing.assert_close(values[1, [0, 127, 128, 255]], expected)


def test_one_common_value_is_one_row() -> None:
    distinct = distinct_timesteps(torch.full((2, 5, 1), 0.7))
    assert distinct.values.shape == (1,)
    assert distinct.index is None


@pytest.mark.parametrize("shape", [(2, 1, 1), (2, 5, 1), (2, 5)])
def test_expanded_timesteps_are_one_row_per_sample(shape: tuple[int, ...]) -> None:
    per_sample = torch.tensor([0.2, 0.7])
    given = per_sample.view(2, *([1] * (len(shape) - 1))).expand(shape)
    distinct = distinct_timesteps(given)
    assert torch.equal(distinct.values, per_sample)
    assert distinct.index is None


def test_a_scalar_expanded_over_batch_and_tokens_is_one_row() -> None:
    distinct = distinct_timesteps(torch.tensor(0.3).expand(4, 5, 1))
    assert torch.equal(distinct.values, torch.tensor([0.3]))


def test_per_token_values_come_back_through_the_index() -> None:
    timesteps = torch.tensor([[0.0, 0.5, 0.5], [0.9, 0.0, 0.9]])[..., None]
    distinct = distinct_timesteps(timesteps)
    assert distinct.values.shape == (3,)
    assert distinct.index is not None
    assert torch.equal(distinct.values[distinct.index], timesteps[..., 0])


def test_rows_equal_the_plain_form() -> None:
    torch.manual_seed(0)
    network, table = AdaLNSingle(8, 3), torch.randn(3, 8)
    timesteps = torch.tensor([[0.0, 0.5, 0.5], [0.9, 0.0, 0.9]])
    distinct = distinct_timesteps(timesteps)
    modulation = Modulation(network(distinct.values * 1000, torch.float32)[0], distinct.index)
    plain = network(timesteps.flatten() * 1000, torch.float32)[0].view(2, 3, 3, 8)
    torch.testing.assert_close(modulation.expand(), plain.flatten(2))
    for row in range(3):
        torch.testing.assert_close(modulation.row(row, table[row]), plain[:, :, row] + table[row])
    torch.testing.assert_close(modulation.row(1, table[1], one_plus=True), plain[:, :, 1] + table[1] + 1)


def test_rows_of_a_float32_table_keep_the_compute_dtype() -> None:
    modulation = Modulation(torch.zeros(1, 2, 4, dtype=torch.bfloat16))
    row = modulation.row(0, torch.ones(4))
    assert row.dtype is torch.bfloat16
    assert row.shape == (1, 1, 4)


def test_modulate_leaves_its_input_alone() -> None:
    x = torch.ones(1, 2, 3)
    assert (modulate(x, torch.full((1, 1, 3), 2.0), torch.ones(1, 1, 3)) == 3).all()
    assert (x == 1).all()


@pytest.mark.parametrize("gate", [None, torch.full((1, 1, 3), 0.5)])
def test_residual_is_in_place_only_without_grad(gate: torch.Tensor | None) -> None:
    x, update = torch.ones(1, 2, 3), torch.full((1, 2, 3), 2.0)
    expected = torch.full_like(x, 3.0 if gate is None else 2.0)
    added = add_residual(x, update, gate)
    assert torch.equal(added, expected)
    assert (x == 1).all()
    with torch.no_grad():
        assert add_residual(x, update, gate) is x
    assert torch.equal(x, expected)
