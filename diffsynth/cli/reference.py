"""The reference of the command line, made from the commands: ``python -m diffsynth.cli.reference``.

Everything between the two marks of ``docs/*/command_line.md`` is what this prints.
"""

import sys
from argparse import Action, ArgumentParser
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import typer

from diffsynth.cli.app import app
from diffsynth.cli.official import PIPELINES

BEGIN = "<!-- python -m diffsynth.cli.reference -->"
END = "<!-- end -->"
OPTIONS = "Options"
_VALUES: Mapping[str, str] = {"str": "TEXT", "int": "N", "float": "X", "Path": "PATH"}
OTHER_VALUE = "VALUE"


def reference() -> str:
    """The whole section between the marks as Markdown, without a newline at the end."""
    lines = [BEGIN, ""]
    for name, command in _commands("diffsynth", typer.main.get_command(app)):
        lines += _section(name, command)
    return "\n".join([*lines, END])


def _commands(name: str, command: Any) -> Iterator[tuple[str, Any]]:
    """A command with its full name, then those of the group that it may be."""
    yield name, command
    children: Mapping[str, Any] = getattr(command, "commands", {})
    for child_name, child in children.items():
        if not child.hidden:
            yield from _commands(f"{name} {child_name}", child)


def _section(name: str, command: Any) -> list[str]:
    """Heading, help, usage, and a table of options per panel."""
    if command.name in PIPELINES:
        return [*_head(name, command, [name, "[OPTIONS]"]), *_official(PIPELINES[command.name].parser())]
    shown = [parameter for parameter in command.params if not parameter.hidden]
    arguments = [_typed(parameter) for parameter in shown if not _is_option(parameter)]
    usage = [name, *(["[OPTIONS]"] if any(map(_is_option, shown)) else []), *arguments]
    if hasattr(command, "commands"):
        usage.append("COMMAND")
    lines = _head(name, command, usage)
    panels: dict[str, list[Any]] = {}
    for parameter in shown:
        panels.setdefault(parameter.rich_help_panel or OPTIONS, []).append(parameter)
    for panel, members in panels.items():
        rows = [(_names(each), _default(each), _meaning(each)) for each in members]
        lines += [f"**{panel}**", "", *_table([("option", "default", "meaning"), *rows]), ""]
    return lines


def _head(name: str, command: Any, usage: Sequence[str]) -> list[str]:
    return [f"## {name}", "", _one_line(command.help), "", "```text", " ".join(usage), "```", ""]


def _official(parser: ArgumentParser) -> list[str]:
    """The options of a command that reads its own."""
    # argparse has no public list of what was declared.
    actions = [action for action in parser._actions if action.dest != "help"]
    rows = [(_flags(each), "required" if each.required else "", _escaped(each.help)) for each in actions]
    return [*_table([("option", "default", "meaning"), *rows]), ""]


def _flags(action: Action) -> str:
    word = action.metavar or _VALUES.get(getattr(action.type, "__name__", ""), OTHER_VALUE)
    value = "" if action.nargs == 0 else f" {word}"
    return " / ".join(f"`{flag}{value}`" for flag in action.option_strings)


def _table(rows: Sequence[tuple[str, ...]]) -> Iterator[str]:
    for number, cells in enumerate(rows):
        yield "| " + " | ".join(cells) + " |"
        if number == 0:
            yield "|---" * len(cells) + "|"


def _is_option(parameter: Any) -> bool:
    return bool(parameter.opts[0].startswith("-"))


def _names(parameter: Any) -> str:
    """All spellings, each with its value; what switches it off comes after a slash."""
    on = ", ".join(f"`{_typed(parameter, name)}`" for name in parameter.opts)
    off = ", ".join(f"`{name}`" for name in parameter.secondary_opts)
    return f"{on} / {off}" if off else on


def _typed(parameter: Any, name: str = "") -> str:
    """An option with its value, an argument in capitals."""
    if not _is_option(parameter):
        return str(parameter.metavar or parameter.name.upper())
    return name if parameter.is_flag else f"{name} {parameter.metavar or _value(parameter)}"


def _value(parameter: Any) -> str:
    annotation = parameter.type_descriptor.annotation
    for inner in getattr(annotation, "__args__", ())[:1]:
        annotation = inner
    one = _VALUES.get(getattr(annotation, "__name__", ""), OTHER_VALUE)
    return " ".join([one] * max(parameter.nargs, 1))


def _default(parameter: Any) -> str:
    default = parameter.default
    if parameter.required:
        return "required"
    if not _is_option(parameter) or default in (None, "", (), []) or not parameter.show_default:
        return ""
    if parameter.is_flag:
        spellings = parameter.opts if default else parameter.secondary_opts
        return f"`{spellings[0]}`" if parameter.secondary_opts or default else ""
    return f"`{default}`"


def _meaning(parameter: Any) -> str:
    text = _escaped(parameter.help)
    several = _is_option(parameter) and parameter.multiple and "repeat" not in text
    return f"{text}; may be repeated" if several else text


def _escaped(text: str | None) -> str:
    return _one_line(text).replace("|", "\\|")


def _one_line(text: str | None) -> str:
    return " ".join((text or "").split())


if __name__ == "__main__":
    sys.stdout.write(reference() + "\n")
