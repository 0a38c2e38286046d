"""Whether checkpoints are sound: every file against its manifest, and the trackers against the checkpoints."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

from bridge.training.checkpointing.catalog.entries import trackers_of
from bridge.training.checkpointing.catalog.origins import require_foreign
from bridge.training.checkpointing.catalog.payload import payload_problems
from bridge.training.checkpointing.catalog.reading import BLOCK, Reading, Report
from bridge.training.checkpointing.catalog.warnings import collected
from bridge.training.checkpointing.errors import (
    CheckpointDamagedError,
    CheckpointError,
    CheckpointMismatchError,
    CheckpointNotFoundError,
    NotACheckpointError,
    tells_of_damage,
)
from bridge.training.checkpointing.integrity import FileRecord, Manifest, find_damage, read_manifest
from bridge.training.checkpointing.layout import (
    LEGACY_TRACKER,
    NON_PERSISTENT_DIRECTORY,
    RELEASE,
    TRACKER,
    is_iteration_directory,
    iteration_name,
    list_checkpoints,
)
from bridge.training.checkpointing.marks import is_marked
from bridge.training.checkpointing.resolve import Source
from bridge.training.checkpointing.source import describe, require_whole
from bridge.training.checkpointing.trackers import read_tracker, sound_tracker

Level = Literal["sizes", "full"]
_MOST_THREADS = 8


@dataclass(frozen=True)
class Verified:
    """What was found of one checkpoint."""

    path: Path
    is_sound: bool
    problems: tuple[str, ...]
    """One sentence for each file that is not what it should be."""
    notes: tuple[str, ...]
    files: int
    """That were checked."""
    total_bytes: int
    """Of these files."""
    has_checksums: bool
    """False for a checkpoint of another program: its files are there in full, and that is all that can be said."""
    url: str = ""
    """Where it is in object storage; `path` then leads nowhere."""

    @property
    def place(self) -> str:
        """Where it is, for people."""
        return self.url or str(self.path)


@dataclass(frozen=True)
class Verification:
    """What was found of a directory of checkpoints."""

    directory: Path
    level: Level
    checkpoints: tuple[Verified, ...]
    problems: tuple[str, ...]
    """Of the directory itself: of its trackers."""
    to_repair: tuple[Path, ...] = ()
    """The directories whose trackers these are."""
    url: str = ""
    """Where this is in object storage; `directory` then leads nowhere."""

    @property
    def place(self) -> str:
        """Where this is, for people."""
        return self.url or str(self.directory)

    @property
    def is_sound(self) -> bool:
        """Whether there are checkpoints, and all of them are sound, and the trackers too."""
        return bool(self.checkpoints) and not self.problems and all(found.is_sound for found in self.checkpoints)


def verify_directory(
    directory: Path,
    *,
    step: int | None = None,
    level: Level = "full",
    threads: int | None = None,
    report: Report | None = None,
    done: Callable[[Verified], None] | None = None,
) -> Verification:
    """Check every published checkpoint of a directory, or one. Nothing is changed, and files are read in small pieces.

    Args:
        directory: of checkpoints, or one checkpoint. What is in `non_persistent` below it is checked too.
        step: only the checkpoint of this iteration.
        level: `full` reads every byte; `sizes` compares the sizes of all files, and the contents of those that are not
            payload.
        threads: that read at the same time; None is one a core, at most 8.
        report: told of the progress.
        done: told of each checkpoint when it is checked.

    Raises:
        CheckpointNotFoundError: there is no checkpoint, or none of this iteration.
        NotACheckpointError: it is a file, or holds something else.
    """
    paths, problems, to_repair = _to_check(directory, step)
    found = []
    with Reading.begun(threads or min(_MOST_THREADS, os.cpu_count() or 1), report) as reading:
        for path in paths:
            verified = _verify(path, level, reading)
            if verified is not None:
                found.append(verified)
                if done is not None:
                    done(verified)
    if not found and not problems:
        raise CheckpointNotFoundError(f"what there was to check in {directory} has been deleted meanwhile")
    return Verification(directory, level, tuple(found), tuple(problems), tuple(to_repair))


def _to_check(directory: Path, step: int | None) -> tuple[list[Path], list[str], list[Path]]:
    if not directory.exists():
        raise CheckpointNotFoundError(f"{directory} does not exist; name a directory of checkpoints, or a checkpoint")
    if not directory.is_dir():
        raise NotACheckpointError(f"{directory} is not a directory; name a directory of checkpoints, or a checkpoint")
    if is_iteration_directory(directory):
        if step is not None:
            raise CheckpointMismatchError(
                f"--step: {step} cannot be looked up in {directory}, which is itself one checkpoint; leave it out"
            )
        return [directory], [], []
    if step is not None:
        return [_of_step(directory, step)], [], []
    paths: list[Path] = []
    problems: list[str] = []
    to_repair: list[Path] = []
    for each in (directory, directory / NON_PERSISTENT_DIRECTORY):
        paths += _published(each)
        found = _tracker_problems(each)
        problems += found
        to_repair += [each] if found else []
    if not paths and not problems:
        raise CheckpointNotFoundError(f"there is no checkpoint in {directory}; name a directory of checkpoints")
    return paths, problems, to_repair


def _of_step(directory: Path, step: int) -> Path:
    iterations = list_checkpoints(directory).iterations
    if step not in iterations:
        there = ", ".join(map(str, iterations[-8:])) or "none"
        raise CheckpointNotFoundError(f"--step: {step} is not in {directory} (there: {there})")
    return directory / iteration_name(step)


def _published(directory: Path) -> Iterator[Path]:
    listing = list_checkpoints(directory)
    if listing.has_release:
        yield directory / RELEASE
    yield from (directory / iteration_name(iteration) for iteration in listing.iterations)


def _tracker_problems(directory: Path) -> list[str]:
    """What is wrong with the trackers: unreadable, of another checkpoint, or naming what is not there."""
    listing = list_checkpoints(directory)
    problems: list[str] = []
    for name in trackers_of(listing):
        only = replace(listing, has_tracker=name == TRACKER, has_legacy_tracker=name == LEGACY_TRACKER)
        try:
            tracked = read_tracker(only)
        except (CheckpointError, OSError) as error:
            problems.append(str(error))
            continue
        if tracked is None:
            continue
        target = RELEASE if tracked.release else iteration_name(tracked.iteration)
        if not (directory / target).is_dir():
            problems.append(f"{directory / name} names {target}, which does not exist")
    try:
        with collected():
            sound_tracker(listing, fallback=False)
    except CheckpointError as error:
        problems.append(str(error))
    except OSError:
        pass  # what it names cannot be read: that is a problem of the checkpoint
    return list(dict.fromkeys(problems))


def _verify(path: Path, level: Level, reading: Reading) -> Verified | None:
    """None where it has been deleted meanwhile, as by the retention of a run."""
    manifest: Manifest | None = None
    problems: list[str] = []
    notes: list[str] = []
    checked, size = 0, 0
    try:
        manifest = read_manifest(path)
        require_whole(path, "sizes" if level == "sizes" or manifest is None else "off")
        if manifest is None:
            notes.append("it has no manifest.json, so its files have no checksums to be compared with")
            require_foreign(path)
            checked, size, problems = payload_problems(path)
        else:
            checked, size = len(manifest.files), manifest.total_bytes
            if level == "full":
                problems = reading.problems(path.name, manifest.files, partial(_damage, path, reading))
        if not problems:
            _describe(path, notes)
    except CheckpointError as error:
        problems.append(_without_path(str(error), path))
    except OSError as error:
        problems.append(f"it cannot be read: {error}")
    if not os.path.lexists(path):
        return None
    if not path.exists():
        problems = [f"it is a link to {path.readlink()}, which does not exist"]
    if is_marked(path) and not problems:
        notes.append("it is marked as damaged, and nothing is wrong with it; repair takes the mark off")
    return Verified(path, not problems, tuple(problems), tuple(notes), checked, size, manifest is not None)


def _damage(path: Path, reading: Reading, record: FileRecord) -> list[str]:
    """As `find_damage` with checksums, of one file."""
    problems = find_damage(path, [record])
    if problems:
        return problems
    try:
        return reading.compare(record, _blocks(path / record.name))
    except OSError as error:
        if not tells_of_damage(error):
            raise
        return [f"{record.name} cannot be read: {error.strerror or error}"]


def _blocks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as stream:
        while block := stream.read(BLOCK):
            yield block


def _describe(path: Path, notes: list[str]) -> None:
    """Read what a run reads first: files that contradict one another, or that cannot be read, are damage."""
    try:
        with collected():
            describe(Source(path, path.name == RELEASE, "it is verified"), "off")
    except (CheckpointDamagedError, NotACheckpointError):
        raise
    except CheckpointError as error:
        notes.append(f"a run needs more to load it: {error}")


def _without_path(message: str, path: Path) -> str:
    return message.removeprefix(f"{path} is damaged: ")
