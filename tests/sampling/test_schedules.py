import math

import pytest
import torch

from diffsynth.errors import RequestError
from diffsynth.sampling import schedules


def test_forty_steps_of_the_dev_schedule() -> None:
    sigmas = schedules.ltx2_schedule(40)
    assert sigmas.dtype == torch.float32
    assert sigmas.shape == (41,)
    torch.testing.assert_close(
        sigmas[:4], torch.tensor([0.9999999, 0.9964492, 0.9927, 0.9889]), atol=5e-5, rtol=0
    )
    torch.testing.assert_close(sigmas[-4:], torch.tensor([0.3378, 0.2339, 0.1, 0.0]), atol=5e-5, rtol=0)


def test_the_default_token_count_is_4096_and_counts_matter() -> None:
    assert torch.equal(schedules.ltx2_schedule(8), schedules.ltx2_schedule(8, 4096))
    assert (schedules.ltx2_schedule(8, 6144)[1:-2] > schedules.ltx2_schedule(8)[1:-2]).all()


def test_one_step_goes_from_noise_to_the_end() -> None:
    assert schedules.ltx2_schedule(1).tolist() == [1.0, 0.0]
    assert schedules.linear_quadratic_schedule(1).tolist() == [1.0, 0.0]


@pytest.mark.parametrize("tokens", [1, 4096, 24576, 60_000, 200_000, 5_000_000])
@pytest.mark.parametrize("steps", [2, 15, 50])
def test_every_token_count_gives_a_falling_list(steps: int, tokens: int) -> None:
    sigmas = schedules.ltx2_schedule(steps, tokens)
    assert torch.isfinite(sigmas).all()
    assert (sigmas.diff() < 0).all()
    assert sigmas[-2].item() == pytest.approx(0.1, abs=1e-4)


def test_the_exact_form_is_the_same_curve() -> None:
    steps, tokens = 20, 4096
    factor = math.exp(2.05)
    exact = schedules._stretched_exactly(torch.linspace(1, 0, steps + 1)[:-1], factor, 0.1)
    torch.testing.assert_close(schedules.ltx2_schedule(steps, tokens)[:-1], exact, atol=1e-6, rtol=0)


def test_without_stretch_the_terminal_value_is_free() -> None:
    assert schedules.ltx2_schedule(8, stretch=False)[-2] > 0.5


@pytest.mark.parametrize("steps", [0, -3])
def test_too_few_steps_are_refused(steps: int) -> None:
    for make in (
        schedules.ltx2_schedule,
        schedules.linear_quadratic_schedule,
        schedules.beta_schedule,
        schedules.diffsynth_schedule,
    ):
        with pytest.raises(RequestError, match="num_inference_steps"):
            make(steps)


@pytest.mark.parametrize("strength", [0.0, 1.5, -1.0])
def test_a_start_outside_the_range_is_refused(strength: float) -> None:
    with pytest.raises(RequestError, match="denoising_strength"):
        schedules.diffsynth_schedule(4, denoising_strength=strength)


def test_linear_part_must_leave_room_for_the_quadratic_one() -> None:
    with pytest.raises(RequestError, match="linear_steps=5"):
        schedules.linear_quadratic_schedule(5, linear_steps=5)
    sigmas = schedules.linear_quadratic_schedule(10, linear_steps=3)
    torch.testing.assert_close(sigmas[:3].diff(), sigmas[1:4].diff())


def test_diffsynth_starts_lower_for_a_lower_strength() -> None:
    assert torch.equal(schedules.diffsynth_schedule(6), schedules.ltx2_schedule(6))
    lower = schedules.diffsynth_schedule(6, denoising_strength=0.6)
    assert lower[0] < 0.9
    assert lower[-1] == 0


def test_bfloat16_timesteps_of_the_distilled_list() -> None:
    rounded = schedules.rounded_timesteps(torch.tensor(schedules.DISTILLED_STAGE_1))
    assert rounded.tolist() == [1000.0, 992.0, 988.0, 980.0, 976.0, 908.0, 724.0, 422.0, 0.0]


def test_distilled_lists_share_their_tail() -> None:
    assert schedules.DISTILLED_STAGE_1[5:] == schedules.DISTILLED_STAGE_2


@pytest.mark.parametrize("p", [1e-6, 0.025, 0.3, 0.5, 0.77, 0.999])
def test_beta_quantiles_with_closed_forms(p: float) -> None:
    assert schedules._beta_quantile(p, 1, 1) == pytest.approx(p, abs=1e-12)
    arcsine = math.sin(math.pi * p / 2) ** 2
    assert schedules._beta_quantile(p, 0.5, 0.5) == pytest.approx(arcsine, rel=1e-9)
    assert schedules._beta_quantile(p, 3, 1) == pytest.approx(p ** (1 / 3), rel=1e-9)


def test_beta_drops_repeated_levels() -> None:
    sigmas = schedules.beta_schedule(1000)
    assert len(sigmas) < 1001
    assert (sigmas.diff() < 0).all()
