import pytest
import torch
from torch import Tensor

from diffsynth.models.ltx2.rope import (
    GridPrecision,
    RopeLayout,
    RopeTable,
    frequency_grid,
    interval_fractions,
    rope_angles,
    rope_table,
    rotate,
)


def vectors(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, 4, 6, 8, generator=torch.Generator().manual_seed(1)).to(dtype)


def table(layout: RopeLayout = RopeLayout.SPLIT, dtype: torch.dtype = torch.float32) -> RopeTable:
    fractions = torch.linspace(0, 1, 6)[None, :, None]
    return rope_table(fractions, width=32, heads=4, layout=layout, dtype=dtype)


def test_grid_runs_from_half_pi_to_theta_half_pi() -> None:
    grid = frequency_grid(4096, 3, theta=100.0)
    assert grid.shape == (682,)
    assert grid.dtype is torch.float32
    torch.testing.assert_close(grid[[0, -1]], torch.tensor([torch.pi / 2, 100 * torch.pi / 2]))


def test_float32_grid_differs_from_float64_grid() -> None:
    assert not torch.equal(frequency_grid(2048, 1), frequency_grid(2048, 1, precision=GridPrecision.FLOAT32))


def test_fractions_are_midpoints_over_maximum() -> None:
    positions = torch.tensor([[[[0.0, 1.0], [1.0, 9.0]], [[0.0, 32.0], [32.0, 64.0]]]])
    fractions = interval_fractions(positions, (20, 2048))
    torch.testing.assert_close(fractions, torch.tensor([[[0.5 / 20, 16 / 2048], [5 / 20, 48 / 2048]]]))


def test_angles_are_flattened_frequency_major() -> None:
    angles = rope_angles(torch.tensor([[[1.0, 0.5, 0.0]]]), torch.tensor([1.0, 10.0]))
    torch.testing.assert_close(angles, torch.tensor([[[1.0, 0.0, -1.0, 10.0, 0.0, -10.0]]]))


def test_missing_frequencies_are_padded_in_front_with_no_rotation() -> None:
    padded = rope_table(torch.rand(1, 5, 3), width=32, heads=2)  # 16 pairs, 3 axes x 5 frequencies
    assert padded.cos.shape == padded.sin.shape == (1, 2, 5, 8)
    assert (padded.cos[:, 0, :, 0] == 1).all()
    assert (padded.sin[:, 0, :, 0] == 0).all()
    assert (padded.sin[:, 0, :, 1:] != 0).any()


@pytest.mark.parametrize("layout", RopeLayout)
def test_each_pair_turns_by_its_angle(layout: RopeLayout) -> None:
    x, turn = vectors(), table(layout)
    turned = rotate(x, turn)
    half = x.shape[-1] // 2
    first = slice(0, half) if layout is RopeLayout.SPLIT else slice(0, None, 2)
    second = slice(half, None) if layout is RopeLayout.SPLIT else slice(1, None, 2)
    expected = torch.complex(x[..., first], x[..., second]) * torch.complex(turn.cos, turn.sin)
    torch.testing.assert_close(turned[..., first], expected.real)
    torch.testing.assert_close(turned[..., second], expected.imag)


@pytest.mark.parametrize("layout", RopeLayout)
def test_gradient_path_gives_the_same_numbers_and_flows(layout: RopeLayout) -> None:
    x = vectors()
    with torch.no_grad():
        expected = rotate(x, table(layout))
    x.requires_grad_()
    turned = rotate(x, table(layout))
    torch.testing.assert_close(turned, expected, rtol=0, atol=1e-6)
    torch.autograd.backward(turned.sum())
    assert x.grad is not None
    assert x.grad.abs().min() > 0


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("table_dtype", [torch.float32, torch.bfloat16])
def test_bf16_vectors_stay_bf16_and_unchanged(grad: bool, table_dtype: torch.dtype) -> None:
    x = vectors(torch.bfloat16)
    before = x.clone()
    with torch.set_grad_enabled(grad):
        turned = rotate(x, table(dtype=table_dtype))
    assert turned.dtype is torch.bfloat16
    assert torch.equal(x, before)
    torch.testing.assert_close(turned.float(), rotate(x.float(), table()), rtol=0, atol=0.05)


def test_result_lies_in_memory_as_the_input_does() -> None:
    x = vectors().transpose(1, 2).contiguous().transpose(1, 2)
    with torch.no_grad():
        assert rotate(x, table()).stride() == x.stride()
