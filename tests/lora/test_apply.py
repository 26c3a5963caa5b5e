import copy
import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from diffsynth.errors import CheckpointError, RequestError
from diffsynth.lora import Lora, LoraReport, LoraStack, LoraUpdate, fuse, fuse_bias, linear_shapes, read_lora
from tests.lora.conftest import RANK, TinyTransformer

Factors = Callable[..., dict[str, tuple[Tensor, Tensor]]]


def make_lora(model: nn.Module, factors: Factors, seed: int = 1, alpha: float | None = None) -> Lora:
    shapes = linear_shapes(model)
    tensors: dict[str, Tensor] = {}
    for name, (down, up) in factors(shapes, seed).items():
        tensors |= {
            f"diffusion_model.{name}.lora_A.weight": down,
            f"diffusion_model.{name}.lora_B.weight": up,
        }
        if alpha is not None:
            tensors[f"diffusion_model.{name}.alpha"] = torch.tensor(alpha)
    return read_lora(tensors, shapes, shapes)


def fused_copy(model: nn.Module, *weighted: tuple[Lora, float]) -> nn.Module:
    result = copy.deepcopy(model)
    for module in result.modules():
        module._forward_hooks.clear()
    for name in linear_shapes(result):
        layer = result.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        updates = [(lora.updates[name], strength) for lora, strength in weighted if name in lora.updates]
        layer.weight.data = fuse(layer.weight, updates)
        bias = fuse_bias(layer.bias, updates)
        if bias is not None:
            layer.bias = nn.Parameter(bias, requires_grad=False)
    return result


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) for module in model.modules())


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(7))


@torch.inference_mode()
def test_unfused_equals_fused(model: TinyTransformer, factors: Factors, x: Tensor) -> None:
    first, second = make_lora(model, factors, 1), make_lora(model, factors, 2, alpha=RANK * 3)
    stack = LoraStack(model)
    stack.add(first, 0.8)
    stack.add(second, -0.35)
    torch.testing.assert_close(
        model(x), fused_copy(model, (first, 0.8), (second, -0.35))(x), rtol=1e-5, atol=1e-5
    )
    assert not torch.allclose(model(x), fused_copy(model, (first, 0.8))(x), atol=1e-3)


@torch.inference_mode()
def test_removal_restores_the_base_bit_for_bit(model: TinyTransformer, factors: Factors, x: Tensor) -> None:
    lora = make_lora(model, factors)
    weights = copy.deepcopy(model.state_dict())
    base = model(x)
    stack = LoraStack(model)
    handle = stack.add(lora, 0.8)
    changed = model(x)
    assert not torch.equal(changed, base)
    stack.set_strength(handle, 0.0)
    assert torch.equal(model(x), base)
    stack.set_strength(handle, 0.8)
    assert torch.equal(model(x), changed)
    stack.remove(handle)
    assert torch.equal(model(x), base)
    assert hooks(model) == 0
    assert len(stack) == 0
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


@torch.inference_mode()
def test_removing_one_of_two_leaves_exactly_the_other(
    model: TinyTransformer, factors: Factors, x: Tensor
) -> None:
    first, second = make_lora(model, factors, 1), make_lora(model, factors, 2)
    alone = LoraStack(model)
    alone.add(second, 0.5)
    expected = model(x)
    alone.clear()
    stack = LoraStack(model)
    handle = stack.add(first, 0.8)
    other = stack.add(second, 0.5)
    stack.remove(handle)
    assert torch.equal(model(x), expected)
    assert stack.active == {other: 0.5}
    stack.clear()
    assert hooks(model) == 0


@torch.inference_mode()
def test_a_scoped_lora_is_gone_after_an_error(model: TinyTransformer, factors: Factors, x: Tensor) -> None:
    lora = make_lora(model, factors)
    stack = LoraStack(model)
    base = model(x)
    with pytest.raises(RuntimeError, match="stage 2"), stack.scoped(lora, 0.8):
        assert not torch.equal(model(x), base)
        raise RuntimeError("stage 2")
    assert torch.equal(model(x), base)
    assert hooks(model) == 0
    with stack.scoped(lora, 0.8):
        stack.clear()
    assert hooks(model) == 0


@torch.inference_mode()
def test_full_differences_without_a_product(model: TinyTransformer, x: Tensor) -> None:
    report = LoraReport(source="x", format="ComfyUI", matched=1, ranks=(), alpha="none")
    difference = torch.randn(8, 6, generator=torch.Generator().manual_seed(3))
    update = LoraUpdate(weight_diff=difference, bias_diff=torch.arange(8.0))
    lora = Lora(updates={"patchify_proj": update}, report=report)
    LoraStack(model).add(lora, 0.5)
    expected = fused_copy(model, (lora, 0.5))(x)
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)


@torch.inference_mode()
def test_compute_dtype_is_that_of_the_layer(model: TinyTransformer, factors: Factors, x: Tensor) -> None:
    lora = make_lora(model, factors)
    exact = fused_copy(model, (lora, 0.8))(x)
    model.bfloat16()
    LoraStack(model).add(lora, 0.8)
    result = model(x.bfloat16())
    assert result.dtype == torch.bfloat16
    torch.testing.assert_close(result.float(), exact, rtol=0.05, atol=0.05)


