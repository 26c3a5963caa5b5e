import json
from pathlib import Path
from typing import Any

import pytest
import torch

from diffsynth.errors import CheckpointError
from diffsynth.models.ltx2.transformer import (
    EXCLUDED_PREFIXES,
    KEY_PREFIXES,
    LTX2Transformer,
    TransformerConfig,
)
from tests.models.ltx2.tiny import VARIANTS, tiny_config

MANIFESTS = Path(__file__).parents[2] / "manifest"
CHECKPOINTS = ("ltx-2-19b", "ltx-2.3-22b")
(PREFIX,) = KEY_PREFIXES
COUNTS = {"ltx-2-19b": (3510, 18_876_174_592), "ltx-2.3-22b": (4186, 18_988_838_144)}


def read(name: str) -> dict[str, Any]:
    parsed: dict[str, Any] = json.loads((MANIFESTS / name).read_text(encoding="utf-8"))
    return parsed


def shapes(checkpoint: str) -> dict[str, tuple[int, ...]]:
    return {key: tuple(shape) for key, (_, shape) in read(f"{checkpoint}.transformer.json").items()}


def sections(checkpoint: str, **changes: Any) -> dict[str, Any]:
    config = read(f"config.{checkpoint}.transformer.json")
    config["transformer"].update(changes)
    return config


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_network_holds_exactly_the_keys_of_the_checkpoint(checkpoint: str) -> None:
    with torch.device("meta"):
        network = LTX2Transformer(TransformerConfig.from_sections(sections(checkpoint)))
    own = {PREFIX + key: tuple(value.shape) for key, value in network.state_dict().items()}
    assert own == shapes(checkpoint)
    assert not list(network.buffers())
    total = sum(parameter.numel() for parameter in network.parameters())
    assert (len(own), total) == COUNTS[checkpoint]
    assert not any(key.startswith(EXCLUDED_PREFIXES) for key in own)


@pytest.mark.parametrize("with_prefix", [True, False])
@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_shapes_alone_tell_the_configuration(checkpoint: str, with_prefix: bool) -> None:
    found = {
        key if with_prefix else key.removeprefix(PREFIX): shape for key, shape in shapes(checkpoint).items()
    }
    assert TransformerConfig.infer(found) == TransformerConfig.from_sections(sections(checkpoint), keys=found)


def test_text_side_and_training_keys_change_nothing() -> None:
    config = TransformerConfig.from_sections(sections("ltx-2.3-22b"))
    changed = sections("ltx-2.3-22b", connector_num_layers=3, audio_connector_num_layers=5, dropout=0.1)
    assert TransformerConfig.from_sections(changed) == config


@pytest.mark.parametrize(
    "changes",
    [
        {"a_key_of_tomorrow": 1},
        {"connector_of_tomorrow": 1},
        {"has_audio": False},
        {"ff_bias": False},
        {"use_keyframes_abs_pos_embedding": True},
        {"qk_norm": "layer_norm"},
        {"rope_type": "spiral"},
        {"audio_num_attention_heads": 16},
    ],
)
def test_what_the_network_does_not_implement_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match=r"|".join(changes) + "|audio heads"):
        TransformerConfig.from_sections(sections("ltx-2.3-22b", **changes))


def test_a_file_of_another_model_is_refused() -> None:
    with pytest.raises(CheckpointError, match="no section 'transformer'"):
        TransformerConfig.from_sections({"vae": {}})
    with pytest.raises(CheckpointError, match="not an LTX-2 transformer"):
        TransformerConfig.infer({"encoder.conv_in.weight": (8, 3, 3, 3)})


def test_absent_keys_mean_what_the_format_says() -> None:
    section = sections("ltx-2-19b")
    for key in ("rope_type", "frequencies_precision", "av_ca_timestep_scale_multiplier"):
        del section["transformer"][key]
    config = TransformerConfig.from_sections(section)
    assert (config.rope_type, config.frequencies_precision) == ("interleaved", "float32")
    assert config.av_ca_timestep_scale_multiplier == 1


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_file_without_audio_keys_is_a_video_only_network(variant: str) -> None:
    with torch.device("meta"):
        network = LTX2Transformer(tiny_config(variant, has_audio=False))
    keys = network.state_dict()
    assert not any("audio" in key or "av_ca" in key or "a2v" in key for key in keys)
    assert not TransformerConfig.infer({k: tuple(v.shape) for k, v in keys.items()}).has_audio
    assert not TransformerConfig.from_sections(sections("ltx-2-19b"), keys=keys).has_audio
