"""From one format to another without the run: every tensor, object and file of a checkpoint, under the same names.

It streams: what is held at once is bounded, however large the checkpoint is. Several processes each read, write and
compare parts of it. What is finished is remembered, so a conversion that was cut short continues when it is started
again. The source is only read. The destination gets a checkpoint like any other: whole or not at all.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

from bridge.training.checkpointing.conversion.destination import (
    TO,
    check_destination,
    claimed,
)
from bridge.training.checkpointing.conversion.plan import PlanError, shares_of
from bridge.training.checkpointing.conversion.running import Conversion, Converted, Report, Request, Step
from bridge.training.checkpointing.conversion.source import examine
from bridge.training.checkpointing.errors import (
    CheckpointError,
    CheckpointSaveError,
)
from bridge.training.checkpointing.safety.safe_globals import allow

DEFAULT_MEMORY = 4 << 30
"""Bytes."""
_MOST_PROCESSES = 4
_WORTH_PROCESSES = 1 << 30
"""Bytes of a checkpoint from which it pays to start further processes, which takes some seconds."""


def convert(
    source: Path,
    destination: Path,
    target_format: str,
    *,
    step: int | None = None,
    memory: int = DEFAULT_MEMORY,
    processes: int | None = None,
    verify: bool = True,
    force: bool = False,
    safe_globals: Sequence[str] = (),
    report: Report | None = None,
) -> Converted:
    """Publish a checkpoint in another format.

    The destination stays claimed until it returns or raises. After an error, or if the process is killed, what was
    finished stays in the destination, in a directory that does not count, and the same call continues from there.

    Args:
        source: a checkpoint, or a directory of checkpoints, of which the tracked one is taken.
        destination: a directory of checkpoints, which need not exist.
        target_format: `torch_dist`, `zarr` or `fsdp_dtensor`.
        step: the iteration to take from a directory of checkpoints.
        memory: bytes of values, objects and buffers that all processes together hold at most. The program itself, with
            its libraries, comes on top.
        processes: that work at the same time; None is one for each core and no more than 4, and for a checkpoint of
            less than a GiB only this one.
        verify: check the source's checksums first, and in the end compare everything with it.
        force: replace a checkpoint of this iteration that the destination has.
        safe_globals: further classes, as dotted paths, that the checkpoint may hold: `checkpoint.safe_globals`.
        report: told of the progress.

    Raises:
        CheckpointNotFoundError, NotACheckpointError: there is nothing to convert, or the destination is something else.
        CheckpointMismatchError: it is in this format already, or cannot become one of it.
        CheckpointDamagedError, UnsafeCheckpointError: the source cannot be trusted.
        DirectoryInUseError: a run saves in the destination.
        NotEnoughSpaceError: the file system has too little room.
        CheckpointSaveError: the checkpoint cannot be written, or is not what was read. Nothing was published.
    """
    started = time.monotonic()
    allow(list(safe_globals))
    if processes is not None and processes < 1:
        raise CheckpointSaveError(f"--processes is {processes}, and at least one has to do the work")
    read = examine(source, step, target_format)
    processes = processes or _default_processes(read.path)
    listing = check_destination(destination, read.path, read.iteration)
    try:
        shares = shares_of(memory, processes)
    except PlanError as error:
        raise CheckpointSaveError(f"--memory-gib: {error}") from error
    with claimed(destination):
        try:
            request = Request(read, destination, target_format, processes, shares, verify, force, tuple(safe_globals))
            return Conversion(request, listing, report or quiet, started).run()
        except CheckpointError:
            raise
        except OSError as error:
            raise CheckpointSaveError(f"{TO}: {error}; start the conversion again to continue it") from error


def quiet(step: Step, done: int, total: int) -> None:
    """Tells nobody."""
    del step, done, total


def _default_processes(path: Path) -> int:
    size = sum(each.stat().st_size for each in path.rglob("*") if each.is_file())
    return min(_MOST_PROCESSES, os.cpu_count() or 1) if size >= _WORTH_PROCESSES else 1
