"""The JSON Schema of recipes and overlays, by which editors complete and check them."""

from __future__ import annotations

import ast
import inspect
import itertools
import types
from typing import Any, Literal, Union, get_args, get_origin

from bridge.training.config.container import ConfigContainer
from bridge.training.config.schema import default_of, field_types, is_section, section_type

DIALECT = "http://json-schema.org/draft-07/schema#"
"""The draft that editors' YAML servers know."""

_INTERPOLATION = "interpolation"
_DEFINITIONS = {
    _INTERPOLATION: {
        "description": "What is resolved after the merge, such as ${oc.env:NAME}; or ???, which asks for a value.",
        "type": "string",
        "pattern": r"\$\{.+\}|^\?\?\?$",
    }
}

_TYPES: dict[Any, dict[str, Any]] = {
    int: {"type": "integer"},
    float: {"type": "number"},
    str: {"type": "string"},
    bool: {"type": "boolean"},
    type(None): {"type": "null"},
    Any: {},
}


def recipe_schema() -> dict[str, Any]:
    """The schema of a recipe: sections, and for each setting its type, default and description."""
    sections = {}
    for name, declared in field_types(ConfigContainer).items():
        section = section_type(declared)
        if section is not None:
            # A section whose settings are all commented out reads as null.
            sections[name] = _section_schema(section, descriptions(ConfigContainer)[name])
    return {"$schema": DIALECT, "title": "Recipe of bridge", **_closed(sections), "definitions": _DEFINITIONS}


def _section_schema(section: type, description: str) -> dict[str, Any]:
    said = descriptions(section)
    settings = {
        name: {"description": said[name], "default": default_of(section, name), **_setting_schema(declared)}
        for name, declared in field_types(section).items()
        if not is_section(declared)
    }
    return {"description": description, **_closed(settings), "type": ["object", "null"]}


def _closed(properties: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "additionalProperties": False}


def _setting_schema(declared: Any) -> dict[str, Any]:
    """What one setting may be. Strings are as they are: an interpolation is one."""
    members = _members(declared)
    if {} in members or {"type": "string"} in members:
        return {"anyOf": members} if len(members) > 1 else members[0]
    return {"anyOf": [*members, {"$ref": f"#/definitions/{_INTERPOLATION}"}]}


def _members(declared: Any) -> list[dict[str, Any]]:
    origin = get_origin(declared)
    if origin in (Union, types.UnionType):
        return [schema for member in get_args(declared) for schema in _members(member)]
    if origin is Literal:
        return [{"enum": list(get_args(declared))}]
    if origin is list:
        (item,) = get_args(declared)
        return [{"type": "array", "items": _setting_schema(item)}]
    if origin is dict:
        return [{"type": "object"}]
    return [_TYPES[declared]]


def descriptions(section: type) -> dict[str, str]:
    """The docstring under each field of a dataclass, from its source."""
    statements = ast.parse(inspect.getsource(section)).body[0].body  # type: ignore[attr-defined]
    return {
        field.target.id: " ".join(text.value.value.split())
        for field, text in itertools.pairwise(statements)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
    }
