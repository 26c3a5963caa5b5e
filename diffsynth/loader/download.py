"""Fetching model files: sizes are known and the disk is checked before the first byte, and a file gets its
final name only when it is complete.

A file arrives in ``FOLDER/.download/NAME/`` and is moved to ``FOLDER/NAME`` in one step when its size agrees
with the hub's list.  An interrupted download leaves what arrived in that hidden folder, where the hub's
library takes it up again.  A lock file per download makes two processes that want the same file wait for one
another.
"""

import contextlib
import difflib
import logging
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, Protocol

from diffsynth.errors import DownloadError

logger = logging.getLogger(__name__)

WORK_FOLDER = ".download"
# What a tokenizer folder needs; other endings (weights, pictures, scripts) are not fetched with it.
_TOKENIZER_SUFFIXES = frozenset({".json", ".model", ".txt", ".jinja"})
_SPARE_BYTES = 64 * 2**20


class RemoteFile(NamedTuple):
    """A file of a hub's repository: path in it with forward slashes, size in bytes."""

    path: str
    size: int


class Hub(Protocol):
    """What the loader asks of a place that offers models."""

    @property
    def name(self) -> str:
        """The name that ``download_source`` gives it."""

    def list_files(self, model_id: str) -> list[RemoteFile]:
        """All files of a repository with their sizes."""

    def download(self, model_id: str, path: str, into: Path) -> Path:
        """Fetch one file below the folder ``into``, going on with what an earlier try left there.

        Returns:
            Where the complete file lies.
        """


class ModelScope:
    """https://modelscope.cn, through its own library."""

    name = "modelscope"

    def list_files(self, model_id: str) -> list[RemoteFile]:
        """All files of a repository with their sizes."""
        from modelscope.hub.api import HubApi

        return modelscope_files(HubApi().get_model_files(model_id, recursive=True))

    def download(self, model_id: str, path: str, into: Path) -> Path:
        """Fetch one file below ``into``."""
        from modelscope.hub.file_download import model_file_download

        return Path(model_file_download(model_id, path, local_dir=str(into)))


def modelscope_files(entries: Iterable[Mapping[str, Any]]) -> list[RemoteFile]:
    """The files of ModelScope's list, in which newer versions of its library do not mark folders."""
    files = [RemoteFile(e["Path"], int(e["Size"])) for e in entries if e.get("Type") != "tree"]
    folders = {str(parent) for file in files for parent in PurePosixPath(file.path).parents}
    return [file for file in files if file.path not in folders]


class HuggingFace:
    """https://huggingface.co, through its own library."""

    name = "huggingface"

    def list_files(self, model_id: str) -> list[RemoteFile]:
        """All files of a repository with their sizes."""
        from huggingface_hub import HfApi
        from huggingface_hub.hf_api import RepoFile

        tree = HfApi().list_repo_tree(model_id, recursive=True)
        return [RemoteFile(entry.path, entry.size) for entry in tree if isinstance(entry, RepoFile)]

    def download(self, model_id: str, path: str, into: Path) -> Path:
        """Fetch one file below ``into``."""
        from huggingface_hub import hf_hub_download

        return Path(hf_hub_download(model_id, path, local_dir=into))


HUBS: dict[str, Callable[[], Hub]] = {"modelscope": ModelScope, "huggingface": HuggingFace}


def matches(path: str, pattern: str) -> bool:
    """Whether a path in a repository fits ``pattern``, part by part: ``*`` stays inside one folder level.

    A pattern that is empty or ends in ``/`` means a folder with what a tokenizer needs, at any depth.
    """
    parts = PurePosixPath(path).parts
    if any(part.startswith(".") for part in parts):
        return False
    wanted = PurePosixPath(pattern).parts
    if is_folder(pattern):
        inside = parts[: len(wanted)] == wanted and len(parts) > len(wanted)
        return inside and PurePosixPath(path).suffix in _TOKENIZER_SUFFIXES
    return len(parts) == len(wanted) and all(map(fnmatchcase, parts, wanted))


def is_folder(pattern: str) -> bool:
    """Whether a pattern names a whole folder."""
    return pattern in {"", ".", "*"} or pattern.endswith("/")


def pending_mark(folder: Path, pattern: str) -> Path:
    """The file that exists while a whole folder is being fetched: what is there may be only a part of it."""
    return folder / WORK_FOLDER / f"{pattern.replace('/', '__')}.pending"


def free_bytes(folder: Path) -> int:
    """Free space of the disk on which ``folder`` lies or will lie."""
    existing = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    return shutil.disk_usage(existing).free


