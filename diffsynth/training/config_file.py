"""Reading the configuration file: TOML, every mistake named with its line."""

import difflib
import re
import tomllib
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from diffsynth import nano
from diffsynth.errors import RequestError
from diffsynth.training.conditions import Condition
from diffsynth.training.config import TrainConfig
from diffsynth.training.validation_config import ValidationClip
from diffsynth.validation import check_types, freeze

_HEADER = re.compile(r"\s*\[\[?\s*([^\]]+?)\s*\]")
_SETTING = re.compile(r"\[(\w+)\](?:[^=]*?(\w+)=)?")
_KEY = re.compile(r"""\s*["']?([A-Za-z0-9_-]+)["']?\s*[.=]""")

ConfigT = TypeVar("ConfigT")


def read_config(path: str | Path) -> TrainConfig:
    """Read and check a configuration.  Relative paths in it count from its folder.

    Raises:
        RequestError: no such file, no TOML, an unknown or missing key, or a value that cannot work; with the
            line, and for an unknown key the nearest known one.
        CheckpointError: ``checkpoint = "nano"`` where that model is not there.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
        tables = tomllib.loads(text)
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"{path} cannot be read: {error}", hint="the path of a TOML file") from error
    except tomllib.TOMLDecodeError as error:
        raise RequestError(f"{path}: {error}", hint="TOML: [section], then key = value") from error
    file = _File(path, _lines(text))
    sections = {f.name: f.type for f in fields(TrainConfig)}
    for name in tables:
        if name not in sections:
            raise file.error(name, None, f"unknown section [{name}]", _near(name, sections))
    values: dict[str, Any] = {}
    for f in fields(TrainConfig):
        if f.name in tables:
            values[f.name] = file.section(f.name, f.type, tables[f.name])
        elif f.default_factory is MISSING:
            raise RequestError(f"{path}: section [{f.name}] is missing", hint=f"[{f.name}]")
    config = TrainConfig(**values)
    try:
        config.check()
    except RequestError as error:
        section, key = _named(error.message)
        raise file.error(section, key, error.message, error.hint) from error
    return config


@dataclass(frozen=True, slots=True)
class _File:
    path: Path
    lines: Mapping[tuple[str, str | None], int]
    """(section, key) -> number of its line from 1; key None for the header.  See :func:`_lines`."""

    def error(self, section: str, key: str | None, message: str, hint: str) -> RequestError:
        outer, _, inner = section.partition("#")[0].rpartition(".")
        places = [(section, key), (section, None), (outer, inner)]
        places += [place for place in self.lines if place[0].startswith(f"{section}.")]
        line = next((self.lines[place] for place in places if place in self.lines), None)
        place = str(self.path) if line is None else f"{self.path}:{line}"
        return RequestError(f"{place}: {message}", hint=hint)

    def section(self, name: str, cls: Any, table: Any) -> Any:
        if not isinstance(table, dict):
            raise self.error(name, None, f"{name} is no section", f"[{name}]")
        if name == "model" and table.get("checkpoint") in (nano.NAME, [nano.NAME]):
            found = nano.files()
            table = {"gemma": str(found.gemma), **table, "checkpoint": str(found.checkpoint)}
        values = {key: self._value(name, key, value) for key, value in table.items()}
        return self._made(name, cls, values)

    def _value(self, section: str, key: str, value: Any) -> Any:
        match section.partition("#")[0], key:
            case "strategy", "conditions":
                return self._items(section, key, value, Condition)
            case "validation", "clips":
                return self._items(section, key, value, ValidationClip)
            case "validation.clips", "image" | "reference" | "sound" | "video":
                return self._path(section, key, value)
            case "data", "source" | "folder" | "video_masks" | "audio_masks":
                return self._path(section, key, value)
            case "output", "folder":
                return self._path(section, key, value)
            case "model", "checkpoint":
                names = [value] if isinstance(value, str) else value
                return tuple(map(self._model, names)) if isinstance(names, list) else names
            case "model", "gemma":
                return self._model(value)
            case _:
                return freeze(value)

    def _items(self, section: str, key: str, tables: Any, cls: type[ConfigT]) -> tuple[ConfigT, ...]:
        """The tables under ``[[section.key]]``."""
        name = f"{section}.{key}"
        if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
            raise self.error(section, key, f"{key} is no list", f"[[{name}]]")
        made = []
        for number, table in enumerate(tables):
            place = f"{name}#{number}"
            values = {k: self._value(place, k, value) for k, value in table.items()}
            made.append(self._made(place, cls, values))
        return tuple(made)

    def _path(self, section: str, key: str, value: Any) -> Path:
        if not isinstance(value, str) or not value:
            raise self.error(section, key, f"{key}={value!r} is no path", "a name in quotes")
        return (self.path.parent / value).absolute()

    def _model(self, name: Any) -> Any:
        """A file beside the configuration by its whole path; anything else as it is."""
        beside = self.path.parent / name if isinstance(name, str) and name else None
        return str(beside.absolute()) if beside is not None and beside.exists() else name

    def _made(self, section: str, cls: type[ConfigT], values: Mapping[str, Any]) -> ConfigT:
        known = {f.name: f for f in fields(cls)}  # type: ignore[arg-type]
        shown = section.partition("#")[0]
        for key in values:
            if key not in known:
                raise self.error(section, key, f"unknown key {key!r} in [{shown}]", _near(key, known))
        for key, f in known.items():
            if key not in values and f.default is MISSING and f.default_factory is MISSING:
                raise self.error(section, None, f"{key} is missing in [{shown}]", f"{key} = ...")
        made = cls(**values)
        try:
            check_types(made)  # type: ignore[arg-type]
            if isinstance(made, Condition):
                made.check()
        except RequestError as error:
            key = error.message.partition("=")[0].split()[-1]
            raise self.error(section, key, error.message, error.hint) from error
        return made


def _lines(text: str) -> dict[tuple[str, str | None], int]:
    """Where sections and keys stand first; a key inside a value of several lines is not told apart.

    The tables under ``[[NAME]]`` are the sections ``NAME#0``, ``NAME#1`` and so on.
    """
    found: dict[tuple[str, str | None], int] = {}
    section, counts = "", Counter[str]()
    for number, line in enumerate(text.splitlines(), 1):
        if header := _HEADER.match(line):
            section = header[1]
            if line.lstrip().startswith("[["):
                section = f"{header[1]}#{counts[header[1]]}"
                counts[header[1]] += 1
            found.setdefault((section, None), number)
        elif key := _KEY.match(line):
            found.setdefault((section or key[1], key[1] if section else None), number)
    return found


def _named(message: str) -> tuple[str, str | None]:
    """Section and key of ``[section] ... key=value ...``; None without a key."""
    found = _SETTING.match(message)
    return (found[1], found[2]) if found else ("", None)


def _near(name: str, known: Collection[str]) -> str:
    return ", ".join(difflib.get_close_matches(name, known, n=1, cutoff=0.4) or sorted(known))
