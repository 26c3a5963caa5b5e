"""No two drivers share a run of similar lines: what is common stands in one place."""

import io
import tokenize
from collections import defaultdict
from collections.abc import Iterable
from itertools import combinations
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("diffsynth/pipelines", "diffsynth/cli", "examples")
LONGEST = 14
"""Lines that two files may share in a row."""
_LAYOUT = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
_LITERALS = {"STRING": "S", "FSTRING_START": "S", "FSTRING_MIDDLE": "", "FSTRING_END": "", "NUMBER": "N"}


def similar_lines(source: str) -> list[str]:
    """Lines of code without comments, layout and the values of literals.

    Several lines of nothing but literals, such as a long text or a table, count as one.
    """
    rows: dict[int, list[str]] = defaultdict(list)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in _LAYOUT and token.string:
            rows[token.start[0]].append(_LITERALS.get(tokenize.tok_name[token.type], token.string))
    lines = [" ".join(filter(None, row)) for row in rows.values()]
    before = ["", *lines[:-1]]
    return [line for line, last in zip(lines, before, strict=True) if not (line == last and is_data(line))]


def is_data(line: str) -> bool:
    return set(line.split()) <= {"S", "N", ",", ":"}


def shared_runs(files: Iterable[Path], longest: int = LONGEST) -> list[str]:
    """Pairs of files with a run of more than ``longest`` similar lines, and where the first one begins."""
    places: dict[tuple[str, ...], dict[Path, int]] = defaultdict(dict)
    for file in files:
        lines = similar_lines(file.read_text(encoding="utf-8"))
        for start in range(len(lines) - longest):
            places[tuple(lines[start : start + longest + 1])].setdefault(file, start)
    found = {}
    for window, where in places.items():
        for first, second in combinations(where, 2):
            found.setdefault((first, second), f"{first.name} and {second.name}: {window[0]} ...")
    return list(found.values())


def drivers() -> list[Path]:
    return [file for room in ROOMS for file in sorted((ROOT / room).rglob("*.py"))]


def test_no_two_drivers_are_alike() -> None:
    assert len(drivers()) > 90
    assert shared_runs(drivers()) == []


SCRIPT = '''"""A script."""

import math


def first(value):
    for number in range(3):  # a loop
        value = math.sin(value) * 2.5
        value += number
    if value > 1:
        value = max(value, 7)
        value = f"{value} is large"
    elif value < 0:
        value = -value
        print("negative")
    else:
        print(value)
    value = [value, value]
    return value
'''


@pytest.mark.parametrize(
    ("changed", "count"),
    [
        (SCRIPT, 1),
        (SCRIPT.replace("2.5", "1e9").replace('"negative"', "'other'").replace("# a loop", ""), 1),
        (SCRIPT.replace("    ", "  ").replace("\n    value", "\n\n    value"), 1),
        (SCRIPT.replace("value += number", "value -= number").replace("print(value)", "pass"), 0),
        (SCRIPT.replace("value", "other"), 0),
    ],
    ids=["equal", "other literals", "other layout", "broken twice", "other names"],
)
def test_copies_are_found(changed: str, count: int, tmp_path: Path) -> None:
    files = [tmp_path / "one.py", tmp_path / "two.py"]
    for file, source in zip(files, (SCRIPT, changed), strict=True):
        file.write_text(source, encoding="utf-8")
    assert len(shared_runs(files)) == count


def test_data_is_no_copy() -> None:
    assert similar_lines('X = [\n    "a",\n    "b",\n    "c",\n]\n') == ["X = [", "S ,", "]"]
