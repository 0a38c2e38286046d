"""What the report of a directory is made of: its events, its manifests, and the losses of its run."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterable
from pathlib import Path

from bridge.training.checkpointing.errors import CheckpointDamagedError, CheckpointNotFoundError
from bridge.training.checkpointing.events.file import EventLog, read_events
from bridge.training.checkpointing.events.kinds import LARGEST_COUNT, Event, RunStarted, is_metric, is_time
from bridge.training.checkpointing.events.report.view import Found, LossPoint
from bridge.training.checkpointing.integrity import Manifest, read_manifest
from bridge.training.checkpointing.layout import iteration_name, list_checkpoints

_LARGEST_METRICS = 256 << 20
"""Bytes at the end of a metrics file that are read."""


def gather(directory: Path) -> tuple[EventLog, list[Found], list[LossPoint]]:
    """Read what there is.

    Returns:
        The events, the checkpoints that are there now, and the losses of the last run that kept a metrics file.

    Raises:
        CheckpointNotFoundError: the directory holds neither events nor checkpoints.
        OSError: it cannot be read.
    """
    log = read_events(directory)
    found = _checkpoints(directory)
    if not log.events and not found:
        raise CheckpointNotFoundError(
            f"{directory} has neither events nor checkpoints; name the checkpoint.save directory of a run"
        )
    return log, found, _losses(log.events)


def _checkpoints(directory: Path) -> list[Found]:
    found = []
    for iteration in list_checkpoints(directory).iterations:
        if iteration > LARGEST_COUNT:
            continue
        path = directory / iteration_name(iteration)
        try:
            manifest = read_manifest(path)
        except (CheckpointDamagedError, OSError):
            manifest = None
        if manifest is None:
            found.append(Found(iteration, str(path), None, None, None, None))
        else:
            found.append(_found(iteration, path, manifest))
    return found


def _found(iteration: int, path: Path, manifest: Manifest) -> Found:
    """What a manifest says, as far as it is possible: anybody may have written it."""
    created, size, loss = manifest.created, manifest.total_bytes, manifest.metrics.get("loss")
    return Found(
        iteration,
        str(path),
        created if created is not None and is_time(created) else None,
        size if 0 <= size <= LARGEST_COUNT else None,
        manifest.checkpoint_format,
        loss if loss is not None and is_metric(loss) else None,
    )


def _losses(events: Iterable[Event]) -> list[LossPoint]:
    """Of the metrics files that runs have named, in the order of the runs."""
    paths = [event.metrics_path for event in events if isinstance(event, RunStarted) and event.metrics_path]
    points: list[LossPoint] = []
    for path in dict.fromkeys(paths):
        points += read_losses(Path(path))
    return points


def read_losses(path: Path) -> list[LossPoint]:
    """Iterations and losses of a metrics file, in its order; none of what is no such file or cannot be read."""
    points = []
    try:
        # Events name the path, and anybody may have written them: no pipe and no device is read.
        if not stat.S_ISREG(path.stat().st_mode):
            return []
        with path.open("rb") as stream:
            stream.seek(max(0, os.fstat(stream.fileno()).st_size - _LARGEST_METRICS))
            for line in stream:
                point = _point(line)
                if point is not None:
                    points.append(point)
    except (OSError, ValueError):  # a path may be none at all
        return []
    return points


def _point(line: bytes) -> LossPoint | None:
    try:
        values = json.loads(line)
        iteration, loss = values["iteration"], values["loss"]
        if isinstance(iteration, int) and isinstance(loss, int | float) and 0 <= iteration <= LARGEST_COUNT:
            point = LossPoint(iteration, float(loss))
            return point if is_metric(point.loss) else None
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        pass
    return None
