"""The folder of packed files: found by what they were made of, made when they are missing.

Nothing is trusted by its name.  A file counts only if its header says that it was made of exactly these
sources with exactly these layouts; every block is checked when it is first used; a damaged file is made anew.
Files appear under their names complete or not at all, so a process that is killed leaves only a ``.part``
file, which the next writer of the same file deletes.  Two processes that want the same file take turns by a
lock file; where the system has no locks both write, and one of the two equal files stays.
"""

import contextlib
import errno
import logging
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from pathlib import Path
from typing import IO

import platformdirs

from diffsynth.errors import CheckpointError, OutputError
from diffsynth.vram.identity import Identity
from diffsynth.vram.packed_file import PackedFile

logger = logging.getLogger(__name__)

FOLDER_VARIABLE = "DIFFSYNTH_CACHE_PATH"
"""Environment variable that names the cache folder."""

_POLL_S = 0.1
_SUFFIX = ".safetensors"
_HINT = f"a folder that you may write to in {FOLDER_VARIABLE}, or --no-cache"


class EntryState(StrEnum):
    """What a file in the cache is good for."""

    READY = "ready"
    STALE = "stale"
    """The files that it was made of have changed: it will never be used again."""
    DAMAGED = "damaged"
    """Or written by another version: it will be made anew."""
    UNFINISHED = "unfinished"
    """Being written, or left by a process that was killed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheEntry:
    """One file of the cache, as its header describes it."""

    path: Path
    network: str
    """Empty when the file cannot be read, as the next two."""
    sources: tuple[str, ...]
    """Paths of the files that it was made of."""
    format: str
    nbytes: int
    """Size of the file."""
    created: datetime
    state: EntryState


class PackedCache:
    """Packed files in one folder, shared by all processes of a user.

    Args:
        folder: where the files lie; None: ``packed`` in the folder that ``DIFFSYNTH_CACHE_PATH`` names, or in
            the user's cache folder.  It is made when the first file is.
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        self.folder = Path(folder) if folder is not None else default_folder()

    def find(self, identity: Identity) -> PackedFile | None:
        """The file for ``identity``, if there is one whose header is good."""
        return self._open(self.folder / identity.file_name, identity)

    def get_or_build(self, identity: Identity, build: Callable[[Path], None]) -> PackedFile:
        """Open the file for ``identity``, after making it when there is none that can be used.

        Before one is made, files of the same network that were made of earlier states of the same sources are
        deleted: they would never be used again, and the space may be needed.

        Args:
            identity: see :func:`diffsynth.vram.identity.identify`.
            build: writes the file to the path that it is given, all or nothing, as
                :func:`diffsynth.vram.packed_writer.write_packed` does.

        Raises:
            OutputError: the folder is not writable or the disk is full.
            CheckpointError: the weights cannot be read or stored, or ``build`` did not write this file.
            ValueError: the identity names no source, so that a change could not be noticed.
        """
        if not identity.sources:
            raise ValueError("weights that come from no file are not cached")
        path = self.folder / identity.file_name
        found = self._open(path, identity)
        if found is not None:
            return found
        self._make_folder()
        with _locked(path, wait=True) as alone:
            found = self._open(path, identity)
            if found is not None:
                return found
            if alone:
                _remove_unfinished(path)
            self._remove_superseded(identity)
            logger.info("converting the %s to %s: %s", identity.network, identity.policy, path)
            build(path)
        try:
            return PackedFile.open(path, identity, discard_damaged=True)
        except FileNotFoundError:
            raise CheckpointError(f"{path} was deleted after it was made", hint="start again") from None

    def entries(self) -> list[CacheEntry]:
        """All files of the cache, unfinished ones included, oldest first."""
        paths = [*self.folder.glob(f"*{_SUFFIX}"), *self.folder.glob(f".*{_SUFFIX}.*.part")]
        found = [entry for entry in map(_entry, paths) if entry is not None]
        return sorted(found, key=lambda entry: (entry.created, entry.path))

    def clear(self, older_than: timedelta | None = None) -> list[CacheEntry]:
        """Delete files; what another process is writing stays.

        Args:
            older_than: only files that were made longer ago than this.

        Returns: the entries that were deleted.

        Raises:
            OutputError: a file cannot be deleted.
        """
        limit = None if older_than is None else datetime.now(UTC) - older_than
        removed = []
        for entry in self.entries():
            if limit is not None and entry.created > limit:
                continue
            if entry.state is EntryState.UNFINISHED:
                with _locked(_final_path(entry.path), wait=False) as alone:
                    if not alone:
                        logger.info("%s is being written and stays", entry.path)
                        continue
                    _unlink(entry.path)
            else:
                _unlink(entry.path)
            removed.append(entry)
        return removed

    def _open(self, path: Path, identity: Identity) -> PackedFile | None:
        """The file if it is there and good."""
        try:
            return PackedFile.open(path, identity, discard_damaged=True)
        except FileNotFoundError:
            return None
        except CheckpointError as error:
            logger.warning("%s  It is made anew.", error.message)
            return None

    def _make_folder(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(
                f"{self.folder} could not be made: {os.strerror(error.errno or 0)}", hint=_HINT
            ) from error

    def _remove_superseded(self, identity: Identity) -> None:
        """Delete what was made of the same paths when other files lay there."""
        paths = {source.path for source in identity.sources}
        for entry in self.entries():
            if (
                entry.state is EntryState.STALE
                and entry.network == identity.network
                and paths.intersection(entry.sources)
            ):
                logger.info("%s was made of files that have changed since; it is deleted", entry.path)
                with contextlib.suppress(OutputError):
                    _unlink(entry.path)


def default_folder() -> Path:
    """Where packed files lie when nothing else is said."""
    stated = os.environ.get(FOLDER_VARIABLE)
    root = Path(stated) if stated else platformdirs.user_cache_path("diffsynth", appauthor=False)
    return root / "packed"


def _entry(path: Path) -> CacheEntry | None:
    """Look at one file; None when it has just been deleted."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    identity, state = None, EntryState.UNFINISHED
    if path.suffix != ".part":
        try:
            with PackedFile.open(path, None) as file:
                identity = file.identity
            state = EntryState.STALE if any(s.changed() for s in identity.sources) else EntryState.READY
        except FileNotFoundError:
            return None
        except CheckpointError:
            state = EntryState.DAMAGED
    return CacheEntry(
        path=path,
        network=identity.network if identity else "",
        sources=tuple(source.path for source in identity.sources) if identity else (),
        format=identity.policy if identity else "",
        nbytes=status.st_size,
        created=datetime.fromtimestamp(status.st_mtime, UTC),
        state=state,
    )


def _final_path(unfinished: Path) -> Path:
    """``.NAME.TOKEN.part`` -> ``NAME``."""
    return unfinished.with_name(unfinished.name.removeprefix(".").rsplit(".", 2)[0])


def _remove_unfinished(path: Path) -> None:
    for left in path.parent.glob(f".{path.name}.*.part"):
        logger.info("%s was left by a process that was killed; it is deleted", left)
        with contextlib.suppress(OutputError):
            _unlink(left)


def _unlink(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(
            f"{path} could not be deleted: {os.strerror(error.errno or 0)}",
            hint="end the programs that use it",
        ) from error


@contextlib.contextmanager
def _locked(path: Path, *, wait: bool) -> Iterator[bool]:
    """Hold the lock of the file ``path``; the system frees it when the process ends, however it ends.

    Yields: whether the lock is held.  False without ``wait`` when somebody else has it, and always where the
    system has no locks.
    """
    lock = path.with_name(f".{path.name}.lock")
    try:
        file = lock.open("ab")
    except OSError as error:
        raise OutputError(
            f"{lock} could not be written: {os.strerror(error.errno or 0)}", hint=_HINT
        ) from error
    with file:
        yield _take(file, path, wait)


def _take(file: IO[bytes], path: Path, wait: bool) -> bool:
    told = False
    while True:
        try:
            _lock_now(file)
            return True
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN, errno.EDEADLK):
                logger.debug("no locks for %s: %s", path, error)
                return False
        if not wait:
            return False
        if not told:
            logger.info("another process is writing %s; waiting for it", path)
            told = True
        time.sleep(_POLL_S)


def _lock_now(file: IO[bytes]) -> None:
    """Lock until the file is closed.  Raises OSError: somebody else has the lock, or there are no locks."""
    if os.name == "nt":
        import msvcrt

        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
    else:
        import fcntl

        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
