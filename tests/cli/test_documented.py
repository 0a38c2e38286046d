"""docs/cli.md has every command and every option, and every command has what all have in common."""

from __future__ import annotations

import re
from pathlib import Path

import click
import pytest

from bridge.cli.application import COMMANDS, parse

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "cli.md").read_text()


def section(name: str) -> str:
    """The part of the page that is about a command."""
    match = re.search(rf"^## {name}\n(.*?)(?=^## |\Z)", PAGE, re.DOTALL | re.MULTILINE)
    assert match is not None, f"docs/cli.md has no section {name}"
    return match[1]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_every_option_has_its_place(command: click.Command) -> None:
    text = section(str(command.name))
    common = PAGE.partition("\n## ")[0]
    for parameter in command.params:
        if not isinstance(parameter, click.Option):
            assert parameter.make_metavar(click.Context(command)) in text
            continue
        for name in (*parameter.opts, *parameter.secondary_opts):
            if name == "--verify" or name == "--values":
                continue  # the default, which --no-... turns off
            assert re.search(rf"`{name}[` ]", common if name in ("--json", "--quiet") else text), name


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_every_command_has_what_all_have(command: click.Command) -> None:
    options = {name for parameter in command.params for name in parameter.opts}
    assert {"--json", "--quiet"} <= options
    assert command.short_help
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert parameter.help, parameter.name


def test_the_page_has_no_other_command() -> None:
    names = {command.name for command in COMMANDS}
    for line in re.findall(r"^bridge-ckpt (.*)$", PAGE, re.MULTILINE):
        assert line.split()[0] in names
    with pytest.raises(click.UsageError):
        parse(["ls", "--no-such-option"])
