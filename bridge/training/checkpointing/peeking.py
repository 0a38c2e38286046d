"""Looks at files that take long to parse, for what a few of their bytes tell."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from bridge.training.checkpointing.errors import CheckpointDamagedError
from bridge.training.checkpointing.layout import PAYLOAD_METADATA, RUN_CONFIG
from bridge.training.checkpointing.safety.containment import contained_file

_BLOCK = 1 << 20
_LONGEST_KEY = 1 << 8
"""Bytes by which blocks overlap, so that what is looked for lies in one of them."""
_LARGEST_CONFIG = 1 << 20
_SECTION = re.compile(rb"^checkpoint: *\n((?: .*\n)+)", re.MULTILINE)
"""The section of a configuration in which each setting has a line, as programs write it."""
_FORMAT = re.compile(rb"^( +)ckpt_format: *([a-z_]+) *$", re.MULTILINE)


def is_cut_short(checkpoint: Path) -> bool:
    """Whether `.metadata` lacks how pickles begin or end. A whole one can still be unreadable.

    Raises:
        UnsafeCheckpointError: it is a link that leads out of the checkpoint.
        CheckpointDamagedError: it cannot be read.
    """
    with _metadata(checkpoint) as (stream, size):
        begins = stream.read(1) == b"\x80"
        stream.seek(max(0, size - 1))
        return not begins or stream.read(1) != b"."


def may_hold(checkpoint: Path, pattern: re.Pattern[bytes]) -> bool:
    """Whether something in `.metadata` looks as a pattern says; keys are in it as they are.

    Raises:
        UnsafeCheckpointError: it is a link that leads out of the checkpoint.
        CheckpointDamagedError: it cannot be read.
    """
    with _metadata(checkpoint) as (stream, _):
        kept = b""
        while block := stream.read(_BLOCK):
            if pattern.search(kept + block):
                return True
            kept = block[-_LONGEST_KEY:]
    return False


@contextmanager
def _metadata(checkpoint: Path) -> Iterator[tuple[BinaryIO, int]]:
    """`.metadata`, open, and its size in bytes."""
    path, size = contained_file(checkpoint, PAYLOAD_METADATA)
    try:
        with path.open("rb") as stream:
            yield stream, size
    except OSError as error:
        raise CheckpointDamagedError(f"{path} cannot be read: {error}") from error


def is_plainly_configured(checkpoint: Path, checkpoint_format: str) -> bool:
    """Whether `run_config.yaml` says in a line of its own that the run saves in a format.

    False says nothing: it can say so in another form.
    """
    path = checkpoint / RUN_CONFIG
    try:
        with path.open("rb") as stream:
            data = stream.read(_LARGEST_CONFIG)
    except OSError:
        return False
    sections = _SECTION.findall(data)
    if len(sections) != 1:
        return False
    indent = len(sections[0]) - len(sections[0].lstrip(b" "))
    named = [name for spaces, name in _FORMAT.findall(sections[0]) if len(spaces) == indent]
    return named == [checkpoint_format.encode()]
