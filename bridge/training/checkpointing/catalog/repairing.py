"""Setting a directory of checkpoints right: trackers, remains of crashes, marks. What is planned can be shown first."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from bridge.training.checkpointing import commit, inheritance, ownership, recovery
from bridge.training.checkpointing.catalog.choosing import choose
from bridge.training.checkpointing.catalog.foreseen import foreseen
from bridge.training.checkpointing.catalog.owners import find_owner
from bridge.training.checkpointing.catalog.reading import Report
from bridge.training.checkpointing.catalog.verifying import verify_directory
from bridge.training.checkpointing.catalog.warnings import collected
from bridge.training.checkpointing.detection import read_metadata
from bridge.training.checkpointing.errors import (
    CheckpointError,
    CheckpointMismatchError,
    CheckpointNotFoundError,
    DirectoryInUseError,
)
from bridge.training.checkpointing.files import replace_file
from bridge.training.checkpointing.layout import (
    LEGACY_TRACKER,
    RELEASE,
    TRACKER,
    TRAIN_STATE,
    TRASH_PREFIX,
    WRITER,
    is_iteration_directory,
    iteration_name,
    list_checkpoints,
    staged_name,
)
from bridge.training.checkpointing.marks import is_marked, unmark
from bridge.training.checkpointing.trackers import sound_tracker
from bridge.training.config import CheckpointConfig


@dataclass(frozen=True)
class Repair:
    """One thing to do."""

    kind: Literal["publish", "remove", "unmark", "track"]
    path: Path
    """What it is done to."""
    text: str
    """What is done and why, in words."""
    iteration: int | None = None
    """For `track`: what the trackers are to name."""


@dataclass(frozen=True)
class Repairs:
    """What there is to set right, or what was."""

    repairs: tuple[Repair, ...]
    problems: tuple[str, ...] = ()
    """What cannot be set right, or could not."""


def require_unowned(directory: Path, setting: str = "DIR", *, is_sure: bool = False) -> None:
    """Refuse to go on where a run saves.

    Args:
        directory: of checkpoints.
        setting: what names it, for messages.
        is_sure: the caller knows that no run saves there, so that it does not matter if nobody else can say.

    Raises:
        DirectoryInUseError: one does, or nobody can say.
    """
    owner = find_owner(directory)
    if owner.is_alive:
        raise DirectoryInUseError(
            f"{setting}: a run saves in {directory} ({owner.description}), and what it does there must not be "
            "disturbed; end that run first"
        )
    if owner.may_be_alive and not is_sure:
        raise DirectoryInUseError(
            f"{setting}: nobody can say whether the run that has saved in {directory} is alive ({owner.description}): "
            f"the lock in {WRITER} cannot be asked for; if you know that it has ended, on every host, give "
            "--no-run-saves-here"
        )


def plan_repairs(directory: Path, *, report: Report | None = None, is_sure: bool = False) -> Repairs:
    """What there is to set right. Nothing is changed; marked checkpoints are read in full.

    Args:
        directory: of checkpoints.
        report: told of the progress.
        is_sure: as for `require_unowned`.

    Raises:
        CheckpointNotFoundError: the directory does not exist.
        CheckpointMismatchError: it is one checkpoint.
        DirectoryInUseError: a run saves there, or nobody can say.
    """
    _require_directory(directory)
    require_unowned(directory, is_sure=is_sure)
    with collected(), foreseen(directory) as seen:
        marks = list(_marks(directory, report))
        unmarked = [each.path.name for each in marks]
        trackers, problems = _trackers(seen.view, unmarked)
        at = str(seen.view), str(directory)
        trackers = [replace(each, path=directory / each.path.name, text=each.text.replace(*at)) for each in trackers]
        repairs = (*_leftovers(directory), *marks, *trackers)
        return Repairs(repairs, tuple(problem.replace(*at) for problem in problems))


def repair(directory: Path, *, report: Report | None = None, is_sure: bool = False) -> Repairs:
    """Set a directory right. It is claimed meanwhile, so that no run saves there.

    The arguments are those of `plan_repairs`.

    Returns:
        What was done, and what could not be done.

    Raises:
        DirectoryInUseError: a run saves there, or nobody can say.
        CheckpointError: as `plan_repairs`.
    """
    _require_directory(directory)
    require_unowned(directory, is_sure=is_sure)
    new = ownership.claim(directory, "DIR", wait_seconds=0.0, passing=True)
    try:
        with collected() as messages:
            done, problems = _recovered(directory, messages)
            for each in list(_marks(directory, report)):
                unmark(each.path)
                if is_marked(each.path):
                    problems.append(f"the mark of damage cannot be taken off {each.path.name}")
                else:
                    done.append(each)
            # Only now: what was published and what was marked decide what the trackers are to name.
            trackers, more = _trackers(directory)
            problems += more
            for each in trackers:
                try:
                    _track(directory, each)
                    done.append(each)
                except OSError as error:
                    problems.append(f"the trackers cannot be written: {error}")
        return Repairs(tuple(done), tuple(problems))
    finally:
        if new:
            ownership.give_up(directory)


def _recovered(directory: Path, messages: list[str]) -> tuple[list[Repair], list[str]]:
    """Publish and remove what crashes have left; what was done, and what was not."""
    planned, problems = list(_leftovers(directory)), []
    try:
        recovery.recover(directory)
    except OSError as error:
        problems.append(f"the remains cannot be cleaned up: {error}")
    left = list_checkpoints(directory).leftovers
    problems += [message for message in messages if message.startswith("could not ")]
    if left and not problems:
        problems.append(f"still there: {', '.join(left)}")
    # What cannot be deleted has got another name that ends in a new number, so that only a few can be told apart.
    stems = tuple(f"{name.lstrip('.')}-" for name in (each.path.name for each in planned))
    done = [
        each
        for each, stem in zip(planned, stems, strict=True)
        if each.path.name not in left and not any(name.startswith(f"{TRASH_PREFIX}{stem}") for name in left)
    ]
    return done, problems


def _require_directory(directory: Path) -> None:
    if not directory.is_dir():
        raise CheckpointNotFoundError(f"DIR: {directory} is not a directory; name a directory of checkpoints")
    if is_iteration_directory(directory):
        raise CheckpointMismatchError(f"DIR: {directory} is one checkpoint; name the directory that it is in")


def _leftovers(directory: Path) -> Iterator[Repair]:
    sealed, staged = recovery.unpublished(directory), recovery.staged(directory)
    for name in list_checkpoints(directory).leftovers:
        path, target = directory / name, staged_name(name)
        if name in sealed:
            yield Repair("publish", path, f"publish {target}, which a crash has left complete as {name}")
        elif name in staged and inheritance.is_complete(path):
            reason = f"publish {target}, which writers have completed as {name} after their run had died"
            yield Repair("publish", path, reason)
        elif name in staged and inheritance.shows_life(path):
            reason = f"publish {target}, or remove {name} if the writers that have outlived its run do not complete it"
            yield Repair("publish", path, reason)
        elif target is not None:
            yield Repair("remove", path, f"remove {name}: a save that did not finish")
        else:
            yield Repair("remove", path, f"remove {name}: a deletion that did not finish")


def _marks(directory: Path, report: Report | None) -> Iterator[Repair]:
    for iteration in list_checkpoints(directory).iterations:
        path = directory / iteration_name(iteration)
        if is_marked(path) and _is_right_in_every_byte(path, report):
            yield Repair("unmark", path, f"take the mark of damage off {path.name}: every byte of it is right")


def _is_right_in_every_byte(path: Path, report: Report | None) -> bool:
    """Without checksums nobody knows, and what is no checkpoint any more is not."""
    try:
        found = verify_directory(path, report=report)
    except (CheckpointError, OSError):
        return False
    return found.is_sound and all(each.has_checksums for each in found.checkpoints)


def _trackers(directory: Path, unmarked: Collection[str] = ()) -> tuple[list[Repair], list[str]]:
    """What the trackers are to name, if that is to be changed, and why that cannot be said."""
    reason = _what_is_wrong(directory)
    if not reason:
        return [], []
    choice = choose(CheckpointConfig(load=str(directory)), unmarked=unmarked)
    if choice.outcome == "error":
        return [], [f"the trackers can be made to name nothing: {choice.error}"]
    if choice.source is None or choice.iteration is None:
        return [], []
    text = f"make the trackers name {choice.source.path.name}: {reason}"
    return [Repair("track", choice.source.path, text, choice.iteration)], []


def _what_is_wrong(directory: Path) -> str:
    """With the trackers, in words; empty if nothing is."""
    listing = list_checkpoints(directory)
    try:
        tracked, _ = sound_tracker(listing, fallback=False)
    except CheckpointError as error:
        return str(error)
    except OSError:
        return ""  # the checkpoint that it names cannot be read now: that says nothing of the tracker
    if tracked is None:
        return "there is none" if listing.iterations else ""
    name = RELEASE if tracked.release else iteration_name(tracked.iteration)
    if not (directory / name).is_dir():
        return f"{tracked.file} names {name}, which does not exist"
    if tracked.file == LEGACY_TRACKER and (directory / name / TRAIN_STATE).is_file():
        return f"there is no {TRACKER}"
    if tracked.file != TRACKER:
        return ""
    try:
        legacy = read_metadata(directory / LEGACY_TRACKER)
    except CheckpointError as error:
        return str(error)
    return "" if legacy == (tracked.iteration, tracked.release) else f"{LEGACY_TRACKER} names another one"


def _track(directory: Path, each: Repair) -> None:
    if each.iteration is None:
        return
    train_state = each.path / TRAIN_STATE
    if train_state.is_file():
        commit.move_trackers(directory, each.iteration, train_state.read_bytes())
    else:
        (directory / TRACKER).unlink(missing_ok=True)
        replace_file(directory / LEGACY_TRACKER, str(each.iteration).encode())
