"""The error tree.  Every error that a user can cause says what is wrong and what to do about it.

DiffSynthError                    message + hint
    RequestError (ValueError)     an argument of a generation cannot work          exit code 2
    CheckpointError               a weight file cannot be read or does not fit     exit code 3
    DownloadError                 a file could not be fetched                      exit code 3
    OutputError                   a result could not be written                    exit code 3
    MemoryBudgetError             the request does not fit the machine             exit code 4
    NumericalError                values overflowed: neither picture nor sound     exit code 1
    Cancelled                     the user asked to stop                           exit code 130
"""

from typing import ClassVar


class DiffSynthError(Exception):
    """Base of all errors raised on purpose: what went wrong, and in ``hint`` the way out."""

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}  Try: {self.hint}" if self.hint else self.message


class RequestError(DiffSynthError, ValueError):
    """An argument of the request cannot work.  The message names the argument."""

    exit_code = 2


class CheckpointError(DiffSynthError):
    """A file is missing, damaged, of an unknown layout, or belongs to another model."""

    exit_code = 3


class DownloadError(DiffSynthError):
    """A file could not be fetched from its hub."""

    exit_code = 3


class OutputError(DiffSynthError):
    """A result could not be written; nothing is left under its final name."""

    exit_code = 3


class MemoryBudgetError(DiffSynthError):
    """The request does not fit the memory budget; the hint names the nearest one that does."""

    exit_code = 4


class NumericalError(DiffSynthError):
    """Values overflowed on the way; what would come out is neither picture nor sound."""


class Cancelled(DiffSynthError):
    """The user stopped the run; memory is released and nothing half-written stays."""

    exit_code = 130
