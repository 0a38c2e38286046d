"""The checkpoint that is converted: found, and checked as far as this goes without its keys."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from bridge.training.checkpointing.conversion.stores import FORMATS
from bridge.training.checkpointing.detection import get_checkpoint_format
from bridge.training.checkpointing.errors import (
    CheckpointDamagedError,
    CheckpointMismatchError,
    CheckpointNotFoundError,
)
from bridge.training.checkpointing.integrity import Manifest
from bridge.training.checkpointing.layout import is_iteration_directory, iteration_name
from bridge.training.checkpointing.marks import is_marked, problem_of
from bridge.training.checkpointing.resolve import Source
from bridge.training.checkpointing.source import describe, find_source, require_whole

FROM = "SRC"
"""What messages call the source: it is named on a command line."""


@dataclass(frozen=True)
class Read:
    """The checkpoint to convert."""

    path: Path
    name: str
    """Of its format."""
    iteration: int
    manifest: Manifest | None


def examine(source: Path, step: int | None, target_format: str) -> Read:
    """Find the checkpoint and check that it can be converted, as far as this is known without its keys.

    Args:
        source: a checkpoint, or a directory of checkpoints, of which the tracked one is taken.
        step: the iteration to take from a directory of checkpoints.
        target_format: that it is to become.

    Raises:
        CheckpointError: as `convert.convert`.
    """
    if target_format not in FORMATS:
        raise CheckpointMismatchError(f"--format: there is no format {target_format!r}; there are {', '.join(FORMATS)}")
    if step is not None and is_iteration_directory(source):
        raise CheckpointMismatchError(f"--step: {source} is one checkpoint; name the directory of checkpoints")
    if not source.exists():
        raise CheckpointNotFoundError(f"{FROM}: {source} does not exist")
    found = find_source(source, step, setting=FROM)
    if found is None:
        raise CheckpointNotFoundError(f"{FROM}: there is no checkpoint in {source}")
    path = found.path.absolute()
    if found.release:
        raise CheckpointMismatchError(
            f"{FROM}: {path} is a release checkpoint, which has no iteration to be published under; copy it to a "
            f"directory of another name, {iteration_name(0)}, and convert that"
        )
    if is_marked(path):
        raise CheckpointDamagedError(f"{FROM}: {path} is marked as damaged: {problem_of(path)}")
    manifest = require_whole(path)
    name = get_checkpoint_format(path)
    if name not in FORMATS:
        raise CheckpointMismatchError(
            f"{FROM}: {path} is in the format {name!r}, and what can be converted is in one of {', '.join(FORMATS)}"
        )
    if name == target_format:
        raise CheckpointMismatchError(f"{FROM}: {path} is in the format {name!r} already")
    saved, _ = describe(Source(path, False, f"{FROM} names it"))
    return Read(path, name, saved.iteration if manifest is None else manifest.iteration, manifest)
