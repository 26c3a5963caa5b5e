"""Live tensors of a forward pass, counted on the CPU: a named temporary too many shows here."""

import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from diffsynth.models.ltx2.transformer import LTX2Transformer, Modality, Pass
from tests.models.ltx2.tiny import intervals, tiny_config, tiny_modality

TOKENS = 512


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sum of the storages that operations made and nobody has freed, and its highest value."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        self.peak = max(self.peak, self.live)
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata not in self._sizes:
            self._sizes[storage._cdata] = storage.nbytes()
            self.live += storage.nbytes()
            weakref.finalize(storage, self._free, storage._cdata)

    def _free(self, key: int) -> None:
        self.live -= self._sizes.pop(key)


def peak_in_hidden_states(network: LTX2Transformer, video: Modality, passes: int = 1) -> float:
    """Peak of a video-only call, in units of one hidden state (B, T, D)."""
    with torch.inference_mode(), LiveBytes() as counter:
        network.forward_passes([Pass(video=video, audio=None)] * passes, chunk_tokens=TOKENS // 8)
    return counter.peak / (TOKENS * network.config.width * 4)


@pytest.mark.parametrize("kept_tokens", [0, TOKENS // 4])
def test_a_pass_needs_few_hidden_states_and_further_passes_one_each(kept_tokens: int) -> None:
    config = tiny_config(num_layers=2, attention_head_dim=32, cross_attention_dim=128)
    network = LTX2Transformer(config)
    timesteps = torch.full((1, TOKENS, 1), 0.5)
    timesteps[:, :kept_tokens] = 0
    video = replace(
        tiny_modality("video", config, batch=1),
        latent=torch.zeros(1, TOKENS, 6),
        timesteps=timesteps,
        positions=intervals(TOKENS, 3, batch=1),
    )
    one = peak_in_hidden_states(network, video)
    # Residual, modulated input, q, k, v and attention result; the RoPE tables are one more.
    assert one < 7.5
    assert peak_in_hidden_states(network, video, passes=3) < one + 2.1
