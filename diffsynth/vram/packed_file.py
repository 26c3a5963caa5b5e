"""A network's blocks in one file, ready to be copied or mapped: written once, read many times.

How the file is laid out and protected by checksums: :mod:`diffsynth.vram.packed_header`.  Whatever is
damaged, stale or cut off raises; nothing is ever repaired by guessing.
"""

import contextlib
import ctypes
import errno
import mmap
import os
import secrets
import shutil
import threading
import weakref
import zlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import BinaryIO, Self, TypeAlias

import numpy as np
import torch
from torch import Tensor

from diffsynth.errors import CheckpointError, OutputError
from diffsynth.vram.blocks import BlockLayout, clear_gaps, pack_entry
from diffsynth.vram.formats import AS_IS
from diffsynth.vram.identity import Identity
from diffsynth.vram.packed_header import PIECE_BYTES, PackedHeader

Read: TypeAlias = Callable[[str], Tensor | Mapping[str, Tensor]]
"""Gives a tensor by the name of its entry: the weight, or its stored parts by suffix."""
Progress: TypeAlias = Callable[[int, int], None]
"""Told after every block: bytes written, bytes in all."""

_MAX_TRANSFER_BYTES = 2**30
_THREADS = 6  # a disk is at its best with a few requests at a time, and checksums take as long as reading
_MARGIN_BYTES = 64 * 2**20
_OUT_OF_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


