"""Writing files so that a final name always means a complete file."""

import contextlib
import errno
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from diffsynth.errors import OutputError, RequestError

_NAME_SHOWN = 80
_OUT_OF_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


@contextmanager
def atomic_file(path: str | Path, *, argument: str = "") -> Iterator[Path]:
    """A temporary file beside ``path`` that takes its name when the ``with`` block ends well.

    The block writes to the path that it is given, which exists and is empty, and closes it.  The content is
    flushed to the disk before the name changes, so that a power cut leaves the old file or the new one.
    After any exception, also KeyboardInterrupt, nothing is left and an older file of that name is untouched.
    Errors name ``argument``, the argument that the path was given as, if it is stated.

    Raises:
        OutputError: the folder is missing or not writable, the disk is full, or the name cannot be taken.
        Other exceptions of the block pass unchanged.
    """
    # A link keeps pointing at its file; the replacement happens where the file is.
    final = Path(os.path.realpath(path))
    temporary = _create_beside(final, path, argument)
    rights = stat.S_IMODE(temporary.stat().st_mode)
    try:
        yield temporary
        temporary.chmod(rights)  # safetensors puts a file of its own there, which its owner alone may read
        _flush(temporary)
        temporary.replace(final)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and _is_about(error, temporary):
            raise output_error(path, error, argument=argument) from error
        raise
    _flush_folder(final.parent)


def write_file(path: str | Path, content: str | bytes) -> None:
    """Write a whole file atomically; text as UTF-8.  Raises OutputError as :func:`atomic_file`."""
    data = content.encode() if isinstance(content, str) else content
    with atomic_file(path) as temporary:
        temporary.write_bytes(data)


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, as far as they are not there.

    Raises:
        OutputError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{folder} cannot be made: {error.strerror}", hint="another folder") from error


def check_writable(path: str | Path, *, argument: str = "") -> Path:
    """Make sure, by trying, that a file can be created beside ``path``; nothing stays behind.

    Returns: ``path`` as a Path.
    Raises:
        OutputError: the folder is missing or not writable, or ``path`` is a folder or a device.
    """
    final = Path(os.path.realpath(path))
    _create_beside(final, path, argument).unlink()
    if final.exists() and not final.is_file():
        kind = "a folder" if final.is_dir() else "not an ordinary file"
        raise OutputError(f"{_label(path, argument)} is {kind}", hint="another file name")
    return Path(path)


def output_error(path: str | Path, error: OSError, *, argument: str = "") -> OutputError:
    """The error for the user when writing ``path`` failed with ``error``."""
    folder = Path(path).parent
    reason = os.strerror(error.errno) if error.errno else str(error)
    hints = {
        errno.ENOENT: f"create the folder {folder}",
        errno.ENOTDIR: f"another folder: {folder} is not one",
        errno.EACCES: f"a folder that you may write to, {folder} is not",
        errno.EPERM: f"a folder that you may write to, {folder} is not",
        errno.EROFS: f"a folder that you may write to, {folder} is not",
        errno.ENAMETOOLONG: "a shorter file name",
        **dict.fromkeys(_OUT_OF_SPACE, f"free space in {folder}, or another disk"),
    }
    hint = hints.get(error.errno or 0, "another folder")
    return OutputError(f"{_label(path, argument)} could not be written: {reason}", hint=hint)


def unreadable(argument: str, path: str | Path, error: Exception) -> RequestError:
    """The error for the user when the file that was given as ``argument`` could not be read."""
    hint = "check the path" if isinstance(error, FileNotFoundError) else "another file"
    return RequestError(f"{argument}={path} cannot be read: {reason_of(error)}", hint=hint)


def reason_of(error: Exception) -> str:
    """What an error says, without its number and the path, which stand beside it."""
    return getattr(error, "strerror", None) or str(error)


def _label(path: str | Path, argument: str) -> str:
    return f"{argument}={path}" if argument else str(path)


def _create_beside(final: Path, shown: str | Path, argument: str) -> Path:
    """A new empty file in the folder of ``final``, with the access rights that a new file gets there."""
    name = f".{final.name[:_NAME_SHOWN]}.{secrets.token_hex(4)}.part"
    temporary = final.with_name(name)
    try:
        # The name itself must be possible too, or the failure would come after all the work.
        with contextlib.suppress(FileNotFoundError):
            final.stat()
        temporary.touch(exist_ok=False)
    except OSError as error:
        raise output_error(shown, error, argument=argument) from error
    return temporary


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _flush_folder(folder: Path) -> None:
    # The file is complete under its name; some systems cannot open or flush a folder, and that is no failure.
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _is_about(error: OSError, temporary: Path) -> bool:
    """Whether an error of the block is about writing this file, and not about something it read."""
    if error.errno in _OUT_OF_SPACE:
        return True
    names = {os.fspath(name) for name in (error.filename, error.filename2) if isinstance(name, (str, Path))}
    return str(temporary) in names
