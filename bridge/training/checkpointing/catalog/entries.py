"""The checkpoints in a directory and in the tiers beside it: what each of them says about itself."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from bridge.training.callbacks import CheckpointKind
from bridge.training.checkpointing.catalog.manifests import ManifestHead, read_head
from bridge.training.checkpointing.catalog.origins import origin_of, require_foreign
from bridge.training.checkpointing.detection import get_checkpoint_format
from bridge.training.checkpointing.errors import CheckpointError, NotACheckpointError
from bridge.training.checkpointing.layout import (
    LEGACY_TRACKER,
    RELEASE,
    TRACKER,
    Listing,
    is_iteration_directory,
    iteration_name,
    list_checkpoints,
    parse_iteration_name,
)
from bridge.training.checkpointing.marks import problem_of
from bridge.training.checkpointing.parallel import Layout
from bridge.training.checkpointing.resolve import Tracked
from bridge.training.checkpointing.trackers import read_tracker

State = Literal["committed", "foreign", "marked", "damaged"]
"""`committed`: it has a manifest, so its save came to its end. `foreign`: of another program. `marked`: a run found it
to be damaged. `damaged`: what a checkpoint must have is missing or unreadable. What is committed need not be sound:
that is found out by reading it."""


@dataclass(frozen=True)
class CatalogEntry:
    """One checkpoint."""

    path: Path
    iteration: int | None
    """None for a release checkpoint, or one whose name does not tell."""
    kind: CheckpointKind
    """The tier that it is in."""
    state: State
    origin: str
    """The program that wrote it: `bridge`, `Megatron Bridge`, `Megatron-LM`, `torch DCP`; empty if unknown."""
    format: str | None = None
    total_bytes: int | None = None
    files: int | None = None
    created: float | None = None
    """Unix time in seconds: of the commit, or of the last change where there is no manifest."""
    layout: Layout | None = None
    world_size: int | None = None
    versions: dict[str, str] | None = None
    metrics: dict[str, float] | None = None
    problem: str = ""
    """What is wrong, in words."""
    tracked: bool = False
    """Whether the tracker of its directory names it."""
    start: int = 0
    """Number of the run's start that saved it; 0 where nobody counts."""
    left_behind: bool = False
    """Whether the run has gone back to before it since, and gone on from there."""
    averaged: tuple[int, ...] = ()
    """The iterations whose mean it is; none for what a run has saved."""
    url: str = ""
    """Where it is in object storage; `path` then leads nowhere."""

    @property
    def place(self) -> str:
        """Where it is, for people."""
        return self.url or str(self.path)


@dataclass(frozen=True)
class Catalog:
    """A directory of checkpoints."""

    directory: Path
    exists: bool
    entries: tuple[CatalogEntry, ...]
    """By iteration; a release checkpoint comes first."""
    tracked: Tracked | None
    """What the tracker says."""
    tracker_problem: str
    """Why it cannot be read."""
    leftovers: tuple[str, ...]
    """Remains of unfinished saves and deletions."""
    foreign: tuple[str, ...]
    """Names of what is no checkpoint."""


def read_catalog(directory: Path, kind: CheckpointKind = "persistent") -> Catalog:
    """Look at a directory of checkpoints, or at one checkpoint. No payload is read, and nothing is verified.

    Args:
        directory: it need not exist.
        kind: the tier that it is of.

    Raises:
        NotACheckpointError: it is a file.
        OSError: it cannot be read.
    """
    if directory.exists() and not directory.is_dir():
        raise NotACheckpointError(f"{directory} is not a directory; name a directory of checkpoints")
    if directory.is_dir() and is_iteration_directory(directory):
        entry = read_entry(directory, kind, tracked=False)
        return Catalog(directory, True, (entry,), None, "", (), ())
    listing = list_checkpoints(directory)
    tracked, problem = _tracker(listing)
    return Catalog(
        directory,
        listing.exists,
        tuple(_entries(listing, kind, tracked)),
        tracked,
        problem,
        listing.leftovers,
        listing.foreign,
    )


def _tracker(listing: Listing) -> tuple[Tracked | None, str]:
    try:
        return read_tracker(listing), ""
    except CheckpointError as error:
        return None, str(error)


def _entries(listing: Listing, kind: CheckpointKind, tracked: Tracked | None) -> Iterable[CatalogEntry]:
    if listing.has_release:
        yield read_entry(listing.path / RELEASE, kind, tracked=tracked is not None and tracked.release)
    for iteration in listing.iterations:
        is_tracked = tracked is not None and not tracked.release and tracked.iteration == iteration
        yield read_entry(listing.path / iteration_name(iteration), kind, tracked=is_tracked)


def read_entry(path: Path, kind: CheckpointKind = "persistent", *, tracked: bool = False) -> CatalogEntry:
    """Look at one checkpoint."""
    iteration = parse_iteration_name(path.name)
    try:
        head = read_head(path)
        mark = problem_of(path)
        if head is not None:
            return _committed(path, head, kind, mark, tracked)
        return _without_manifest(path, iteration, kind, mark, tracked)
    except (CheckpointError, OSError) as error:
        return CatalogEntry(path, iteration, kind, "damaged", "", problem=str(error), tracked=tracked)


def _committed(path: Path, head: ManifestHead, kind: CheckpointKind, mark: str | None, tracked: bool) -> CatalogEntry:
    named = parse_iteration_name(path.name)
    problem = "" if named in (None, head.iteration) else f"its manifest is of iteration {head.iteration}"
    state: State = "damaged" if problem else "committed" if mark is None else "marked"
    return CatalogEntry(
        path,
        None if path.name == RELEASE else head.iteration if named is None else named,
        kind,
        state,
        "bridge",
        head.checkpoint_format,
        head.total_bytes,
        head.files,
        head.created,
        head.layout,
        head.world_size,
        head.versions,
        head.metrics,
        problem or mark or "",
        tracked,
        head.start,
        averaged=head.averaged,
    )


def _without_manifest(
    path: Path, iteration: int | None, kind: CheckpointKind, mark: str | None, tracked: bool
) -> CatalogEntry:
    size, files, changed = _measured(path)
    name: str | None = None
    problem = mark or ""
    state: State = "foreign" if mark is None else "marked"
    try:
        name = get_checkpoint_format(path)
        require_foreign(path)
    except CheckpointError as error:
        state, problem = "damaged", str(error)
    return CatalogEntry(
        path, iteration, kind, state, origin_of(path), name, size, files, changed, problem=problem, tracked=tracked
    )


def _measured(path: Path) -> tuple[int, int, float | None]:
    """Bytes and number of all files, and when the last of them was changed."""
    size = count = 0
    changed: float | None = None
    for directory, _, names in os.walk(path):
        for name in names:
            found = os.lstat(os.path.join(directory, name))  # noqa: PTH118 (as os.walk gives it)
            size, count = size + found.st_size, count + 1
            changed = found.st_mtime if changed is None else max(changed, found.st_mtime)
    return size, count, changed


def trackers_of(listing: Listing) -> tuple[str, ...]:
    """The tracker files that a directory has."""
    found = ((listing.has_tracker, TRACKER), (listing.has_legacy_tracker, LEGACY_TRACKER))
    return tuple(name for is_there, name in found if is_there)
