"""Saves whose trainers have died while the writers went on, and what the next start makes of them.

Each writer then leaves a file in the staging directory (`io.bequest`): which files it has written, and behind that what
its trainer gave it when the save began. All of them together say what rank 0 would have heard when it published the
save, so the next start can seal it. If one is missing, nothing comes of the others.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import stat
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from zlib_ng.zlib_ng import crc32

from bridge.training.checkpointing.commit import describe_files, seal
from bridge.training.checkpointing.errors import CheckpointError
from bridge.training.checkpointing.files import sync_file
from bridge.training.checkpointing.integrity import FileRecord, Manifest, merged_metrics
from bridge.training.checkpointing.layout import BEQUEST_PREFIX, bequest_name, iteration_name, staged_name

logger = logging.getLogger(__name__)

VERSION = 1

_PATIENCE_SECONDS = 20.0
"""For which nothing may be heard of any writer that is still at it. Each of them shows every second that it lives."""
_NOTICE_SECONDS = 5.0
"""For which nothing may be heard where the writers that have shown themselves are done: the others have nothing."""
_FIRST_SIGN_SECONDS = 1.0
"""For which the first sign is waited for: a writer looks for its trainer ten times a second, and this start may have
come at the very moment in which that died."""
_LONGEST_SECONDS = 600.0
"""For which writers are waited for at all."""
_LOOK_SECONDS = 0.1
_TELL_SECONDS = 10.0
_NOT_THERE = {errno.ENOENT, errno.ELOOP, errno.ENOTDIR, errno.ENXIO}
_OF_THE_DIRECTORY = {errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ELOOP}
"""Errors that will be the same at the next start."""
_MOST_RANKS = 1 << 20
_LARGEST = 1 << 28
"""Bytes of a file that a writer leaves; that of 16,384 ranks takes 6 MB."""


class _NoPartError(Exception):
    """What a rank has left is none, or fits nothing."""


def bequest_of(rank: int, manifest: Manifest, trackers: str, payload: bytes) -> bytes:
    """What a trainer gives its writer.

    Args:
        rank: its own.
        manifest: of the checkpoint, as far as this rank knows it: its files are left out.
        trackers: on rank 0, `commit.digest_of_trackers` when the save began.
        payload: what the format needs of this rank (`PayloadWrite.bequest`).
    """
    content = {"version": VERSION, "rank": rank, "trackers": trackers, "manifest": manifest.to_json()}
    return json.dumps(content).encode() + b"\n" + payload


@dataclass(frozen=True)
class _Part:
    """What one rank has left."""

    manifest: Manifest
    """With the files of this rank."""
    checksum: str
    """The kind of its files' checksums."""
    trackers: str
    payload: bytes


