"""Retention on storage: what there is, what may go, and its way out of sight.

All of this runs on rank 0, after a commit and at no other time. A checkpoint goes by one rename to a `.trash-` name;
its files are deleted afterwards. So wherever a sweep is cut short, every checkpoint is whole or out of sight, and the
next sweep finds what this one did not come to.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from bridge.training.checkpointing.detection import read_metadata
from bridge.training.checkpointing.errors import CheckpointDamagedError, CheckpointNotFoundError
from bridge.training.checkpointing.files import delete_trash, move_to_trash, sync_directory
from bridge.training.checkpointing.integrity import read_manifest
from bridge.training.checkpointing.layout import (
    LEGACY_TRACKER,
    MANIFEST,
    Listing,
    deleted_iteration,
    iteration_name,
    list_checkpoints,
)
from bridge.training.checkpointing.marks import is_marked
from bridge.training.checkpointing.retention.policies import Best, Entry, MostRecent, Policy, removable
from bridge.training.checkpointing.retention.trash import Trash
from bridge.training.checkpointing.starts import Starts, lost_starts, read_starts
from bridge.training.checkpointing.trackers import read_tracker

if TYPE_CHECKING:
    from bridge.training.config import CheckpointConfig

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Swept:
    """What a sweep has done."""

    deleted: tuple[int, ...] = ()
    """Iterations of the checkpoints that are out of sight now."""
    kept: int = 0
    """Checkpoints that are still there."""


def sweep_after_save(
    save_dir: Path,
    iteration: int,
    policies: Sequence[Policy],
    trash: Trash,
    in_use: Iterable[Path] = (),
    starts_in: Path | None = None,
) -> Swept | None:
    """Let go what no policy keeps, now that `iteration` is published and tracked.

    The deletion itself goes on in the background. Nothing is raised, because the save has succeeded whatever happens
    here: a failure is logged, and the next sweep does what this one could not.

    Args:
        save_dir: the directory that the checkpoint was published in.
        iteration: of the checkpoint just saved, which is kept.
        policies: each keeps what it names, as `policies_of` gives them; without any, everything is kept.
        trash: deletes in the background.
        in_use: paths of checkpoints that must stay; see `needed_again`.
        starts_in: the directory that the run notes its starts in; None for `save_dir`.

    Returns:
        What was done; None if it failed, or there is no policy.
    """
    try:
        moved = sweep(save_dir, policies, saved=iteration, in_use=in_use, starts_in=starts_in) if policies else []
        trash.delete(moved)
        if not policies:
            return None
        deleted = (deleted_iteration(path.name) for path in moved)
        kept = len(list_checkpoints(save_dir).iterations)
        return Swept(tuple(number for number in deleted if number is not None), kept)
    except Exception:
        logger.exception("OLD CHECKPOINTS IN %s ARE NOT DELETED; the next save tries again", save_dir)
        return None


def sweep(
    save_dir: Path,
    policies: Sequence[Policy],
    *,
    saved: int | None = None,
    in_use: Iterable[Path] = (),
    starts_in: Path | None = None,
) -> list[Path]:
    """Move the checkpoints that no policy keeps out of sight.

    Only directories count that have an iteration's name and a manifest of that iteration. Everything else, links
    included, stays, and takes no place from a checkpoint. So does what a link in the directory leads to.

    Args:
        save_dir: a directory of checkpoints whose trackers exist.
        policies: each keeps what it names; without any, everything is kept.
        saved: a checkpoint to keep whatever its number.
        in_use: paths of checkpoints to keep; they may lead here through links.
        starts_in: the directory that the run notes its starts in; None for `save_dir`.

    Returns:
        What is now to be deleted, under `.trash-` names.

    Raises:
        CheckpointDamagedError: a tracker is unreadable, or names what is not there; nothing has been moved.
        CheckpointNotFoundError: there is no tracker that names an iteration; nothing has been moved.
        OSError: the directory cannot be read.
    """
    plan = plan_sweep(save_dir, policies, saved=saved, in_use=in_use, starts_in=starts_in)
    return _move_out(plan.listing, plan.removable)


@dataclass(frozen=True)
class SweepPlan:
    """What a sweep would do."""

    listing: Listing
    entries: tuple[Entry, ...]
    """The checkpoints that it judges, by iteration."""
    tracked: tuple[int, ...]
    """The iterations that the trackers name, that of ours first."""
    used: frozenset[int]
    """The iterations that a link or a setting leads to."""
    removable: tuple[int, ...]
    """The iterations that nothing keeps, by number."""


def plan_sweep(
    save_dir: Path,
    policies: Sequence[Policy],
    *,
    saved: int | None = None,
    in_use: Iterable[Path] = (),
    starts_in: Path | None = None,
) -> SweepPlan:
    """Find out what `sweep` would move out of sight, and move nothing. Arguments and errors are those of `sweep`."""
    listing = list_checkpoints(save_dir)
    tracked = _tracked(listing)
    entries = committed_entries(listing, starts_in)
    if not tracked:
        raise CheckpointNotFoundError(f"{save_dir} has no tracker that names an iteration")
    if tracked[0] not in {entry.iteration for entry in entries}:
        raise CheckpointDamagedError(f"{save_dir}: the tracker names iteration {tracked[0]}, which is not whole there")
    _warn_of_unmeasured(policies, entries, saved)
    links = [entry for entry in save_dir.iterdir() if entry.is_symlink()]  # somebody's name for what it leads to
    used = _used(listing, [*in_use, *links])
    protected = {*tracked, *used} | (set() if saved is None else {saved})
    goes = removable(entries, policies, tracked[0], protected)
    return SweepPlan(listing, tuple(entries), tuple(tracked), frozenset(used), tuple(goes))


def committed_entries(listing: Listing, starts_in: Path | None = None) -> list[Entry]:
    """The committed, unmarked checkpoints of a directory: by name, by being a directory, no link, and by manifest.

    Args:
        listing: of the directory.
        starts_in: the directory that the run notes its starts in; None for this one.

    Raises:
        CheckpointDamagedError: what the run has left behind is noted there, and what is noted is damaged: whoever does
            not know it would delete the wrong ones.
        OSError: it cannot be read now.
    """
    found = list(_committed(listing))
    noted_in = starts_in or listing.path
    starts = read_starts(noted_in) if any(start for _, start in found) else Starts()
    told = starts.judge_to_delete((entry.iteration, start) for entry, start in found)
    entries = [replace(entry, left_behind=left) for (entry, _), left in zip(found, told, strict=True)]
    if None in told and not starts.entries:
        logger.warning("%s", lost_starts(noted_in))
    return entries


def committed_iterations(listing: Listing) -> list[int]:
    """The iterations of `committed_entries`, whatever the run has left behind."""
    return [entry.iteration for entry, _ in _committed(listing)]


def _committed(listing: Listing) -> Iterator[tuple[Entry, int]]:
    """Each committed checkpoint, and the number of the start that saved it."""
    for iteration in listing.iterations:
        path = listing.path / iteration_name(iteration)
        if path.is_symlink() or is_marked(path):
            continue
        try:
            found = (path / MANIFEST).stat()
            entry, start = _entry(path, found.st_ino, found.st_mtime_ns, found.st_size)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except (CheckpointDamagedError, OSError) as error:
            logger.warning("retention neither counts nor deletes %s: %s", path, error)
            continue
        if entry is not None and entry.iteration == iteration:
            yield entry, start


@lru_cache(maxsize=10_000)
def _entry(path: Path, inode: int, modified: int, size: int) -> tuple[Entry | None, int]:
    """What a checkpoint's manifest says, and the number of the start that saved it.

    It is parsed again only when it is another file: all ranks wait for a sweep.

    Args:
        path: the checkpoint.
        inode: of its manifest.
        modified: of its manifest, Unix time in nanoseconds.
        size: of its manifest, in bytes.
    """
    manifest = read_manifest(path)
    if manifest is None:
        return None, 0
    created = modified / 1e9 if manifest.created is None else manifest.created
    return Entry(manifest.iteration, created, manifest.metrics), manifest.start


def needed_again(
    checkpoint_config: CheckpointConfig, loaded_from: str | None = None, base_checkpoint: str | None = None
) -> list[Path]:
    """Paths of the checkpoints that a restart with the same settings would load, beside the one that is tracked.

    Args:
        checkpoint_config: `load`, `ckpt_step`, `pretrained_checkpoint` and `save` are read.
        loaded_from: the checkpoint that this run started from.
        base_checkpoint: the checkpoint that adapters are trained on.
    """
    cfg = checkpoint_config
    named = [cfg.load, cfg.pretrained_checkpoint, base_checkpoint]
    paths = [Path(name).expanduser() for name in named if name is not None]
    if cfg.load is not None and cfg.ckpt_step is not None:
        paths.append(Path(cfg.load).expanduser() / iteration_name(cfg.ckpt_step))
    # A run that continues itself finds what its tracker names; one that loads from elsewhere starts there again.
    continues = cfg.load is not None and cfg.save is not None and _place(Path(cfg.load)) == _place(Path(cfg.save))
    if loaded_from is not None and not continues:
        paths.append(Path(loaded_from))
    return paths


def remove_old_checkpoints(save_dir: str | os.PathLike[str], leave_ckpt_num: int = 1, do_async: bool = False) -> None:
    """Keep the newest checkpoints of a directory and delete the others.

    Only committed checkpoints directly in `save_dir` count. The one that the tracker names is kept whatever its
    number, and everything newer with it. When this returns, the others are out of sight.

    Args:
        save_dir: directory of checkpoints; nothing happens if it does not exist.
        leave_ckpt_num: how many to keep, at least 1.
        do_async: delete what is out of sight in the background; the end of this process waits for it.

    Raises:
        ValueError: `leave_ckpt_num` is less than 1.
        CheckpointDamagedError: the tracker is unreadable, so it is not known what to keep; nothing was deleted.
    """
    if leave_ckpt_num < 1:
        raise ValueError(f"the number of checkpoints to keep is {leave_ckpt_num}; it must be at least 1")
    listing = list_checkpoints(Path(save_dir))
    tracked = _tracked(listing)
    entries = committed_entries(listing)
    newest = max((entry.iteration for entry in entries), default=0)
    # Without a tracker there is nothing but the numbers to go by.
    reference = tracked[0] if tracked else newest
    trash = _move_out(listing, removable(entries, [MostRecent(leave_ckpt_num)], reference, tracked))
    if do_async:
        _process_trash(os.getpid()).delete(trash)
        return
    for path in trash:
        try:
            delete_trash(path)
        except OSError as error:
            logger.error("could not delete %s, which the next run that saves there tries again: %s", path, error)


@cache
def _process_trash(pid: int) -> Trash:
    """The trash of callers that keep nothing between their calls; a fork has its own."""
    return Trash()


def _tracked(listing: Listing) -> list[int]:
    """The iterations that the trackers name, that of ours first; none for `release`.

    Raises:
        CheckpointDamagedError: one is unreadable.
    """
    if not listing.exists:
        return []
    iterations = []
    tracked = read_tracker(listing)
    if tracked is not None and not tracked.release:
        iterations.append(tracked.iteration)
    if listing.has_tracker and listing.has_legacy_tracker:
        # A crash between the two leaves them a save apart; readers of Megatron-LM go by this one.
        iteration, release = read_metadata(listing.path / LEGACY_TRACKER)
        if not release:
            iterations.append(iteration)
    return iterations


def _used(listing: Listing, paths: Iterable[Path]) -> set[int]:
    """The iterations whose directories one of `paths` leads to."""
    places = {_place(path) for path in paths} - {None}
    if not places:
        return set()
    return {number for number in listing.iterations if _place(listing.path / iteration_name(number)) in places}


def _place(path: Path) -> tuple[int, int] | None:
    """Where a path leads, the same through links and mounts; None if nowhere."""
    try:
        found = path.expanduser().stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _move_out(listing: Listing, iterations: Iterable[int]) -> list[Path]:
    """Rename checkpoints out of sight, the oldest first, and make that durable; what cannot be renamed is logged."""
    trash = []
    for iteration in iterations:
        path = listing.path / iteration_name(iteration)
        try:
            trash.append(move_to_trash(path))
        except OSError as error:
            logger.error("could not remove the old checkpoint %s; the next save tries again: %s", path, error)
        else:
            logger.info("removing the old checkpoint %s", path)
    try:
        sync_directory(listing.path)
    except OSError as error:
        # After a power loss some may be back, whole: the next sweep moves them again.
        logger.error("could not sync %s after removing old checkpoints: %s", listing.path, error)
    return trash


def _warn_of_unmeasured(policies: Iterable[Policy], entries: Iterable[Entry], saved: int | None) -> None:
    """Say so when the checkpoint just saved cannot be among the best."""
    metrics = next((entry.metrics for entry in entries if entry.iteration == saved), None)
    for policy in policies:
        if isinstance(policy, Best) and metrics is not None and policy.metric not in metrics:
            logger.warning(
                "checkpoint.retain_best_metric: %r was not measured for the checkpoint of iteration %s, which has %s",
                policy.metric,
                saved,
                ", ".join(sorted(metrics)) or "no metrics",
            )
