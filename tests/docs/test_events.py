"""docs/events.md has a place for every event, every field, every number and every setting."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from bridge.training.checkpointing.events.kinds import KINDS, Event
from bridge.training.config import LoggerConfig

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "events.md").read_text()
COMMON = [item.name for item in dataclasses.fields(Event)]


def rows(heading: str) -> dict[str, str]:
    """The rows of the table whose first column is headed so: the rest of each by its first cell, without backticks."""
    table = PAGE.partition(f"| {heading} |")[2].partition("\n\n")[0]
    cells = (line.strip("|").partition("|") for line in table.splitlines()[2:])
    return {first.strip().strip("`"): rest for first, _, rest in cells}


def test_every_event_and_every_field_of_it_is_described() -> None:
    described = rows("Event")
    assert sorted(described) == sorted(KINDS)
    for name, event in KINDS.items():
        own = [item.name for item in dataclasses.fields(event) if item.name not in COMMON]
        fields = described[name].partition("|")[2]
        missing = [field for field in own if f"`{field}`" not in fields]
        assert not missing, name
    assert list(rows("Field")) == ["event", *COMMON]


def test_every_setting_is_described() -> None:
    names = [item.name for item in dataclasses.fields(LoggerConfig)]
    assert list(rows("Field of `logger`")) == names[names.index("checkpoint_events") :]


def test_every_program_has_its_setting_and_its_extra() -> None:
    extras = re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    for program, rest in rows("Program").items():
        (setting,) = re.findall(r"`logger\.(\w+)`", rest)
        (extra,) = re.findall(r"bridge\[(\w+)\]", rest)
        assert hasattr(LoggerConfig(), setting), program
        assert extra in extras, program
