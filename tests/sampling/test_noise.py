import pytest
import torch

from diffsynth.conditioning.items import Frozen, Keyframe
from diffsynth.conditioning.state import ModalityState
from diffsynth.errors import RequestError
from diffsynth.sampling.conventions import NoiserRule, NoiseRule
from diffsynth.sampling.noise import (
    FreshNoise,
    RenewedNoise,
    SdeNoise,
    SharedNoise,
    add_noise,
    mix_noise,
    noise_source,
    resolve_seed,
)

VIDEO = (1, 8, 2, 2, 3)
AUDIO = (1, 2, 5, 4)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_a_given_seed_stays_and_a_missing_one_is_drawn_anew() -> None:
    assert resolve_seed(43) == 43
    assert resolve_seed(-1) == -1
    drawn = {resolve_seed(None) for _ in range(8)}
    assert len(drawn) > 1
    assert all(0 <= seed < 2**32 for seed in drawn)


@pytest.mark.parametrize("seed", [2**63, 1.5, True])
def test_an_impossible_seed_is_refused(seed: int) -> None:
    with pytest.raises(RequestError, match="seed="):
        resolve_seed(seed)


def test_renewed_noise_goes_on_and_is_not_that_of_the_start() -> None:
    state = ModalityState.video(VIDEO, 24.0)
    source = RenewedNoise(7)
    first, kept, second = source.draw(state), source.snapshot(), source.draw(state)
    assert not torch.equal(first, second)
    assert not torch.equal(first, FreshNoise(7).draw(state))
    source.restore(kept)
    assert torch.equal(source.draw(state), second)
    keyframe = Keyframe(latent=torch.zeros(1, 8, 1, 2, 3), frame_index=8)
    longer = RenewedNoise(7).draw(keyframe.apply(state))
    assert torch.equal(longer[:, : first.shape[1]], first)
    assert RenewedNoise(2**63 - 1).draw(state).shape == first.shape


def test_the_shared_source_draws_tokens_one_tensor_after_the_other() -> None:
    video, audio = ModalityState.video(VIDEO, 24.0), ModalityState.audio(AUDIO)
    source = SharedNoise(7)
    generator = torch.Generator().manual_seed(7)
    assert torch.equal(source.draw(video), torch.randn(video.latent.shape, generator=generator))
    assert torch.equal(source.draw(audio), torch.randn(audio.latent.shape, generator=generator))
    assert torch.equal(source.draw(video), torch.randn(video.latent.shape, generator=generator))


def test_the_shared_source_draws_in_the_latents_dtype() -> None:
    state = ModalityState.video(VIDEO, 24.0, dtype=torch.bfloat16)
    drawn = SharedNoise(7).draw(state)
    generator = torch.Generator().manual_seed(7)
    assert torch.equal(drawn, torch.randn(state.latent.shape, generator=generator, dtype=torch.bfloat16))


def test_the_fresh_source_starts_again_for_every_tensor() -> None:
    video, audio = ModalityState.video(VIDEO, 24.0), ModalityState.audio(AUDIO)
    source = noise_source(NoiseRule.FRESH, 3)
    first = source.draw(video)
    latent = video.with_latent(first).unpatchified()
    assert torch.equal(latent, randn(*VIDEO, seed=3))
    assert torch.equal(audio.with_latent(source.draw(audio)).unpatchified(), randn(*AUDIO, seed=3))
    assert torch.equal(source.draw(video), first)


def test_appended_tokens_leave_the_fresh_noise_of_the_target_alone() -> None:
    plain = ModalityState.video(VIDEO, 24.0)
    more = Keyframe(latent=randn(1, 8, 1, 2, 3), frame_index=8).apply(plain)
    source = FreshNoise(3)
    drawn = source.draw(more)
    assert drawn.shape == more.latent.shape
    assert torch.equal(drawn[:, : plain.num_tokens], source.draw(plain))
    assert drawn[:, plain.num_tokens :].std() > 0.5


def test_rules_agree_where_they_should_and_differ_where_they_may() -> None:
    clean, noise = randn(1, 6, 4, seed=1), randn(1, 6, 4, seed=2)
    partial = torch.tensor([0.0, 0.0, 0.4, 0.4, 1.0, 1.0])[None, :, None]
    for scale in (1.0, 0.9):
        two = mix_noise(clean, clean, partial, noise, scale, NoiserRule.TWO_LERPS)
        one = mix_noise(clean, clean, partial, noise, scale, NoiserRule.ONE_LERP)
        torch.testing.assert_close(two, one)
    initial = randn(1, 6, 4, seed=3)
    two = mix_noise(initial, clean, partial, noise, 0.9, NoiserRule.TWO_LERPS)
    one = mix_noise(initial, clean, partial, noise, 0.9, NoiserRule.ONE_LERP)
    assert torch.equal(two[:, :2], clean[:, :2])
    torch.testing.assert_close(two[:, 4:], one[:, 4:])
    assert (two[:, 2:4] - one[:, 2:4]).abs().max() > 0.05


def test_full_noise_is_the_noise_itself() -> None:
    initial, noise = randn(1, 6, 4, seed=1), randn(1, 6, 4, seed=2)
    ones = torch.ones(1, 6, 1)
    for rule in NoiserRule:
        assert torch.equal(mix_noise(initial, initial, ones, noise, 1.0, rule), noise)


def test_the_unmasked_rule_ignores_masks() -> None:
    initial, noise = randn(1, 6, 4, seed=1), randn(1, 6, 4, seed=2)
    mixed = mix_noise(initial, initial, torch.zeros(1, 6, 1), noise, 0.75, NoiserRule.UNMASKED)
    torch.testing.assert_close(mixed, 0.25 * initial + 0.75 * noise)


def test_a_frozen_stream_stays_clean_but_its_noise_is_drawn() -> None:
    given = randn(*AUDIO)
    frozen = Frozen().apply(ModalityState.audio(AUDIO, latent=given))
    source = SharedNoise(7)
    noised = add_noise(frozen, source)
    assert torch.equal(noised.unpatchified(), given)
    generator = torch.Generator().manual_seed(7)
    torch.randn(frozen.latent.shape, generator=generator)
    video = ModalityState.video(VIDEO, 24.0)
    assert torch.equal(source.draw(video), torch.randn(video.latent.shape, generator=generator))


def test_sde_noise_continues_from_a_snapshot() -> None:
    like = torch.zeros(1, 6, 4)
    sde = SdeNoise()
    sde.draw(sde.step, like)
    saved = sde.snapshot()
    first = (sde.draw(sde.step, like), sde.draw(sde.substep, like))
    other = SdeNoise(5)
    other.restore(saved)
    assert torch.equal(other.draw(other.step, like), first[0])
    assert torch.equal(other.draw(other.substep, like), first[1])


def test_sde_streams_have_their_documented_seeds_and_precision() -> None:
    like = torch.zeros(1, 6, 4)
    default, explicit = SdeNoise(), SdeNoise(-1, 9999)
    assert torch.equal(default.draw(default.substep, like), explicit.draw(explicit.substep, like))
    single = SdeNoise(dtype=torch.float32)
    drawn = single.draw(single.step, like)
    assert drawn.dtype == torch.float32
    torch.testing.assert_close(drawn.double(), default.draw(default.step, like), atol=1e-6, rtol=1e-6)
