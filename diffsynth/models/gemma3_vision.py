"""What lets Gemma 3 look at a picture: the SigLIP vision tower and the projector into the text model.

P patches of a side (64), D width of the text model (3840), t tokens of a side (16).

Source: the Gemma 3 report (arXiv 2503.19786) and the released checkpoint; agrees with ``SiglipVisionModel``
and ``Gemma3MultiModalProjector`` of transformers.  The tower runs without its pooling head.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import isqrt
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from diffsynth.errors import CheckpointError
from diffsynth.models.gemma3 import RMSNorm
from diffsynth.models.gemma3_config import HINT

Shapes = Mapping[str, tuple[int, ...]]

HEAD_WIDTH = 72
"""Of the released tower; shapes do not tell it."""
RELEASED_TOKENS = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class Gemma3VisionConfig:
    """``vision_config`` of ``config.json`` and what the projector needs of the rest."""

    width: int
    inner_width: int
    num_layers: int
    num_heads: int
    image_size: int
    """Height and width of a prepared picture in pixels."""
    patch_size: int
    norm_eps: float
    text_width: int
    num_tokens: int
    """That a picture becomes."""

    @property
    def patches_per_side(self) -> int:
        """P."""
        return self.image_size // self.patch_size

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Self:
        """Parse ``config.json``; absent keys mean what the file format says.

        Raises:
            CheckpointError: another architecture, or sizes that do not divide.
        """
        vision, text = config.get("vision_config"), config.get("text_config")
        if not isinstance(vision, Mapping) or not isinstance(text, Mapping):
            raise CheckpointError("the configuration of Gemma 3 describes no vision tower", hint=HINT)
        activation = vision.get("hidden_act", "gelu_pytorch_tanh")
        if vision.get("model_type") != "siglip_vision_model" or activation != "gelu_pytorch_tanh":
            raise CheckpointError(
                f"a vision tower {vision.get('model_type')!r} with {activation!r} is not supported",
                hint=HINT,
            )
        names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        missing = [name for name in (*names, "image_size", "patch_size") if name not in vision]
        if missing or "hidden_size" not in text:
            raise CheckpointError(f"the configuration of the vision tower lacks {missing}", hint=HINT)
        return cls(
            width=vision["hidden_size"],
            inner_width=vision["intermediate_size"],
            num_layers=vision["num_hidden_layers"],
            num_heads=vision["num_attention_heads"],
            image_size=vision["image_size"],
            patch_size=vision["patch_size"],
            norm_eps=vision.get("layer_norm_eps", 1e-6),
            text_width=text["hidden_size"],
            num_tokens=config.get("mm_tokens_per_image", RELEASED_TOKENS),
        )._checked()

    @classmethod
    def infer(cls, shapes: Shapes) -> Self:
        """From parameter shapes, by their names in the module; the rest is as released.

        Raises:
            CheckpointError: the shapes are not those of a vision tower.
        """
        try:
            width, _, patch_size, _ = shapes["vision_model.embeddings.patch_embedding.weight"]
            patches, _ = shapes["vision_model.embeddings.position_embedding.weight"]
            inner_width = shapes["vision_model.encoder.layers.0.mlp.fc1.weight"][0]
            _, text_width = shapes["multi_modal_projector.mm_input_projection_weight"]
        except (KeyError, ValueError) as error:
            raise CheckpointError(f"no vision tower of Gemma 3: {error}", hint=HINT) from None
        layers = {key.split(".")[3] for key in shapes if key.startswith("vision_model.encoder.layers.")}
        return cls(
            width=width,
            inner_width=inner_width,
            num_layers=len(layers),
            num_heads=max(1, width // HEAD_WIDTH),
            image_size=isqrt(patches) * patch_size,
            patch_size=patch_size,
            norm_eps=1e-6,
            text_width=text_width,
            num_tokens=RELEASED_TOKENS,
        )._checked()

    def _checked(self) -> Self:
        tokens = isqrt(self.num_tokens)
        if self.width % self.num_heads or tokens**2 != self.num_tokens or self.patches_per_side % tokens:
            raise CheckpointError(
                f"sizes of the vision tower do not divide: width {self.width} by {self.num_heads} heads, "
                f"{self.patches_per_side} patches of a side by {self.num_tokens} tokens",
                hint=HINT,
            )
        return self


class _Attention(nn.Module):
    def __init__(self, config: Gemma3VisionConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.q_proj = nn.Linear(config.width, config.width)
        self.k_proj = nn.Linear(config.width, config.width)
        self.v_proj = nn.Linear(config.width, config.width)
        self.out_proj = nn.Linear(config.width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            layer(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        out = functional.scaled_dot_product_attention(q, k, v)
        return self.out_proj(out.transpose(1, 2).flatten(-2))


class _MLP(nn.Module):
    def __init__(self, config: Gemma3VisionConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.width, config.inner_width)
        self.fc2 = nn.Linear(config.inner_width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(functional.gelu(self.fc1(x), approximate="tanh"))


class _Layer(nn.Module):
    def __init__(self, config: Gemma3VisionConfig) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.self_attn = _Attention(config)
        self.layer_norm2 = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.mlp = _MLP(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class _Embeddings(nn.Module):
    def __init__(self, config: Gemma3VisionConfig) -> None:
        super().__init__()
        size = config.patch_size
        self.patch_embedding = nn.Conv2d(3, config.width, kernel_size=size, stride=size)
        self.position_embedding = nn.Embedding(config.patches_per_side**2, config.width)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.patch_embedding(pixels).flatten(2).transpose(1, 2) + self.position_embedding.weight


class _Encoder(nn.Module):
    def __init__(self, config: Gemma3VisionConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Layer(config) for _ in range(config.num_layers))


class _VisionModel(nn.Module):
    def __init__(self, config: Gemma3VisionConfig) -> None:
        super().__init__()
        self.embeddings = _Embeddings(config)
        self.encoder = _Encoder(config)
        self.post_layernorm = nn.LayerNorm(config.width, eps=config.norm_eps)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.embeddings(pixels)
        for layer in self.encoder.layers:
            x = layer(x)
        return self.post_layernorm(x)


class _Projector(nn.Module):
    def __init__(self, config: Gemma3VisionConfig) -> None:
        super().__init__()
        self.patches = config.patches_per_side
        self.pooled = self.patches // isqrt(config.num_tokens)
        self.mm_input_projection_weight = nn.Parameter(torch.zeros(config.width, config.text_width))
        self.mm_soft_emb_norm = RMSNorm(config.width, config.norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        grid = x.transpose(1, 2).reshape(1, -1, self.patches, self.patches)
        tokens = functional.avg_pool2d(grid, self.pooled).flatten(2).transpose(1, 2)
        return self.mm_soft_emb_norm(tokens) @ self.mm_input_projection_weight


class Gemma3Vision(nn.Module):
    """A picture -> tokens for the text model."""

    def __init__(self, config: Gemma3VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.vision_model = _VisionModel(config)
        self.multi_modal_projector = _Projector(config)

    def forward(self, pixels: Tensor) -> Tensor:
        """Args: pixels [1, 3, size, size] in [-1, 1], in the compute dtype.
        Returns: [t*t, D]; they stand beside scaled embeddings and are not scaled themselves."""
        return self.multi_modal_projector(self.vision_model(pixels))[0]
