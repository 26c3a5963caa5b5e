"""The weights that come with the package."""

import re
from pathlib import Path

from tests.cli.command import Here


def test_the_demo_shows_and_sounds_what_it_says(here: Here, tmp_path: Path) -> None:
    ended = here("demo", "--device", "cpu", "--quiet", "--output", str(tmp_path / "demo.mp4"))
    assert ended.code == 0, ended.err
    *_, read, agreed, where = ended.out.splitlines()
    assert re.fullmatch(
        r"Read from the file: red circle on blue, motion left, place \w+; beep at 1\d\d\d Hz", read
    )
    assert agreed == "As asked: colour, background, shape, motion, sound, pitch, pan"
    assert int(where.rpartition("(")[2].removesuffix(" s)")) < 60
