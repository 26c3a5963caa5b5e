from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from diffsynth.conditioning.items import Frozen
from diffsynth.conditioning.state import ModalityState
from diffsynth.errors import Cancelled
from diffsynth.sampling.conventions import MaskedStep
from diffsynth.sampling.loops import Step, ancestral, euler, gradient_estimation, res_2s
from diffsynth.sampling.noise import RenewedNoise, SdeNoise, SharedNoise, add_noise
from diffsynth.sampling.steps import x0_from_velocity

VIDEO = (1, 8, 2, 2, 3)
AUDIO = (1, 2, 5, 4)
SIGMAS = (1.0, 0.9, 0.7, 0.4, 0.0)


def ancestral_of_seed(*arguments: Any, **options: Any) -> Any:
    return ancestral(*arguments, noise=RenewedNoise(3), **options)


LOOPS: list[Callable[..., Any]] = [euler, gradient_estimation, res_2s, ancestral_of_seed]
State = ModalityState | None


def randn(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def noisy(state: ModalityState, seed: int) -> ModalityState:
    mask = state.mask.clone()
    mask[:, 0], mask[:, 1] = 0.0, 0.4
    clean = randn(tuple(state.clean.shape), seed + 1)
    mixed = clean * (1 - mask) + randn(tuple(state.latent.shape), seed) * mask
    return replace(state, latent=mixed, clean=clean, mask=mask)


def pair() -> tuple[ModalityState, ModalityState]:
    return noisy(ModalityState.video(VIDEO, 24.0), 1), noisy(ModalityState.audio(AUDIO), 5)


class Toy:
    """A denoiser whose estimate depends on the latent, the level and the call, and that keeps a record."""

    def __init__(self) -> None:
        self.calls: list[tuple[float, int]] = []

    def __call__(self, video: State, audio: State, sigma: float, step: int) -> tuple[Any, Any]:
        self.calls.append((sigma, step))
        return tuple(
            None if s is None else torch.tanh(s.latent * 0.7) * (1 - 0.3 * sigma) for s in (video, audio)
        )  # type: ignore[return-value]


@pytest.mark.parametrize("loop", LOOPS)
def test_a_constant_estimate_is_reached_and_kept_tokens_stay_exact(loop: Callable[..., Any]) -> None:
    video, audio = pair()
    target = randn(tuple(video.latent.shape), 9)
    result, other = loop(lambda v, a, s, i: (target, None), video, audio, SIGMAS)
    assert torch.equal(result.latent[:, 0], video.clean[:, 0])
    assert torch.equal(result.latent[:, 2:], target[:, 2:])
    torch.testing.assert_close(result.latent[:, 1], 0.4 * target[:, 1] + 0.6 * video.clean[:, 1])
    assert torch.equal(other.latent[:, 0], audio.clean[:, 0])


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("done", [1, 2, 3, 4])
def test_a_resumed_run_is_bit_equal(loop: Callable[..., Any], done: int) -> None:
    seen: list[Step[ModalityState]] = []
    whole = loop(Toy(), *pair(), SIGMAS, on_step=seen.append)
    last = seen[done - 1]
    options: dict[str, Any] = {} if loop is euler else {"carry": last.carry}
    resumed = loop(Toy(), last.video, last.audio, SIGMAS, start_step=done, **options)
    for a, b in zip(whole, resumed, strict=True):
        assert torch.equal(a.latent, b.latent)


@pytest.mark.parametrize("loop", LOOPS)
def test_steps_report_progress_and_estimates(loop: Callable[..., Any]) -> None:
    seen: list[Step[ModalityState]] = []
    video, audio = pair()
    result, _ = loop(Toy(), video, audio, SIGMAS, on_step=seen.append)
    total = 5 if loop is res_2s else 4
    assert [(s.index, s.total) for s in seen] == [(i, total) for i in range(total)]
    assert seen[0].sigma == 1.0
    assert seen[-1].sigma_next == 0.0
    last_x0 = seen[-1].video_x0
    assert last_x0 is not None
    assert torch.equal(last_x0, result.latent)
    assert torch.equal(last_x0[:, 0], video.clean[:, 0])
    assert seen[-1].video is result


def test_evaluations_of_res_2s() -> None:
    toy = Toy()
    res_2s(toy, *pair(), SIGMAS)
    assert len(toy.calls) == 9
    assert [step for _, step in toy.calls] == [0, 0, 1, 0, 2, 0, 3, 0, 4]
    assert toy.calls[1][0] == pytest.approx(0.9**0.5)
    assert toy.calls[-1][0] == pytest.approx(0.0011)


def test_float32_res_2s_is_close_to_float64() -> None:
    exact = res_2s(Toy(), *pair(), SIGMAS)
    single = res_2s(Toy(), *pair(), SIGMAS, sde_noise=SdeNoise(dtype=torch.float32))
    for a, b in zip(exact, single, strict=True):
        assert a is not None
        assert b is not None
        torch.testing.assert_close(a.latent, b.latent, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("loop", LOOPS)
def test_one_modality_alone(loop: Callable[..., Any]) -> None:
    video, audio = pair()
    alone, nothing = loop(Toy(), video, None, SIGMAS)
    assert nothing is None
    nothing, _ = loop(Toy(), None, audio, SIGMAS)
    assert nothing is None
    if loop in (euler, gradient_estimation):  # new noise of the other modality moves the generators on
        together, _ = loop(Toy(), video, audio, SIGMAS)
        assert torch.equal(alone.latent, together.latent)


@pytest.mark.parametrize("loop", LOOPS)
def test_latents_keep_their_dtype(loop: Callable[..., Any]) -> None:
    video, audio = pair()
    half = replace(video, latent=video.latent.bfloat16(), clean=video.clean.bfloat16())
    result, other = loop(Toy(), half, audio, SIGMAS)
    assert result.latent.dtype == torch.bfloat16
    assert other.latent.dtype == torch.float32


def test_no_answer_for_a_state_leaves_its_tokens_where_they_are() -> None:
    video, audio = pair()
    whole = replace(audio, mask=torch.ones_like(audio.mask))
    _, other = euler(lambda v, a, s, i: (v.latent if v else None, None), video, whole, SIGMAS)
    assert other is not None
    assert torch.equal(other.latent, audio.latent)


def test_the_callback_can_stop_a_run() -> None:
    toy = Toy()

    def stop(step: Step[ModalityState]) -> None:
        if step.index == 1:
            raise Cancelled("stopped")

    with pytest.raises(Cancelled):
        euler(toy, *pair(), SIGMAS, on_step=stop)
    assert len(toy.calls) == 2


@pytest.mark.parametrize("start", [-1, 5])
def test_a_start_outside_the_schedule_is_refused(start: int) -> None:
    with pytest.raises(ValueError, match="start_step"):
        euler(Toy(), *pair(), SIGMAS, start_step=start)


def test_levels_are_float32_whoever_wrote_them() -> None:
    toy = Toy()
    euler(toy, *pair(), (0.9, 0.1))
    assert toy.calls[0][0] == torch.tensor(0.9).item()


def test_gradient_estimation_with_gamma_one_is_euler() -> None:
    plain, _ = euler(Toy(), *pair(), SIGMAS)
    steered, _ = gradient_estimation(Toy(), *pair(), SIGMAS, gamma=1.0)
    other, _ = gradient_estimation(Toy(), *pair(), SIGMAS)
    assert plain is not None
    assert steered is not None
    assert other is not None
    torch.testing.assert_close(steered.latent, plain.latent, atol=1e-5, rtol=1e-5)
    assert (other.latent - plain.latent).abs().max() > 1e-3


def test_an_ancestral_step_without_new_noise_is_euler() -> None:
    plain, _ = euler(Toy(), *pair(), SIGMAS)
    still, _ = ancestral_of_seed(Toy(), *pair(), SIGMAS, eta=0.0)
    lively, _ = ancestral_of_seed(Toy(), *pair(), SIGMAS, eta=1.0)
    assert plain is not None
    # Partial masks are blended once more after each step; the others agree.
    torch.testing.assert_close(still.latent[:, 2:], plain.latent[:, 2:], atol=1e-5, rtol=1e-5)
    assert (lively.latent - plain.latent)[:, 2:].abs().max() > 1e-2


def test_the_level_of_renewed_noise_is_that_of_the_schedule() -> None:
    """Of a picture that is all zeros nothing but noise is left: its deviation is the next sigma."""
    shape = (1, 64, 8, 8, 8)
    state = ModalityState.video(shape, 24.0, latent=randn(shape, 1))
    for eta in (0.5, 1.0):
        levels: list[float] = []
        ancestral(
            lambda v, a, s, i: (torch.zeros_like(v.latent), None),  # type: ignore[union-attr]
            state,
            None,
            SIGMAS,
            noise=RenewedNoise(3),
            eta=eta,
            on_step=lambda step, found=levels: found.append(step.video.latent.std().item()),  # type: ignore[misc]
        )
        assert levels == pytest.approx(SIGMAS[1:], abs=0.01)


@pytest.mark.parametrize("rule", list(MaskedStep))
def test_what_a_partial_mask_does(rule: MaskedStep) -> None:
    """The velocity that moves a token: the clean part is common, the model's has weight m^2 or m."""
    sigma, following = 0.8, 0.5
    video, _ = pair()
    velocity = randn(tuple(video.latent.shape), 3)
    shown: list[Tensor] = []

    def denoise(v: State, a: State, s: float, i: int) -> tuple[Tensor | None, Tensor | None]:
        assert v is not None
        shown.append(v.latent)
        return x0_from_velocity(v.latent, velocity, v.timesteps(s)), None

    result, _ = euler(denoise, video, None, (sigma, following), masked_step=rule)
    assert result is not None
    m, x, c = video.mask, video.latent, video.clean
    weight = m**2 if rule is MaskedStep.X0_BLEND else m
    moved = (1 - m) * (x - c) / sigma + weight * velocity
    torch.testing.assert_close(result.latent, x + moved * (following - sigma), atol=1e-5, rtol=1e-5)
    expected_input = x if rule is MaskedStep.X0_BLEND else x * m + c * (1 - m)
    torch.testing.assert_close(shown[0], expected_input)


def test_both_mask_rules_agree_for_masks_of_zero_and_one() -> None:
    """Official code keeps the token clean all along, the other rule starts it as noise: same end."""
    video, _ = pair()
    hard = replace(video, mask=(video.mask > 0.5).float())
    kept = replace(hard, latent=torch.where(hard.mask > 0, hard.latent, hard.clean))

    def denoise(v: State, a: State, s: float, i: int) -> tuple[Tensor | None, Tensor | None]:
        assert v is not None
        return x0_from_velocity(v.latent, torch.tanh(v.latent), v.timesteps(s)), None

    blended, _ = euler(denoise, kept, None, SIGMAS)
    mixed, _ = euler(denoise, hard, None, SIGMAS, masked_step=MaskedStep.VELOCITY)
    assert blended is not None
    assert mixed is not None
    torch.testing.assert_close(mixed.latent, blended.latent, atol=1e-5, rtol=1e-5)
    assert torch.equal(mixed.latent[:, 0], video.clean[:, 0])


@pytest.mark.parametrize("loop", LOOPS)
def test_no_loop_looks_at_the_data(loop: Callable[..., Any]) -> None:
    """On the meta device a wait for a value, or a tensor left on the CPU, is an error."""
    source = SharedNoise(1)
    video = add_noise(ModalityState.video(VIDEO, 24.0, device="meta"), source)
    audio = add_noise(Frozen().apply(ModalityState.audio(AUDIO, device="meta")), source)
    result, other = loop(Toy(), video, audio, SIGMAS)
    assert result.latent.device.type == other.latent.device.type == "meta"
    assert result.latent.shape == video.latent.shape
