"""Every error and every prominent warning has a place in docs/, and what docs/troubleshooting.md quotes is said."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs/troubleshooting.md"
TREES = {path: ast.parse(path.read_text()) for path in sorted((ROOT / "bridge").rglob("*.py"))}
"""Every module, as its syntax: nothing is imported."""
LOGGED = {"warning", "error", "exception"}
LOUD = re.compile(r"^[A-Z]{5,}\b|\b[A-Z]+ [A-Z]{2,}\b")
"""A word in capitals at the beginning, or two in a row."""
PLACEHOLDER = re.compile(r"%(?:\.\d+)?[sdgf]|%r")


def pieces(node: ast.AST) -> list[str] | None:
    """The fixed parts of a string in a program, in order; None if the node is no string."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return PLACEHOLDER.split(node.value)
    if isinstance(node, ast.JoinedStr):
        return [str(part.value) for part in node.values if isinstance(part, ast.Constant)]
    return None


def strings() -> Iterator[list[str]]:
    for tree in TREES.values():
        yield from filter(None, map(pieces, ast.walk(tree)))


STRINGS = ["\0".join(parts) for parts in strings()]


def is_said(message: str) -> bool:
    """Whether some string of the program has all fixed parts of `message`, in this order."""
    wanted = [part.strip(" ();") for part in message.split("...")]
    return any(has_in_order(text, [part for part in wanted if part]) for text in STRINGS)


def has_in_order(text: str, parts: list[str]) -> bool:
    end = 0
    for part in parts:
        begin = text.find(part, end)
        if begin < 0:
            return False
        end = begin + len(part)
    return True


def quoted_messages() -> list[str]:
    return re.findall(r"^\| `([^`]+)` \|", PAGE.read_text(), re.MULTILINE)


@pytest.mark.parametrize(
    "module", [path for path in TREES if path.name == "errors.py"], ids=lambda path: path.parent.name
)
def test_every_error_has_its_place(module: Path) -> None:
    own = {node.name for node in TREES[module].body if isinstance(node, ast.ClassDef)}
    assert own
    text = PAGE.read_text()
    assert {name for name in own if f"`{name}`" not in text} == set()
    if module.parent.name == "checkpointing":
        assert own <= set(re.findall(r"^## (\w+Error)$", text, re.MULTILINE))


def warnings_in_capitals() -> list[str]:
    """The messages that are logged with words in capitals."""
    calls = (node for tree in TREES.values() for node in ast.walk(tree) if isinstance(node, ast.Call))
    logged = (node.args[0] for node in calls if node.args and getattr(node.func, "attr", "") in LOGGED)
    return [str(text.value) for text in logged if isinstance(text, ast.Constant) and LOUD.search(str(text.value))]


def test_every_warning_in_capitals_has_its_place() -> None:
    messages = warnings_in_capitals()
    assert len(messages) >= 11
    quoted = quoted_messages()
    for message in messages:
        words = re.findall(r"\b[A-Z]+\b", message)
        assert any(re.search(".*".join(words), line) for line in quoted), message


def test_the_messages_that_are_quoted_are_said() -> None:
    quoted = quoted_messages()
    assert len(quoted) > 100
    # Two that are put together from parts which are said apart.
    composed = {message for message in quoted if message.startswith("STARTING ")}
    assert {message for message in quoted if message not in composed and not is_said(message)} == set()


def test_a_message_that_nobody_says_is_noticed() -> None:
    assert not is_said("... is damaged by the moon: ...")
