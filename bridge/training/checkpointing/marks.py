"""Marks of damaged checkpoints: a small file in the checkpoint, written by the run that found the damage.

A checkpoint that is passed over stays where it is, for whoever wants to find out what happened. The mark keeps it from
being counted as one to fall back on: retention neither counts nor deletes it, and a load verifies every byte of it
before it is tried again. A save of the same iteration replaces the directory as a whole, and the mark goes with it.
"""

from __future__ import annotations

import json
import logging
import time
from datetime import datetime, timezone
from pathlib import Path

from bridge.training.checkpointing.files import replace_file, sync_directory
from bridge.training.checkpointing.layout import DAMAGED

logger = logging.getLogger(__name__)

_LARGEST = 1 << 16
"""Bytes."""


def is_marked(checkpoint: Path) -> bool:
    """Whether a checkpoint was found to be damaged. A mark counts whatever it says."""
    return (checkpoint / DAMAGED).is_file()


def mark(checkpoint: Path, problem: str) -> None:
    """Mark a checkpoint as damaged, durably; trouble with that is only logged, because the load goes on anyway."""
    if checkpoint.is_symlink() or not checkpoint.is_dir():
        return
    found = datetime.fromtimestamp(time.time(), timezone.utc).isoformat("T", "seconds")
    text = json.dumps({"found": found, "problem": problem[: _LARGEST // 2]}, indent=1) + "\n"
    try:
        replace_file(checkpoint / DAMAGED, text.encode())
    except OSError as error:
        logger.warning("could not mark %s as damaged: %s", checkpoint, error)


def unmark(checkpoint: Path) -> None:
    """Remove a mark, of a checkpoint that has turned out to be good; trouble with that is only logged."""
    try:
        (checkpoint / DAMAGED).unlink(missing_ok=True)
        sync_directory(checkpoint)
    except OSError as error:
        logger.warning("could not remove the mark of damage from %s: %s", checkpoint, error)


def problem_of(checkpoint: Path) -> str | None:
    """What a mark says was found; None without a mark, and empty where it does not say."""
    path = checkpoint / DAMAGED
    if not is_marked(checkpoint):
        return None
    try:
        content = json.loads(path.read_bytes()[:_LARGEST])
        return str(content["problem"]) if isinstance(content, dict) else ""
    except (OSError, ValueError, KeyError, RecursionError):
        return ""