@dataclass
class _Heard:
    """What can be told of the writers without reading all that they have left."""

    staging: Path
    world_size: int | None = None
    """Once one of them has said it."""
    done: set[int] = field(default_factory=set)
    writing: dict[int, int] = field(default_factory=dict)
    """Those that are still at it: when they were last heard of, by the clock of the file system."""

    @property
    def is_complete(self) -> bool:
        return self.world_size is not None and len(self.done) == self.world_size

    def listen(self) -> None:
        """Look again.

        Raises:
            OSError: storage does not say whether there is something.
        """
        for rank in self._ranks() - self.done:
            found = self._status(rank)
            self.writing.pop(rank, None)
            if found is not None and found.st_size:
                self.done.add(rank)
            elif found is not None:
                self.writing[rank] = found.st_mtime_ns
        for rank in sorted(self.done) if self.world_size is None else ():
            self._learn(rank)
        if (ranks := self.world_size) is not None:
            self.done = {rank for rank in self.done if rank < ranks}
            self.writing = {rank: at for rank, at in self.writing.items() if rank < ranks}

    def _ranks(self) -> set[int]:
        if self.world_size is not None:  # asked for by name, because a listing may be an old one
            return set(range(self.world_size))
        names = [entry.name.removeprefix(BEQUEST_PREFIX) for entry in self.staging.glob(f"{BEQUEST_PREFIX}*")]
        return {int(name) for name in names if name.isdecimal() and len(name) < 10}

    def _status(self, rank: int) -> os.stat_result | None:
        try:
            # Opened, because a network file system then asks for what is really there.
            descriptor = os.open(self.staging / bequest_name(rank), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError as error:
            if error.errno in _NOT_THERE:
                return None
            raise
        try:
            found = os.fstat(descriptor)
        finally:
            os.close(descriptor)
        return found if stat.S_ISREG(found.st_mode) else None

    def _learn(self, rank: int) -> None:
        try:
            world_size = _read(self.staging, rank).manifest.world_size
        except _NoPartError:
            return
        if 0 < world_size <= _MOST_RANKS:
            self.world_size = world_size


def is_complete(staging: Path) -> bool:
    """Whether the writers of all ranks have left word that they are done. Nothing is changed, and nothing raised."""
    heard = _Heard(staging)
    try:
        heard.listen()
        heard.listen()  # by name, now that it is known how many there are
    except OSError:
        return False
    return heard.is_complete


def shows_life(staging: Path) -> bool:
    """Whether a writer has said that it is still at it, or is done. Nothing is changed, and nothing raised."""
    heard = _Heard(staging)
    try:
        heard.listen()
    except OSError:
        return False
    return bool(heard.done or heard.writing)


def trackers_then(staging: Path) -> str | None:
    """`commit.digest_of_trackers` when the save began, as rank 0 has left it; None where it has left nothing."""
    try:
        return _read(staging, 0).trackers
    except (_NoPartError, OSError):
        return None


def inherit(staging: Path) -> bool:
    """Make a sealed staging directory of one that the trainers of all ranks have left to their writers.

    Writers that are still at it are waited for, as long as they show that they live.

    Returns:
        Whether it is sealed now. If not, too few ranks have left something, or it does not fit together; why is logged.

    Raises:
        OSError: it is complete, and storage does not let it be read, or what is missing be written.
    """
    if not _await_writers(staging):
        return False
    try:
        manifest = _complete(staging)
        seal(staging, manifest)
    except OSError as error:
        if error.errno not in _OF_THE_DIRECTORY:
            raise
        logger.warning("%s cannot be completed: %s", staging, error)
        return False
    except (_NoPartError, CheckpointError, ValueError, OverflowError, MemoryError) as error:
        logger.warning("%s cannot be completed: %s", staging, error or type(error).__name__)
        return False
    logger.warning("completed the save of iteration %d: its writers have outlived a run that died", manifest.iteration)
    return True


def _await_writers(staging: Path) -> bool:
    """Wait while writers are at it; whether all of them came to their end."""
    heard, before = _Heard(staging), ({-1}, {-1: 0})
    begun = since = told = time.monotonic()
    while True:
        heard.listen()
        now = time.monotonic()
        if heard.is_complete:
            return True
        if not heard.done and not heard.writing:
            if now - begun > _FIRST_SIGN_SECONDS:
                return False
        elif (found := (set(heard.done), dict(heard.writing))) != before:
            before, since = found, now
        silent = now - since
        if silent > (_PATIENCE_SECONDS if heard.writing else _NOTICE_SECONDS) or now - begun > _LONGEST_SECONDS:
            logger.warning("%s: nothing was heard of the other ranks' writers for %.0f s", staging, silent)
            return False
        if now - told > _TELL_SECONDS:
            told = now
            logger.warning(
                "%s: waiting for writers that have outlived their run; %d are done", staging, len(heard.done)
            )
        time.sleep(_LOOK_SECONDS)


def _read(staging: Path, rank: int) -> _Part:
    """What a rank has left.

    Raises:
        _NoPartError: there is nothing, or it is something else.
        OSError: it cannot be read.
    """
    path = staging / bequest_name(rank)
    try:
        found = path.lstat()
        if not stat.S_ISREG(found.st_mode) or found.st_size > _LARGEST:
            raise _NoPartError(f"{path.name} is no file of a size that makes sense")
        return _parsed(path.read_bytes(), rank)
    except FileNotFoundError as error:
        raise _NoPartError(f"rank {rank} has left nothing") from error
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError) as error:
        raise _NoPartError(f"what rank {rank} has left cannot be read: {type(error).__name__}: {error}") from error


def _parsed(data: bytes, rank: int) -> _Part:
    head, body = data.split(b"\n", 1)
    if json.loads(head) != {"crc32": crc32(body)}:
        raise ValueError("it is damaged")
    written, given, payload = body.split(b"\n", 2)
    files: dict[str, Any] = json.loads(written)
    content: dict[str, Any] = json.loads(given)
    if content["version"] != VERSION or content["rank"] != rank:
        raise ValueError(f"it is of rank {content['rank']!r} and of version {content['version']!r}")
    kind = files["checksum"]
    records = tuple(FileRecord(name, size, checksum, kind, sample) for name, size, checksum, sample in files["files"])
    # Parsed once more with these files: that checks their names, sizes and checksums.
    manifest = Manifest.from_json(replace(Manifest.from_json(content["manifest"]), files=records).to_json())
    return _Part(manifest, str(kind), str(content["trackers"]), payload)


def _complete(staging: Path) -> Manifest:
    """Write the files that need what all ranks know; return the manifest.

    Raises:
        _NoPartError, ValueError: the parts do not make up a whole.
        OSError: a file cannot be written.
    """
    # Imported where it is needed: it brings megatron-core, which most starts find nothing to do for.
    from bridge.training.checkpointing.formats.registry import format_of_this_version

    first = _read(staging, 0).manifest
    parts = [_read(staging, rank) for rank in range(first.world_size)]
    checksum = parts[0].checksum
    if iteration_name(first.iteration) != staged_name(staging.name):
        raise _NoPartError(f"rank 0 has left iteration {first.iteration}")
    for rank, part in enumerate(parts):
        if _save_of(part.manifest) != _save_of(first) or part.checksum != checksum:
            raise _NoPartError(f"rank {rank} has left another save than rank 0")
    form = format_of_this_version(first.checkpoint_format)
    if form is None or form.inherit is None:
        raise _NoPartError(f"the format {first.checkpoint_format!r} cannot be completed")
    names = form.inherit(staging, [part.payload for part in parts])
    for name in names:
        sync_file(staging / name)
    records = [record for part in parts for record in part.manifest.files]
    records += describe_files(staging, names, checksum)
    if len({record.name for record in records}) != len(records):
        raise _NoPartError("two ranks have written one file")
    metrics = merged_metrics([part.manifest.metrics for part in parts])
    ordered = tuple(sorted(records, key=lambda record: record.name))
    return replace(first, files=ordered, created=time.time(), metrics=metrics)


def _save_of(manifest: Manifest) -> tuple[object, ...]:
    return manifest.iteration, manifest.checkpoint_format, manifest.world_size, manifest.start
