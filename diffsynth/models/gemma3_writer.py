"""Gemma 3 as a writer: it continues a text token by token.

D width, n tokens, V vocabulary, L layers.  One traversal of the layers reads the whole given text, then one
each gives a further token.  The head is the embedding table: its rows are multiplied chunk by chunk, so that
the table, 2 GB for 12B, need not be on the device.

Source: the Gemma 3 report (arXiv 2503.19786); agrees with ``Gemma3ForConditionalGeneration`` of transformers.
"""

from collections.abc import Callable, Collection, Iterator

import torch
from torch import Tensor
from torch.nn import functional

from diffsynth.models.gemma3 import Gemma3TextModel, RopeTable
from diffsynth.models.gemma3_cache import KeyValueCache, first_mask
from diffsynth.models.gemma3_config import Gemma3Config

HeadChunks = Callable[[], Iterator[Tensor]]
"""Gives the embedding table, some rows at a time, on the device; each chunk is valid until the next."""


def head_rows(config: Gemma3Config) -> list[int]:
    """Rows of the embedding table in each chunk: there are at most as many chunks as layers."""
    most = -(-config.vocab_size // len(config.layer_kinds))
    whole, rest = divmod(config.vocab_size, most)
    return [most] * whole + [rest] * bool(rest)


def table_chunks(model: Gemma3TextModel) -> Iterator[Tensor]:
    """The embedding table where it lies, in chunks of :func:`head_rows`."""
    yield from torch.split(model.embed_tokens.weight, head_rows(model.config))


class Continuation:
    """A text that is being continued: the caches of all layers, and how many tokens they hold."""

    def __init__(
        self,
        model: Gemma3TextModel,
        given: Tensor,
        capacity: int,
        *,
        device: torch.device,
        dtype: torch.dtype,
        picture: slice | None = None,
    ) -> None:
        """Allocate everything.

        Args:
            model: its layers compute on ``device``; its embedding table may lie elsewhere.
            given: scaled embeddings of the given text, [1, n, D].
            capacity: tokens that the text may grow to.
            device: where the layers compute.
            dtype: compute dtype.
            picture: which tokens of the given text stand for a picture.
        """
        self._model = model
        self._device, self._dtype = device, dtype
        self._unread: Tensor | None = given.to(device, dtype)
        self._position = 0
        self._tables = model.rope_tables(torch.arange(capacity), device=device, dtype=dtype)
        c = model.config
        shape = (1, c.num_key_value_heads, capacity, c.head_dim)
        windows = {"sliding_attention": c.sliding_window, "full_attention": None}
        masks = {kind: first_mask(given.shape[1], windows[kind], picture) for kind in self._tables}
        on_device = {kind: None if m is None else m.to(device) for kind, m in masks.items()}
        self._caches = [
            KeyValueCache(
                torch.empty(shape, device=device, dtype=dtype),
                torch.empty(shape, device=device, dtype=dtype),
                window=windows[kind],
                mask=on_device[kind],
            )
            for kind in c.layer_kinds
        ]

    def logits(self, chunks: HeadChunks) -> Tensor:
        """Read what came last, in one traversal of the layers: float32 [V] on the CPU for the next token.

        Raises:
            ValueError: nothing was appended since.
        """
        x, self._unread = self._unread, None
        if x is None:
            raise ValueError("everything is read: append() comes first")
        start, end = self._position, self._position + x.shape[1]
        for index, kind in enumerate(self._model.config.layer_kinds):
            cos, sin = self._tables[kind]
            rope = RopeTable(cos[start:end], sin[start:end])
            (x,) = self._model.layer(index)([x], [rope], [self._caches[index]])
        self._position = end
        last = self._model.norm(x[:, -1])
        return torch.cat([functional.linear(last, rows)[0] for rows in chunks()]).cpu().float()

    def append(self, token: int) -> None:
        """Let a token come next."""
        self._unread = self._model.embed(torch.tensor([token]), device=self._device, dtype=self._dtype)


def write(
    continuation: Continuation,
    chunks: HeadChunks,
    *,
    seed: int,
    temperature: float,
    max_tokens: int,
    stops: Collection[int],
    on_token: Callable[[int], None] = lambda count: None,
) -> list[int]:
    """Continue a text.

    Tokens are drawn on the CPU from float32 probabilities, with a generator of their own: the draw depends
    neither on the device nor on any other source of noise.

    Args:
        continuation: of the given text.
        chunks: of the embedding table.
        seed: of the draws, 64 bits.
        temperature: of the logits; 0 takes the most probable token.
        max_tokens: to write at most.
        stops: tokens that end the text.
        on_token: called with the number of tokens after each; it may raise to stop.

    Returns:
        Ids of the new tokens, without the one that ended the text.
    """
    random = torch.Generator("cpu").manual_seed(seed)
    written: list[int] = []
    while len(written) < max_tokens:
        token = draw(continuation.logits(chunks), temperature, random)
        if token in stops:
            break
        written.append(token)
        on_token(len(written))
        continuation.append(token)
    return written


def draw(logits: Tensor, temperature: float, random: torch.Generator) -> int:
    """A token from logits, float32 [V] on the CPU; with temperature 0 the most probable one."""
    if temperature == 0:
        return int(logits.argmax())
    probabilities = torch.softmax(logits / temperature, dim=-1)
    return int(torch.multinomial(probabilities, 1, generator=random))
