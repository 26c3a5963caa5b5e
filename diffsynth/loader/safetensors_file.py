"""Reading safetensors files: only the header on opening, then single tensors by positional reads.

Nothing is mapped into memory: a tensor is read into memory of its own, so host memory is exactly what was
asked for, and the operating system's file cache may drop what was read.  Opening imports neither torch nor
numpy, so that a 43 GB checkpoint can be looked at in milliseconds.

Format (https://huggingface.co/docs/safetensors): 8 bytes header length, little endian; the header, a JSON
object ``{name: {"dtype", "shape", "data_offsets": [begin, end]}, "__metadata__": {text: text}}``; then the
tensor data, row-major, without holes.
"""

import json
import math
import mmap
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeGuard

from diffsynth.errors import CheckpointError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

PIECE_BYTES = 4 * 2**20
"""Size of the staging buffer when a tensor is converted or moved while it is read."""

# Bits per element of every dtype that the format knows.
DTYPE_BITS: Mapping[str, int] = {
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32,
    "I64": 64, "U64": 64, "F64": 64, "C64": 64,
}  # fmt: skip

_TORCH_NAMES: Mapping[str, str] = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "F8_E5M2": "float8_e5m2", "F8_E4M3": "float8_e4m3fn",
    "I16": "int16", "U16": "uint16", "F16": "float16", "BF16": "bfloat16",
    "I32": "int32", "U32": "uint32", "F32": "float32",
    "I64": "int64", "U64": "uint64", "F64": "float64", "C64": "complex64",
}  # fmt: skip

_MAX_HEADER_BYTES = 100_000_000
_PICKLE_SUFFIXES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl"})
_AGAIN = "delete the file and fetch it again"


class WeightSource(Protocol):
    """Named tensors that can be listed without being read: a file, several files, or a state dict."""

    @property
    def name(self) -> str:
        """For messages: a path, or what else the tensors come from."""

    @property
    def metadata(self) -> Mapping[str, str]:
        """Text entries of the file; empty when it has none."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of every tensor, by key."""

    @property
    def dtypes(self) -> Mapping[str, str]:
        """Name of every tensor's stored dtype as safetensors writes it, for instance ``"BF16"``."""

    def read(
        self, key: str, dtype: "torch.dtype | None" = None, device: "torch.device | str | None" = None
    ) -> "Tensor":
        """One tensor, see :meth:`SafetensorsFile.read`."""

    def pieces(self, key: str) -> "Iterator[tuple[slice, Tensor]]":
        """One tensor in pieces of whole rows, see :meth:`SafetensorsFile.pieces`."""


