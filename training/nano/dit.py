"""The diffusion transformer of nano with its text side: configuration, initial weights, files.

The layout is that of LTX-2 (19B): both streams, both cross-modal attentions, caption projections.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from diffsynth.loader import NetworkKind
from diffsynth.models.ltx2.connectors import KEY_PREFIXES as CONNECTOR_PREFIXES
from diffsynth.models.ltx2.transformer import LTX2Transformer, TransformerConfig
from diffsynth.models.ltx2.transformer_config import FILE_PREFIX
from training.nano.parts import load_part
from training.nano.prompts import TextModel, TextSettings, connector_keys, gemma_section, write_gemma

NAME = "transformer"
GEMMA = "gemma"
"""Folder of the text model, beside the file of the rest."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TransformerSizes:
    """Sizes of the network; training takes the channels from the latents."""

    layers: int = 4
    heads: int = 4
    head_dim: int = 48
    audio_head_dim: int = 24
    video_channels: int = 64
    audio_channels: int = 128


def config_section(sizes: TransformerSizes, text: TextSettings) -> dict[str, Any]:
    """The section ``transformer`` of the checkpoint's metadata."""
    width, audio_width = sizes.heads * sizes.head_dim, sizes.heads * sizes.audio_head_dim
    return connector_keys(text) | {
        "_class_name": "AVTransformer3DModel",
        "activation_fn": "gelu-approximate",
        "attention_bias": True,
        "attention_head_dim": sizes.head_dim,
        "attention_type": "default",
        "audio_attention_head_dim": sizes.audio_head_dim,
        "audio_cross_attention_dim": audio_width,
        "audio_in_channels": sizes.audio_channels,
        "audio_num_attention_heads": sizes.heads,
        "audio_out_channels": sizes.audio_channels,
        "audio_positional_embedding_max_pos": [20],
        "av_ca_timestep_scale_multiplier": 1000.0,
        "av_cross_ada_norm": True,
        "causal_temporal_positioning": True,
        "cross_attention_dim": width,
        "cross_attention_norm": True,
        "double_self_attention": False,
        "dropout": 0.0,
        "frequencies_precision": "float64",
        "in_channels": sizes.video_channels,
        "norm_elementwise_affine": False,
        "norm_eps": 1e-6,
        "num_attention_heads": sizes.heads,
        "num_layers": sizes.layers,
        "out_channels": sizes.video_channels,
        "positional_embedding_max_pos": [20, 2048, 2048],
        "positional_embedding_theta": 10000.0,
        "positional_embedding_type": "rope",
        "qk_norm": "rms_norm",
        "rope_type": "split",
        "standardization_norm": "rms_norm",
        "timestep_scale_multiplier": 1000,
        "use_audio_video_cross_attention": True,
        "use_middle_indices_grid": True,
    }


class NanoTransformer(nn.Module):
    """Text model, connectors and diffusion transformer: all that turns captions and noise into velocities."""

    def __init__(self, section: Mapping[str, Any], gemma: Mapping[str, Any]) -> None:
        """Initial weights come from torch's generator; before the first step the network predicts zeros.

        Args:
            section: ``transformer`` of the checkpoint.
            gemma: ``config.json`` of the text model.
        """
        super().__init__()
        self.section = dict(section)
        self.text = TextModel(section, gemma)
        self.transformer = LTX2Transformer(TransformerConfig.from_sections({NAME: self.section}))
        _initialise(self.transformer)

    @classmethod
    def of_sizes(cls, sizes: TransformerSizes, text: TextSettings, vocab_size: int) -> Self:
        """A new one."""
        return cls(config_section(sizes, text), gemma_section(text, vocab_size))

    @classmethod
    def load(cls, folder: Path, device: torch.device | str, dtype: torch.dtype) -> Self:
        """What :meth:`save` wrote, frozen."""
        text = folder / GEMMA
        with safe_open(folder / f"{NAME}.safetensors", framework="pt") as file:
            section = json.loads(file.metadata()["config"])[NAME]
        network = cls(section, json.loads((text / "config.json").read_text(encoding="utf-8")))
        for kind, module, where in (
            (NetworkKind.TRANSFORMER, network.transformer, folder),
            (NetworkKind.TEXT_CONNECTORS, network.text.connectors, folder),
            (NetworkKind.GEMMA, network.text.gemma, text),
        ):
            module.load_state_dict(load_part(where, kind, "cpu", dtype).state_dict())
        return network.to(device, dtype).eval().requires_grad_(False)

    def save(self, folder: Path) -> None:
        """Write ``transformer.safetensors`` (bfloat16, keys and metadata of a checkpoint) and ``gemma/``."""
        # The first file prefix of a part of the connectors is the official one.
        files = {module: file for file, module in reversed(CONNECTOR_PREFIXES.items())}
        tensors = {f"{FILE_PREFIX}{key}": value for key, value in self.transformer.state_dict().items()}
        for key, value in self.text.connectors.state_dict().items():
            stem = f"{key.split('.', 1)[0]}."
            tensors[files[stem] + key.removeprefix(stem)] = value
        folder.mkdir(parents=True, exist_ok=True)
        stored = {key: _stored(value) for key, value in tensors.items()}
        save_file(stored, folder / f"{NAME}.safetensors", {"config": json.dumps({NAME: self.section})})
        write_gemma(folder / GEMMA, self.text)


def _stored(value: Tensor) -> Tensor:
    return value.detach().to("cpu", torch.bfloat16).contiguous()


@torch.no_grad()
def _initialise(network: LTX2Transformer) -> None:
    """Residual branches begin at zero with open gates, timesteps without effect."""
    for name, parameter in network.named_parameters():
        if name.endswith(("to_out.0.weight", "ff.net.2.weight", "proj_out.weight")) or "adaln" in name:
            if "emb.timestep_embedder" not in name:
                nn.init.zeros_(parameter)
        elif "scale_shift_table" in name and parameter.shape[0] > 2:
            gates = (2, 5) if parameter.shape[0] == 6 else (4,)
            for row in gates:
                parameter[row] = 1.0
        elif name.endswith(".bias"):
            nn.init.zeros_(parameter)
        elif parameter.ndim == 2 and "table" not in name:
            nn.init.normal_(parameter, std=1 / math.sqrt(parameter.shape[1]))
