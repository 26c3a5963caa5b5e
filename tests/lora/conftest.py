"""A small module with the layer names of the transformer, and LoRAs for it."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

RANK = 2


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.to_q = nn.Linear(width, width)
        self.to_out = nn.Sequential(nn.Linear(width, width), nn.Identity())

    def forward(self, x: Tensor) -> Tensor:
        return self.to_out(torch.tanh(self.to_q(x)))


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.attn1 = Attention(width)
        self.audio_to_video_attn = Attention(width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attn1(x) + self.audio_to_video_attn(x)


class TinyTransformer(nn.Module):
    """(B, T, 6) -> (B, T, 5) through linears named like those of the real one."""

    def __init__(self) -> None:
        super().__init__()
        self.patchify_proj = nn.Linear(6, 8)
        self.transformer_blocks = nn.ModuleList(Block(8) for _ in range(2))
        self.proj_out = nn.Linear(8, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patchify_proj(x)
        for block in self.transformer_blocks:
            x = block(x)
        return self.proj_out(x)


@pytest.fixture
def model() -> TinyTransformer:
    torch.manual_seed(0)
    return TinyTransformer().requires_grad_(False)


@pytest.fixture
def factors() -> Callable[[dict[str, tuple[int, int]], int], dict[str, tuple[Tensor, Tensor]]]:
    """Random (A, B) for each layer of {name: (out, in)}, from a seed."""

    def make(shapes: dict[str, tuple[int, int]], seed: int = 1) -> dict[str, tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        return {
            name: (
                torch.randn(RANK, width_in, generator=generator),
                torch.randn(width_out, RANK, generator=generator) * 0.1,
            )
            for name, (width_out, width_in) in shapes.items()
        }

    return make
