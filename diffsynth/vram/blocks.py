"""Blocks: the tensors that move together, packed into one run of bytes.

A block is one contiguous uint8 buffer, on the host, on a device or in a file, and a :class:`BlockLayout` that
says where in it every part of every tensor lies.  The layout is data: it is made once from names, shapes and
formats, is written into the packed file, and holds for every copy of the block.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from diffsynth.errors import CheckpointError
from diffsynth.vram.formats import FLOAT8_DTYPES, SCALE, StorageFormat, decode, effective_format, encode
from diffsynth.vram.formats import parts as part_specs

PART_ALIGNMENT = 64
"""Every part begins at a multiple of so many bytes: vector loads and every dtype are satisfied."""
BLOCK_ALIGNMENT = 256
"""Sizes of blocks are multiples of so many bytes, so that blocks laid end to end stay aligned."""

Views: TypeAlias = dict[str, dict[str, Tensor]]
"""Tensor name -> suffix of the part -> typed view of the block's bytes."""

_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.bfloat16,
        torch.float16,
        torch.float32,
        torch.float8_e4m3fn,
        torch.float8_e5m2,
        torch.int8,
        torch.uint8,
    )
}


class TensorSpec(NamedTuple):
    """What is to be stored, and how: ``dtype`` is that of the tensor where it is computed with."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    format: StorageFormat


class Part(NamedTuple):
    """One stored tensor inside a block; ``offset`` in bytes from the start of the block."""

    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    suffix: str

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def end(self) -> int:
        """First byte after the part."""
        return self.offset + self.nbytes


class Entry(NamedTuple):
    """One tensor of a block and the parts that store it."""

    name: str
    shape: tuple[int, ...]
    format: StorageFormat
    dtype: torch.dtype
    """Of the tensor where it is computed with."""
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class BlockLayout:
    """Where everything lies in a block of ``nbytes`` bytes."""

    entries: tuple[Entry, ...]
    nbytes: int

    @cached_property
    def by_name(self) -> Mapping[str, Entry]:
        """The entries by name."""
        return {entry.name: entry for entry in self.entries}

    @property
    def parts(self) -> tuple[Part, ...]:
        """All parts of all entries in the order of their offsets."""
        return tuple(part for entry in self.entries for part in entry.parts)

    def views(self, buffer: Tensor, *, float8: bool = True) -> Views:
        """Typed views of a block's bytes; nothing is copied.

        Args:
            buffer: (nbytes or more,) uint8 on any device, beginning at a multiple of ``PART_ALIGNMENT`` bytes
                of its storage.
            float8: whether the device knows float8 dtypes; if not, such parts stay uint8.

        Raises:
            ValueError: the buffer is too small or not flat uint8.
        """
        self._check(buffer)
        return {
            entry.name: {part.suffix: _view(buffer, part, float8) for part in entry.parts}
            for entry in self.entries
        }

    def views_of(self, buffer: Tensor, name: str, *, float8: bool = True) -> dict[str, Tensor]:
        """The views of one entry, see :meth:`views`."""
        self._check(buffer)
        return {part.suffix: _view(buffer, part, float8) for part in self.by_name[name].parts}

    def to_json(self) -> str:
        """The layout as JSON text, equal for equal layouts."""
        entries = [
            {
                "name": entry.name,
                "shape": entry.shape,
                "format": str(entry.format),
                "dtype": _dtype_name(entry.dtype),
                "parts": [
                    {
                        "suffix": part.suffix,
                        "dtype": _dtype_name(part.dtype),
                        "shape": part.shape,
                        "offset": part.offset,
                    }
                    for part in entry.parts
                ],
            }
            for entry in self.entries
        ]
        return json.dumps({"nbytes": self.nbytes, "entries": entries}, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> "BlockLayout":
        """The layout that :meth:`to_json` wrote.

        Raises:
            CheckpointError: the text is not one, or describes parts that overlap, leave the block or do not
                belong to their format.
        """
        try:
            data = json.loads(text)
            layout = cls(entries=tuple(_entry(item) for item in data["entries"]), nbytes=data["nbytes"])
            layout._validate()
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"damaged block layout ({type(error).__name__}: {error})",
                hint="clear the cache: `diffsynth cache clear`",
            ) from error
        return layout

    def _check(self, buffer: Tensor) -> None:
        if buffer.dtype != torch.uint8 or buffer.ndim != 1 or buffer.numel() < self.nbytes:
            raise ValueError(
                f"a block of {self.nbytes} bytes needs a flat uint8 buffer, not {tuple(buffer.shape)} "
                f"{buffer.dtype}"
            )

    def _validate(self) -> None:
        """Raise ValueError unless parts fit their entries, follow one another and end inside the block."""
        position = 0
        if len(self.by_name) != len(self.entries):
            raise ValueError("a name occurs twice")
        for entry in self.entries:
            found = [(part.suffix, part.dtype, part.shape) for part in entry.parts]
            if found != [tuple(spec) for spec in part_specs(entry.format, entry.shape)]:
                raise ValueError(f"parts of {entry.name!r} do not store {entry.format} {entry.shape}")
            for part in entry.parts:
                if part.offset < position or part.offset % PART_ALIGNMENT:
                    raise ValueError(f"offset {part.offset} of {entry.name!r}")
                position = part.end
        if type(self.nbytes) is not int or self.nbytes < position or self.nbytes % BLOCK_ALIGNMENT:
            raise ValueError(f"block size {self.nbytes}")


def make_layout(specs: Mapping[str, TensorSpec]) -> BlockLayout:
    """Lay tensors out one after another, in the order given.

    An int4 weight whose width no group divides becomes int8, see
    :func:`diffsynth.vram.formats.effective_format`.

    Raises:
        ValueError: a quantised format for a tensor that is not 2-D.
    """
    position = 0
    entries = []
    for name, spec in specs.items():
        format = effective_format(spec.format, spec.shape)
        placed = []
        for part in part_specs(format, spec.shape):
            placed.append(Part(position, part.dtype, part.shape, part.suffix))
            position = _aligned(placed[-1].end, PART_ALIGNMENT)
        entries.append(Entry(name, tuple(spec.shape), format, spec.dtype, tuple(placed)))
    return BlockLayout(tuple(entries), _aligned(position, BLOCK_ALIGNMENT))


def pack(
    layout: BlockLayout, tensors_or_parts: Mapping[str, Tensor | Mapping[str, Tensor]], out: Tensor
) -> Tensor:
    """Write a whole block.

    Args:
        layout: of the block.
        tensors_or_parts: by name, a weight that is converted to the format of its entry, or its parts by
            suffix, whose bytes are taken over.
        out: (nbytes or more,) uint8 on the CPU.  Equal content gives equal bytes: gaps are filled with zeros.

    Returns: ``out``.

    Raises:
        CheckpointError: a tensor is missing, has another shape, or cannot be stored in its format.
    """
    clear_gaps(layout, out)
    for entry in layout.entries:
        if entry.name not in tensors_or_parts:
            raise CheckpointError(f"{entry.name}: missing", hint="use a complete checkpoint")
        pack_entry(layout, entry.name, tensors_or_parts[entry.name], out)
    return out


def pack_entry(
    layout: BlockLayout, name: str, tensor_or_parts: Tensor | Mapping[str, Tensor], out: Tensor
) -> None:
    """Write one entry into a block, see :func:`pack`; the rest of the block is not touched."""
    entry = layout.by_name[name]
    views = layout.views_of(out, name)
    if isinstance(tensor_or_parts, Tensor):
        if tuple(tensor_or_parts.shape) != entry.shape:
            raise _wrong(name, tensor_or_parts, entry.shape)
        encode(tensor_or_parts, entry.format, out=views, name=name)
        return
    if tensor_or_parts.keys() != views.keys():
        raise CheckpointError(
            f"{name}: parts {sorted(tensor_or_parts)} instead of {sorted(views)} for {entry.format}",
            hint="another storage format",
        )
    for suffix, view in views.items():
        part = tensor_or_parts[suffix]
        if part.numel() != view.numel() or (suffix == "" and part.shape != view.shape):
            raise _wrong(f"{name} {suffix}".rstrip(), part, tuple(view.shape))
        if part.dtype != view.dtype:
            raise CheckpointError(
                f"{name} {suffix}: {part.dtype} instead of {view.dtype}", hint="another storage format"
            )
    if entry.format in (StorageFormat.FP8, StorageFormat.FP8_TENSOR):
        # Takes the bytes over as well, and refuses NaN.
        encode(tensor_or_parts[""], entry.format, scale=tensor_or_parts[SCALE], out=views, name=name)
        return
    for suffix, view in views.items():
        view.copy_(tensor_or_parts[suffix].reshape(view.shape))


def clear_gaps(layout: BlockLayout, out: Tensor) -> None:
    """Zero the bytes of a block that belong to no part."""
    position = 0
    for part in layout.parts:
        out[position : part.offset].zero_()
        position = part.end
    out[position : layout.nbytes].zero_()


def unpack(
    layout: BlockLayout,
    buffer: Tensor,
    name: str,
    dtype: torch.dtype | None = None,
    *,
    out: Tensor | None = None,
    float8_cast: bool = True,
) -> Tensor:
    """One tensor of a block, in ``dtype`` or the dtype of its entry, on the device of the buffer.

    See :func:`diffsynth.vram.formats.decode`; an entry stored in the wanted dtype comes back as a view.
    """
    entry = layout.by_name[name]
    return decode(
        layout.views_of(buffer, name, float8=float8_cast),
        entry.format,
        entry.shape,
        dtype or entry.dtype,
        out=out,
        float8_cast=float8_cast,
    )


def _view(buffer: Tensor, part: Part, float8: bool) -> Tensor:
    flat = buffer[part.offset : part.end]
    if float8 or part.dtype not in FLOAT8_DTYPES:
        flat = flat.view(part.dtype)
    return flat.view(part.shape)


def _entry(item: Mapping[str, Any]) -> Entry:
    """An entry from JSON.  Raises ValueError, KeyError or TypeError."""
    placed = tuple(
        Part(_count(p["offset"]), _DTYPES[p["dtype"]], _shape(p["shape"]), str(p["suffix"]))
        for p in item["parts"]
    )
    return Entry(
        str(item["name"]),
        _shape(item["shape"]),
        StorageFormat(item["format"]),
        _DTYPES[item["dtype"]],
        placed,
    )


def _shape(value: object) -> tuple[int, ...]:
    if not isinstance(value, list):
        raise TypeError(f"shape {value!r}")
    return tuple(_count(number) for number in value)


def _count(value: object) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} is not a count")
    return value


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _aligned(position: int, alignment: int) -> int:
    return -(-position // alignment) * alignment


def _wrong(name: str, tensor: Tensor, shape: tuple[int, ...]) -> CheckpointError:
    return CheckpointError(
        f"{name}: shape {tuple(tensor.shape)} instead of {shape}", hint="use the checkpoint that belongs here"
    )
