"""What mkdocs does beyond its settings in mkdocs.yml.

Links that leave docs/ become plain text: the pages are read in the repository too, where such links lead to files, and
the site does not have these files. And docs/reference/messages.md gets the messages of all errors, from the source.
"""

from __future__ import annotations

import ast
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
_LINK = re.compile(r"\[(?P<text>[^\]]+)\]\((?!https?://|#)(?P<target>[^)#\s]+)(?:#[^)]*)?\)")
_HERE = "<!-- the messages of all errors, filled in when the site is built -->"
_BLANK = "..."
"""Stands for what differs from case to case."""
_FEWEST_LETTERS = 10
"""A message with fewer says nothing by itself."""


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """A page's text as it goes onto the site; mkdocs calls this for every page."""
    if _HERE in markdown:
        markdown = markdown.replace(_HERE, all_messages(ROOT / "bridge"))
    return without_links_outside(markdown, page.file.src_uri)


def without_links_outside(markdown: str, page: str) -> str:
    """Replace the links of a page that lead out of docs/ by their text and the path.

    Args:
        markdown: the page's text.
        page: its path inside docs/.
    """

    def replaced(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page), match["target"]))
        if target.startswith("docs/") or match["target"].startswith("/"):
            return match[0]
        return match["text"] if match["text"].strip("`") == target else f"{match['text']} (`{target}`)"

    return _LINK.sub(replaced, markdown)


def all_messages(package: Path) -> str:
    """A section for each error of a package, with the messages that it is made with."""
    trees = {path: ast.parse(path.read_text()) for path in sorted(package.rglob("*.py"))}
    errors = [node for path, tree in trees.items() if path.name == "errors.py" for node in _classes(tree)]
    found: dict[str, set[str]] = {node.name: set() for node in errors}
    for tree in trees.values():
        for name, message in messages_in(tree):
            if name in found and len(re.sub(r"\W", "", message)) >= _FEWEST_LETTERS:
                found[name].add(message)
    return "\n\n".join(_section(node, found[node.name]) for node in sorted(errors, key=lambda node: node.name))


def messages_in(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """The names of what a module makes with a text, and the text; of rules of the configuration too."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name) or not node.args:
            continue
        if node.func.id == "Violation" and len(node.args) > 3:
            setting, value, reason, fix = (_text(argument) for argument in node.args[:4])
            yield "ConfigError", f"{setting}: {value} {reason}; {fix}"
        else:
            yield node.func.id, _text(node.args[0])


def _text(node: ast.expr) -> str:
    """A text of a program, with `_BLANK` where it has values."""
    if isinstance(node, ast.JoinedStr):
        parts = [str(part.value) if isinstance(part, ast.Constant) else _BLANK for part in node.values]
    elif isinstance(node, ast.Constant) and isinstance(node.value, str):
        parts = [node.value]
    else:
        parts = [_BLANK]
    text = " ".join("".join(parts).split())
    return re.sub(r"\.\.\.(?:\s?\.\.\.)+", _BLANK, text)


def _classes(tree: ast.Module) -> list[ast.ClassDef]:
    return [node for node in tree.body if isinstance(node, ast.ClassDef)]


def _section(error: ast.ClassDef, messages: set[str]) -> str:
    ordered = sorted(messages, key=lambda message: message.lstrip(".: "))
    what = " ".join((ast.get_docstring(error) or "").split())
    return "\n".join([f"## {error.name}", "", what, "", *(f"- `` {message} ``" for message in ordered)])
