"""A recipe, overlays and overrides to a `ConfigContainer`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from bridge.training.config.container import ConfigContainer
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

_SECTIONS: dict[str, type] = {
    name: section for name, declared in field_types(ConfigContainer).items() if (section := section_type(declared))
}
_OPTIONAL = {name for name, declared in field_types(ConfigContainer).items() if not is_section(declared)}
"""Sections that a configuration may lack: null says so."""
_SETTINGS: tuple[str, ...] = tuple(
    f"{name}.{field}" for name, section in _SECTIONS.items() for field in field_types(section)
)


@dataclass(frozen=True)
class _Source:
    """Settings from one file or one override, and the words by which a message points to it."""

    label: str
    settings: dict[str, Any]


def load_config(
    recipe: str | PathLike[str],
    overlays: Sequence[str | PathLike[str]] = (),
    overrides: Sequence[str] = (),
) -> ConfigContainer:
    """Merge a recipe, overlays and `section.key=value` overrides; what comes later wins.

    Mappings are merged, everything else is replaced. Values are YAML; `${oc.env:NAME}` and other OmegaConf
    interpolations are resolved after the merge. The rules between settings are not checked: call `validate`.

    Raises:
        ConfigError: a file is missing or malformed, a setting is unknown (with the nearest known one), or a
            value does not have its setting's type; `problems` lists them all with the place they come from.
    """
    sources = [_read_file(Path(path)) for path in (recipe, *overlays)]
    sources += [_read_override(text) for text in overrides]
    problems = [problem for source in sources for problem in _unknown_settings(source)]
    if problems:
        raise ConfigError(problems)
    return _build(_merge(sources), sources)


def _read_file(path: Path) -> _Source:
    try:
        loaded = OmegaConf.load(path)
        settings = OmegaConf.to_container(loaded, resolve=False)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the configuration file {path}: {error}") from error
    except (yaml.YAMLError, OmegaConfBaseException, RecursionError, ValueError) as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(settings, dict):
        raise ConfigError(f"{path}: expected sections such as `model:` and `train:`, found a list or a single value")
    # A section whose settings are all commented out reads as null and sets nothing.
    always_there = _SECTIONS.keys() - _OPTIONAL
    empty = {name for name in settings if settings[name] is None and name in always_there}
    return _Source(str(path), {str(name): settings[name] for name in settings if name not in empty})


def _read_override(text: str) -> _Source:
    key, equals, value = text.partition("=")
    label = f"override {text!r}"
    if not equals or not key.strip():
        raise ConfigError(f"{label}: expected section.key=value")
    if not value.strip():
        raise ConfigError(f"{label}: the value is empty; write {key}=null to unset it or {key}='\"\"' for no text")
    try:
        parsed: Any = OmegaConf.to_container(OmegaConf.from_dotlist([f"{key.strip()}={value}"]), resolve=False)
    except (yaml.YAMLError, OmegaConfBaseException, RecursionError, ValueError) as error:
        raise ConfigError(f"{label}: the value is not valid YAML: {error}") from error
    return _Source(label, {str(name): values for name, values in parsed.items()})


def _unknown_settings(source: _Source) -> Iterator[str]:
    """Every section and setting of a source that does not exist, and sections that are no mappings."""
    for name, values in source.settings.items():
        section = _SECTIONS.get(name)
        if section is None:
            yield f"{source.label}: unknown section {name!r}; {_advice(name, values)}"
        elif values is None and name in _OPTIONAL:
            continue
        elif not isinstance(values, dict):
            yield f"{source.label}: {name}: {show(values)} is not a mapping; set its settings one by one"
        else:
            known = field_types(section)
            for key in values:
                if key not in known:
                    setting = f"{name}.{key}"
                    yield f"{source.label}: unknown setting {setting!r}; {_advice(setting, None)}"


def _advice(name: str, values: Any) -> str:
    """What an unknown section or setting was probably meant to be."""
    if name.endswith("_target_"):
        return "this looks like a run_config.yaml: read it with ConfigContainer.from_yaml"
    section, _, key = name.rpartition(".")
    close = next((setting for setting in _SETTINGS if setting.endswith(f".{key}")), None)
    if close is None and section:
        close = nearest(name, _SETTINGS)
    elif close is None:
        close = nearest(name, _SECTIONS)
    if close is None and not isinstance(values, dict):
        # Somebody who leaves out the section may misspell the rest as well.
        short = nearest(key, [setting.partition(".")[2] for setting in _SETTINGS])
        close = next((setting for setting in _SETTINGS if short and setting.endswith(f".{short}")), None)
    if close is not None:
        return f"did you mean {close!r}?"
    if section:
        return f"it is no field of {_SECTIONS[section].__name__}"
    return f"the sections are {', '.join(_SECTIONS)}"


def _merge(sources: Sequence[_Source]) -> DictConfig:
    """Defaults and all sources in one, unresolved: defaults too, because an interpolation may name them."""
    merged = OmegaConf.create(dataclasses.asdict(ConfigContainer()))
    for source in sources:
        try:
            merged.merge_with(source.settings)
        except (OmegaConfBaseException, ValueError) as error:
            raise ConfigError(f"{source.label}: {error}") from error
    return merged


def _build(merged: DictConfig, sources: Sequence[_Source]) -> ConfigContainer:
    """The merged values as dataclasses."""
    problems: list[str] = []
    parts: dict[str, Any] = {}
    for name, section in _SECTIONS.items():
        given = merged[name]
        if given is None:
            parts[name] = None
            continue
        parts[name] = section(
            **{
                field: _take(given, field, f"{name}.{field}", field_type, sources, problems)
                for field, field_type in field_types(section).items()
                if field in given
            }
        )
    if problems:
        raise ConfigError(problems)
    return ConfigContainer(**parts)


def _take(
    parent: DictConfig, key: str, setting: str, declared: Any, sources: Sequence[_Source], problems: list[str]
) -> Any:
    """Resolve and convert one setting, or append to `problems`."""
    given, origin = _given(setting, sources)
    if given == "???":
        problems.append(f"{setting}: ??? asks for a value and none was given; set it{origin}")
        return None
    try:
        value = parent[key]
        if OmegaConf.is_config(value):
            value = OmegaConf.to_container(value, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        reason = str(error).partition("\n")[0]
        problems.append(f"{setting}: cannot be resolved: {reason}{origin}")
        return None
    try:
        return convert(value, declared)
    except Mismatch as error:
        problems.append(f"{setting}: {show(value)} is not valid; set it to {error.wanted}{origin}")
        return None


def _given(setting: str, sources: Sequence[_Source]) -> tuple[Any, str]:
    """The value of a setting in the last source that has it, and that source for the end of a message."""
    section, _, field = setting.partition(".")
    for source in reversed(sources):
        values = source.settings.get(section)
        if isinstance(values, dict) and field in values:
            return values[field], f" (from {source.label})"
    return None, ""