class TensorEntry(NamedTuple):
    """One line of the header; ``begin`` and ``end`` are byte positions in the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class SafetensorsFile:
    """One safetensors file.  Opening reads and checks the header only; nothing stays open afterwards.

    ``bytes_read`` counts what was read from the file so far, header included.

    Raises:
        CheckpointError: the file is missing, empty, cut off, damaged, or not safetensors (a pickle is
            refused: it could run code when opened).
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.bytes_read = 0
        _refuse_by_name(self.path)
        try:
            with self.path.open("rb", buffering=0) as file:
                status = os.fstat(file.fileno())
                header, start = self._read_header(file.fileno(), status.st_size)
        except FileNotFoundError:
            raise CheckpointError(f"{self.path}: no such file", hint="check the path") from None
        except OSError as error:
            raise CheckpointError(
                f"{self.path}: cannot be read ({error.strerror})", hint="check it"
            ) from error
        self._stamp = (status.st_size, status.st_mtime_ns)
        self.metadata: dict[str, str] = _metadata(self.path, header.pop("__metadata__", None))
        self._entries = _entries(self.path, header, start, status.st_size)
        self.shapes: dict[str, tuple[int, ...]] = {key: e.shape for key, e in self._entries.items()}
        self.dtypes: dict[str, str] = {key: e.dtype for key, e in self._entries.items()}

    @property
    def name(self) -> str:
        """The path, for messages."""
        return str(self.path)

    @property
    def keys(self) -> list[str]:
        """Tensor names in file order."""
        return list(self._entries)

    def entry(self, key: str) -> TensorEntry:
        """Where the tensor lies: for readers of their own that want bytes instead of tensors."""
        try:
            return self._entries[key]
        except KeyError:
            raise CheckpointError(
                f"{self.path}: holds no tensor {key!r}", hint="see what it holds: `diffsynth inspect FILE`"
            ) from None

    def read(
        self, key: str, dtype: "torch.dtype | None" = None, device: "torch.device | str | None" = None
    ) -> "Tensor":
        """Read one tensor.

        Args:
            key: its name in the file.
            dtype: what to convert to; None keeps the stored dtype.
            device: where to put it; None is the CPU.

        Returns:
            A tensor of its own memory.  Conversion and transfer go through pieces of ``PIECE_BYTES``, so host
            memory never holds the tensor twice.
        """
        import torch

        entry = self.entry(key)
        stored = torch_dtype(entry.dtype, where=f"{self.path}: {key}")
        target = torch.device("cpu") if device is None else torch.device(device)
        if (dtype is None or dtype == stored) and target.type == "cpu":
            flat = torch.empty(entry.end - entry.begin, dtype=torch.uint8)
            self._fill(flat, entry.begin)
            return flat.view(stored).reshape(entry.shape)
        result = torch.empty(entry.shape, dtype=dtype or stored, device=target)
        rows = result.view(-1) if result.ndim == 0 else result
        for part, piece in self.pieces(key):
            rows[part].copy_(piece)
        return result

    def pieces(self, key: str, piece_bytes: int = PIECE_BYTES) -> "Iterator[tuple[slice, Tensor]]":
        """Read one tensor in pieces of whole rows of its first axis (a scalar counts as one row).

        Yields:
            The range of rows and their values in the stored dtype on the CPU, [rows, ...]; the memory is used
            again for the next piece.
        """
        import torch

        entry = self.entry(key)
        stored = torch_dtype(entry.dtype, where=f"{self.path}: {key}")
        shape = entry.shape or (1,)
        row_bytes = (entry.end - entry.begin) // max(shape[0], 1)
        step = max(1, piece_bytes // max(row_bytes, 1))
        size = min(step, shape[0]) * row_bytes
        if not size:
            return
        # Not from the heap: between tensors that stay, freed pieces would leave holes that nothing fills.
        buffer = torch.frombuffer(mmap.mmap(-1, size), dtype=torch.uint8)
        for first in range(0, shape[0], step):
            last = min(first + step, shape[0])
            flat = buffer[: (last - first) * row_bytes]
            self._fill(flat, entry.begin + first * row_bytes)
            yield slice(first, last), flat.view(stored).reshape(last - first, *shape[1:])

    def _fill(self, target: "Tensor", position: int) -> None:
        """Read the bytes from ``position`` of the file into a flat uint8 tensor."""
        view = target.numpy().data
        done = 0
        with self.path.open("rb", buffering=0) as file:
            status = os.fstat(file.fileno())
            if (status.st_size, status.st_mtime_ns) != self._stamp:
                raise CheckpointError(f"{self.path} changed while it was in use", hint="load it again")
            file.seek(position)
            while done < len(view):
                count = file.readinto(view[done:])
                if not count:
                    raise CheckpointError(f"{self.path} ends at byte {position + done}", hint=_AGAIN)
                done += count
        self.bytes_read += done

    def _read_header(self, descriptor: int, size: int) -> tuple[dict[str, Any], int]:
        """The parsed header and the position of the first tensor byte."""
        start = _exactly(descriptor, min(size, 64))
        _refuse_by_content(self.path, start)
        length = int.from_bytes(start[:8], "little")
        if size < 8 or length > _MAX_HEADER_BYTES or 8 + length > size:
            # Deleting is no advice for a file that may be something else.
            raise CheckpointError(
                f"{self.path}: not a safetensors file, or cut off in its header",
                hint="the .safetensors file of the model, fetched again if this is it",
            )
        text = start[8 : 8 + length] + _exactly(descriptor, max(0, 8 + length - len(start)))
        self.bytes_read += max(len(start), 8 + length)
        try:
            header = json.loads(text)
        except ValueError as error:
            raise CheckpointError(f"{self.path}: damaged header ({error})", hint=_AGAIN) from None
        if not isinstance(header, dict):
            raise CheckpointError(f"{self.path}: damaged header (not a table of tensors)", hint=_AGAIN)
        return header, 8 + length


def torch_dtype(name: str, *, where: str = "") -> "torch.dtype":
    """The torch dtype of a safetensors dtype name.

    Raises:
        CheckpointError: torch cannot hold it; ``where`` names the tensor in the message.
    """
    import torch

    if name not in _TORCH_NAMES:
        raise CheckpointError(f"{where}: dtype {name} is not supported", hint="use the bf16 or fp8 file")
    dtype = getattr(torch, _TORCH_NAMES[name])
    assert isinstance(dtype, torch.dtype)
    return dtype


def safetensors_dtype(dtype: "torch.dtype") -> str:
    """The name that a safetensors file would give to a torch dtype; the dtype's own name for foreign ones."""
    plain = str(dtype).removeprefix("torch.")
    return next((name for name, known in _TORCH_NAMES.items() if known == plain), plain)


def _exactly(descriptor: int, count: int) -> bytes:
    """Up to ``count`` bytes from the present position; fewer only at the end of the file."""
    parts = []
    while count > 0:
        part = os.read(descriptor, count)
        if not part:
            break
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


def _refuse_by_name(path: Path) -> None:
    if path.suffix in _PICKLE_SUFFIXES:
        raise CheckpointError(
            f"{path}: {path.suffix} files are Python pickles, which can run code when opened",
            hint="use the .safetensors file of the same model",
        )
    if path.suffix == ".gguf":
        raise CheckpointError(f"{path}: GGUF files are not supported", hint="use the .safetensors file")


def _refuse_by_content(path: Path, start: bytes) -> None:
    """Files that are something else entirely, named for what they are."""
    if not start:
        raise CheckpointError(f"{path}: the file is empty", hint=_AGAIN)
    if start[8:9] == b"{":
        return  # a header after its length, whose bytes can look like the beginning of anything
    if start.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")):
        raise CheckpointError(
            f"{path}: a Python pickle under another name; opening it could run code",
            hint="use the .safetensors file of the same model",
        )
    if start.startswith(b"GGUF"):
        raise CheckpointError(f"{path}: GGUF files are not supported", hint="use the .safetensors file")
    if start.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{path}: only a Git LFS pointer, not the weights", hint="git lfs pull")
    if start.lstrip()[:1] == b"<":
        raise CheckpointError(f"{path}: a web page was saved instead of the weights", hint=_AGAIN)


def _metadata(path: Path, value: object) -> dict[str, str]:
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise CheckpointError(f"{path}: damaged header (metadata is not text)", hint=_AGAIN)
    return value


def _entries(path: Path, header: dict[str, Any], start: int, size: int) -> dict[str, TensorEntry]:
    """The header's tensors in file order, checked to fill the file exactly."""
    entries = {key: _entry(path, key, value, start) for key, value in header.items()}
    ordered = dict(sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)))
    position = start
    for key, entry in ordered.items():
        if entry.begin != position:
            raise CheckpointError(f"{path}: damaged header (hole or overlap before {key!r})", hint=_AGAIN)
        position = entry.end
    if size != position:
        what = (
            f"cut off: {size:,} of {position:,} bytes" if size < position else "longer than its header says"
        )
        raise CheckpointError(f"{path}: {what}: {size:,} instead of {position:,} bytes", hint=_AGAIN)
    return ordered


def _entry(path: Path, key: str, value: object, start: int) -> TensorEntry:
    if isinstance(value, dict) and value.get("dtype") in DTYPE_BITS:
        shape, offsets = value.get("shape"), value.get("data_offsets")
        if _counts(shape) and _counts(offsets) and len(offsets) == 2:
            begin, end = offsets
            if (end - begin) * 8 == DTYPE_BITS[value["dtype"]] * math.prod(shape):
                return TensorEntry(value["dtype"], tuple(shape), start + begin, start + end)
    raise CheckpointError(f"{path}: damaged header (entry of {key!r})", hint=_AGAIN)


def _counts(value: object) -> TypeGuard[list[int]]:
    """Whether a JSON value is a list of whole numbers from 0 up."""
    return isinstance(value, list) and all(type(number) is int and number >= 0 for number in value)
