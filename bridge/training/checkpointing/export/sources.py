"""The checkpoints that something is made of: found, checked, and opened for reading."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bridge.training.checkpointing.catalog.contents import find_checkpoint, part_of
from bridge.training.checkpointing.contents.run_config import read_run_config
from bridge.training.checkpointing.conversion.plan import Tensor
from bridge.training.checkpointing.conversion.stores import FORMATS, Store, open_store
from bridge.training.checkpointing.detection import get_checkpoint_format
from bridge.training.checkpointing.errors import CheckpointDamagedError, CheckpointMismatchError
from bridge.training.checkpointing.integrity import Manifest, find_damage
from bridge.training.checkpointing.layout import is_iteration_directory
from bridge.training.checkpointing.marks import is_marked, problem_of
from bridge.training.checkpointing.resolve import Source
from bridge.training.checkpointing.source import describe, require_whole

FROM = "SRC"
MODEL = "model"

Report = Callable[[str, int, int], None]
"""Told how many bytes of how many a step has handled."""


@dataclass(frozen=True)
class Opened:
    """A checkpoint that is read."""

    path: Path
    """Absolute."""
    format: str
    """Its name."""
    iteration: int
    manifest: Manifest | None
    config: dict[str, Any] | None
    """Its `run_config.yaml`; None where there is none."""
    store: Store


def open_checkpoint(path: Path, step: int | None, reader_bytes: int) -> Opened:
    """Find a checkpoint, check that it has all its files, and open it. Local.

    Args:
        path: a checkpoint, or a directory of checkpoints, of which the tracked one is taken.
        step: the iteration to take from a directory of checkpoints.
        reader_bytes: of the reader's buffers.

    Raises:
        CheckpointNotFoundError, NotACheckpointError: there is none.
        CheckpointDamagedError, UnsafeCheckpointError: it cannot be trusted.
        CheckpointMismatchError: its format cannot be read tensor by tensor.
    """
    if step is not None and is_iteration_directory(path):
        raise CheckpointMismatchError(f"--step: {path} is one checkpoint; name the directory of checkpoints")
    found = find_checkpoint(path, step, FROM).absolute()
    if is_marked(found):
        raise CheckpointDamagedError(f"{FROM}: {found} is marked as damaged: {problem_of(found)}")
    manifest = require_whole(found)
    name = get_checkpoint_format(found)
    if name not in FORMATS:
        raise CheckpointMismatchError(
            f"{FROM}: {found} is in the format {name!r}, and what can be read tensor by tensor is in one of "
            f"{', '.join(FORMATS)}"
        )
    if manifest is not None:
        iteration = manifest.iteration
    else:
        iteration = describe(Source(found, False, f"{FROM} names it"))[0].iteration
    config = read_run_config(found)
    return Opened(found, name, iteration, manifest, config, open_store(found, name, reader_bytes))


def model_tensors(store: Store) -> dict[str, Tensor]:
    """The tensors of a store that are the model's, by key."""
    return {key: tensor for key, tensor in store.tensors.items() if part_of(key) == MODEL}


def verify(checkpoints: Sequence[Opened], report: Report) -> bool:
    """Compare every file with its checkpoint's manifest.

    Returns:
        Whether all had a manifest.

    Raises:
        CheckpointDamagedError: a file is not what it was.
    """
    total = sum(0 if each.manifest is None else each.manifest.total_bytes for each in checkpoints)
    done = 0
    for each in checkpoints:
        for record in () if each.manifest is None else each.manifest.files:
            problems = find_damage(each.path, [record], checksums=True)
            if problems:
                raise CheckpointDamagedError(f"{FROM}: {each.path} is damaged: {problems[0]}")
            done += record.size
            report("checking", done, total)
    return all(each.manifest is not None for each in checkpoints)
