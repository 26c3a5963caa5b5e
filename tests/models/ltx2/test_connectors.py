import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diffsynth.errors import CheckpointError
from diffsynth.models.ltx2.connectors import (
    KEY_PREFIXES,
    ConnectorConfig,
    EmbeddingsConnector,
    TextConnectors,
    TextConnectorsConfig,
)
from diffsynth.models.ltx2.feature_extractor import PromptFeatures
from diffsynth.models.ltx2.transformer_config import TransformerConfig

MANIFEST = Path(__file__).parents[2] / "manifest"
MODELS = {"ltx-2-19b": 59, "ltx-2.3-22b": 262}


def load(name: str) -> dict[str, Any]:
    return json.loads((MANIFEST / f"{name}.json").read_text())


def shapes_of(name: str) -> dict[str, tuple[int, ...]]:
    return {key: tuple(shape) for key, (_, shape) in load(f"{name}.text").items()}


def section(name: str = "ltx-2.3-22b", **changes: Any) -> dict[str, Any]:
    return {"transformer": load(f"config.{name}.transformer")["transformer"] | changes}


def module_key(key: str) -> str:
    (prefix,) = [p for p in KEY_PREFIXES if key.startswith(p)]
    return KEY_PREFIXES[prefix] + key.removeprefix(prefix)


def tiny(*, gated: bool = True, seed: int = 3) -> EmbeddingsConnector:
    torch.manual_seed(seed)
    config = ConnectorConfig(num_layers=2, num_heads=2, head_dim=8, num_registers=4, gated=gated, max_pos=64)
    connector = EmbeddingsConnector(config)
    for parameter in connector.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return connector.requires_grad_(False)


def rows(*lengths: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(4)
    return [torch.randn(n, 16, generator=generator) for n in lengths]


@pytest.mark.parametrize(("name", "count"), MODELS.items())
def test_keys_and_shapes_are_those_of_the_released_checkpoint(name: str, count: int) -> None:
    shapes = shapes_of(name)
    with torch.device("meta"):
        model = TextConnectors(TextConnectorsConfig.from_sections(section(name), shapes))
    built = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    assert built == {module_key(key): shape for key, shape in shapes.items()}
    assert len(built) == count
    assert not list(model.buffers())


@pytest.mark.parametrize("name", MODELS)
def test_shapes_alone_tell_the_released_configuration(name: str) -> None:
    shapes = shapes_of(name)
    config = TextConnectorsConfig.from_sections(section(name))
    assert TextConnectorsConfig.infer(shapes) == config
    assert TextConnectorsConfig.infer({module_key(key): shape for key, shape in shapes.items()}) == config
    assert TextConnectorsConfig.from_sections(load(f"config.{name}.text"), shapes) == config


def test_the_text_length_is_that_of_the_configuration() -> None:
    assert TextConnectorsConfig.from_sections(section()).text_length == 1024
    assert TextConnectorsConfig.from_sections(section(text_length=256)).text_length == 256
    with pytest.raises(CheckpointError, match="text length of 100 for 128 registers"):
        TextConnectorsConfig.from_sections(section(text_length=100))


def test_audio_falls_back_to_the_plain_keys_field_by_field() -> None:
    config = TextConnectorsConfig.from_sections(section())
    assert (config.video.num_heads, config.video.head_dim, config.video.num_layers) == (32, 128, 8)
    assert (config.audio.num_heads, config.audio.head_dim, config.audio.num_layers) == (32, 64, 8)
    assert config.audio.gated
    own = TextConnectorsConfig.from_sections(section(audio_connector_num_layers=3))
    assert (own.video.num_layers, own.audio.num_layers) == (8, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"connector_new_trick": 1}, "connector_new_trick"),
        ({"caption_proj_input_norm": True}, "unknown text path"),
        ({"caption_proj_before_connector": None}, "unknown text path"),
        ({"text_encoder_norm_type": "layer"}, "unknown text path"),
        ({"connector_norm_output": False}, "connector_norm_output"),
        ({"rope_type": "spiral"}, "unknown RoPE spiral"),
        ({"frequencies_precision": "float16"}, "float16"),
        ({"connector_num_learnable_registers": 0}, "registers"),
        ({"connector_positional_embedding_max_pos": [20, 2048]}, "one axis"),
        ({"connector_attention_head_dim": 64}, r"\(4096, 2048\) and connectors \(2048, 2048\)"),
    ],
)
def test_other_models_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        TextConnectorsConfig.from_sections(section(**change))
    assert caught.value.hint


def test_keys_of_the_transformer_are_known_here_too() -> None:
    keys = {field.name for field in fields(TransformerConfig)} - {"has_audio"}
    expected = TextConnectorsConfig.from_sections(section())
    absent: dict[str, Any] = dict.fromkeys(keys - section()["transformer"].keys())
    assert TextConnectorsConfig.from_sections(section(**absent)) == expected


