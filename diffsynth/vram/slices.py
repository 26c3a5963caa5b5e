"""Slices of a large weight, streamed: a product that is a sum over slices needs only one at a time."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from diffsynth.device import Backend
from diffsynth.vram.binding import Contents, contents_of
from diffsynth.vram.blocks import BlockLayout, Entry, TensorSpec, make_layout
from diffsynth.vram.formats import StorageFormat, as_is
from diffsynth.vram.linear import Decode, Decoder, decoded_bytes, needs_decoding
from diffsynth.vram.source import BlockSource, TensorSource
from diffsynth.vram.streamer import Streamer, Traffic


def slice_layouts(
    weights: Mapping[str, tuple[int, int]],
    num_slices: int,
    *,
    per_block: int,
    dtype: torch.dtype,
    format: StorageFormat | None = None,
) -> dict[str, BlockLayout]:
    """Lay slices out as :class:`StreamedSlices` wants them.

    Entries are named ``{weight}:{index}``, blocks ``slices.{number}``.

    Args:
        weights: name of each weight and shape (out, in) of one slice of it.
        num_slices: slices of each weight.
        per_block: indices per block; the last block may have fewer.
        dtype: to compute with.
        format: to store in; None: as they are.
    """
    blocks = {}
    for number, first in enumerate(range(0, num_slices, per_block)):
        blocks[f"slices.{number}"] = make_layout(
            {
                f"{name}:{index}": TensorSpec(shape, dtype, format or as_is(dtype))
                for index in range(first, min(first + per_block, num_slices))
                for name, shape in weights.items()
            }
        )
    return blocks


def stream_rows(
    backend: Backend, table: Tensor, rows: Sequence[int], *, slots: int, residents: Collection[int] = ()
) -> "StreamedSlices":
    """Stream a table that lies on the host, piece by piece, over and over.

    Args:
        backend: of the device.
        table: (total, width) on the host; it must stay as it is.
        rows: of each piece.
        slots: see :class:`StreamedSlices`.
        residents: numbers of the pieces that stay on the device.
    """
    pieces = {f"table:{number}": piece for number, piece in enumerate(torch.split(table, list(rows)))}
    layouts = {
        f"rows.{number}": make_layout({name: TensorSpec(tuple(piece.shape), piece.dtype, as_is(piece.dtype))})
        for number, (name, piece) in enumerate(pieces.items())
    }
    return StreamedSlices(
        backend,
        TensorSource(layouts, pieces.__getitem__, backend),
        tuple(layouts),
        num_weights=1,
        slots=slots,
        residents=[f"rows.{number}" for number in residents],
    )


class StreamedSlices:
    """Gives the slices of index 0, 1, 2, ... over and over: ``slices(index)``, one tensor per weight.

    The entries of the blocks, one block after another, are the slices of index 0 of every weight, then those
    of index 1, and so on; the slices of one index lie in one block.  What is returned is valid until the next
    call.  ``with`` closes it.
    """

    def __init__(
        self,
        backend: Backend,
        source: BlockSource,
        blocks: Sequence[str],
        *,
        num_weights: int,
        slots: int = 2,
        residents: Collection[str] = (),
    ) -> None:
        """Allocate and begin to stream.

        Args:
            backend: of the device.
            source: of the blocks.
            blocks: their names in order.
            num_weights: weights that are cut into slices, hence slices of each index.
            slots: see :class:`~.streamer.Streamer`.
            residents: see :class:`~.streamer.Streamer`.

        Raises:
            ValueError: a block does not hold whole indices.
            CheckpointError: a resident block cannot be read.
            torch.OutOfMemoryError: or what the backend raises; nothing stays allocated.
        """
        self._places: list[tuple[str, int]] = []
        self._entries: list[tuple[Entry, ...]] = []
        for block in blocks:
            entries = source.layout(block).entries
            if len(entries) % num_weights:
                raise ValueError(f"block {block!r} holds {len(entries)} slices of {num_weights} weights")
            for first in range(0, len(entries), num_weights):
                self._places.append((block, first))
                self._entries.append(entries[first : first + num_weights])
        self._held: str | None = None
        self._contents: Contents | None = None
        self._decoders: list[Decoder] = []
        self._streamer = Streamer(
            backend, source, blocks, slots=slots, residents=residents, prepare=contents_of, label="slices"
        )
        try:
            self._decode = self._bind_decoders(backend, num_weights)
        except BaseException:
            self.close()
            raise

    def _bind_decoders(self, backend: Backend, num_weights: int) -> list[list[Decode | None]]:
        """Slices of one index are used together, so every weight has a scratch buffer of its own."""
        for weight in range(num_weights):
            largest = max((decoded_bytes(entries[weight]) for entries in self._entries), default=0)
            self._decoders.append(Decoder(backend, largest, label="decoded slice"))
        return [
            [
                decoder.bind(entry) if needs_decoding(entry) else None
                for decoder, entry in zip(self._decoders, entries, strict=True)
            ]
            for entries in self._entries
        ]

    def __call__(self, index: int) -> list[Tensor]:
        """The slices of ``index``, in the dtype of their entries, on the device.

        Raises:
            CheckpointError: the block cannot be read.
        """
        block, first = self._places[index]
        if block != self._held:
            self._release()
            self._contents = self._streamer.acquire(block)
            self._held = block
        assert self._contents is not None
        values, parts = self._contents
        return [
            values[first + i] if decode is None else decode(parts[first + i])
            for i, decode in enumerate(self._decode[index])
        ]

    def traverse(self) -> Iterator[list[Tensor]]:
        """What each index in turn gives, from the first to the last."""
        for index in range(len(self._places)):
            yield self(index)
        self._release()

    @property
    def traffic(self) -> Traffic:
        """Everything moved so far."""
        return self._streamer.traffic

    @property
    def device_bytes(self) -> int:
        """Device memory held now."""
        return self._streamer.device_bytes + sum(decoder.device_bytes for decoder in self._decoders)

    def close(self) -> None:
        """Give all memory back and stop the source.  May be called twice."""
        self._held = self._contents = None
        self._decode = []
        self._decoders.clear()
        self._streamer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _release(self) -> None:
        held, self._held, self._contents = self._held, None, None
        if held is not None:
            self._streamer.release(held)
