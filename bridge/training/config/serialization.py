"""run_config.yaml: a configuration as plain values, and back.

Each dataclass is a mapping of its fields and a `_target_` with its public dotted name. Reading compares that
name with the class that the setting must have; no name is ever looked up, imported or called.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar

import yaml

from bridge.training.config.errors import ConfigError
from bridge.training.config.schema import (
    Mismatch,
    convert,
    field_types,
    is_section,
    nearest,
    section_type,
    show,
)

PUBLIC_MODULE = "bridge.training.config"
"""Where the names of all sections live, whichever module defines them: files outlive modules."""

T = TypeVar("T")


def target_name(section: type) -> str:
    """The `_target_` of a section's class."""
    return f"{PUBLIC_MODULE}.{section.__name__}"


def to_plain(section: Any, name: str = "") -> dict[str, Any]:
    """A dataclass as a mapping of plain values with its `_target_`; fields that begin with "_" are left out.

    Raises:
        ConfigError: a value has no plain form in YAML.
    """
    plain: dict[str, Any] = {"_target_": target_name(type(section))}
    for item in dataclasses.fields(section):
        if item.name.startswith("_"):
            continue
        setting = f"{name}.{item.name}" if name else item.name
        value = getattr(section, item.name)
        if dataclasses.is_dataclass(value):
            plain[item.name] = to_plain(value, setting)
            continue
        try:
            plain[item.name] = convert(value, Any)
        except Mismatch as error:
            raise ConfigError(f"{setting}: {show(value)} cannot be written; use {error.wanted}") from error
    return plain


def from_plain(section: type[T], values: Any, name: str = "") -> T:
    """The reverse of `to_plain`; a field that `values` lacks takes its default.

    Raises:
        ConfigError: all that does not fit, in one.
    """
    problems: list[str] = []
    result = _read_section(section, values, name, problems)
    if problems or result is None:
        raise ConfigError(problems)
    return result


def _read_section(section: type[T], values: Any, name: str, problems: list[str]) -> T | None:
    """Build a section from plain values, or append to `problems`."""
    where = name or "the file"
    if not isinstance(values, Mapping):
        problems.append(f"{where}: {show(values)} is not a mapping of settings; expected {target_name(section)}")
        return None
    target = values.get("_target_", target_name(section))
    if target != target_name(section):
        problems.append(
            f"{where}: the `_target_` {show(target)} is not allowed here; it must be {target_name(section)!r}"
        )
        return None
    found = len(problems)
    known = field_types(section)
    arguments: dict[str, Any] = {}
    for key, value in values.items():
        setting = f"{name}.{key}" if name else str(key)
        if key == "_target_":
            continue
        if key not in known:
            close = nearest(str(key), known)
            advice = f"did you mean {close!r}?" if close else "was the file written by another version?"
            problems.append(f"{setting}: unknown setting; {advice}")
        elif (part := section_type(known[key])) is not None:
            left_out = value is None and not is_section(known[key])
            arguments[key] = None if left_out else _read_section(part, value, setting, problems)
        else:
            _read_value(setting, key, value, known[key], arguments, problems)
    return section(**arguments) if len(problems) == found else None


def _read_value(
    setting: str, key: str, value: Any, declared: Any, arguments: dict[str, Any], problems: list[str]
) -> None:
    try:
        arguments[key] = convert(value, declared)
    except Mismatch as error:
        problems.append(f"{setting}: {show(value)} is not valid; expected {error.wanted}")


@dataclass(frozen=True)
class _Plain:
    """Plain values that are the same as others if they look the same; `1`, `1.0` and `True` are equal, and do not."""

    shown: str
    values: dict[str, Any] = field(compare=False)


@lru_cache(maxsize=4)
def _yaml_of(plain: _Plain) -> str:
    """The YAML of some values. Each save of a run writes the same ones, and making YAML takes long."""
    # An endless line width keeps every value on its own line, so that a diff of two files shows settings.
    text: str = yaml.safe_dump(plain.values, default_flow_style=False, sort_keys=True, width=float("inf"))
    return text


def write_yaml(section: Any, path: str | PathLike[str] | None) -> str:
    """The YAML of `to_plain`: block style, sorted keys; also written to `path` unless that is None."""
    plain = to_plain(section)
    text = _yaml_of(_Plain(repr(plain), plain))
    if path is not None:
        Path(path).write_text(text, encoding="utf-8")
    return text


class _Loader(yaml.SafeLoader):
    """A safe loader without aliases: our files have none, and a file with them can be made to never end."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases are not allowed")
        return super().compose_node(parent, index)


def read_yaml(section: type[T], path: str | PathLike[str]) -> T:
    """Read what `write_yaml` wrote.

    Raises:
        ConfigError: the file cannot be read, is no YAML, or does not fit the section.
    """
    try:
        values = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=_Loader)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the configuration {path}: {error}") from error
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    try:
        return from_plain(section, values)
    except ConfigError as error:
        raise ConfigError([f"{path}: {problem}" for problem in error.problems]) from error
