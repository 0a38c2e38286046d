"""Which checkpoint to load. Decisions only: what is on disk comes in as plain values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bridge.training.checkpointing.errors import (
    CheckpointDamagedError,
    CheckpointMismatchError,
    CheckpointNotFoundError,
    NotACheckpointError,
)
from bridge.training.checkpointing.layout import LEGACY_TRACKER, RELEASE, TRACKER, Listing, iteration_name


@dataclass(frozen=True)
class Tracked:
    """What a tracker file says."""

    iteration: int
    """The iteration; 0 with `release`."""
    release: bool
    file: str
    """The tracker's name."""


@dataclass(frozen=True)
class Source:
    """The checkpoint to load."""

    path: Path
    release: bool
    reason: str
    """Why this one, for the log."""


def resolve(
    listing: Listing,
    tracked: Tracked | None,
    ckpt_step: int | None,
    is_whole: Callable[[int], bool],
    setting: str = "checkpoint.load",
) -> Source | None:
    """Choose a checkpoint from a directory of checkpoints.

    An explicit step beats the tracker, the tracker beats a scan, and a scan only takes whole checkpoints.

    Args:
        listing: what the directory holds.
        tracked: what its tracker says; None if it has none.
        ckpt_step: `checkpoint.ckpt_step`.
        is_whole: whether a listed iteration was published by us and has all its files; asked only where
            there is no tracker.
        setting: the setting that names the directory, for messages.

    Returns:
        The checkpoint, or None if none was ever published in this directory.

    Raises:
        CheckpointNotFoundError: `ckpt_step` is not there.
        CheckpointDamagedError: the tracker's target is gone, or no listed checkpoint is whole.
        NotACheckpointError: the directory holds something else.
    """
    if ckpt_step is not None:
        return _explicit(listing, ckpt_step)
    if tracked is not None:
        return _tracked(listing, tracked)
    if listing.iterations:
        return _scanned(listing, is_whole)
    if listing.has_release:
        return Source(listing.path / RELEASE, True, "there is a release checkpoint and no tracker")
    if listing.foreign:
        raise NotACheckpointError(
            f"{setting}: {listing.path} holds no checkpoint but something else ({_some(listing.foreign)}); "
            "name a directory of checkpoints, or an empty or new one to start afresh"
        )
    return None


def reject_step_of_iteration_directory(path: Path, ckpt_step: int | None) -> None:
    """Refuse `ckpt_step` together with a `load` that already is one checkpoint.

    Raises:
        CheckpointMismatchError: both are set.
    """
    if ckpt_step is not None:
        raise CheckpointMismatchError(
            f"checkpoint.ckpt_step: {ckpt_step} cannot be looked up in {path}, which is itself one checkpoint; "
            f"set checkpoint.load to {path.parent}, or leave checkpoint.ckpt_step unset"
        )


def _explicit(listing: Listing, ckpt_step: int) -> Source:
    if ckpt_step in listing.iterations:
        return Source(listing.path / iteration_name(ckpt_step), False, f"checkpoint.ckpt_step is {ckpt_step}")
    raise CheckpointNotFoundError(
        f"checkpoint.ckpt_step: {ckpt_step} is not in {listing.path} "
        f"({iteration_name(ckpt_step)} does not exist; {_available(listing)})"
    )


def _tracked(listing: Listing, tracked: Tracked) -> Source:
    reason = f"{tracked.file} names it"
    if tracked.release:
        if listing.has_release:
            return Source(listing.path / RELEASE, True, reason)
    elif tracked.iteration in listing.iterations:
        return Source(listing.path / iteration_name(tracked.iteration), False, reason)
    name = RELEASE if tracked.release else iteration_name(tracked.iteration)
    raise CheckpointDamagedError(
        f"{listing.path / tracked.file} names {name}, which does not exist ({_available(listing)}); "
        "set checkpoint.ckpt_step to one that does"
    )


def _scanned(listing: Listing, is_whole: Callable[[int], bool]) -> Source:
    for iteration in reversed(listing.iterations):
        if is_whole(iteration):
            reason = f"it is the newest whole checkpoint, and there is no {TRACKER} or {LEGACY_TRACKER}"
            return Source(listing.path / iteration_name(iteration), False, reason)
    raise CheckpointDamagedError(
        f"{listing.path} has no tracker, and none of its checkpoints is whole ({_available(listing)}); "
        "set checkpoint.ckpt_step to load one all the same"
    )


def _available(listing: Listing) -> str:
    if not listing.exists:
        return "the directory does not exist"
    if not listing.iterations:
        return "there is no checkpoint in it"
    return f"there {'are' if len(listing.iterations) > 1 else 'is'} {_some(listing.iterations)}"


def _some(values: tuple[object, ...]) -> str:
    names = [str(value) for value in values]
    return ", ".join(names) if len(names) <= 8 else f"{', '.join(names[:3])} … {', '.join(names[-3:])}"
