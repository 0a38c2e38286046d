"""The files that a tokenizer is made of, read once."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from bridge.training.tokenizers.errors import TokenizerError


def locate(path: str | os.PathLike[str], name: str) -> Path:
    """`path`, or the file `name` in it if it is a directory."""
    given = Path(path)
    return given / name if given.is_dir() else given


def read_file(setting: str, path: Path, expected: str) -> bytes:
    """The content of a tokenizer's file.

    Args:
        setting: the setting that names the file, for the message.
        path: the file.
        expected: what belongs there, for the message.

    Raises:
        TokenizerError: it cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise TokenizerError(
            f"{setting}: expected {expected}; cannot read {error.filename}: {error.strerror}"
        ) from error


def read_text(setting: str, path: Path, content: bytes) -> str:
    """The text of a file's content.

    Raises:
        TokenizerError: it is not UTF-8.
    """
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise TokenizerError(f"{setting}: {path} is not text in UTF-8: {error}") from error


def parse_json(setting: str, path: Path, content: bytes, expected: type[dict[str, Any]] | type[list[Any]]) -> Any:
    """The JSON value of a file's content, a list or an object as `expected` (`list` or `dict`).

    Raises:
        TokenizerError: it is no JSON, or JSON of another kind.
    """
    try:
        value = json.loads(content)
    except ValueError as error:
        raise TokenizerError(f"{setting}: {path} is not valid JSON: {error}") from error
    if not isinstance(value, expected):
        raise TokenizerError(
            f"{setting}: {path} holds {type(value).__name__}, not {'a list' if expected is list else 'an object'}"
        )
    return value