class PackedFile:
    """A packed file that was opened and checked; made by :meth:`open`.  May be used by several threads."""

    def __init__(self, path: Path, descriptor: int, *, discard_damaged: bool) -> None:
        header, self._crc32, start = PackedHeader.read(path, descriptor)
        self._header = header
        self.path = path
        self.identity = header.identity
        self.layouts = header.layouts
        """Layout of every block, in the order of the file."""
        self.nbytes = header.payload_bytes
        """Bytes of all blocks."""
        self._offsets = header.offsets(start)
        self._descriptor = descriptor
        self._discard_damaged = discard_damaged
        self._checked: set[str] = set()
        self._mapping: Tensor | None = None
        self._lock = threading.Lock()
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="diffsynth-disk")
        self._closing = weakref.finalize(self, os.close, descriptor)

    @classmethod
    def open(cls, path: str | Path, identity: Identity | None, *, discard_damaged: bool = False) -> Self:
        """Open a file and check its header; the blocks are checked when they are first used.

        Args:
            path: the file.
            identity: what the file must have been made of; None: whatever it says itself.
            discard_damaged: delete the file when a block turns out to be damaged, so that it is made anew.

        Raises:
            FileNotFoundError: there is none.
            CheckpointError: it cannot be read, is no packed file, is damaged, cut off, of another version, or
                was made of something else.
        """
        path = Path(path)
        try:
            descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        except FileNotFoundError:
            raise
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read ({error.strerror})", hint="check it") from error
        try:
            file = cls(path, descriptor, discard_damaged=discard_damaged)
        except BaseException:
            os.close(descriptor)
            raise
        if identity is not None and file.identity != identity:
            file.close()
            raise CheckpointError(
                f"{path} was made of other files or with other settings",
                hint="remove it: `diffsynth cache clear`",
            )
        return file

    def close(self) -> None:
        """Close the file, when no thread reads any more; mapped blocks stay valid while tensors live."""
        self._mapping = None
        self._threads.shutdown()
        self._closing()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def read_into(self, block: str, buffer: Tensor, *, keep_in_file_cache: bool = True) -> None:
        """Read a block; its checksum is compared on the first read of the block.

        Args:
            block: its name.
            buffer: (nbytes or more,) uint8 on the CPU, contiguous.
            keep_in_file_cache: whether the system should keep the bytes in memory for the next read.  A scan
                over more than fits evicts everything just before it is wanted, and other programs with it.

        Raises:
            CheckpointError: the block is damaged or cannot be read.
            ValueError: the buffer is too small, or the file is closed.
        """
        layout = self.layouts[block]
        if buffer.dtype != torch.uint8 or buffer.ndim != 1 or buffer.numel() < layout.nbytes:
            raise ValueError(f"{block} needs {layout.nbytes} flat uint8, not {tuple(buffer.shape)}")
        if not self._closing.alive:
            raise ValueError(f"{self.path} is closed")
        view = buffer.numpy().data[: layout.nbytes]
        start = self._offsets[block]

        def read(piece: slice) -> int:
            done = self._fill(view[piece], start + piece.start)
            if not keep_in_file_cache and hasattr(os, "posix_fadvise"):
                os.posix_fadvise(self._descriptor, start + piece.start, done, os.POSIX_FADV_DONTNEED)
            return done

        try:
            done = self._for_pieces(block, view, read)
        except OSError as error:
            raise CheckpointError(
                f"{self.path}: {block} cannot be read ({error.strerror})", hint="check the disk"
            ) from error
        if done != layout.nbytes:
            raise self._damage(block, f"ends {layout.nbytes - done} bytes early")

    def mapped(self, block: str) -> Tensor:
        """A block as a read-only window on the file: (nbytes,) uint8, page by page read when it is touched.

        The checksum is compared on the first use of the block, which reads it whole.  Writing to the tensor
        ends the process.

        Raises:
            CheckpointError: the block is damaged or cannot be mapped.
            ValueError: the file is closed.
        """
        with self._lock:
            if self._mapping is None:
                if not self._closing.alive:
                    raise ValueError(f"{self.path} is closed")
                self._mapping = _map(self.path, self._descriptor)
            whole = self._mapping
        position = self._offsets[block]
        result = whole[position : position + self.layouts[block].nbytes]
        if result.numel() != self.layouts[block].nbytes:
            raise self._damage(block, "is cut off")

        def touch(piece: slice) -> int:
            size: int = piece.stop - piece.start
            if hasattr(os, "posix_fadvise"):  # in large reads: page faults ask for a little at a time
                os.posix_fadvise(self._descriptor, position + piece.start, size, os.POSIX_FADV_WILLNEED)
            return size

        if block not in self._checked:
            self._for_pieces(block, result.numpy().data, touch)
        return result

    def _for_pieces(self, block: str, content: memoryview, read: Callable[[slice], int]) -> int:
        """Read a block, several pieces at once, and compare their checksums on its first use.

        When anything fails, no thread touches ``content`` any more.

        Returns: bytes read, the sum of what ``read`` says.
        """
        checked = block in self._checked
        wrong: list[slice] = []

        def work(piece: slice, crc32: int) -> int:
            done = read(piece)
            whole = done == piece.stop - piece.start
            if whole and not checked and zlib.crc32(content[piece]) != crc32:
                wrong.append(piece)
            return done

        jobs = list(zip(self._header.pieces(block), self._crc32[block], strict=True))
        if len(jobs) > 1:
            running = [self._threads.submit(work, *job) for job in jobs]
            wait(running)
            done = sum(job.result() for job in running)
        else:
            done = sum(work(*job) for job in jobs)
        if wrong:
            raise self._damage(block, "does not have its checksum")
        if done == len(content):
            self._checked.add(block)
        return done

    def _damage(self, block: str, what: str) -> CheckpointError:
        hint = "remove it: `diffsynth cache clear`"
        if self._discard_damaged:
            with contextlib.suppress(OSError):
                # Somebody may have put a new file there meanwhile.
                if os.path.samestat(self.path.stat(), os.fstat(self._descriptor)):
                    self.path.unlink()
                    hint = "start again: the damaged file was deleted and will be made anew"
        return CheckpointError(f"{self.path}: damaged: {block} {what}", hint=hint)

    def _fill(self, view: memoryview, position: int) -> int:
        """Read from ``position`` until ``view`` is full or the file ends; returns the bytes read."""
        if not hasattr(os, "preadv"):
            with self._lock, os.fdopen(self._descriptor, "rb", buffering=0, closefd=False) as file:
                file.seek(position)
                return _until_full(view, file.readinto)
        place = position

        def read(part: memoryview) -> int:
            nonlocal place
            count = os.preadv(self._descriptor, [part], place)
            place += count
            return count

        return _until_full(view, read)


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


def _map(path: Path, descriptor: int) -> Tensor:
    """The whole file as a uint8 tensor.

    Mapped for reading only: a private writable mapping would count against the system's memory limit with its
    whole size.  torch warns about read-only buffers, so it gets one that does not say that it is.
    """
    try:
        mapping = mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be mapped ({error.strerror})", hint="read it instead, or free address space"
        ) from error
    address = np.frombuffer(mapping, dtype=np.uint8).ctypes.data
    window = (ctypes.c_uint8 * len(mapping)).from_address(address)
    window.mapping = mapping  # type: ignore[attr-defined]  # lives as long as the tensor
    return torch.frombuffer(window, dtype=torch.uint8)


def _until_full(view: memoryview, move: Callable[[memoryview], int | None]) -> int:
    """Call ``move`` on what is left of ``view`` until nothing is, or nothing more comes."""
    done = 0
    while done < len(view):
        count = move(view[done : done + _MAX_TRANSFER_BYTES])
        if not count:
            break
        done += count
    return done


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
        _until_full(content, file.write)


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
