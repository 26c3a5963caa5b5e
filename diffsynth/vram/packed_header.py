"""The header of a packed file: what is in it, where, and the checksums of all of it.

The file is safetensors (https://huggingface.co/docs/safetensors), so that any tool can look into it: one U8
tensor per block, named like the block, in the order in which the blocks are used.  Its metadata states

* ``diffsynth_packed``: the format version;
* ``identity``: what the file was made of (:class:`diffsynth.vram.identity.Identity`);
* ``layouts``: for every block, where the tensors lie in it;
* ``piece_bytes`` and ``crc32``: for every block, the checksums of its pieces of that size, so that several
  threads can read and check one block;
* ``checksum``: SHA-256 of the whole header and its length, this value being zeros.

So every byte of the file is covered by a checksum.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeAlias

from diffsynth.errors import CheckpointError
from diffsynth.vram.blocks import BlockLayout
from diffsynth.vram.identity import FORMAT_VERSION, Identity

PAGE = 4096
"""The first block begins at a multiple of so many bytes of the file."""
PIECE_BYTES = 2**25
"""Size of the pieces that have a checksum each: large enough for a disk, small enough to share out."""

Checksums: TypeAlias = Mapping[str, Sequence[int]]
"""CRC-32 of every piece of every block."""

_VERSION_KEY = "diffsynth_packed"
_NO_CHECKSUM = "0" * 64
_MAX_HEADER_BYTES = 100_000_000


@dataclass(frozen=True)
class PackedHeader:
    """Everything that the header states, except checksums."""

    identity: Identity
    layouts: Mapping[str, BlockLayout]
    """Layout of every block, in the order of the file."""
    piece_bytes: int = PIECE_BYTES

    @property
    def payload_bytes(self) -> int:
        """Bytes of all blocks."""
        return sum(layout.nbytes for layout in self.layouts.values())

    @property
    def nbytes(self) -> int:
        """Size of the header, which does not depend on the checksums: a multiple of ``PAGE``."""
        unknown = {name: [0] * len(self.pieces(name)) for name in self.layouts}
        length = 8 + len(self._text(_NO_CHECKSUM, unknown))
        return -(-length // PAGE) * PAGE

    def pieces(self, block: str) -> list[slice]:
        """The bytes of a block that share a checksum, in order."""
        end = self.layouts[block].nbytes
        return [slice(b, min(b + self.piece_bytes, end)) for b in range(0, end, self.piece_bytes)]

    def to_bytes(self, crc32: Checksums) -> bytes:
        """The header as it stands in the file, with the checksums of every block."""
        size = self.nbytes
        blank = _padded(self._text(_NO_CHECKSUM, crc32), size)
        return _padded(self._text(hashlib.sha256(blank).hexdigest(), crc32), size)

    def offsets(self, start: int = 0) -> dict[str, int]:
        """Where every block begins, when the first one begins at ``start``."""
        sizes = (layout.nbytes for layout in self.layouts.values())
        return dict(zip(self.layouts, accumulate(sizes, initial=start), strict=False))

    def _text(self, checksum: str, crc32: Checksums) -> bytes:
        metadata = {
            _VERSION_KEY: str(FORMAT_VERSION),
            "checksum": checksum,
            "identity": self.identity.to_json(),
            "piece_bytes": str(self.piece_bytes),
            "crc32": json.dumps({name: [f"{v:08x}" for v in values] for name, values in crc32.items()}),
            "layouts": json.dumps({name: layout.to_json() for name, layout in self.layouts.items()}),
        }
        return json.dumps({"__metadata__": metadata, **self._table()}, separators=(",", ":")).encode()

    def _table(self) -> dict[str, Any]:
        """The entries of the safetensors format."""
        return {
            name: {
                "dtype": "U8",
                "shape": [self.layouts[name].nbytes],
                "data_offsets": [begin, begin + self.layouts[name].nbytes],
            }
            for name, begin in self.offsets().items()
        }

    @classmethod
    def read(cls, path: Path, descriptor: int) -> tuple["PackedHeader", Checksums, int]:
        """Read and check a header; the file must be as long as it says.

        Returns: the header, the checksums, and the position of the first block.

        Raises:
            CheckpointError: the file cannot be read, is no packed file, is damaged, cut off, or of another
                version.
        """
        try:
            size = os.fstat(descriptor).st_size
            with os.fdopen(descriptor, "rb", closefd=False) as file:
                start = file.read(8)
                length = int.from_bytes(start, "little")
                fits = len(start) == 8 and length <= min(_MAX_HEADER_BYTES, size - 8)
                text = file.read(length) if fits else b""
        except OSError as error:
            raise CheckpointError(
                f"{path}: cannot be read ({error.strerror})", hint="check the disk"
            ) from error
        try:
            header, crc32 = cls._parse(start, text)
        except (ValueError, KeyError, TypeError, AttributeError, CheckpointError) as error:
            raise damaged(path, f"not a packed file ({type(error).__name__}: {error})") from error
        if len(start) + len(text) + header.payload_bytes != size:
            raise damaged(path, "cut off, or longer than its header says")
        return header, crc32, len(start) + len(text)

    @classmethod
    def _parse(cls, start: bytes, text: bytes) -> tuple["PackedHeader", Checksums]:
        """Header and checksums.  Whatever is wrong raises one of the errors that :meth:`read` translates."""
        table = json.loads(text)
        metadata = table.pop("__metadata__")
        checksum = metadata["checksum"]
        blank = text.replace(checksum.encode(), _NO_CHECKSUM.encode(), 1)
        if hashlib.sha256(start + blank).hexdigest() != checksum:
            raise ValueError("the header does not have its checksum")
        if metadata[_VERSION_KEY] != str(FORMAT_VERSION):
            raise ValueError(f"format version {metadata[_VERSION_KEY]} instead of {FORMAT_VERSION}")
        layouts = {name: BlockLayout.from_json(t) for name, t in json.loads(metadata["layouts"]).items()}
        header = cls(Identity.from_json(metadata["identity"]), layouts, int(metadata["piece_bytes"]))
        crc32 = {name: [int(v, 16) for v in values] for name, values in json.loads(metadata["crc32"]).items()}
        counts = {name: len(header.pieces(name)) for name in layouts}
        if table != header._table() or {name: len(values) for name, values in crc32.items()} != counts:
            raise ValueError("its tables do not agree")
        return header, crc32


def damaged(path: Path, what: str) -> CheckpointError:
    """The error for a file that cannot be trusted."""
    return CheckpointError(f"{path}: damaged: {what}", hint="remove it: `diffsynth cache clear`")


def _padded(text: bytes, size: int) -> bytes:
    """Length and text, filled up with blanks, as the format allows."""
    return (size - 8).to_bytes(8, "little") + text.ljust(size - 8)
