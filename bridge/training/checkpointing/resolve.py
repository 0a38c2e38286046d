"""Which checkpoint to load. Decisions only: what is on disk comes in as plain values."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from bridge.training.callbacks import CheckpointKind
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
    kind: CheckpointKind = "persistent"
    origin: str = ""
    """Its URL, where it is in object storage; `path` then leads nowhere."""
    iteration: int | None = field(default=None, compare=False)
    """Its iteration, where the path does not tell it."""

    @property
    def place(self) -> str:
        """Where it is, for people."""
        return self.origin or str(self.path)


@dataclass(frozen=True)
class Offer:
    """A complete non-persistent checkpoint that a tier has."""

    kind: CheckpointKind
    iteration: int
    path: Path
    """Where it is; for messages where that is no directory."""


@dataclass(frozen=True)
class Persistent:
    """What a look for a persistent checkpoint found."""

    source: Source | None
    iteration: int
    """The source's; 0 for a release checkpoint."""
    problem: str = ""
    """With an explicit step: what to tell if no other tier has it either."""


def preference(persistent: Persistent, offers: Iterable[Offer], ckpt_step: int | None) -> list[Source]:
    """The checkpoints that a run may start from, the best first, over all tiers.

    An explicit step admits no other iteration. Otherwise the newest complete checkpoint is the best. Among equal
    iterations the persistent one is preferred, then that in memory, the local one, and the global non-persistent
    one. The persistent checkpoint is the last resort: what is older than it is no candidate.

    Args:
        persistent: what the directory of persistent checkpoints gives.
        offers: the complete checkpoints of the other tiers.
        ckpt_step: `checkpoint.ckpt_step`.

    Raises:
        CheckpointNotFoundError: no tier has the explicit step.
    """
    offers = sorted(offers, key=lambda offer: (-offer.iteration, _SPEED.index(offer.kind)))
    own = [] if persistent.source is None else [persistent.source]
    if ckpt_step is not None:
        reason = f"checkpoint.ckpt_step is {ckpt_step}"
        named = own + [_offered(o, reason) for o in offers if o.iteration == ckpt_step]
        if not named:
            others = ", ".join(f"{o.iteration} ({NAMES[o.kind]})" for o in offers)
            raise CheckpointNotFoundError(
                persistent.problem + (f"; non-persistent checkpoints: {others}" if others else "")
            )
        return named[:1]
    newer = [offer for offer in offers if persistent.source is None or offer.iteration > persistent.iteration]
    return [_offered(o, f"it is the newest complete {NAMES[o.kind]}") for o in newer] + own


def _offered(offer: Offer, reason: str) -> Source:
    return Source(offer.path, False, reason, offer.kind, iteration=offer.iteration)


@dataclass(frozen=True)
class Older:
    """A persistent checkpoint that may stand in for a newer one."""

    iteration: int
    path: Path
    created: float | None = None
    """When it was committed, Unix time in seconds; None if it does not say."""
    left_behind: bool | None = None
    """Whether the run has gone back since, as its starts tell; None where they do not."""


def present_history(found: Iterable[Older]) -> tuple[list[Older], list[Older]]:
    """Divide checkpoints into those that the run went on from, and those that a rollback has left behind.

    The starts decide where they can, and no clock has a say in that. Among the others an iteration was left behind
    if an older one was saved after it.

    Returns:
        Both in ascending order of iterations.
    """
    line: list[Older] = []
    left_behind: list[Older] = []
    latest = -math.inf
    for entry in sorted(found, key=lambda entry: entry.iteration):
        is_left_behind = entry.left_behind
        if is_left_behind is None:
            saved = latest if entry.created is None else entry.created
            is_left_behind = saved < latest
            latest = max(saved, latest)
        (left_behind if is_left_behind else line).append(entry)
    return line, left_behind


def stand_ins(older: Iterable[Older], offers: Iterable[Offer], below: int) -> list[Source]:
    """The checkpoints that may stand in for a persistent one that is damaged or gone, the best first.

    That is the newest of all tiers, and among equal iterations the order of `preference`. Persistent ones that a
    rollback has left behind come last: the run did not go on from there.

    Args:
        older: the persistent ones of lower iterations.
        offers: the complete checkpoints of the other tiers, up to that iteration.
        below: the iteration that they stand in for.
    """
    line, left_behind = present_history(older)
    ranked = [(-e.iteration, 0, Source(e.path, False, _stands_in(below))) for e in line]
    ranked += [(-o.iteration, _SPEED.index(o.kind), _offered(o, _stands_in(below))) for o in offers]
    reason = f"no other before iteration {below} is good; a rollback had left it behind"
    last = [Source(entry.path, False, reason) for entry in reversed(left_behind)]
    return [source for _, _, source in sorted(ranked, key=lambda each: each[:2])] + last


def _stands_in(below: int) -> str:
    return f"it is the newest that can stand in for iteration {below}"


_SPEED: tuple[CheckpointKind, ...] = ("persistent", "in_memory", "local", "non_persistent_global")
"""Equal iterations in the order in which they are preferred."""

NAMES: dict[CheckpointKind, str] = {
    "persistent": "persistent checkpoint",
    "in_memory": "checkpoint in memory",
    "local": "local checkpoint",
    "non_persistent_global": "global non-persistent checkpoint",
}
"""What messages call the kinds."""


def resolve(
    listing: Listing,
    tracked: Tracked | None,
    ckpt_step: int | None,
    is_whole: Callable[[int], bool],
    setting: str = "checkpoint.load",
    left_behind: Callable[[], Collection[int]] = frozenset,
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
        left_behind: the iterations that a rollback has left behind: the last resort of a scan, and asked only for one.

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
        return _scanned(listing, is_whole, left_behind())
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


def _scanned(listing: Listing, is_whole: Callable[[int], bool], left_behind: Collection[int]) -> Source:
    newest_first = listing.iterations[::-1]
    ordered = [i for i in newest_first if i not in left_behind] + [i for i in newest_first if i in left_behind]
    for iteration in ordered:
        if is_whole(iteration):
            reason = f"it is the newest whole checkpoint, and there is no {TRACKER} or {LEGACY_TRACKER}"
            if iteration in left_behind:
                reason += "; a rollback had left it behind"
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
