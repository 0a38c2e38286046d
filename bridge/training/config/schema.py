"""Values and their declared types: conversion without guessing, and the words for what was expected."""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, TypeGuard, Union, get_args, get_origin, get_type_hints

Plain = None | bool | int | float | str | list[Any] | dict[str, Any]
"""What YAML has a plain form for."""


@dataclass(frozen=True)
class Violation:
    """One thing that is wrong: the dotted setting, the value found, why it cannot be, and what to do."""

    setting: str
    value: Any
    reason: str
    fix: str

    def __str__(self) -> str:
        return f"{self.setting}: {show(self.value)} {self.reason}; {self.fix}"


class Mismatch(Exception):
    """A value does not have the declared type. `wanted` says in words what would."""

    def __init__(self, wanted: str) -> None:
        super().__init__(wanted)
        self.wanted = wanted


def show(value: Any) -> str:
    """A value as a recipe would spell it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    return repr(value)


def nearest(name: str, names: Iterable[str]) -> str | None:
    """The entry of `names` that `name` was most likely meant to be; None when nothing comes close."""
    return next(iter(difflib.get_close_matches(name, list(names), n=1)), None)


def is_section(declared: Any) -> TypeGuard[type]:
    """Whether a declared type is a dataclass: a section of settings and no setting itself."""
    return isinstance(declared, type) and dataclasses.is_dataclass(declared)


def section_type(declared: Any) -> type | None:
    """The dataclass of a declared type that is a section, or a section that may be left out (`Section | None`)."""
    if is_section(declared):
        return declared
    if get_origin(declared) in (Union, types.UnionType):
        return next((member for member in get_args(declared) if is_section(member)), None)
    return None


def field_types(section: type) -> Mapping[str, Any]:
    """Field names of a dataclass, in order, with their resolved types."""
    return _resolved(section)


@cache  # every save checks its configuration, and to resolve the types takes milliseconds
def _resolved(section: type) -> Mapping[str, Any]:
    hints = get_type_hints(section)
    return {item.name: hints[item.name] for item in dataclasses.fields(section)}


def default_of(section: type, name: str) -> Any:
    """The default of a field of a dataclass."""
    item = section.__dataclass_fields__[name]  # type: ignore[attr-defined]
    if item.default_factory is not dataclasses.MISSING:
        return item.default_factory()
    return item.default


def convert(value: Any, declared: Any) -> Any:
    """`value` as the declared type: an int becomes a float where one is declared, all else must already fit.

    Raises:
        Mismatch: it does not fit. A bool is no number, and a string is never read as one.
    """
    origin = get_origin(declared)
    if declared is Any:
        return _plain(value)
    if origin in (Union, types.UnionType):
        return _convert_to_first(value, declared)
    if origin is Literal:
        fits = any(type(value) is type(choice) and value == choice for choice in get_args(declared))
    elif declared is float:
        return _convert_to_float(value)
    elif origin is list and type(value) is list:
        return [_convert_inside(item, get_args(declared)[0], declared) for item in value]
    elif origin is dict and type(value) is dict:
        return _plain(value)
    else:
        fits = type(value) is declared
    if not fits:
        raise Mismatch(describe(declared) + _hint(value, declared))
    return value


def _convert_to_first(value: Any, declared: Any) -> Any:
    """Convert to the first member of a union that takes the value."""
    for member in get_args(declared):
        try:
            return convert(value, member)
        except Mismatch:
            continue
    raise Mismatch(describe(declared) + _hint(value, declared))


def _convert_inside(value: Any, item_type: Any, declared: Any) -> Any:
    try:
        return convert(value, item_type)
    except Mismatch as error:
        raise Mismatch(describe(declared)) from error


def _convert_to_float(value: Any) -> float:
    if type(value) not in (int, float):
        raise Mismatch(describe(float) + _hint(value, float))
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise Mismatch(describe(float))
    return number


def _plain(value: Any) -> Plain:
    """A copy of a free-form value.

    Raises:
        Mismatch: something in it has no plain form in YAML, or is a `_target_`, which only sections may have.
    """
    if type(value) is dict:
        if not all(type(key) is str and key != "_target_" for key in value):
            raise Mismatch("a mapping whose keys are strings, none of them `_target_`")
        return {key: _plain(item) for key, item in value.items()}
    if type(value) is list:
        return [_plain(item) for item in value]
    if value is None or type(value) in (bool, int, float, str):
        return value  # type: ignore[no-any-return]
    raise Mismatch("plain values only: strings, numbers, true, false, null, lists and mappings")


_WORDS: dict[Any, tuple[str, str]] = {
    int: ("an integer", "integers"),
    float: ("a finite number", "numbers"),
    str: ("a string", "strings"),
    bool: ("true or false", "true or false"),
    type(None): ("null", "null"),
}


def describe(declared: Any) -> str:
    """A declared type in words, for the end of "set it to ..."."""
    origin = get_origin(declared)
    if origin in (Union, types.UnionType):
        return " or ".join(describe(member) for member in get_args(declared))
    if origin is Literal:
        return " or ".join(show(choice) for choice in get_args(declared))
    if origin is list:
        return f"a list of {_WORDS[get_args(declared)[0]][1]}"
    if origin is dict:
        return "a mapping"
    return _WORDS[declared][0]


def _hint(value: Any, declared: Any) -> str:
    """What to write where YAML's own reading of the text is the likely cause."""
    is_union = get_origin(declared) in (Union, types.UnionType)
    members = set(get_args(declared)) if is_union else {declared}
    if str in members and not isinstance(value, (dict, list, type(None))):
        return ", in quotes"
    if isinstance(value, str) and members & {int, float} and _reads_as_number(value):
        return ", without quotes (${oc.decode:${oc.env:NAME}} reads one from the environment)"
    return ""


def _reads_as_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def at_least(name: str, section: Any, minimum: float, *fields: str) -> Iterator[Violation]:
    """Fields of a section that hold a number below `minimum`; None passes."""
    for field in fields:
        value = getattr(section, field)
        if value is not None and value < minimum:
            yield Violation(f"{name}.{field}", value, "is too small", f"set it to {minimum} or more")


def between(
    name: str, section: Any, low: float, high: float, *fields: str, include_high: bool = False
) -> Iterator[Violation]:
    """Fields that hold a number outside [low, high), or outside (low, high] with `include_high`."""
    for field in fields:
        value = getattr(section, field)
        inside = low < value <= high if include_high else low <= value < high
        if not inside:
            ends = f"above {low} and up to {high}" if include_high else f"from {low} to below {high}"
            yield Violation(f"{name}.{field}", value, "is out of range", f"set it to a number {ends}")


def multiple_of(setting: str, value: int | None, what: str, divisor: int | None) -> Iterator[Violation]:
    """`value` when it is no multiple of `divisor`, which the message calls `what`.

    Numbers below 1 pass: they are reported on their own.
    """
    if value is None or divisor is None or value < 1 or divisor < 1 or value % divisor == 0:
        return
    yield Violation(setting, value, f"is not a multiple of {what} {divisor}", "change one of them")
