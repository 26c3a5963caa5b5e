"""Text features and connectors beside the official ones, Gemma beside that of transformers, at random.

Each becomes a golden case in memory, which the runner of its component compares.  Skipped without the
official package; to run it: ``pip install --no-deps ltx-core==1.0.0 scipy``, then ``pytest tests/oracle``.
"""

import random
from typing import Any

import pytest
import torch
from torch import nn

from tests.oracle.in_memory import compare
from tests.runners import text

connectors = pytest.importorskip("ltx_core.text_encoders.gemma.embeddings_connector")
extractors = pytest.importorskip("ltx_core.text_encoders.gemma.feature_extractor")
processors = pytest.importorskip("ltx_core.text_encoders.gemma.embeddings_processor")
rope = pytest.importorskip("ltx_core.model.transformer.rope")
transformers = pytest.importorskip("transformers")

SEEDS = pytest.mark.parametrize("seed", range(5))
PREFIXES = {
    "feature_extractor.": "text_embedding_projection.",
    "video_connector.": "model.diffusion_model.video_embeddings_connector.",
    "audio_connector.": "model.diffusion_model.audio_embeddings_connector.",
}
NEWER = {
    "caption_proj_before_connector": True,
    "caption_proj_input_norm": False,
    "caption_projection_first_linear": False,
    "caption_projection_second_linear": False,
    "text_encoder_norm_type": "per_token_rms",
}


def randomised(network: nn.Module) -> Any:
    for name, tensor in network.state_dict().items():
        noise = torch.randn(tensor.shape)
        norm = tensor.ndim == 1 and "norm" in name
        tensor.copy_(noise / tensor.shape[1] ** 0.5 if tensor.ndim > 1 else 0.2 * noise + norm)
    return network.float().eval()


def section(pick: random.Random, hidden: int) -> dict[str, Any]:
    """The section ``transformer`` of a checkpoint of either form."""
    newer, heads = pick.random() < 0.5, pick.choice([1, 2, 3])
    audio_heads = pick.choice([1, 2]) if newer else heads
    head = pick.choice([4, 6]) if newer else hidden // heads
    audio_head = pick.choice([2, 4]) if newer else head
    return (NEWER if newer else {}) | {
        "caption_channels": hidden,
        "num_attention_heads": heads,
        "attention_head_dim": head,
        "audio_num_attention_heads": audio_heads,
        "audio_attention_head_dim": audio_head,
        "connector_num_attention_heads": heads,
        "connector_attention_head_dim": head,
        "audio_connector_num_attention_heads": audio_heads,
        "audio_connector_attention_head_dim": audio_head,
        "connector_num_layers": pick.choice([1, 2, 3]),
        "connector_num_learnable_registers": pick.choice([2, 3, 8]),
        "connector_positional_embedding_max_pos": [pick.choice([1, 48, 4096])],
        "connector_apply_gated_attention": pick.random() < 0.5,
        "rope_type": pick.choice(["split", "interleaved"]),
        "frequencies_precision": pick.choice(["float64", "float32"]),
    }


def official(stated: dict[str, Any], num_states: int) -> Any:
    """Feature extractor and connectors; the official configurators fix the sizes of the text model."""

    def connector(prefix: str) -> Any:
        return connectors.Embeddings1DConnector(
            attention_head_dim=stated[f"{prefix}connector_attention_head_dim"],
            num_attention_heads=stated[f"{prefix}connector_num_attention_heads"],
            num_layers=stated["connector_num_layers"],
            positional_embedding_max_pos=stated["connector_positional_embedding_max_pos"],
            num_learnable_registers=stated["connector_num_learnable_registers"],
            rope_type=rope.LTXRopeType(stated["rope_type"]),
            double_precision_rope=stated["frequencies_precision"] == "float64",
            apply_gated_attention=stated["connector_apply_gated_attention"],
        )

    video, audio, hidden = connector(""), connector("audio_"), stated["caption_channels"]
    inputs = hidden * num_states
    if "text_encoder_norm_type" in stated:
        streams = (nn.Linear(inputs, stream.inner_dim) for stream in (video, audio))
        extractor = extractors.FeatureExtractorV2(next(streams), hidden, next(streams))
    else:
        extractor = extractors.FeatureExtractorV1(nn.Linear(inputs, hidden, bias=False), is_av=True)
    parts = {"video_connector": video, "audio_connector": audio, "feature_extractor": extractor}
    return randomised(processors.EmbeddingsProcessor(**parts))


@SEEDS
@torch.inference_mode()
def test_features_and_connectors(seed: int) -> None:
    """Rows with no, one, some and only valid tokens, padded on either side."""
    pick = random.Random(torch.manual_seed(seed).initial_seed())
    stated, num_states = section(pick, 12), pick.choice([2, 5])
    network = official(stated, num_states)
    length = stated["connector_num_learnable_registers"] * pick.choice([2, 3])
    lengths = [0, 1, pick.randint(1, length), length]
    left = torch.tensor([[0] * (length - n) + [1] * n for n in lengths])
    states = torch.randn(len(lengths), length, 12, num_states) * 5
    # One row at a time and padding on the left: all that the official code can do.
    rows = [network.process_hidden_states(s[None], m[None]) for s, m in zip(states, left, strict=True)]
    video, audio, _ = (torch.cat(each) for each in zip(*rows, strict=True))
    if pick.random() < 0.5:
        states = torch.stack([row.roll(n - length, 0) for row, n in zip(states, lengths, strict=True)])
        left = left.flip(1)
    tensors = {
        f"weights/{file}{key.removeprefix(own)}": tensor
        for key, tensor in network.state_dict().items()
        for own, file in PREFIXES.items()
        if key.startswith(own)
    }
    tensors |= {"in/hidden_states": states, "in/attention_mask": left}
    tensors |= {"out/video_context": video, "out/audio_context": audio}
    compare(text.post, {"config": {"transformer": stated}}, tensors, 3e-5)


@SEEDS
@torch.inference_mode()
def test_hidden_states_of_gemma(seed: int) -> None:
    pick = random.Random(torch.manual_seed(seed).initial_seed())
    num_layers = pick.choice([1, 3, 5])
    config = {
        "hidden_size": 24,
        "intermediate_size": 32,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": pick.choice([1, 2, 4]),
        "head_dim": pick.choice([4, 8]),
        "query_pre_attn_scalar": pick.choice([16, 20]),
        "sliding_window": pick.choice([1, 6, 64]),
        "vocab_size": 64,
        "pad_token_id": 0,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": pick.choice([2.0, 8.0]), "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
        "layer_types": pick.choices(["sliding_attention", "full_attention"], k=num_layers),
    }
    network = randomised(transformers.Gemma3TextModel(transformers.Gemma3TextConfig(**config)))
    length = 20
    mask = torch.tensor([[0] * (length - n) + [1] * n for n in (1, pick.randint(2, 19), length)])
    ids = torch.randint(2, 64, mask.shape) * mask
    states = network(ids, attention_mask=mask, output_hidden_states=True, use_cache=False).hidden_states
    tensors = {f"weights/language_model.model.{key}": value for key, value in network.state_dict().items()}
    tensors |= {"in/input_ids": ids, "in/attention_mask": mask}
    tensors["out/hidden_states"] = torch.stack(states, dim=-1)
    kind = {"model_type": "gemma3", "text_config": {"model_type": "gemma3_text"} | config}
    compare(text.gemma3, {"gemma_config": kind}, tensors, 3e-5)