class StreamedLinear(nn.Module):
    """A linear without parameters, whose weight is kept elsewhere: what a memory manager makes."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.stored = [linear.weight.detach().clone(), linear.bias]

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.stored
        return nn.functional.linear(x, weight, bias)


@torch.inference_mode()
def test_layers_whose_weights_live_elsewhere(model: TinyTransformer, factors: Factors, x: Tensor) -> None:
    lora = make_lora(model, factors)
    expected = fused_copy(model, (lora, 0.8))(x)
    resident = LoraStack(model)
    resident.add(lora, 0.8)
    unfused = model(x)
    resident.clear()
    for name in linear_shapes(model):
        parent, _, leaf = name.rpartition(".")
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        setattr(model.get_submodule(parent), leaf, StreamedLinear(layer))
    assert not list(model.parameters())
    LoraStack(model).add(make_lora(model, factors), 0.8)
    assert torch.equal(model(x), unfused)
    torch.testing.assert_close(unfused, expected, rtol=1e-5, atol=1e-5)


@torch.inference_mode()
@pytest.mark.parametrize("limit", [0, 200, None])
def test_the_bound_on_copies_changes_no_result(
    model: TinyTransformer, factors: Factors, x: Tensor, limit: int | None
) -> None:
    model.bfloat16()
    lora = make_lora(model, factors)
    unbound = LoraStack(model)
    unbound.add(lora, 0.8)
    expected = model(x.bfloat16())
    unbound.clear()
    stack = LoraStack(model, max_cached_bytes=limit)
    stack.add(lora, 0.8)
    for _ in range(2):
        assert torch.equal(model(x.bfloat16()), expected)
    # bf16 copies of float32 factors take half the bytes of the file.
    kept = [entry for layer in stack._layers.values() for entry in layer.entries.values() if entry.placed]
    total = sum(entry.placed_bytes for entry in kept)
    assert total <= (lora.nbytes // 2 if limit is None else limit)
    assert len(kept) == len(lora.updates) if limit is None else len(kept) < len(lora.updates)
    assert limit == 0 or total > 0


@torch.inference_mode()
def test_removal_frees_the_copies(model: TinyTransformer, factors: Factors, x: Tensor) -> None:
    model.bfloat16()
    stack = LoraStack(model)
    handle = stack.add(make_lora(model, factors), 1.0)
    model(x.bfloat16())
    layers = list(stack._layers.values())
    placed = [entry.placed for layer in layers for entry in layer.entries.values()]
    references = [weakref.ref(item.down) for item in placed if item is not None and item.down is not None]
    assert len(references) == len(layers)
    stack.remove(handle)
    del layers, placed
    gc.collect()
    assert all(reference() is None for reference in references)


def test_gradients_flow_through_the_hook(model: TinyTransformer, factors: Factors, x: Tensor) -> None:
    lora = make_lora(model, factors)
    LoraStack(model).add(lora, 0.8)
    inputs = x.clone().requires_grad_()
    model(inputs).sum().backward()
    reference = x.clone().requires_grad_()
    fused_copy(model, (lora, 0.8))(reference).sum().backward()
    assert inputs.grad is not None
    assert reference.grad is not None
    torch.testing.assert_close(inputs.grad, reference.grad, rtol=1e-4, atol=1e-5)


def test_a_lora_of_another_model_adds_nothing(model: TinyTransformer, factors: Factors) -> None:
    lora = make_lora(model, factors)
    with pytest.raises(CheckpointError, match="another model"):
        LoraStack(model.transformer_blocks[0]).add(lora)
    assert hooks(model) == 0


@pytest.mark.parametrize("strength", [float("nan"), float("inf")])
def test_strengths_are_finite(model: TinyTransformer, factors: Factors, strength: float) -> None:
    stack = LoraStack(model)
    lora = make_lora(model, factors)
    with pytest.raises(RequestError):
        stack.add(lora, strength)
    handle = stack.add(lora)
    with pytest.raises(RequestError):
        stack.set_strength(handle, strength)
    assert stack.active == {handle: 1.0}


def test_updates_of_a_layer_are_those_of_all_active_loras(model: TinyTransformer, factors: Factors) -> None:
    stack = LoraStack(model)
    first, second = make_lora(model, factors, 1), make_lora(model, factors, 2)
    stack.add(first, 0.8)
    stack.add(second, 0.2)
    assert stack.updates("proj_out") == [(first.updates["proj_out"], 0.8), (second.updates["proj_out"], 0.2)]
    assert stack.updates("nothing") == []


def test_books_without_hooks_state_the_updates_and_leave_the_module_alone() -> None:
    module = nn.ModuleDict({"layer": nn.Linear(4, 3)})
    shapes = linear_shapes(module)
    tensors = {"layer.lora_A.weight": torch.randn(2, 4), "layer.lora_B.weight": torch.randn(3, 2)}
    lora = read_lora(tensors, shapes.keys(), shapes)
    stack = LoraStack(module, hooked=False)
    handle = stack.add(lora, 0.5)
    assert not module["layer"]._forward_hooks
    assert stack.updates("layer") == [(lora.updates["layer"], 0.5)]
    stack.set_strength(handle, 0.25)
    assert stack.updates("layer")[0][1] == 0.25
    stack.remove(handle)
    assert stack.updates("layer") == []
