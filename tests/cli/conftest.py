"""Fixtures of the command line."""

import pytest

from tests.cli.command import Here


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Here:
    """Run the command in this process."""
    return Here(monkeypatch, capsys)
