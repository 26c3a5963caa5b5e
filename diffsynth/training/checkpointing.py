"""Gradient checkpointing by block: hidden states between blocks are kept, everything inside is made again.

Backward makes a block anew and goes through it at once, so its weights are wanted once there and once on the
way back: just what a memory manager that streams them needs to know.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from diffsynth.models.ltx2.transformer import LTX2Transformer, PassState, StreamState
from diffsynth.training.stash import DeviceStash, Stash

Forward = Callable[[Sequence[PassState]], None]
Hold = Callable[[str], AbstractContextManager[None]]
"""Name of a block -> a context in which its weights are there."""

_ROWS = ("modulation", "prompt", "cross_scale_shift", "cross_gate")
"""What of a stream changes with its noise level."""


def no_hold(name: str) -> AbstractContextManager[None]:
    """Of weights that are always there."""
    return nullcontext()


@contextmanager
def checkpointed_blocks(
    network: LTX2Transformer, enabled: bool = True, *, hold: Hold = no_hold, stash: Stash | None = None
) -> Iterator[None]:
    """Within the ``with`` block the blocks of ``network`` keep their inputs only, if ``enabled``.

    Chen et al., Training Deep Nets with Sublinear Memory Cost (arXiv 1604.06174).  Gradients of what lies in
    the blocks are equal, bit for bit: the same operations run a second time.  Those of what all blocks read
    are sums over the blocks, which add up in another order.

    Args:
        network: its passes without gradients run as before.
        enabled: False does nothing.
        hold: what keeps the weights of a block in their place while it goes backward.
        stash: where the hidden states wait; None: on the device.
    """
    keep = DeviceStash() if stash is None else stash
    anchor = torch.zeros((), requires_grad=True)
    before: list[tuple[Any, Any]] = []
    try:
        for number, block in enumerate(network.transformer_blocks if enabled else ()):
            before.append((block, block.__dict__.get("forward")))
            name = f"transformer_blocks.{number}"
            block.forward = _Checkpointed(block.forward, partial(hold, name), keep, anchor)
        yield
    finally:
        for block, forward in before:
            block.__dict__.pop("forward")  # the method of the class shows again
            if forward is not None:
                block.forward = forward


@dataclass(frozen=True, slots=True)
class _Checkpointed:
    """The ``forward`` of one block.

    ``anchor`` asks for a gradient, so that the first block, to whose inputs none flows, goes backward too.
    """

    forward: Forward
    hold: Callable[[], AbstractContextManager[None]]
    stash: Stash
    anchor: Tensor

    def __call__(self, states: Sequence[PassState]) -> None:
        if not torch.is_grad_enabled():
            self.forward(states)
            return
        for state in states:
            hidden = _MadeTwice.apply(self, state, self.anchor, *_tensors(state))  # type: ignore[no-untyped-call]
            for stream, advanced in zip(_streams(state), hidden, strict=True):
                stream.hidden = advanced

    def run(self, state: PassState, tensors: Sequence[Tensor], needed: Sequence[bool]) -> tuple[Any, Any]:
        """Advance a state of its own, recording; returns its leaves and the hidden states after the block."""
        leaves = [t.detach().requires_grad_(n) for t, n in zip(tensors, needed, strict=True)]
        own = _with_tensors(state, leaves)
        self.forward([own])
        return leaves, [stream.hidden for stream in _streams(own)]


class _MadeTwice(torch.autograd.Function):
    """One pass through one block."""

    @staticmethod
    def forward(ctx: Any, call: _Checkpointed, state: PassState, anchor: Tensor, *tensors: Tensor) -> Any:
        count = len(_streams(state))
        ctx.call, ctx.outline = call, _with_tensors(state, [None] * len(tensors))
        ctx.kept = call.stash.put(tensors[:count])
        ctx.save_for_backward(*tensors[count:])
        # The operations are those of the second time, which record, so that the bits are; nothing is kept.
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(_drop, _dropped):
            _, hidden = call.run(state, tensors, ctx.needs_input_grad[3:])
        return tuple(h.detach() for h in hidden)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        call: _Checkpointed = ctx.call
        tensors = [*call.stash.take(ctx.kept), *ctx.saved_tensors]
        with call.hold():
            with torch.enable_grad():
                leaves, hidden = call.run(ctx.outline, tensors, ctx.needs_input_grad[3:])
            del tensors
            ends = [(h, g) for h, g in zip(hidden, grads, strict=True) if g is not None and h.requires_grad]
            del hidden
            torch.autograd.backward([h for h, _ in ends], [g for _, g in ends])
        return (None, None, None, *(leaf.grad for leaf in leaves))


def _drop(_: Tensor) -> None:
    return None


def _dropped(_: None) -> Tensor:
    raise AssertionError("backward goes through what is made the second time")


def _streams(state: PassState) -> list[StreamState]:
    return [stream for stream in (state.video, state.audio) if stream is not None]


def _tensors(state: PassState) -> list[Tensor]:
    """What a gradient may flow to: the hidden states first."""
    streams = _streams(state)
    rows = (getattr(stream, name) for stream in streams for name in _ROWS)
    shared = [row.values for row in rows if row is not None]
    return [*(stream.hidden for stream in streams), *(stream.context for stream in streams), *shared]


def _with_tensors(state: PassState, tensors: Sequence[Any]) -> PassState:
    """A state of its own with the tensors in the order of :func:`_tensors`."""
    streams = _streams(state)
    count = len(streams)
    shared = iter(tensors[2 * count :])
    made = []
    for stream, hidden, context in zip(streams, tensors[:count], tensors[count : 2 * count], strict=True):
        given = ((name, getattr(stream, name)) for name in _ROWS)
        rows = {name: replace(row, values=next(shared)) for name, row in given if row is not None}
        made.append(replace(stream, hidden=hidden, context=context, **rows))
    video = made.pop(0) if state.video is not None else None
    return replace(state, video=video, audio=made.pop(0) if state.audio is not None else None)
