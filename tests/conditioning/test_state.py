import pytest
import torch

from diffsynth.conditioning.items import Frozen, Keyframe
from diffsynth.conditioning.state import ModalityState
from diffsynth.errors import RequestError
from diffsynth.models.ltx2.modulation import distinct_timesteps
from diffsynth.sampling.conventions import FrozenSigma

VIDEO = (2, 8, 3, 2, 2)
AUDIO = (2, 4, 5, 4)


def test_a_new_state_is_empty_and_all_to_be_generated() -> None:
    video, audio = ModalityState.video(VIDEO, 24.0), ModalityState.audio(AUDIO)
    assert (video.num_tokens, video.target_tokens, video.is_video) == (12, 12, True)
    assert (audio.num_tokens, audio.target_tokens, audio.is_video) == (5, 5, False)
    assert video.latent.shape == video.clean.shape == (2, 12, 8)
    assert audio.latent.shape == (2, 5, 16)
    assert (video.mask == 1).all()
    assert video.attention is None


def test_an_initial_latent_comes_back_unpatchified() -> None:
    latent = torch.randn(VIDEO)
    state = ModalityState.video(VIDEO, 24.0, latent=latent, dtype=torch.bfloat16)
    assert state.latent.dtype == torch.bfloat16
    assert torch.equal(state.unpatchified(), latent.bfloat16())
    assert torch.equal(state.clean, state.latent)


def test_an_initial_latent_of_another_shape_is_refused() -> None:
    with pytest.raises(RequestError, match=r"\(2, 4, 4, 4\), the target \(2, 4, 5, 4\)"):
        ModalityState.audio(AUDIO, latent=torch.zeros(2, 4, 4, 4))
    with pytest.raises(RequestError, match=r"\(1, 8, 0, 16\)"):
        ModalityState.audio((1, 8, 0, 16))


def test_timesteps_follow_the_mask() -> None:
    state = ModalityState.video(VIDEO, 24.0)
    assert (state.timesteps(0.5) == 0.5).all()
    appended = Keyframe(latent=torch.randn(2, 8, 1, 2, 2), frame_index=8, strength=0.75).apply(state)
    timesteps = appended.timesteps(0.5)
    assert timesteps.shape == (2, 16, 1)
    assert timesteps.dtype == torch.float32
    assert timesteps[0, 12:, 0].tolist() == pytest.approx([0.125] * 4)


def test_the_network_sees_by_the_strides_that_all_tokens_agree() -> None:
    state = ModalityState.video(VIDEO, 24.0)
    for uniform in (state, Frozen().apply(state), state.cleared()):
        distinct = distinct_timesteps(uniform.timesteps(0.5))
        assert distinct.values.shape == (1,)
        assert uniform.timesteps(0.5).stride(1) == 0


def test_a_frozen_stream_shows_its_own_sigma() -> None:
    state = ModalityState.audio(AUDIO, latent=torch.randn(AUDIO))
    frozen = Frozen().apply(state)
    assert frozen.frozen
    assert (frozen.timesteps(0.5) == 0).all()
    assert state.sigma_shown(0.5) == 0.5
    assert frozen.sigma_shown(0.5) == 0.0
    assert frozen.sigma_shown(0.5, FrozenSigma.CURRENT) == 0.5


def test_clearing_drops_all_that_was_appended() -> None:
    latent = torch.randn(VIDEO)
    state = ModalityState.video(VIDEO, 24.0, latent=latent)
    more = state.appended(torch.zeros(2, 4, 8), torch.randn(2, 4, 8), torch.zeros(2, 3, 4, 2), mask_value=0.0)
    assert more.num_tokens == 16
    cleared = more.cleared()
    assert cleared.num_tokens == 12
    assert cleared.positions.shape == (2, 3, 12, 2)
    assert (cleared.mask == 1).all()
    assert torch.equal(more.unpatchified(), latent)
    assert torch.equal(cleared.unpatchified(), latent)


def test_attention_between_target_and_two_weighted_groups() -> None:
    state = ModalityState.audio(AUDIO)
    first = torch.tensor([[0.5, 0.25]]).expand(2, 2)
    weights = state.extended_attention(2, first)
    assert torch.equal(weights[0, :5, 5:], first[0].expand(5, 2))
    assert torch.equal(weights[0, 5:, :5], first[0][:, None].expand(2, 5))
    assert (weights[:, 5:, 5:] == 1).all()
    assert (weights[:, :5, :5] == 1).all()
    assert weights.dtype == torch.float32


def test_states_are_not_changed_by_their_methods() -> None:
    state = ModalityState.video(VIDEO, 24.0)
    state.with_latent(torch.ones_like(state.latent))
    Frozen().apply(state)
    assert (state.latent == 0).all()
    assert (state.mask == 1).all()
    assert not state.frozen
