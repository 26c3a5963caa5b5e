"""Writing token by token with a cache, against transformers without one."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from diffsynth.models.gemma3 import Gemma3TextModel
from diffsynth.models.gemma3_cache import KeyValueCache, first_mask
from diffsynth.models.gemma3_config import Gemma3Config
from diffsynth.models.gemma3_writer import Continuation, draw, head_rows, table_chunks, write
from tests.models.test_gemma3 import TINY, tiny_model

CPU = torch.device("cpu")
GIVEN = torch.tensor([2, 5, 9, 11, 3, 60, 7, 8, 40])
"""More than the window of 5 tokens."""


@pytest.fixture(scope="module")
def model() -> Gemma3TextModel:
    made = tiny_model()
    made.embed_tokens.weight.mul_(0.3)  # the logits of a wider table leave the draws no choice
    return made


@pytest.fixture(scope="module")
def oracle(model: Gemma3TextModel) -> Gemma3ForCausalLM:
    config = Gemma3TextConfig(**TINY, attn_implementation="eager", tie_word_embeddings=True)
    made = Gemma3ForCausalLM(config).eval().requires_grad_(False)
    made.model.load_state_dict(model.state_dict(), strict=True)
    made.tie_weights()
    return made


def continuation(model: Gemma3TextModel, ids: Tensor = GIVEN, capacity: int = 64) -> Continuation:
    return Continuation(model, model.embed(ids), capacity, device=CPU, dtype=torch.float32)


def written(model: Gemma3TextModel, **how: Any) -> list[int]:
    settings: dict[str, Any] = {"seed": 7, "temperature": 0.7, "max_tokens": 24, "stops": (), **how}
    return write(continuation(model), lambda: table_chunks(model), **settings)


def test_greedy_tokens_are_those_that_transformers_generates(
    model: Gemma3TextModel, oracle: Gemma3ForCausalLM
) -> None:
    found = oracle.generate(
        GIVEN[None], max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=0, use_cache=True
    )
    assert written(model, temperature=0.0) == found[0, len(GIVEN) :].tolist()


@pytest.mark.parametrize("seed", [7, -3, 2**62])
def test_sampled_tokens_are_those_of_full_passes_without_a_cache(
    seed: int, model: Gemma3TextModel, oracle: Gemma3ForCausalLM
) -> None:
    random = torch.Generator().manual_seed(seed)
    ids = GIVEN.tolist()
    while len(ids) < len(GIVEN) + 24:
        logits = oracle(torch.tensor([ids]), use_cache=False).logits[0, -1]
        probabilities = torch.softmax(logits / 0.7, dim=-1)
        ids.append(int(torch.multinomial(probabilities, 1, generator=random)))
    own = written(model, seed=seed)
    assert own == ids[len(GIVEN) :]
    assert len(set(own)) > 8, "the draws have a choice"


def test_logits_of_every_token(model: Gemma3TextModel, oracle: Gemma3ForCausalLM) -> None:
    more = torch.tensor([33, 21, 4, 4, 19, 50])
    expected = oracle(torch.cat((GIVEN, more))[None], use_cache=False).logits[0, len(GIVEN) - 1 :]
    text = continuation(model)
    for token, wanted in zip([*more.tolist(), None], expected, strict=True):
        torch.testing.assert_close(text.logits(lambda: table_chunks(model)), wanted, atol=1e-5, rtol=1e-5)
        if token is not None:
            text.append(token)
    with pytest.raises(ValueError, match="append"):
        text.logits(lambda: table_chunks(model))


def test_seeds_decide_and_nothing_else(model: Gemma3TextModel) -> None:
    state = torch.get_rng_state()
    first = written(model)
    torch.manual_seed(99)
    assert written(model) == first
    assert written(model, seed=8) != first
    torch.set_rng_state(state)
    written(model)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_stop_ends_the_text_and_is_not_part_of_it(model: Gemma3TextModel) -> None:
    whole = written(model)
    stop = whole[5]
    assert written(model, stops=[stop]) == whole[: whole.index(stop)]
    assert written(model, stops=[whole[0]]) == []
    assert written(model, max_tokens=3) == whole[:3]


def test_tokens_are_counted_and_the_writing_can_be_stopped(model: Gemma3TextModel) -> None:
    counts: list[int] = []

    def stop_at_four(count: int) -> None:
        counts.append(count)
        if count == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        written(model, on_token=stop_at_four)
    assert counts == [1, 2, 3, 4]


@pytest.mark.parametrize(("vocab", "layers"), [(64, 5), (5, 4), (3, 8), (262_208, 48)])
def test_the_head_has_at_most_one_chunk_for_a_layer(vocab: int, layers: int) -> None:
    config = Gemma3Config(
        hidden_size=8, intermediate_size=8, vocab_size=vocab, layer_kinds=("full_attention",) * layers
    )
    rows = head_rows(config)
    assert sum(rows) == vocab
    assert len(rows) <= layers
    assert min(rows) > 0
    assert max(rows) == rows[0]


def test_draws_follow_the_temperature() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0])
    random = torch.Generator().manual_seed(0)
    counts = torch.zeros(3)
    for _ in range(4000):
        counts[draw(logits, 0.7, random)] += 1
    torch.testing.assert_close(counts / 4000, torch.softmax(logits / 0.7, 0), atol=0.03, rtol=0.0)
    assert draw(logits, 0.0, random) == 2


def test_what_does_not_fit_a_cache_is_refused() -> None:
    cache = KeyValueCache(torch.zeros(1, 1, 4, 2), torch.zeros(1, 1, 4, 2), window=2)
    one, three = torch.ones(1, 1, 1, 2), torch.ones(1, 1, 3, 2)
    cache.extend(three, three)
    with pytest.raises(ValueError, match="3 tokens after 3"):
        cache.extend(three, three)
    keys, _, mask = cache.extend(one, one)
    assert keys.shape == (1, 1, 2, 2)
    assert mask is None
    with pytest.raises(ValueError, match="do not fit 4"):
        cache.extend(one, one)


def test_tokens_of_a_picture_see_one_another() -> None:
    mask = first_mask(6, 2, slice(1, 4))
    assert mask is not None
    assert mask.int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [0, 1, 1, 1, 0, 0],
        [0, 0, 1, 1, 0, 0],
        [0, 0, 0, 1, 1, 0],
        [0, 0, 0, 0, 1, 1],
    ]
    assert first_mask(6, 6, None) is None
    assert first_mask(6, None, None) is None
