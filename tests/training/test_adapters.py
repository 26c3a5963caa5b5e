"""Factors over a frozen base, and the file that they become."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from diffsynth.errors import RequestError
from diffsynth.lora import linear_shapes, read_lora
from diffsynth.lora.official import official_metadata, official_tensors
from diffsynth.models.ltx2.transformer import LTX2Transformer
from diffsynth.training.adapters import ATTENTION_TARGETS, TrainableLora
from diffsynth.training.samples import save_tensors


def lora(network: LTX2Transformer, *targets: str, rank: int = 4, alpha: float = 4.0) -> TrainableLora:
    generator = torch.Generator().manual_seed(0)
    return TrainableLora(network, targets or ATTENTION_TARGETS, rank=rank, alpha=alpha, generator=generator)


def test_targets_match_whole_last_parts(network: LTX2Transformer) -> None:
    blocks = len(network.transformer_blocks)
    assert len(lora(network).layers) == blocks * 6 * 4
    assert list(lora(network, "attn1.to_k").layers) == [
        f"transformer_blocks.{i}.attn1.to_k" for i in range(blocks)
    ]


def test_unknown_target_is_named_with_near_ones(network: LTX2Transformer) -> None:
    with pytest.raises(RequestError, match=r"'to_qq'.*to_q"):
        lora(network, "to_k", "to_qq")


def test_nothing_changes_at_the_start_and_after_detaching(network: LTX2Transformer) -> None:
    layer = network.transformer_blocks[0].attn1.to_q
    x = torch.randn(2, layer.in_features)
    before = layer(x)
    adapters = lora(network)
    assert torch.equal(layer(x), before)
    torch.nn.init.ones_(adapters.layers["transformer_blocks.0.attn1.to_q"].up)
    assert not torch.equal(layer(x), before)
    adapters.detach()
    assert torch.equal(layer(x), before)


def test_only_the_factors_learn(network: LTX2Transformer) -> None:
    adapters = lora(network)
    assert all(not parameter.requires_grad for parameter in network.parameters())
    assert all(parameter.requires_grad for parameter in adapters.parameters().values())
    assert {p.dtype for p in adapters.parameters().values()} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reader_gives_every_bit_back(network: LTX2Transformer, tmp_path: Path, dtype: torch.dtype) -> None:
    adapters = lora(network)
    for layer in adapters.layers.values():
        torch.nn.init.normal_(layer.up)
    file = tmp_path / "lora.safetensors"
    metadata = official_metadata("LTX-2", {"steps": 3})
    save_tensors(file, official_tensors(adapters.updates(), dtype), metadata)
    shapes = linear_shapes(network)
    read = read_lora(file, shapes.keys(), shapes)
    assert (read.report.format, read.report.rank, read.report.made_for) == ("official", 4, "LTX-2")
    assert read.updates.keys() == adapters.layers.keys()
    for name, update in read.updates.items():
        layer = adapters.layers[name]
        assert update.down is not None
        assert update.up is not None
        assert update.scale == 1
        assert torch.equal(update.down, layer.down.to(dtype))
        assert torch.equal(update.up, layer.up.to(dtype))
    with safe_open(file, framework="pt") as opened:
        assert json.loads(opened.metadata()["training"]) == {"steps": 3}


def test_alpha_other_than_rank_is_in_the_weights(network: LTX2Transformer) -> None:
    adapters = lora(network, "attn1.to_q", rank=4, alpha=2.0)
    name, layer = next(iter(adapters.layers.items()))
    torch.nn.init.normal_(layer.up)
    tensors = official_tensors(adapters.updates(), torch.float32)
    x = torch.randn(3, layer.down.shape[1])
    down, up = (tensors[f"diffusion_model.{name}.lora_{side}.weight"] for side in "AB")
    torch.testing.assert_close(x @ down.T @ up.T, layer(x))