def fetch(
    hub: Hub,
    model_id: str,
    patterns: Iterable[str],
    folder: Path,
    *,
    free: Callable[[Path], int] = free_bytes,
) -> list[Path]:
    """Fetch the files that fit ``patterns`` and are not there yet.

    Args:
        hub: where from.
        model_id: ``owner/name``.
        patterns: see :func:`matches`.
        folder: where the repository's files belong; a file there is never fetched again or replaced.
        free: free bytes of a folder's disk.

    Returns:
        The files fetched now.

    Raises:
        DownloadError: the hub does not answer, nothing fits, the disk is too small, a file came incomplete.
    """
    with _explained(hub, model_id, "list the files"):
        listed = [file for file in hub.list_files(model_id) if _stays_inside(file.path)]
    patterns = list(patterns)
    wanted = _select(listed, patterns, f"{hub.name}: {model_id}")
    absent = [file for file in wanted if not (folder / file.path).is_file()]
    marks = [pending_mark(folder, pattern) for pattern in patterns if is_folder(pattern)]
    if not absent:
        _remove(marks)
        return []
    total = sum(file.size for file in absent)
    available = free(folder)
    logger.info(
        "fetching %s in %d file(s) from %s: %s to %s (%s free)",
        _size(total), len(absent), hub.name, model_id, folder, _size(available),
    )  # fmt: skip
    _check_room(absent, folder, available)
    (folder / WORK_FOLDER).mkdir(parents=True, exist_ok=True)
    for mark in marks:
        mark.touch()
    with _progress(total, len(absent)) as advance:
        for number, file in enumerate(absent, start=1):
            logger.info("file %d of %d: %s, %s", number, len(absent), file.path, _size(file.size))
            _fetch_file(hub, model_id, file, folder)
            advance(file.size)
    _remove(marks)
    return [folder / file.path for file in absent]


def _check_room(files: list[RemoteFile], folder: Path, available: int) -> None:
    """Raise DownloadError when the disk is too small for what is still to come."""
    there = sum(_arrived(_work_folder(folder, file.path)) for file in files)
    needed = sum(file.size for file in files) - there + _SPARE_BYTES
    if needed > available:
        raise DownloadError(
            f"{folder} needs {_size(needed)} more, {_size(available)} are free",
            hint="free some space, or set local_model_path or DIFFSYNTH_MODEL_BASE_PATH to another disk",
        )


def _stays_inside(path: str) -> bool:
    return ".." not in PurePosixPath(path).parts and not Path(path).is_absolute()


def _remove(marks: list[Path]) -> None:
    for mark in marks:
        mark.unlink(missing_ok=True)


def _select(listed: list[RemoteFile], patterns: list[str], where: str) -> list[RemoteFile]:
    """The files that fit any pattern, each once; every pattern must fit something."""
    chosen: dict[str, RemoteFile] = {}
    for pattern in patterns:
        fitting = {file.path: file for file in listed if matches(file.path, pattern)}
        if not fitting:
            near = difflib.get_close_matches(pattern, [file.path for file in listed], n=3, cutoff=0.4)
            raise DownloadError(
                f"{where} has no file that fits {pattern!r}",
                hint=f"one of {near}" if near else "check model_id and origin_file_pattern",
            )
        chosen.update(fitting)
    return list(chosen.values())


def _fetch_file(hub: Hub, model_id: str, file: RemoteFile, folder: Path) -> None:
    final, work = folder / file.path, _work_folder(folder, file.path)
    work.mkdir(parents=True, exist_ok=True)
    lock = work.with_name(work.name + ".lock")
    with _exclusive(lock):
        if not final.is_file():  # another process may have been faster
            with _explained(hub, model_id, f"fetch {file.path}"):
                arrived = hub.download(model_id, file.path, work)
            _check_and_move(arrived, final, file.size)
        shutil.rmtree(work, ignore_errors=True)  # who was faster has removed it
    # The file is there, so whoever still waits for the lock or makes a new one has nothing left to do.
    lock.unlink(missing_ok=True)


def _check_and_move(arrived: Path, final: Path, size: int) -> None:
    """Give a complete file its final name."""
    actual = arrived.stat().st_size
    if actual != size:
        arrived.unlink()
        raise DownloadError(
            f"{final.name} came with {actual:,} bytes, the hub lists {size:,}",
            hint="run again; if it repeats, take the other hub: download_source=" + " or ".join(HUBS),
        )
    with arrived.open("rb+") as file:
        os.fsync(file.fileno())  # a power cut after the renaming must not leave an empty file
    final.parent.mkdir(parents=True, exist_ok=True)
    arrived.replace(final)


@contextlib.contextmanager
def _explained(hub: Hub, model_id: str, what: str) -> Iterator[None]:
    """Turn whatever a hub's library raises into an error that says what to do."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        other = next(name for name in HUBS if name != hub.name)
        raise DownloadError(
            f"{hub.name}: cannot {what} of {model_id}: {type(error).__name__}: {reason}",
            hint=f"check the network and the name; a gated model needs its licence accepted and a login; "
            f"the other hub: download_source={other!r}; or put the files there by hand",
        ) from error


@contextlib.contextmanager
def _exclusive(lock: Path) -> Iterator[None]:
    """One process at a time; the operating system drops the lock when a process dies."""
    with lock.open("ab") as file:
        if sys.platform == "win32":
            import msvcrt

            while True:
                try:  # gives up by itself after ten seconds
                    msvcrt.locking(file.fileno(), msvcrt.LK_LOCK, 1)
                    break
                except OSError:
                    logger.info("waiting for another process: %s", lock)
        else:
            import fcntl

            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                logger.info("another process fetches this file; waiting for it: %s", lock)
                fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _progress(total: int, count: int) -> Iterator[Callable[[int], object]]:
    """A bar over the bytes of several files; within one file the hub's library shows its own."""
    if count == 1:
        yield lambda size: None
        return
    from tqdm import tqdm

    with tqdm(total=total, unit="B", unit_scale=True, unit_divisor=1000, desc=f"{count} files") as bar:
        yield bar.update


def _work_folder(folder: Path, path: str) -> Path:
    return folder / WORK_FOLDER / path.replace("/", "__")


def _arrived(work: Path) -> int:
    """Bytes that an earlier try left."""
    return sum(file.stat().st_size for file in work.rglob("*") if file.is_file())


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
