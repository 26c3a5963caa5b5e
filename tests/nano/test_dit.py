"""The transformer of nano: its files, and that it begins as nothing."""

from pathlib import Path

import torch

from diffsynth.loader import NetworkKind, WeightFiles, load_network, recognise
from training.nano.dit import NanoTransformer, TransformerSizes
from training.nano.prompts import TextSettings


def test_files_load_by_the_ordinary_loader(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = TransformerSizes(layers=2, heads=2, head_dim=24, audio_head_dim=12)
    network = NanoTransformer.of_sizes(sizes, TextSettings(), 45)
    network.save(tmp_path)
    files = WeightFiles(tmp_path / "transformer.safetensors")
    assert recognise(files) == [NetworkKind.TRANSFORMER, NetworkKind.TEXT_CONNECTORS]
    loaded = load_network(NetworkKind.TRANSFORMER, files, dtype=torch.bfloat16, device="cpu")
    assert loaded.config == network.transformer.config
    own = network.transformer.bfloat16().state_dict()
    assert all(torch.equal(value, own[name]) for name, value in loaded.state_dict().items())
    connectors = load_network(NetworkKind.TEXT_CONNECTORS, files, dtype=torch.bfloat16, device="cpu")
    assert connectors.config == network.text.connectors.config
    assert connectors.config.text_length == 32


def test_sizes_are_those_of_the_budget() -> None:
    with torch.device("meta"):
        network = NanoTransformer.of_sizes(TransformerSizes(), TextSettings(), 45)
    sizes = [sum(2 * p.numel() for p in part.parameters()) for part in (network.transformer, network.text)]
    assert sizes[0] <= 8.9e6
    assert sizes[1] <= 0.5e6
