import pytest
import torch
from torch import Tensor
from torch.nn import functional

from diffsynth.models.ltx2.layers import (
    Attention,
    FeedForward,
    RMSNorm,
    TextProjection,
    channel_rms,
    rms_norm,
)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def attention(gated: bool = True) -> Attention:
    torch.manual_seed(3)
    return Attention(16, 12, 4, 2, gated=gated)


def test_rms_norm_has_unit_mean_square() -> None:
    normed = rms_norm(noise(3, 5, 64) * 7)
    torch.testing.assert_close(normed.square().mean(-1), torch.ones(3, 5), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [0.0, 3e-4, 1.0, 2000.0])
def test_channel_rms_of_float16_neither_overflows_nor_vanishes(size: float) -> None:
    x = noise(1, 64, 2, 3) * size
    rms = channel_rms(x.half(), 1e-8)
    assert rms.dtype is torch.float16
    torch.testing.assert_close(rms.float(), channel_rms(x, 1e-8), rtol=2e-3, atol=0)


def test_rms_norm_weight_in_float32_does_not_promote() -> None:
    norm = RMSNorm(8)
    torch.nn.init.constant_(norm.weight, 2.0)
    x = noise(2, 3, 8).bfloat16()
    assert norm(x).dtype is torch.bfloat16
    torch.testing.assert_close(norm(x.float()), 2 * rms_norm(x.float()))


@pytest.mark.parametrize("gated", [True, False])
def test_keys_are_those_of_the_checkpoint(gated: bool) -> None:
    linears = ["to_q", "to_k", "to_v", "to_out.0", *(["to_gate_logits"] if gated else [])]
    expected = {f"{name}.{part}" for name in linears for part in ("weight", "bias")}
    assert set(attention(gated).state_dict()) == expected | {"q_norm.weight", "k_norm.weight"}


def test_gate_of_zero_logits_changes_nothing() -> None:
    gated, plain = attention(True), attention(False)
    plain.load_state_dict({k: v for k, v in gated.state_dict().items() if "gate" not in k})
    torch.nn.init.zeros_(gated.to_gate_logits.weight)  # type: ignore[union-attr]
    torch.nn.init.zeros_(gated.to_gate_logits.bias)  # type: ignore[union-attr]
    x, context = noise(2, 5, 16), noise(2, 3, 12, seed=1)
    torch.testing.assert_close(gated(x, context), plain(x, context))


def test_mask_removes_a_key() -> None:
    module = attention()
    x, context = noise(1, 5, 16), noise(1, 3, 12, seed=1)
    mask = torch.tensor([0.0, 0.0, torch.finfo(torch.float32).min]).view(1, 1, 1, 3)
    torch.testing.assert_close(module(x, context, mask=mask), module(x, context[:, :2]))


def test_value_passthrough_keeps_gate_and_projection() -> None:
    torch.manual_seed(4)
    module = Attention(16, 16, 4, 2, gated=True)
    x = noise(2, 5, 16)
    gate = 2 * torch.sigmoid(module.to_gate_logits(x))  # type: ignore[misc]
    expected = module.to_out(module.to_v(x) * gate.repeat_interleave(2, dim=-1))
    torch.testing.assert_close(module(x, value_passthrough=True), expected)
    mixed = module(x, value_passthrough=torch.tensor([True, False]))
    torch.testing.assert_close(mixed[:1], expected[:1])
    torch.testing.assert_close(mixed[1:], module(x)[1:])


def test_inference_gives_the_numbers_of_training_and_leaves_inputs_alone() -> None:
    module, x, context = attention(), noise(2, 5, 16), noise(2, 3, 12, seed=1)
    before = x.clone(), context.clone()
    with torch.inference_mode():
        torch.testing.assert_close(module(x, context), module.forward(x, context))
        fast = module(x, context)
    torch.testing.assert_close(fast.clone(), module(x, context).detach())
    assert torch.equal(x, before[0])
    assert torch.equal(context, before[1])


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("chunk_tokens", [1, 3, 7, 8])
def test_feed_forward_in_chunks(chunk_tokens: int, grad: bool) -> None:
    module, x = FeedForward(8), noise(2, 7, 8)
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(module(x, chunk_tokens=chunk_tokens), module(x))
    assert set(module.state_dict()) == {
        f"net.{name}.{part}" for name in ("0.proj", "2") for part in ("weight", "bias")
    }


def test_text_projection_uses_the_tanh_gelu() -> None:
    module, text = TextProjection(6, 8), noise(2, 3, 6) * 3
    hidden = functional.gelu(module.linear_1(text), approximate="tanh")
    torch.testing.assert_close(module(text), module.linear_2(hidden), rtol=0, atol=0)