def test_files_without_connectors_are_refused() -> None:
    with pytest.raises(CheckpointError, match="no section 'transformer'"):
        TextConnectorsConfig.from_sections({"vae": {}})
    with pytest.raises(CheckpointError, match=r"aggregate_embed\.weight is missing"):
        TextConnectorsConfig.infer({"model.diffusion_model.proj_out.weight": (128, 4096)})
    shapes = shapes_of("ltx-2-19b")
    narrow = {key: shape if "registers" not in key else (128, 100) for key, shape in shapes.items()}
    with pytest.raises(CheckpointError, match="does not tell the number of heads"):
        TextConnectorsConfig.infer(narrow)
    with pytest.raises(CheckpointError, match="do not divide by 3841"):
        TextConnectorsConfig.from_sections(section("ltx-2-19b", caption_channels=3841), shapes)


def test_registers_follow_the_features_at_their_absolute_position() -> None:
    connector = tiny()
    (features,) = rows(6)
    out = connector.with_registers(features, 12)
    assert out.shape == (1, 12, 16)
    assert torch.equal(out[0, :6], features)
    assert torch.equal(out[0, 6:], connector.learnable_registers[[2, 3, 0, 1, 2, 3]])
    (full,) = rows(12)
    assert torch.equal(connector.with_registers(full, 12)[0], full)
    assert connector.with_registers(full.bfloat16(), 16).dtype == torch.bfloat16


@pytest.mark.parametrize(("count", "length"), [(3, 10), (13, 12)])
def test_context_length_is_checked(count: int, length: int) -> None:
    with pytest.raises(ValueError, match=f"length={length} must be a multiple of 4 and hold {count} tokens"):
        tiny()(rows(count), length)


@pytest.mark.parametrize("gated", [False, True])
def test_prompts_of_a_batch_are_independent_and_blocks_run_once(gated: bool) -> None:
    connector = tiny(gated=gated)
    calls: list[int] = []
    for i, block in enumerate(connector.transformer_1d_blocks):
        block.register_forward_pre_hook(lambda _m, _a, i=i: calls.append(i))
    features = rows(1, 5, 8)
    together = connector(features, 8)
    assert calls == [0, 1]
    for row, context in zip(features, together, strict=True):
        assert torch.equal(connector([row], 8)[0], context)


def test_context_is_normalised_and_every_token_sees_every_other() -> None:
    connector = tiny()
    (features,) = rows(5)
    (context,) = connector([features], 8)
    assert context.shape == (1, 8, 16)
    torch.testing.assert_close(context.square().mean(-1), torch.ones(1, 8), atol=1e-4, rtol=0)
    features[-1] += 1.0
    (changed,) = connector([features], 8)
    assert ((changed - context).abs().amax(-1) > 1e-4).all()


def test_rotation_covers_the_frequencies_of_the_whole_width() -> None:
    rope = tiny().rope(8, torch.device("cpu"))
    assert rope.cos.shape == rope.sin.shape == (1, 2, 8, 4)
    frequencies = 10000.0 ** (torch.arange(8).double() / 7) * torch.pi / 2
    angle = (2 * 3 / 64 - 1) * frequencies
    torch.testing.assert_close(rope.cos[0, :, 3].flatten().double(), angle.cos(), atol=2e-3, rtol=0)


def test_bfloat16_follows_float32() -> None:
    exact, rounded = tiny(), tiny().to(torch.bfloat16)
    for a, b in zip(exact(rows(5, 8), 8), rounded([r.bfloat16() for r in rows(5, 8)], 8), strict=True):
        assert b.dtype == torch.bfloat16
        assert (a - b.float()).norm() < 0.03 * a.norm()


def test_streams_go_to_their_own_connector() -> None:
    torch.manual_seed(5)
    shapes = {
        "text_embedding_projection.video_aggregate_embed.weight": (16, 24),
        "text_embedding_projection.audio_aggregate_embed.weight": (8, 24),
    }
    sizes: dict[str, Any] = {
        f"{key}_{name}": value
        for key in ("connector", "audio_connector")
        for name, value in {"num_attention_heads": 2, "num_layers": 1, "num_learnable_registers": 4}.items()
    }
    sizes |= {"caption_channels": 12, "num_attention_heads": 2, "audio_num_attention_heads": 2}
    sizes |= {"attention_head_dim": 8, "audio_attention_head_dim": 4}
    sizes |= {"connector_attention_head_dim": 8, "audio_connector_attention_head_dim": 4}
    config = TextConnectorsConfig.from_sections(section(**sizes), shapes)
    assert config.features.num_states == 2
    model = TextConnectors(config).requires_grad_(False)
    features = PromptFeatures(torch.randn(3, 16), torch.randn(3, 8))
    (context,) = model([features], 8)
    assert torch.equal(context.video, model.video_embeddings_connector([features.video], 8)[0])
    assert torch.equal(context.audio, model.audio_embeddings_connector([features.audio], 8)[0])
