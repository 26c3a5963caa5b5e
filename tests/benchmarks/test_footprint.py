"""What is measured about memory is really there."""

import mmap
import sys
from pathlib import Path

import pytest

from benchmarks.footprint import Watch, held, high_water_mark

SIZE = 64 * 2**20

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells own from file pages")


def test_memory_that_is_gone_again_was_seen() -> None:
    with Watch() as watch:
        before = watch.mark()
        # A mapping of its own: other memory may come from what the process freed earlier.
        memory = mmap.mmap(-1, SIZE)
        memory[::4096] = b"1" * (SIZE // 4096)
        assert watch.mark().own > before.own + 0.9 * SIZE
        memory.close()
        watch.mark()
        assert watch.mark().own < before.own + 0.5 * SIZE
    assert watch.peak.own > before.own + 0.9 * SIZE
    assert (high_water_mark() or 0) >= 0.9 * SIZE


def test_anonymous_mappings_count_and_file_pages_do_not(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"1" * SIZE)
    before = held()
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        assert sum(mapped[::4096]) > 0
        during = held()
        assert during.own < before.own + 0.5 * SIZE
        assert during.resident > before.resident + 0.9 * SIZE
    with mmap.mmap(-1, SIZE) as pages:
        pages[:] = b"1" * SIZE
        assert held().own > before.own + 0.9 * SIZE
