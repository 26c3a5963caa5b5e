"""Gradients of the operations that stay undivided on the stand-in; torch has the others from their pieces."""

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from tests.standin.dispatch import dispatch, note_accesses
from tests.standin.tensor import StandInTensor


def call_whole(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run the operation; its gradient is recorded where torch would record one."""
    leaves, spec = pytree.tree_flatten((args, kwargs))
    needed = torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in leaves)
    return _Whole.apply(func, spec, *leaves) if needed else dispatch(func, args, kwargs)  # type: ignore[no-untyped-call]


class _Whole(torch.autograd.Function):
    """What a fused kernel does: inputs are kept, and the gradient is one operation on them."""

    @staticmethod
    def forward(ctx: Any, func: Any, spec: Any, *leaves: Any) -> Any:
        args, kwargs = pytree.tree_unflatten(leaves, spec)
        ctx.func, ctx.spec = func, spec
        ctx.tensors = [number for number, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        ctx.others = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        ctx.save_for_backward(*(leaves[number] for number in ctx.tensors))
        return dispatch(func, args, kwargs)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (grad,) = grads
        owner, leaves = grad.owner, list(ctx.others)
        outside = dict(zip(ctx.tensors, ctx.saved_tensors, strict=True))
        args, kwargs = pytree.tree_unflatten(
            [outside.get(i, leaf) for i, leaf in enumerate(leaves)], ctx.spec
        )
        with owner.lock:
            note_accesses(owner, f"gradient of {ctx.func.overloadpacket.__name__}", ctx.func, args, kwargs)
            wanted = {}
            for number, tensor in outside.items():
                inner = tensor.inside if isinstance(tensor, StandInTensor) else tensor
                leaves[number] = inner.detach()
                if ctx.needs_input_grad[number + 2]:
                    wanted[number] = leaves[number].requires_grad_()
            with torch.enable_grad():
                args, kwargs = pytree.tree_unflatten(leaves, ctx.spec)
                result = ctx.func(*args, **kwargs)
            found = torch.autograd.grad(result, list(wanted.values()), grad.inside)
            made = dict(zip(wanted, found, strict=True))
            outer = {i: StandInTensor.wrap(inner, "gradient", owner) for i, inner in made.items()}
            return (None, None, *(outer.get(i) for i in range(len(leaves))))
