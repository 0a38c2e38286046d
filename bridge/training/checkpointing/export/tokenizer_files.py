"""The tokenizer's files of a checkpoint, beside a model that transformers is to load."""

from __future__ import annotations

import json
from pathlib import Path

from bridge.training.checkpointing.errors import CheckpointDamagedError
from bridge.training.checkpointing.export.plan import CONFIG, INDEX
from bridge.training.checkpointing.export.sources import FROM, Opened
from bridge.training.checkpointing.layout import TOKENIZER_DIRECTORY
from bridge.training.checkpointing.safety.containment import contained_file

NAMES = "tokenizer_files"
"""Key in the metadata of safetensors files: the names of the tokenizer's files beside them, as a JSON list."""
_LARGEST_HEADER = 100_000_000
"""Bytes, as the safetensors library has it."""


def tokenizer_files(opened: Opened) -> dict[str, bytes]:
    """The files in `tokenizer` in a checkpoint, by name, as transformers looks for them beside a model.

    Raises:
        UnsafeCheckpointError: one leads out of the checkpoint.
        CheckpointDamagedError: one cannot be read.
    """
    directory = opened.path / TOKENIZER_DIRECTORY
    try:
        # Not by the manifest: a published checkpoint may have gained them.
        names = sorted(each.name for each in directory.iterdir() if each.is_file()) if directory.is_dir() else []
        return {
            name: contained_file(opened.path, f"{TOKENIZER_DIRECTORY}/{name}")[0].read_bytes()
            for name in names
            if _may_lie_beside(name)
        }
    except OSError as error:
        raise CheckpointDamagedError(f"{FROM}: the tokenizer in {opened.path} cannot be read: {error}") from error


def _may_lie_beside(name: str) -> bool:
    return name not in (CONFIG, INDEX) and not name.endswith(".safetensors")


def names_beside(directory: Path) -> set[str]:
    """The tokenizer's files that an export has written into a directory, as its safetensors files say."""
    found: set[str] = set()
    for path in directory.glob("*.safetensors"):
        found |= _named(path)
    return found


def _named(path: Path) -> set[str]:
    try:
        with path.open("rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(size)) if size <= _LARGEST_HEADER else {}
        return {name for name in json.loads(header["__metadata__"][NAMES]) if isinstance(name, str)}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return set()
