"""Tiny transformers and inputs for the tests of the transformer and of what is built on it."""

from typing import Any

import torch
from torch import Tensor

from diffsynth.models.ltx2.transformer import LTX2Transformer, Modality, TransformerConfig

TOKENS = {"video": 12, "audio": 5}
CHANNELS = {"video": 6, "audio": 4}
VARIANTS = ("ltx-2", "ltx-2.3")


def tiny_config(variant: str = "ltx-2.3", **changes: Any) -> TransformerConfig:
    """Three blocks, four heads, video width 32 and audio width 16."""
    newer = variant == "ltx-2.3"
    values: dict[str, Any] = {
        "num_layers": 3,
        "num_attention_heads": 4,
        "attention_head_dim": 8,
        "in_channels": CHANNELS["video"],
        "out_channels": CHANNELS["video"],
        "cross_attention_dim": 32,
        "caption_channels": 12,
        "norm_eps": 1e-6,
        "positional_embedding_theta": 10000.0,
        "positional_embedding_max_pos": (20, 2048, 2048),
        "audio_num_attention_heads": 4,
        "audio_attention_head_dim": 4,
        "audio_in_channels": CHANNELS["audio"],
        "audio_out_channels": CHANNELS["audio"],
        "audio_cross_attention_dim": 16,
        "av_ca_timestep_scale_multiplier": 1000.0,
        "rope_type": "split",
        "frequencies_precision": "float64",
        "apply_gated_attention": newer,
        "cross_attention_adaln": newer,
        "caption_proj_before_connector": newer,
    }
    return TransformerConfig(**(values | changes))


def tiny_network(variant: str = "ltx-2.3", **changes: Any) -> LTX2Transformer:
    """With random weights everywhere, tables included; the same on every call."""
    network = LTX2Transformer(tiny_config(variant, **changes))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return network


def intervals(tokens: int, axes: int, batch: int = 2) -> Tensor:
    """(B, n, T, 2) positions: time in steps of 0.04 s, the other axes in steps of 32 px."""
    starts = torch.arange(tokens, dtype=torch.float32)
    steps = torch.tensor([0.04, 32.0, 32.0])[:axes, None]
    return torch.stack([starts * steps, (starts + 1) * steps], dim=-1).expand(batch, -1, -1, -1).contiguous()


def tiny_modality(
    stream: str, config: TransformerConfig, *, batch: int = 2, seed: int = 0, **changes: Any
) -> Modality:
    """A stream whose first third of tokens is kept (timestep 0) and the rest at the sigma of its sample."""
    generator = torch.Generator().manual_seed(100 * seed + len(stream) + ord(stream[0]))
    tokens = TOKENS[stream]
    width = config.width if stream == "video" else config.audio_width
    text = width if config.caption_proj_before_connector else config.caption_channels
    sigma = torch.linspace(0.3, 0.9, batch)
    kept = (torch.arange(tokens) >= tokens // 3).float()
    values: dict[str, Any] = {
        "latent": torch.randn(batch, tokens, CHANNELS[stream], generator=generator),
        "sigma": sigma,
        "timesteps": (sigma[:, None] * kept)[..., None],
        "positions": intervals(tokens, 3 if stream == "video" else 1, batch),
        "context": torch.randn(batch, 7, text, generator=generator),
    }
    return Modality(**(values | changes))


def tiny_pair(
    config: TransformerConfig, *, batch: int = 2, seed: int = 0, **changes: Any
) -> tuple[Modality, Modality]:
    """Both streams; ``changes`` apply to both."""
    return (
        tiny_modality("video", config, batch=batch, seed=seed, **changes),
        tiny_modality("audio", config, batch=batch, seed=seed, **changes),
    )
