"""Runners of golden cases, one module per room; which runner a case needs follows from its own metadata."""

from tests.runners.case import Case, GoldenMismatch, Outcome
from tests.runners.registry import collect, run

__all__ = ["Case", "GoldenMismatch", "Outcome", "collect", "run"]
