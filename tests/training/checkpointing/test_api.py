"""Every documented name exists, with the documented parameters and defaults."""

import ast
import dataclasses
import inspect
import json
from pathlib import Path
from typing import Any

import pytest

from bridge.training import checkpointing

DOCUMENTED = json.loads((Path(__file__).parent / "documented_api.json").read_text())
REQUIRED = inspect.Parameter.empty


def expected_default(text: str | None) -> Any:
    return REQUIRED if text is None else ast.literal_eval(text)


def test_the_whole_documented_api_is_covered() -> None:
    assert (len(DOCUMENTED["functions"]), len(DOCUMENTED["classes"]), len(DOCUMENTED["data"])) == (44, 5, 5)


@pytest.mark.parametrize("name", DOCUMENTED["functions"])
def test_functions_have_the_documented_signature(name: str) -> None:
    parameters = list(inspect.signature(getattr(checkpointing, name)).parameters.values())
    documented = DOCUMENTED["functions"][name]
    found = [
        [p.name, "keyword" if p.kind is inspect.Parameter.KEYWORD_ONLY else "positional", p.default] for p in parameters
    ]
    assert [entry[:2] for entry in found[: len(documented)]] == [entry[:2] for entry in documented]
    # Ours may have a default where the documented one has none, and optional parameters may follow.
    assert all(
        default == expected_default(entry[2]) or entry[2] is None
        for entry, (_, _, default) in zip(documented, found, strict=False)
    )
    assert all(default is not REQUIRED for _, _, default in found[len(documented) :])


@pytest.mark.parametrize("name", ["CheckpointSaveContext", "CheckpointLoadContext"])
def test_contexts_have_the_documented_fields(name: str) -> None:
    fields = {
        field.name: REQUIRED if field.default is dataclasses.MISSING else field.default
        for field in dataclasses.fields(getattr(checkpointing, name))
    }
    documented = DOCUMENTED["classes"][name]["fields"]
    assert fields == {field: expected_default(default) for field, default in documented.items()}


@pytest.mark.parametrize("name", ["CheckpointManager", "DefaultCheckpointManager"])
def test_managers_have_the_documented_methods(name: str) -> None:
    cls, documented = getattr(checkpointing, name), DOCUMENTED["classes"][name]
    assert list(inspect.signature(cls.__init__).parameters)[1:] == documented["init"]
    for method, parameters in documented["methods"].items():
        found = [
            p.name if p.default is REQUIRED else f"{p.name}={p.default}"
            for p in inspect.signature(getattr(cls, method)).parameters.values()
        ]
        assert found == ["self", *parameters]
    for name_ in documented.get("properties", []):
        assert isinstance(getattr(cls, name_), property)


def test_checkpoint_types_are_the_documented_ones() -> None:
    assert [member.name for member in checkpointing.CheckpointType] == ["LOCAL", "GLOBAL", "FSDP_DTENSOR"]


@pytest.mark.parametrize("name", DOCUMENTED["data"])
def test_data_names_exist(name: str) -> None:
    assert hasattr(checkpointing, name)


def test_every_documented_function_is_explained() -> None:
    assert [name for name in DOCUMENTED["functions"] if not inspect.getdoc(getattr(checkpointing, name))] == []
