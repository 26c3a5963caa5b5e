"""An adapter of ours in diffusers, where it is installed with peft: the same change of the same layers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from diffsynth.lora import linear_shapes, read_lora
from diffsynth.models.ltx2.transformer import LTX2Transformer
from diffsynth.training.config_file import read_config
from diffsynth.training.preprocess import preprocess
from diffsynth.training.trainer import train
from tests.training.clips import write_config, write_data_set

NAMES = {
    "patchify_proj": "proj_in",
    "audio_patchify_proj": "audio_proj_in",
    "adaln_single.linear": "time_embed.linear",
}
"""Layers that diffusers calls otherwise; blocks have their own names there too."""
TARGETS = ("to_k", "to_q", "to_v", "to_out.0", "net.0.proj", "net.2", *NAMES)


def in_diffusers(network: LTX2Transformer) -> Any:
    """A transformer of the same sizes, with random weights."""
    from diffusers import LTX2VideoTransformer3DModel

    config, audio = network.config, network.audio_patchify_proj
    return LTX2VideoTransformer3DModel(
        in_channels=config.in_channels,
        out_channels=config.in_channels,
        num_attention_heads=config.num_attention_heads,
        attention_head_dim=config.attention_head_dim,
        cross_attention_dim=config.cross_attention_dim,
        audio_in_channels=audio.in_features,
        audio_out_channels=audio.in_features,
        audio_num_attention_heads=config.audio_num_attention_heads,
        audio_attention_head_dim=config.audio_attention_head_dim,
        audio_cross_attention_dim=config.audio_cross_attention_dim,
        num_layers=len(network.transformer_blocks),
        caption_channels=16,
    )


@pytest.mark.filterwarnings("ignore")
def test_the_same_change_of_the_same_layers(
    network: LTX2Transformer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    pytest.importorskip("peft")
    pytest.importorskip("diffusers")
    from diffusers.loaders.lora_pipeline import LTX2LoraLoaderMixin

    write_data_set(tmp_path)
    targets = ", ".join(f'"{name}"' for name in TARGETS)
    config = read_config(
        write_config(
            tmp_path,
            training="steps = 2\nlearning_rate = 1e-2",
            lora=f"rank = 4\nalpha = 2.0\ntargets = [{targets}]",
        )
    )
    preprocess(config)
    file = train(config)
    other = in_diffusers(network)
    state: dict[str, Any] = LTX2LoraLoaderMixin.lora_state_dict(file)
    other.load_lora_adapter(state, prefix="transformer", adapter_name="ours")
    changed: dict[str, Callable[[str], torch.Tensor]] = {
        name: module.get_delta_weight
        for name, module in other.named_modules()
        if hasattr(module, "get_delta_weight") and "ours" in module.lora_A
    }
    shapes = linear_shapes(network)
    updates = read_lora(file, shapes.keys(), shapes).updates
    assert len(changed) == len(updates) > 60
    for name, update in updates.items():
        assert update.up is not None
        assert update.down is not None
        delta = changed[NAMES.get(name, name)]("ours")
        torch.testing.assert_close(delta, update.scale * update.up.float() @ update.down.float())
