"""Writing a packed file: tensor by tensor, complete under its name or not there at all."""

import contextlib
import errno
import os
import secrets
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO, TypeAlias

import torch
from torch import Tensor

from diffsynth.errors import OutputError
from diffsynth.vram.blocks import BlockLayout, clear_gaps, pack_entry
from diffsynth.vram.formats import AS_IS
from diffsynth.vram.identity import Identity
from diffsynth.vram.packed_file import until_full
from diffsynth.vram.packed_header import PIECE_BYTES, PackedHeader

Read: TypeAlias = Callable[[str], Tensor | Mapping[str, Tensor]]
"""Gives a tensor by the name of its entry: the weight, or its stored parts by suffix."""
Progress: TypeAlias = Callable[[int, int], None]
"""Told after every block: bytes written, bytes in all."""

_MARGIN_BYTES = 64 * 2**20
_OUT_OF_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


def write_packed(
    path: str | Path,
    blocks: Mapping[str, BlockLayout],
    identity: Identity,
    read: Read,
    *,
    progress: Progress | None = None,
    piece_bytes: int = PIECE_BYTES,
) -> None:
    """Convert a network, tensor by tensor, and write it.

    Beside the tensor that is being converted, memory for the largest block of several tensors and some 50 MB
    are used.  The file has its name only when it is complete and on the disk; whatever fails, nothing is
    left.

    Args:
        path: of the file; an older one is replaced.
        blocks: the layout of every block by name; names of entries are what ``read`` knows.
        identity: what the file is made of.
        read: see :data:`Read`; called once per entry in order.
        progress: see :data:`Progress`.
        piece_bytes: size of the pieces that have a checksum each.

    Raises:
        OutputError: the disk is full or the folder not writable.
        CheckpointError: a tensor cannot be read or stored, or a source changed meanwhile.
        Other exceptions of ``read`` and ``progress`` pass unchanged.
    """
    path = Path(path)
    header = PackedHeader(identity, blocks, piece_bytes)
    start, payload = header.nbytes, header.payload_bytes
    _check_space(path, start + payload)
    size = max((layout.nbytes for layout in blocks.values() if not _is_lone_tensor(layout)), default=0)
    buffer = torch.empty(size, dtype=torch.uint8)
    crc32: dict[str, list[int]] = {}
    done = 0
    with _new_file(path) as file:
        for name, layout in blocks.items():
            content = _packed(layout, read, buffer).numpy().data
            crc32[name] = [zlib.crc32(content[piece]) for piece in header.pieces(name)]
            _put(path, file, content, start + done)
            done += layout.nbytes
            if progress is not None:
                progress(done, payload)
        # Last, so that not even the content of an unfinished file looks finished.
        _put(path, file, memoryview(header.to_bytes(crc32)), 0)
        identity.check_current()


def _is_lone_tensor(layout: BlockLayout) -> bool:
    """Whether the block is one tensor as it is, byte for byte, like the embedding table."""
    parts = layout.parts
    return len(parts) == 1 and parts[0].nbytes == layout.nbytes and layout.entries[0].format in AS_IS


def _packed(layout: BlockLayout, read: Read, buffer: Tensor) -> Tensor:
    """The bytes of a block: in the buffer, or a lone tensor's own, which may be too large to have twice."""
    if _is_lone_tensor(layout):
        (entry,) = layout.entries
        tensor = read(entry.name)
        if (
            isinstance(tensor, Tensor)
            and tensor.dtype == entry.parts[0].dtype
            and tensor.shape == entry.shape
        ):
            return tensor.contiguous().view(-1).view(torch.uint8)
        block = torch.empty(layout.nbytes, dtype=torch.uint8)
        pack_entry(layout, entry.name, tensor, block)
        return block
    block = buffer[: layout.nbytes]
    clear_gaps(layout, block)
    for entry in layout.entries:
        pack_entry(layout, entry.name, read(entry.name), block)
    return block


def _check_space(path: Path, needed: int) -> None:
    try:
        free = shutil.disk_usage(path.parent).free
    except OSError as error:
        raise _output_error(path, error) from error
    if free < needed + _MARGIN_BYTES:
        raise OutputError(
            f"{path} needs {needed / 1e9:.1f} GB, {path.parent} has {free / 1e9:.1f} GB free",
            hint="free space, another folder in DIFFSYNTH_CACHE_PATH, or --no-cache",
        )


@contextlib.contextmanager
def _new_file(path: Path) -> Iterator[BinaryIO]:
    """A file that takes the name ``path`` when it is complete and on the disk, or is deleted."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        file = temporary.open("xb", buffering=0)
    except OSError as error:
        raise _output_error(path, error) from error
    try:
        with file:
            yield file
            with _output_errors(path):
                os.fsync(file.fileno())
        # Only now: some systems refuse to rename an open file.
        with _output_errors(path):
            temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    _flush_folder(path.parent)


def _put(path: Path, file: BinaryIO, content: memoryview, position: int) -> None:
    with _output_errors(path):
        file.seek(position)
        until_full(content, file.write)


@contextlib.contextmanager
def _output_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _output_error(path, error) from error


def _output_error(path: Path, error: OSError) -> OutputError:
    full = error.errno in _OUT_OF_SPACE
    hint = "free space, another folder in DIFFSYNTH_CACHE_PATH, or --no-cache"
    if not full:
        hint = "a folder that you may write to in DIFFSYNTH_CACHE_PATH, or --no-cache"
    return OutputError(f"{path} could not be written: {os.strerror(error.errno or 0)}", hint=hint)


def _flush_folder(folder: Path) -> None:
    # The file is complete under its name; some systems cannot open or flush a folder, and that is no failure.
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
