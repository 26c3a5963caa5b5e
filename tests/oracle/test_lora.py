"""LoRAs fused into bf16 weights beside the official ones, with random factors, ranks and strengths.

Skipped without the official package; to run it: ``pip install --no-deps ltx-core==1.0.0 scipy``, then
``pytest tests/oracle``.
"""

import random

import pytest
import torch
from torch import Tensor

from diffsynth.lora import fuse, read_lora

loras = pytest.importorskip("ltx_core.loader.fuse_loras")
primitives = pytest.importorskip("ltx_core.loader.primitives")

LAYER = "transformer_blocks.0.attn1.to_q"


@pytest.mark.parametrize("seed", range(10))
def test_fused_in_bf16(seed: int) -> None:
    pick, generator = random.Random(seed), torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    weight = normal(16, 12).bfloat16()
    theirs, ours = [], []
    for strength in pick.sample((0.8, -0.35, 1.0, 0.0), pick.choice((1, 2))):
        rank = pick.choice((1, 3, 8))
        factors = {
            f"{LAYER}.lora_A.weight": normal(rank, 12).bfloat16(),
            f"{LAYER}.lora_B.weight": (normal(16, rank) / rank).bfloat16(),
        }
        held = primitives.StateDict(factors, torch.device("cpu"), 0, set())
        theirs.append(primitives.LoraStateDictWithStrength(held, strength))
        ours.append((read_lora(factors, [LAYER]).updates[LAYER], strength))
    base = primitives.StateDict({f"{LAYER}.weight": weight.clone()}, torch.device("cpu"), 0, set())
    expected = loras.apply_loras(base, theirs, torch.bfloat16).sd[f"{LAYER}.weight"]
    # Official code rounds factor, product and sum to bf16; the tolerance is that of the golden case.
    torch.testing.assert_close(fuse(weight, ours), expected, atol=0.02, rtol=0.01)
