"""The text side of nano: a tokenizer of whole words, a tiny Gemma 3, and both encoded for whole batches.

B prompts, n tokens of one, T context length, D width of the text model, L hidden states.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from torch import Tensor, nn

from diffsynth.conditioning.text import PromptTokenizer
from diffsynth.models.gemma3 import Gemma3TextModel, RopeTable
from diffsynth.models.gemma3_config import Gemma3Config
from diffsynth.models.ltx2.connectors import EmbeddingsConnector, TextConnectors, TextConnectorsConfig
from diffsynth.models.ltx2.layers import rms_norm

SPECIAL_TOKENS = ("<pad>", "<eos>", "<bos>", "<unk>")
"""With the ids that Gemma gives them."""
_EPS = 1e-6


@dataclass(frozen=True, kw_only=True, slots=True)
class TextSettings:
    """Sizes of the text side; ``length`` is T."""

    width: int = 64
    layers: int = 2
    heads: int = 2
    key_value_heads: int = 1
    inner: int = 128
    length: int = 32


def write_tokenizer(folder: Path, vocabulary: Sequence[str]) -> None:
    """Write the files of a tokenizer that reads whole words, whatever their case.

    What is not in the vocabulary leaves no trace, punctuation least of all: a word too many in a prompt
    changes nothing.
    """
    words = sorted({word for word in vocabulary if word.isalpha()})
    ids = {token: index for index, token in enumerate((*SPECIAL_TOKENS, *words))}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    known = Regex(rf"\b(?:{'|'.join(words)})\b")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(known, "removed", invert=True)
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>", "unk_token": "<unk>"}
    _write_json(
        folder / "tokenizer_config.json",
        {"tokenizer_class": "PreTrainedTokenizerFast", "padding_side": "left", **names},
    )


def gemma_section(settings: TextSettings, vocab_size: int) -> dict[str, Any]:
    """``config.json`` of the text model."""
    return {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "attention_bias": False,
        "bos_token_id": 2,
        "dtype": "bfloat16",
        "eos_token_id": 1,
        "head_dim": settings.width // settings.heads,
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": settings.width,
        "intermediate_size": settings.inner,
        "layer_types": ["sliding_attention"] * (settings.layers - 1) + ["full_attention"],
        "max_position_embeddings": settings.length,
        "num_attention_heads": settings.heads,
        "num_hidden_layers": settings.layers,
        "num_key_value_heads": settings.key_value_heads,
        "pad_token_id": 0,
        "query_pre_attn_scalar": settings.width // settings.heads,
        "rms_norm_eps": 1e-6,
        "rope_local_base_freq": 10000.0,
        "rope_theta": 10000.0,
        "sliding_window": 1024,
        "vocab_size": vocab_size,
    }


def connector_keys(settings: TextSettings) -> dict[str, Any]:
    """The keys of the section ``transformer`` that configure the connectors."""
    return {
        "caption_channels": settings.width,
        "connector_attention_head_dim": settings.width // settings.heads,
        "connector_norm_output": True,
        "connector_num_attention_heads": settings.heads,
        "connector_num_layers": 1,
        "connector_num_learnable_registers": settings.length,
        "connector_positional_embedding_max_pos": [settings.length],
        "audio_connector_attention_head_dim": settings.width // settings.heads,
        "audio_connector_num_attention_heads": settings.heads,
        "text_length": settings.length,
        "use_embeddings_connector": True,
    }


class TextModel(nn.Module):
    """Text model and connectors, trained together."""

    def __init__(self, section: Mapping[str, Any], gemma: Mapping[str, Any]) -> None:
        """Build by the sections of :meth:`NanoTransformer`; weights are drawn from torch's generator."""
        super().__init__()
        self.gemma_section = dict(gemma)
        self.gemma = Gemma3TextModel(Gemma3Config.from_dict(self.gemma_section))
        width = self.gemma.config.hidden_size
        projection = (width, width * self.gemma.config.num_hidden_states)
        shapes = {"text_embedding_projection.aggregate_embed.weight": projection}
        self.connectors = TextConnectors(
            TextConnectorsConfig.from_sections({"transformer": dict(section)}, shapes)
        )
        nn.init.normal_(self.gemma.embed_tokens.weight, std=0.125)
        for connector in (self.video_connector, self.audio_connector):
            nn.init.normal_(connector.learnable_registers, std=1.0)

    @property
    def video_connector(self) -> EmbeddingsConnector:
        """Of the connectors."""
        return self.connectors.video_embeddings_connector

    @property
    def audio_connector(self) -> EmbeddingsConnector:
        """Of the connectors."""
        return self.connectors.audio_embeddings_connector

    def forward(self, ids: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        """Contexts of a batch; those of ``encode_prompts`` up to rounding.

        The valid tokens come first: nothing that is valid looks at what follows it, so there is no mask.

        Args:
            ids: (B, T) int64, padding on the right.
            counts: (B,) valid tokens of each prompt.

        Returns:
            (B, T, D) of the video and of the audio.
        """
        length = ids.shape[1]
        valid_BT1 = (torch.arange(length, device=ids.device) < counts[:, None]).unsqueeze(-1)
        features = self._features(self._states(ids), valid_BT1)
        return self._context(self.video_connector, features, valid_BT1), self._context(
            self.audio_connector, features, valid_BT1
        )

    def _states(self, ids: Tensor) -> Tensor:
        """(B, T, D, L)"""
        gemma, length = self.gemma, ids.shape[1]
        dtype = gemma.norm.weight.dtype
        tables = gemma.rope_tables(torch.arange(length), device=ids.device, dtype=dtype)
        x = gemma.embed(ids.flatten()).view(*ids.shape, -1)
        states = [x]
        for index, kind in enumerate(gemma.config.layer_kinds):
            (x,) = gemma.layer(index)([x], [RopeTable(*tables[kind])])
            states.append(x)
        states[-1] = gemma.norm(x)
        return torch.stack(states, dim=-1)

    def _features(self, states: Tensor, valid: Tensor) -> Tensor:
        """The normalisation and projection of ``FeatureExtractor`` over the valid tokens of each row."""
        x_BTDL, valid_BT11 = states.float(), valid.unsqueeze(-1)
        low = x_BTDL.masked_fill(~valid_BT11, torch.inf).amin(dim=(1, 2), keepdim=True)
        high = x_BTDL.masked_fill(~valid_BT11, -torch.inf).amax(dim=(1, 2), keepdim=True)
        count = valid_BT11.sum(dim=1, keepdim=True) * x_BTDL.shape[2]
        mean = x_BTDL.masked_fill(~valid_BT11, 0.0).sum(dim=(1, 2), keepdim=True) / (count + _EPS)
        z_BTDL = (x_BTDL - mean) * 8.0 / (high - low + _EPS)
        (projection,) = self.connectors.text_embedding_projection.projections()
        return nn.functional.linear(z_BTDL.flatten(2), projection.weight.float()).to(states.dtype)

    def _context(self, connector: EmbeddingsConnector, features: Tensor, valid: Tensor) -> Tensor:
        length = features.shape[1]
        registers = connector.learnable_registers.repeat(length // connector.config.num_registers, 1)
        x = torch.where(valid, features, registers.to(features.dtype))
        rope = connector.rope(length, features.device)
        for block in connector.transformer_1d_blocks:
            (x,) = block([x], rope)
        return rms_norm(x)


def token_ids(tokenizer: PromptTokenizer, prompts: Sequence[str], length: int) -> tuple[Tensor, Tensor]:
    """Ids padded on the right and their counts, as :class:`TextModel` takes them; on the CPU."""
    rows = [tokenizer.encode(prompt, length) for prompt in prompts]
    ids = torch.zeros(len(rows), length, dtype=torch.int64)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = torch.tensor(row)
    return ids, torch.tensor([len(row) for row in rows])


def write_gemma(folder: Path, text: TextModel) -> None:
    """Weights, bfloat16, and configuration of the text model, beside its tokenizer."""
    tensors = {
        f"model.{name}": value.detach().to("cpu", torch.bfloat16).contiguous()
        for name, value in text.gemma.state_dict().items()
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    _write_json(folder / "config.json", text.gemma_section)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
