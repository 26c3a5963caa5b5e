import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Gemma3TextConfig
from transformers import Gemma3TextModel as Oracle

from diffsynth.errors import CheckpointError
from diffsynth.models.gemma3 import Gemma3TextModel, rope_table
from diffsynth.models.gemma3_config import Gemma3Config, text_key

MANIFEST = Path(__file__).parents[1] / "manifest"

TINY: dict[str, Any] = {
    "model_type": "gemma3_text",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 64,
    "query_pre_attn_scalar": 20,
    "rope_theta": 1_000_000,
    "rope_local_base_freq": 10_000,
    "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
    "sliding_window": 5,
    "sliding_window_pattern": 3,
}


def shapes_of(name: str) -> dict[str, tuple[int, ...]]:
    manifest = json.loads((MANIFEST / f"{name}.json").read_text())
    return {key: tuple(shape) for key, (_, shape) in manifest.items()}


def released_config() -> dict[str, Any]:
    return json.loads((MANIFEST / "config.gemma-3-12b-it.json").read_text())


def tiny_model(seed: int = 0, dtype: torch.dtype = torch.float32) -> Gemma3TextModel:
    torch.manual_seed(seed)
    model = Gemma3TextModel(Gemma3Config.from_dict(TINY))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.to(dtype).requires_grad_(False)


def run(model: Gemma3TextModel, ids: Sequence[Tensor], **options: Any) -> list[list[Tensor]]:
    states: list[list[Tensor]] = [[] for _ in ids]
    model.hidden_states(ids, lambda _index, prompt, state: states[prompt].append(state), **options)
    return states


IDS = [torch.tensor([2, 5, 9, 11, 3, 60, 7, 8, 40]), torch.tensor([2]), torch.tensor([2, 33, 21])]


def test_keys_and_shapes_are_those_of_the_released_checkpoint() -> None:
    with torch.device("meta"):
        model = Gemma3TextModel(Gemma3Config.from_dict(released_config()))
    built = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    released = shapes_of("gemma-3-12b-it.text")
    assert built == {text_key(key): shape for key, shape in released.items()}
    assert sum(text_key(key) is not None for key in shapes_of("gemma-3-12b-it")) == len(released) == 626
    assert not list(model.buffers())


def test_shapes_tell_the_released_configuration() -> None:
    config = Gemma3Config.from_dict(released_config())
    assert Gemma3Config.infer(shapes_of("gemma-3-12b-it")) == config
    assert (
        Gemma3Config.infer({text_key(k) or k: s for k, s in shapes_of("gemma-3-12b-it.text").items()})
        == config
    )
    assert config.num_hidden_states == 49
    assert [i for i, kind in enumerate(config.layer_kinds) if kind == "full_attention"] == list(
        range(5, 48, 6)
    )
    with pytest.raises(CheckpointError, match=r"embed_tokens\.weight"):
        Gemma3Config.infer({"vision_tower.x": (1,)})


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("language_model.model.layers.3.mlp.up_proj.weight", "layers.3.mlp.up_proj.weight"),
        ("model.language_model.norm.weight", "norm.weight"),
        ("model.embed_tokens.weight", "embed_tokens.weight"),
        ("layers.0.self_attn.q_norm.weight", "layers.0.self_attn.q_norm.weight"),
        ("language_model.lm_head.weight", None),
        ("lm_head.weight", None),
        ("vision_tower.vision_model.encoder.layers.0.layer_norm1.bias", None),
        ("model.vision_tower.encoder.layers.0.layer_norm1.bias", None),
        ("model.multi_modal_projector.mm_soft_emb_norm.weight", None),
        ("model.diffusion_model.proj_out.weight", None),
        ("spiece_model", None),
    ],
)
def test_text_key(key: str, expected: str | None) -> None:
    assert text_key(key) == expected


def test_old_and_new_key_styles_mean_the_same() -> None:
    new_style = Gemma3TextConfig(**TINY).to_dict()
    assert "rope_parameters" in new_style
    assert "rope_scaling" not in new_style
    old = Gemma3Config.from_dict(TINY)
    assert Gemma3Config.from_dict(new_style) == old
    assert Gemma3Config.from_dict({"model_type": "gemma3", "text_config": TINY}) == old
    assert (old.rope_theta_full, old.rope_theta_sliding, old.rope_factor_full) == (1e6, 1e4, 8.0)


