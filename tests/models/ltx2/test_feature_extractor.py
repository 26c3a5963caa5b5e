from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from diffsynth.models.ltx2.feature_extractor import (
    FeatureExtractor,
    FeatureExtractorConfig,
    PromptFeatures,
    by_state,
)

D, L = 12, 5
LENGTHS = (7, 1, 3)


def extractor(*, separate: bool) -> FeatureExtractor:
    torch.manual_seed(1)
    video, audio = (16, 8) if separate else (D, D)
    config = FeatureExtractorConfig(
        hidden_size=D, num_states=L, separate=separate, video_width=video, audio_width=audio
    )
    return FeatureExtractor(config).requires_grad_(False)


def stacked_states() -> list[Tensor]:
    """[n, D, L] per prompt; state 0 is so small that the eps counts, one channel sticks out."""
    generator = torch.Generator().manual_seed(2)
    states = [torch.randn(n, D, L, generator=generator) * 3 + 1 for n in LENGTHS]
    for x in states:
        x[..., 0] *= 1e-4
        x[:, 3] *= 40
    return states


def accumulate(model: FeatureExtractor, states: Sequence[Tensor], **options: Any) -> list[PromptFeatures]:
    sums = model.begin(len(states), **options)
    for index in range(L):
        for prompt, x in enumerate(states):
            sums.add(index, prompt, x[None, ..., index])
    return sums.finish()


def unfolded_ltx2(model: FeatureExtractor, x: Tensor) -> Tensor:
    """The rule as the paper version states it: normalise the stack, flatten, one product."""
    x = x.double()
    mean = x.sum(dim=(0, 1), keepdim=True) / (x.shape[0] * D + 1e-6)
    spread = x.amax(dim=(0, 1), keepdim=True) - x.amin(dim=(0, 1), keepdim=True)
    flat = (8 * (x - mean) / (spread + 1e-6)).reshape(len(x), D * L)
    return (flat @ model.aggregate_embed.weight.double().T).float()


def unfolded_ltx23(projection: torch.nn.Linear, x: Tensor) -> Tensor:
    x = x.double()
    flat = (x * torch.rsqrt((x**2).mean(dim=1, keepdim=True) + 1e-6)).reshape(len(x), D * L)
    flat = flat * (projection.out_features / D) ** 0.5
    return (flat @ projection.weight.double().T + projection.bias.double()).float()


def test_ltx2_equals_the_unfolded_projection() -> None:
    model = extractor(separate=False)
    states = stacked_states()
    for x, row in zip(states, accumulate(model, states), strict=True):
        torch.testing.assert_close(row.video, unfolded_ltx2(model, x), atol=1e-5, rtol=1e-5)
        assert row.audio is row.video


def test_ltx23_equals_the_unfolded_projections() -> None:
    model = extractor(separate=True)
    states = stacked_states()
    for x, row in zip(states, accumulate(model, states), strict=True):
        for own, projection in (
            (row.video, model.video_aggregate_embed),
            (row.audio, model.audio_aggregate_embed),
        ):
            torch.testing.assert_close(own, unfolded_ltx23(projection, x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("separate", [False, True])
def test_streamed_slices_are_fetched_once_per_state_and_change_nothing(separate: bool) -> None:
    model = extractor(separate=separate)
    states = stacked_states()
    stored = [by_state(projection.weight, L) for projection in model.projections()]
    assert all(block.is_contiguous() and block.shape[0] == L for block in stored)
    fetched: list[int] = []

    def slices(index: int) -> list[Tensor]:
        fetched.append(index)
        return [block[index] for block in stored]

    for a, b in zip(accumulate(model, states), accumulate(model, states, slices=slices), strict=True):
        assert torch.equal(a.video, b.video)
        assert torch.equal(a.audio, b.audio)
    assert fetched == list(range(L))


@pytest.mark.parametrize("separate", [False, True])
def test_a_state_is_not_changed_and_a_constant_one_gives_finite_features(separate: bool) -> None:
    model = extractor(separate=separate)
    states = [torch.full((1, D, L), 2.0)]
    (row,) = accumulate(model, states)
    assert torch.isfinite(row.video).all()
    assert (states[0] == 2.0).all()


@pytest.mark.parametrize("separate", [False, True])
def test_a_prompt_without_tokens_has_no_features(separate: bool) -> None:
    model = extractor(separate=separate)
    first, second = accumulate(model, [torch.ones(0, D, L), stacked_states()[0]])
    assert len(first.video) == len(first.audio) == 0
    assert torch.isfinite(second.video).all()


@pytest.mark.parametrize("separate", [False, True])
def test_bfloat16_weights_and_states_accumulate_in_float32(separate: bool) -> None:
    model = extractor(separate=separate).to(torch.bfloat16)
    states = [x.bfloat16() for x in stacked_states()]
    exact = extractor(separate=separate)
    exact.load_state_dict({key: tensor.float() for key, tensor in model.state_dict().items()})
    expected = accumulate(exact, [x.float() for x in states])
    for a, b in zip(accumulate(model, states), expected, strict=True):
        assert a.video.dtype == torch.float32
        assert torch.equal(a.video, b.video)
        assert torch.equal(a.audio, b.audio)


def test_order_and_number_of_states_are_checked() -> None:
    model = extractor(separate=True)
    x = torch.ones(1, 2, D)
    sums = model.begin(2)
    sums.add(0, 0, x)
    with pytest.raises(ValueError, match=r"state 1 of prompt 0 came where \(0, 1\)"):
        sums.add(1, 0, x)
    with pytest.raises(ValueError, match="only 1 states of 2 prompts"):
        sums.finish()
    sums = model.begin(1)
    for index in range(L):
        sums.add(index, 0, x)
    with pytest.raises(ValueError, match=f"state {L} "):
        sums.add(L, 0, x)
