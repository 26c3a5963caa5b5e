import pytest
import torch
from torch import Tensor

from diffsynth.lora import LoraUpdate, add_updates_, dequantise, fuse, fuse_bias, fuse_scaled


def update(shape: tuple[int, int], seed: int, rank: int = 3, scale: float = 2.0) -> LoraUpdate:
    generator = torch.Generator().manual_seed(seed)
    down = torch.randn(rank, shape[1], generator=generator).bfloat16()
    up = (torch.randn(shape[0], rank, generator=generator) * 0.1).bfloat16()
    return LoraUpdate(down=down, up=up, scale=scale)


def product(item: LoraUpdate) -> Tensor:
    assert item.down is not None
    assert item.up is not None
    return item.scale * item.up.double() @ item.down.double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_rounding_at_the_end(dtype: torch.dtype) -> None:
    weight = torch.randn(16, 24, generator=torch.Generator().manual_seed(0)).to(dtype)
    first, second = update((16, 24), 1), update((16, 24), 2, rank=5, scale=1.0)
    exact = weight.double() + 0.8 * product(first) - 0.35 * product(second)
    result = fuse(weight, [(first, 0.8), (second, -0.35)])
    assert result.dtype == dtype
    # Half a unit in the last place, and a little for float32 itself.
    allowed = torch.finfo(dtype).eps * exact.abs() / 2 + 2e-6
    assert torch.all((result.double() - exact).abs() <= allowed)


def test_the_base_is_not_touched_and_the_dtype_can_be_chosen() -> None:
    weight = torch.randn(4, 6)
    before = weight.clone()
    result = fuse(weight, [(update((4, 6), 1), 1.0)], dtype=torch.bfloat16)
    assert result.dtype == torch.bfloat16
    assert torch.equal(weight, before)


def test_add_updates_works_in_place_and_only_in_float32() -> None:
    weight = torch.zeros(4, 6)
    item = update((4, 6), 1)
    assert add_updates_(weight, [(item, 1.0)]) is weight
    torch.testing.assert_close(weight, product(item).float())
    with pytest.raises(ValueError, match="float32"):
        add_updates_(weight.bfloat16(), [(item, 1.0)])


def test_integer_weights_are_refused() -> None:
    with pytest.raises(ValueError, match="dequantised"):
        fuse(torch.zeros(4, 6, dtype=torch.int8), [(update((4, 6), 1), 1.0)])


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_plain_fp8_saturates_instead_of_turning_into_nan(dtype: torch.dtype) -> None:
    weight = torch.full((4, 6), 400.0).to(dtype)
    item = LoraUpdate(weight_diff=torch.full((4, 6), 1e6))
    result = fuse(weight, [(item, 1.0)])
    assert result.dtype == dtype
    assert torch.equal(result.float(), torch.full((4, 6), torch.finfo(dtype).max))


@pytest.mark.parametrize("scale_shape", [(), (1,), (16, 1)])
def test_scaled_fp8_is_requantised_with_a_new_scale(scale_shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    scale = torch.full(scale_shape, 0.003)
    weight = (torch.randn(16, 24, generator=generator) * 60).to(torch.float8_e4m3fn)
    item = update((16, 24), 1)
    result, new_scale = fuse_scaled(weight, scale, [(item, 0.8)])
    assert new_scale.shape == scale.shape
    exact = dequantise(weight, scale).double() + 0.8 * product(item)
    largest = exact.abs().amax() if scale.numel() == 1 else exact.abs().amax(dim=1, keepdim=True)
    torch.testing.assert_close(new_scale.double(), (largest / 448).expand(scale_shape), rtol=1e-5, atol=0)
    error = (dequantise(result, new_scale).double() - exact).abs()
    assert torch.all(error <= exact.abs() / 16 * 1.001 + largest / 448 * 2**-9)


def test_a_scaled_weight_of_zeros_stays_finite() -> None:
    weight = torch.zeros(4, 6).to(torch.float8_e4m3fn)
    result, scale = fuse_scaled(weight, torch.tensor(0.5), [])
    assert torch.equal(dequantise(result, scale), torch.zeros(4, 6))
    assert torch.isfinite(scale)


def test_scales_of_the_wrong_shape_are_refused() -> None:
    weight = torch.zeros(4, 6).to(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match="scale"):
        fuse_scaled(weight, torch.ones(6), [])
    with pytest.raises(ValueError, match="fp8"):
        fuse_scaled(torch.zeros(4, 6), torch.tensor(1.0), [])


def test_bias_differences() -> None:
    item = LoraUpdate(bias_diff=torch.ones(4))
    assert fuse_bias(None, [(update((4, 6), 1), 1.0)]) is None
    bias = torch.zeros(4, dtype=torch.bfloat16)
    result = fuse_bias(bias, [(item, 0.5), (item, 0.25)])
    assert result is not None
    assert torch.equal(result, torch.full((4,), 0.75, dtype=torch.bfloat16))
    assert torch.equal(bias, torch.zeros(4, dtype=torch.bfloat16))
    new = fuse_bias(None, [(item, 0.5), (item, 0.25)])
    assert new is not None
    assert torch.equal(new, torch.full((4,), 0.75))