def test_absent_keys_mean_what_transformers_means_by_them() -> None:
    keys = ("model_type", "hidden_size", "intermediate_size", "num_hidden_layers")
    sparse = {key: TINY[key] for key in keys}
    assert Gemma3Config.from_dict(sparse) == Gemma3Config.from_dict(Gemma3TextConfig(**sparse).to_dict())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gemma2"}, "not Gemma 3 but 'gemma2'"),
        ({"model_type": None}, "not Gemma 3"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ({"hidden_activation": "silu"}, "hidden_activation"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 8.0}}, "yarn"),
        ({"layer_types": ["full_attention"]}, "for 1 of 5 layers"),
        ({"layer_types": ["chunked_attention"] * 5}, "chunked"),
    ],
)
def test_other_architectures_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        Gemma3Config.from_dict(TINY | change)
    assert caught.value.hint
    with pytest.raises(CheckpointError, match="lacks"):
        Gemma3Config.from_dict({"model_type": "gemma3_text"})


def test_agrees_with_transformers_on_left_padded_prompts() -> None:
    model = tiny_model()
    config = Gemma3TextConfig(**TINY, attn_implementation="eager")
    oracle = Oracle(config).eval().requires_grad_(False)
    oracle.load_state_dict(model.state_dict(), strict=True)
    length = 12
    states = run(model, IDS, length=length)
    for ids, own in zip(IDS, states, strict=True):
        pad = length - len(ids)
        result = oracle(
            input_ids=torch.cat((torch.zeros(pad, dtype=torch.int64), ids))[None],
            attention_mask=torch.tensor([[0] * pad + [1] * len(ids)]),
            output_hidden_states=True,
            use_cache=False,
        )
        assert len(own) == len(result.hidden_states) == 6
        for mine, theirs in zip(own, result.hidden_states, strict=True):
            torch.testing.assert_close(mine, theirs[:, pad:], atol=2e-5, rtol=2e-5)


def test_states_come_layer_by_layer_and_a_layer_is_called_once() -> None:
    model = tiny_model()
    calls: list[Any] = []
    for i, layer in enumerate(model.layers):
        layer.register_forward_pre_hook(lambda _m, _a, i=i: calls.append(f"layer {i}"))
    model.hidden_states(IDS, lambda index, prompt, _state: calls.append((index, prompt)))
    expected: list[Any] = []
    for i in range(5):
        expected += [(i, 0), (i, 1), (i, 2), f"layer {i}"]
    assert calls == [*expected, (5, 0), (5, 1), (5, 2)]


def test_prompts_sit_at_the_end_of_the_padded_length() -> None:
    model = tiny_model()
    seen: list[Any] = []
    model.layers[0].register_forward_pre_hook(lambda _m, arguments: seen.extend(arguments[1]))
    run(model, IDS, length=20)
    whole = rope_table(model.config, "sliding_attention", torch.arange(20))
    for ids, rope in zip(IDS, seen, strict=True):
        assert torch.equal(rope.cos, whole.cos[20 - len(ids) :])
        assert torch.equal(rope.sin, whole.sin[20 - len(ids) :])


def test_a_prompt_does_not_depend_on_its_company() -> None:
    model = tiny_model()
    together = run(model, IDS)
    for ids, states in zip(IDS, together, strict=True):
        (alone,) = run(model, [ids])
        assert all(torch.equal(a, b) for a, b in zip(alone, states, strict=True))


def test_embedding_is_scaled_in_the_compute_dtype() -> None:
    with torch.device("meta"):
        model = Gemma3TextModel(Gemma3Config.from_dict(TINY | {"hidden_size": 3840, "num_hidden_layers": 1}))
    model.embed_tokens.weight = torch.nn.Parameter(torch.ones(64, 3840, dtype=torch.bfloat16))
    ids = torch.tensor([3, 4])
    assert model.embed(ids).shape == (1, 2, 3840)
    assert (model.embed(ids) == 62.0).all()
    assert (model.embed(ids, dtype=torch.float32) == torch.tensor(3840.0).sqrt()).all()


def test_angles_stay_float32_in_a_bfloat16_model() -> None:
    model = tiny_model(dtype=torch.bfloat16)
    positions = torch.arange(1024)
    cos, _ = model.rope_tables(positions, device=torch.device("cpu"), dtype=torch.bfloat16)[
        "sliding_attention"
    ]
    exact = torch.cos(positions[:, None].double() * 10_000.0 ** (-torch.arange(8).double() / 8))
    assert (cos.double() - exact).abs().max() < 5e-3
    full = rope_table(model.config, "full_attention", torch.tensor([8.0]))
    assert full.cos[0, 0] == torch.tensor(1.0).cos()


def test_bfloat16_follows_float32() -> None:
    exact = run(tiny_model(), IDS)
    rounded = run(tiny_model(dtype=torch.bfloat16), IDS)
    for a, b in zip(exact, rounded, strict=True):
        assert b[-1].dtype == torch.bfloat16
        assert (a[-1] - b[-1].float()).norm() < 0.05 * a[-1].norm()


@pytest.mark.parametrize("count", [0, 9])
def test_number_of_tokens_is_checked(count: int) -> None:
    with pytest.raises(ValueError, match="must have 1 to 8"):
        run(tiny_model(), [torch.zeros(count, dtype=torch.int64)], length=8)
