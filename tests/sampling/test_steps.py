import math

import pytest
import torch

from diffsynth.sampling import steps

SHAPE = (2, 6, 4)


def tensors(count: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(SHAPE, generator=generator) for _ in range(count)]


def test_velocity_and_x0_are_inverse() -> None:
    x, v = tensors(2)
    x0 = steps.x0_from_velocity(x, v, 0.7)
    torch.testing.assert_close(steps.velocity_from_x0(x, x0, 0.7), v, atol=1e-5, rtol=1e-5)


def test_a_token_at_timestep_zero_is_its_own_x0() -> None:
    x, v = tensors(2)
    timesteps = torch.full((2, 6, 1), 0.4)
    timesteps[:, 2:4] = 0
    x0 = steps.x0_from_velocity(x, v, timesteps)
    assert torch.equal(x0[:, 2:4], x[:, 2:4])
    assert not torch.equal(x0[:, :2], x[:, :2])


def test_sigma_zero_has_no_velocity() -> None:
    x, x0 = tensors(2)
    with pytest.raises(ValueError, match="sigma 0"):
        steps.velocity_from_x0(x, x0, 0.0)


def test_blend_takes_the_clean_latent_exactly_where_the_mask_is_zero() -> None:
    x0, clean = tensors(2)
    mask = torch.tensor([0.0, 1.0, 0.25, 0.0, 1.0, 1.0])[None, :, None]
    mixed = steps.blend(x0, mask, clean)
    assert torch.equal(mixed[:, 0], clean[:, 0])
    assert torch.equal(mixed[:, 1], x0[:, 1])
    torch.testing.assert_close(mixed[:, 2], 0.25 * x0[:, 2] + 0.75 * clean[:, 2])


def test_euler_moves_along_the_line_between_noise_and_x0() -> None:
    x0, noise = tensors(2)
    x = 0.2 * x0 + 0.8 * noise
    expected = 0.7 * x0 + 0.3 * noise
    torch.testing.assert_close(steps.euler_step(x, x0, 0.8, 0.3), expected, atol=1e-6, rtol=1e-5)


def test_euler_rounds_the_velocity_to_the_latents_dtype() -> None:
    x, x0 = (t.bfloat16() for t in tensors(2))
    stepped = steps.euler_step(x, x0, 0.8, 0.35)
    velocity = ((x.float() - x0.float()) / 0.8).bfloat16().float()
    assert stepped.dtype == torch.bfloat16
    assert torch.equal(stepped, (x.float() + velocity * (0.35 - 0.8)).bfloat16())


def test_eta_zero_needs_no_noise() -> None:
    x, x0, noise = tensors(3)
    plain = steps.euler_step(x, x0, 0.8, 0.35)
    torch.testing.assert_close(steps.ancestral_step(x, x0, noise, 0.8, 0.35, 0.0), plain)
    torch.testing.assert_close(
        steps.cfg_pp_step(x, x0, x0, noise, 0.8, 0.35, 0.0), plain, atol=1e-5, rtol=1e-5
    )


def test_ancestral_steps_end_on_x0() -> None:
    x, x0, noise = tensors(3)
    assert torch.equal(steps.ancestral_step(x, x0, noise, 0.4, 0.0, 1.0), x0)


@pytest.mark.parametrize("eta", [0.25, 0.5, 1.0])
def test_ancestral_and_sde_steps_keep_the_noise_level(eta: float) -> None:
    """A perfect x0 with unit noise must come out at the next level: signal 1 - t, noise t."""
    generator = torch.Generator().manual_seed(5)
    old, new = (torch.randn(200_000, generator=generator, dtype=torch.float64) for _ in range(2))
    s, t, x0 = 0.8, 0.35, torch.full_like(old, 3.0)
    x = (1 - s) * x0 + s * old
    ancestral = steps.ancestral_step(x, x0, new, s, t, eta)
    deterministic = (1 - t) * x0 + t * old
    sde = steps.sde_step(x, deterministic, s, t, new, eta=eta)
    for result in (ancestral.double(), sde):
        assert result.mean().item() == pytest.approx((1 - t) * 3.0, abs=0.01)
        assert result.std().item() == pytest.approx(t, rel=0.01)


def test_the_sde_step_returns_the_deterministic_result_where_there_is_no_noise() -> None:
    x, following, noise = tensors(3)
    assert torch.equal(steps.sde_step(x, following, 0.4, 0.0, noise), following.double())
    assert torch.equal(steps.sde_step(x, following, 0.4, 0.2, noise, eta=0.0), following.double())


def test_the_sde_step_in_float32_is_close_to_float64() -> None:
    x, following, noise = tensors(3)
    exact = steps.sde_step(x, following, 0.4, 0.2, noise)
    single = steps.sde_step(x, following, 0.4, 0.2, noise, dtype=torch.float32)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), exact, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("h", [0.05, 0.7, 3.0])
def test_res_2s_is_exact_for_estimates_linear_in_the_exponential_time(h: float) -> None:
    """x' = x0(l) - x with x0 = p + q l, so x(h) = e^-h x + h phi1 p + h^2 phi2 q."""
    a, p, q = 0.9, -0.4, 1.3
    _, b1, b2 = steps.res2s_coefficients(h)
    stepped = a + h * (b1 * (p - a) + b2 * (p + q * h / 2 - a))
    exact = math.exp(-h) * a + h * steps.phi1(-h) * p + h * h * steps.phi2(-h) * q
    assert stepped == pytest.approx(exact, abs=1e-10)


def test_phi_limits() -> None:
    assert (steps.phi1(0.0), steps.phi2(0.0)) == (1.0, 0.5)
    assert steps.phi1(1e-6) == pytest.approx(1.0, abs=1e-5)


def test_normalised_noise_has_exact_moments_per_item() -> None:
    noise = torch.randn(3, 7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 4 + 2
    normal = steps.normalised_noise(noise)
    torch.testing.assert_close(normal.mean((-2, -1)), torch.zeros(3, dtype=torch.float64))
    torch.testing.assert_close(normal.std((-2, -1)), torch.ones(3, dtype=torch.float64))
