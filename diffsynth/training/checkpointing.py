"""Gradient checkpointing by block: hidden states between blocks are kept, everything inside is made again."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

from torch import Tensor
from torch.utils.checkpoint import checkpoint

from diffsynth.models.ltx2.transformer import LTX2Transformer, PassState, StreamState

Forward = Callable[[Sequence[PassState]], None]


@contextmanager
def checkpointed_blocks(network: LTX2Transformer, enabled: bool = True) -> Iterator[None]:
    """Within the ``with`` block the blocks of ``network`` keep their inputs only, if ``enabled``.

    Chen et al., Training Deep Nets with Sublinear Memory Cost (arXiv 1604.06174).  Gradients are equal, bit
    for bit: the same operations run a second time.
    """
    blocks = list(network.transformer_blocks) if enabled else []
    try:
        for block in blocks:
            block.forward = partial(_checkpointed, block.forward)
        yield
    finally:
        for block in blocks:
            block.__dict__.pop("forward", None)  # the method of the class shows again


def _checkpointed(forward: Forward, states: Sequence[PassState]) -> None:
    """Advance every pass; blocks change the states that they are given, so each run gets its own."""
    for state in states:
        streams = [stream for stream in (state.video, state.audio) if stream is not None]
        hidden = checkpoint(
            partial(_advanced, forward, state),
            *(stream.hidden for stream in streams),
            use_reentrant=False,
            preserve_rng_state=False,  # no block draws random numbers
        )
        for stream, advanced in zip(streams, hidden, strict=True):
            stream.hidden = advanced


def _advanced(forward: Forward, state: PassState, *hidden: Tensor) -> tuple[Tensor, ...]:
    remaining = list(hidden)

    def with_hidden(stream: StreamState | None) -> StreamState | None:
        return None if stream is None else replace(stream, hidden=remaining.pop(0))

    own = replace(state, video=with_hidden(state.video), audio=with_hidden(state.audio))
    forward([own])
    return tuple(stream.hidden for stream in (own.video, own.audio) if stream is not None)
