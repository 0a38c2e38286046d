"""Saves whose trainers have died while the writers went on, and what the next start makes of them.

Each writer then leaves a file in the staging directory (`io.bequest`): which files it has written, and behind that what
its trainer gave it when the save began. All of them together say what rank 0 would have heard when it published the
save, so the next start can seal it. If one is missing, nothing comes of the others.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from bridge.training.checkpointing.commit import describe_files, seal
from bridge.training.checkpointing.errors import CheckpointError
from bridge.training.checkpointing.files import sync_file
from bridge.training.checkpointing.integrity import FileRecord, Manifest
from bridge.training.checkpointing.layout import BEQUEST_PREFIX, bequest_name, iteration_name, staged_name
from bridge.training.checkpointing.safety.containment import contained_file

logger = logging.getLogger(__name__)

VERSION = 1

_PATIENCE_SECONDS = 20.0
"""For which nothing may be heard of any writer that is still at it. Each of them shows every second that it lives."""
_NOTICE_SECONDS = 5.0
"""For which nothing may be heard where the writers that have shown themselves are done: the others have nothing."""
_LOOK_SECONDS = 0.1
_TELL_SECONDS = 10.0


def bequest_of(manifest: Manifest, payload: bytes) -> bytes:
    """What a trainer gives its writer.

    Args:
        manifest: of the checkpoint, as far as this rank knows it: its files are left out.
        payload: what the format needs of this rank (`PayloadWrite.bequest`).
    """
    return json.dumps({"version": VERSION, "manifest": manifest.to_json()}).encode() + b"\n" + payload


@dataclass(frozen=True)
class _Part:
    """What one rank has left."""

    manifest: Manifest
    """With the files of this rank."""
    payload: bytes


def is_complete(staging: Path) -> bool:
    """Whether the writers of all ranks have left word that they are done. Nothing is changed."""
    return _is_complete(staging, _left_in(staging))


def inherit(staging: Path) -> bool:
    """Make a sealed staging directory of one that the trainers of all ranks have left to their writers.

    Writers that are still at it are waited for, as long as they show that they live.

    Returns:
        Whether it is sealed now. If not, too few ranks have left something, or it does not fit together; why is logged.

    Raises:
        OSError: storage does not let it be completed.
    """
    if not _await_writers(staging):
        return False
    try:
        manifest = _complete(staging)
        seal(staging, manifest)
    except (CheckpointError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        logger.warning("%s cannot be completed: %s: %s", staging, type(error).__name__, error)
        return False
    remove_bequests(staging)
    logger.warning("completed the save of iteration %d: its writers have outlived a run that died", manifest.iteration)
    return True


def remove_bequests(staging: Path) -> None:
    """Remove what writers have left in a directory; it is sealed, so nobody needs that any more."""
    for path in staging.glob(f"{BEQUEST_PREFIX}*"):
        path.unlink(missing_ok=True)


def _left_in(staging: Path) -> dict[int, tuple[int, int]]:
    """By rank, the size and the time of what is there; only size 0 still changes."""
    found = {}
    for path in staging.glob(f"{BEQUEST_PREFIX}*"):
        rank = path.name.removeprefix(BEQUEST_PREFIX)
        if not rank.isdecimal():
            continue
        try:
            # Opened, because a network file system then asks for what is really there.
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
        except FileNotFoundError:
            continue
        try:
            status = os.fstat(descriptor)
        finally:
            os.close(descriptor)
        found[int(rank)] = status.st_size, status.st_mtime_ns
    return found


def _is_complete(staging: Path, left: Mapping[int, tuple[int, int]]) -> bool:
    done = sorted(rank for rank, (size, _) in left.items() if size)
    if not done:
        return False
    try:
        world_size = _read(staging, done[0]).manifest.world_size
    except (CheckpointError, ValueError, TypeError, KeyError, AttributeError, RecursionError, OSError):
        return False
    return done == list(range(world_size))


def _await_writers(staging: Path) -> bool:
    """Wait while writers are at it; whether all of them came to their end."""
    heard: dict[int, tuple[int, int]] = {}
    since = told = time.monotonic()
    while left := _left_in(staging):
        if _is_complete(staging, left):
            return True
        now = time.monotonic()
        if left != heard:
            heard, since = left, now
        elif now - since > (_NOTICE_SECONDS if all(size for size, _ in left.values()) else _PATIENCE_SECONDS):
            logger.warning("%s: nothing was heard of the other ranks' writers for %.0f s", staging, now - since)
            return False
        if now - told > _TELL_SECONDS:
            told = now
            done = sum(1 for size, _ in left.values() if size)
            logger.warning("%s: waiting for writers that have outlived their run; %d are done", staging, done)
        time.sleep(_LOOK_SECONDS)
    return False


def _read(staging: Path, rank: int) -> _Part:
    """What a rank has left.

    Raises:
        ValueError, TypeError, KeyError, AttributeError: it is something else.
        CheckpointError: it lies elsewhere.
        OSError: it cannot be read.
    """
    written, given, payload = contained_file(staging, bequest_name(rank))[0].read_bytes().split(b"\n", 2)
    files, content = json.loads(written), json.loads(given)
    if content["version"] != VERSION:
        raise ValueError(f"what rank {rank} has left is of version {content['version']!r}")
    manifest = Manifest.from_json(content["manifest"])
    kind = files["checksum"]
    records = tuple(FileRecord(name, size, checksum, kind, sample) for name, size, checksum, sample in files["files"])
    return _Part(replace(manifest, files=records), payload)


def _complete(staging: Path) -> Manifest:
    """Write the files that need what all ranks know; return the manifest."""
    # Imported where it is needed: it brings megatron-core, which most starts find nothing to do for.
    from bridge.training.checkpointing.formats.registry import format_named

    first = _read(staging, 0).manifest
    parts = [_read(staging, rank) for rank in range(first.world_size)]
    if iteration_name(first.iteration) != staged_name(staging.name):
        raise ValueError(f"rank 0 has left iteration {first.iteration}")
    for rank, part in enumerate(parts):
        if _save_of(part.manifest) != _save_of(first):
            raise ValueError(f"rank {rank} has left another save than rank 0")
    complete = format_named(first.checkpoint_format).inherit
    if complete is None:
        raise ValueError(f"the format {first.checkpoint_format!r} cannot be completed")
    names = complete(staging, [part.payload for part in parts])
    for name in names:
        sync_file(staging / name)
    records = [record for part in parts for record in part.manifest.files]
    records += describe_files(staging, names, first.checksum)
    if len({record.name for record in records}) != len(records):
        raise ValueError("two ranks have written one file")
    metrics: dict[str, float] = {}
    for part in reversed(parts):
        metrics |= part.manifest.metrics
    ordered = tuple(sorted(records, key=lambda record: record.name))
    manifest = replace(first, files=ordered, created=time.time(), metrics=metrics)
    return Manifest.from_json(manifest.to_json())  # which checks the records


def _save_of(manifest: Manifest) -> tuple[object, ...]:
    return manifest.iteration, manifest.checkpoint_format, manifest.world_size, manifest.start
