"""A network's blocks in one file, ready to be copied or mapped: written once, read many times.

Written by :mod:`diffsynth.vram.packed_writer`; how the file is laid out and protected by checksums:
:mod:`diffsynth.vram.packed_header`.  Whatever is damaged, stale or cut off raises; nothing is ever repaired
by guessing.
"""

import contextlib
import ctypes
import mmap
import os
import threading
import weakref
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Self

import numpy as np
import torch
from torch import Tensor

from diffsynth.errors import CheckpointError
from diffsynth.vram.identity import Identity
from diffsynth.vram.packed_header import PackedHeader

_MAX_TRANSFER_BYTES = 2**30
_THREADS = 6  # a disk is at its best with a few requests at a time, and checksums take as long as reading


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
        except NotADirectoryError as error:  # the cache folder is a file: whoever writes to it will say so
            raise FileNotFoundError(f"{path}: no such file") from error
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
                return until_full(view, file.readinto)
        place = position

        def read(part: memoryview) -> int:
            nonlocal place
            count = os.preadv(self._descriptor, [part], place)
            place += count
            return count

        return until_full(view, read)


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


def until_full(view: memoryview, move: Callable[[memoryview], int | None]) -> int:
    """Call ``move`` on what is left of ``view`` until nothing is, or nothing more comes."""
    done = 0
    while done < len(view):
        count = move(view[done : done + _MAX_TRANSFER_BYTES])
        if not count:
            break
        done += count
    return done
