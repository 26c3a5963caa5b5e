"""What a packed file was made of: two equal identities mean that its content would be made the same again."""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from diffsynth.errors import CheckpointError
from diffsynth.vram.blocks import BlockLayout

FORMAT_VERSION = 2
"""Of packed files: raised when the same layouts and sources would give other bytes."""

_MAX_HEADER_BYTES = 100_000_000
_SAMPLES = 64
_SAMPLE_BYTES = 4096


class SourceFile(NamedTuple):
    """One file of weights as it was when it was looked at."""

    path: str
    """Absolute, links resolved."""
    size: int
    mtime_ns: int
    digest: str
    """Of the header and of samples spread over the file.

    The samples tell apart two checkpoints of equal layout whose times were set alike, as archives and
    container images do.
    """

    @classmethod
    def of(cls, path: str | Path) -> "SourceFile":
        """Look at a file.

        Raises:
            CheckpointError: the file is missing or cannot be read.
        """
        real = os.path.realpath(path)
        try:
            with Path(real).open("rb") as file:
                status = os.fstat(file.fileno())
                digest = hashlib.sha256()
                for position, count in _looked_at(file.read(8), status.st_size):
                    file.seek(position)
                    digest.update(file.read(count))
        except OSError as error:
            raise CheckpointError(
                f"{path}: cannot be read ({error.strerror})", hint="check the path"
            ) from error
        return cls(real, status.st_size, status.st_mtime_ns, digest.hexdigest())

    def changed(self) -> bool:
        """Whether another file has the path now; a missing file counts as unchanged: it may come back."""
        try:
            status = Path(self.path).stat()
        except OSError:
            return False
        return (status.st_size, status.st_mtime_ns) != (self.size, self.mtime_ns)


def _looked_at(start: bytes, size: int) -> Iterable[tuple[int, int]]:
    """Positions and sizes of what is read: the header, if it is a safetensors file, and the samples."""
    header = 8 + int.from_bytes(start, "little")
    if header <= min(size, _MAX_HEADER_BYTES):
        yield 0, header
    else:
        header = 0
    span = max(0, size - header - _SAMPLE_BYTES)
    for number in range(_SAMPLES):
        yield header + span * number // (_SAMPLES - 1), _SAMPLE_BYTES


@dataclass(frozen=True, kw_only=True, slots=True)
class Identity:
    """Everything that decides the content of a packed file."""

    network: str
    """For people and for the file name, for instance ``"transformer"``."""
    policy: str
    """Name of the rule that gave every tensor its format, for instance ``"int8"``."""
    sources: tuple[SourceFile, ...]
    layout: str
    """Digest of the blocks' layouts."""
    version: int = FORMAT_VERSION

    @property
    def file_name(self) -> str:
        """Name of the packed file: readable, and different for different identities."""
        readable = re.sub(r"[^A-Za-z0-9.-]+", "_", f"{self.network}-{self.policy}")[:80]
        return f"{readable}-{hashlib.sha256(self.to_json().encode()).hexdigest()[:24]}.safetensors"

    def check_current(self) -> None:
        """Make sure that the sources are still the files that were looked at.

        Raises:
            CheckpointError: one has changed or is gone.
        """
        for source in self.sources:
            if SourceFile.of(source.path) != source:
                raise CheckpointError(f"{source.path} changed while it was in use", hint="load it again")

    def to_json(self) -> str:
        """JSON text, equal for equal identities."""
        return json.dumps(
            {
                "version": self.version,
                "network": self.network,
                "policy": self.policy,
                "sources": [source._asdict() for source in self.sources],
                "layout": self.layout,
            },
            separators=(",", ":"),
        )

    @classmethod
    def from_json(cls, text: str) -> "Identity":
        """The identity that :meth:`to_json` wrote.

        Raises:
            ValueError, KeyError, TypeError: the text is not one.
        """
        data: dict[str, Any] = json.loads(text)
        sources = tuple(SourceFile(**source) for source in data.pop("sources"))
        return cls(sources=sources, **data)


def identify(
    network: str, policy: str, paths: Iterable[str | Path], blocks: Mapping[str, BlockLayout]
) -> Identity:
    """The identity of a network that is about to be packed.

    Args:
        network: its name.
        policy: name of the rule that gave every tensor its format.
        paths: all files that its weights come from.
        blocks: the layout of every block, in the order of the packed file.

    Raises:
        CheckpointError: a file is missing or cannot be read.
    """
    digest = hashlib.sha256()
    for name, layout in blocks.items():
        digest.update(json.dumps([name, layout.to_json()]).encode())
    sources = tuple(SourceFile.of(path) for path in paths)
    return Identity(network=network, policy=policy, sources=sources, layout=digest.hexdigest())
