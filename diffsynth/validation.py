"""Checks of plain values that a request and its parts share; nothing here imports torch."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any, get_args, get_origin

from diffsynth.errors import RequestError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


def check_types(values: "DataclassInstance", prefix: str = "") -> None:
    """Raise RequestError for a field whose value is not of its declared type."""
    for f in fields(values):
        value = getattr(values, f.name)
        if not _is_a(value, f.type):
            raise RequestError(f"{prefix}{f.name}={value!r} is of the wrong type", hint=_type_name(f.type))


def check_known(cls: "type[DataclassInstance]", values: Mapping[str, Any], what: str) -> None:
    """Raise RequestError for keys that are no fields of ``cls``."""
    unknown = sorted(values.keys() - {f.name for f in fields(cls)})
    if unknown:
        raise RequestError(f"unknown {what} fields {unknown}", hint="see `diffsynth generate --help`")


def check_finite(name: str, value: object) -> None:
    """Raise RequestError for anything but a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise RequestError(f"{name}={value!r} is not a number", hint="a finite number")


def check_strengths(name: str, value: float | Sequence[float], count: int, what: str) -> tuple[float, ...]:
    """One number in [0, 1] for each of ``count`` things named ``what``.

    Raises:
        RequestError: another number of values, or one outside.
    """
    strengths = per_item(value, count)
    if len(strengths) != count:
        raise RequestError(
            f"{name} has {len(strengths)} entries for {count} {what}", hint="one number for all, or one each"
        )
    for strength in strengths:
        check_finite(name, strength)
        if not 0 <= strength <= 1:
            raise RequestError(f"{name}={strength} is outside 0..1", hint="1.0")
    return strengths


def per_item(value: float | Sequence[float], count: int) -> tuple[float, ...]:
    """A sequence as it is, one number as often as there are items."""
    return tuple(value) if isinstance(value, Sequence) else (value,) * count


def below_and_above(value: int, step: int, first: int = 0) -> Iterator[int]:
    """The positive numbers next to ``value`` among ``first + k * step``."""
    lower = (value - first) // step * step + first
    yield from (number for number in (lower, lower + step) if number > 0)


def freeze(value: Any) -> Any:
    """JSON lists become tuples, all the way down."""
    return tuple(freeze(item) for item in value) if isinstance(value, list) else value


def _is_a(value: object, kind: Any) -> bool:
    """Whether a value is of the type of a field; a whole number passes as float, a bool not as a number."""
    arguments = get_args(kind)
    if get_origin(kind) is tuple:
        if not isinstance(value, tuple):
            return False
        if arguments[-1] is not Ellipsis:
            return len(value) == len(arguments) and all(map(_is_a, value, arguments))
        return all(_is_a(item, arguments[0]) for item in value)
    if arguments:
        return any(_is_a(value, argument) for argument in arguments)
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, (int, float) if kind is float else kind)


def _type_name(kind: Any) -> str:
    return kind.__name__ if isinstance(kind, type) and not get_args(kind) else str(kind)
