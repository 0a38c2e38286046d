"""What the next start makes of a directory that a crash has left: publish what is complete, remove the rest.

A staging directory is complete if it is sealed, or if the writers of all ranks have outlived their trainers and left
word that they have written everything (`inheritance`).
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from bridge.training.checkpointing import commit, inheritance, ownership
from bridge.training.checkpointing.errors import CheckpointDamagedError, CheckpointSaveError
from bridge.training.checkpointing.files import move_to_trash, sync_directory
from bridge.training.checkpointing.integrity import Manifest, find_damage, read_manifest
from bridge.training.checkpointing.layout import (
    TRAIN_STATE,
    bequest_name,
    iteration_name,
    list_checkpoints,
    staged_name,
)
from bridge.training.checkpointing.retention.trash import trash_of

logger = logging.getLogger(__name__)


def staged(save_dir: Path) -> dict[str, str]:
    """Staging directories, and the names that they would get, where those are free. Nothing is changed."""
    named = ((name, staged_name(name)) for name in list_checkpoints(save_dir).leftovers)
    return {name: target for name, target in named if target is not None and not (save_dir / target).exists()}


def unpublished(save_dir: Path) -> dict[str, str]:
    """What `recover` publishes: sealed staging directories, and the names that they get. Nothing is changed.

    Of several that would get one name it is the first.
    """
    found: dict[str, str] = {}
    for name, target in staged(save_dir).items():
        if target not in found.values() and _is_sealed(save_dir / name):
            found[name] = target
    return found


def recover(save_dir: Path, delete: Callable[[list[Path]], None] | None = None) -> None:
    """Clean up after saves and deletions that a crash cut short.

    Call it when no save is in progress, in the process that has claimed the directory. `delete` is given what is to
    be deleted, under names that never count; by default it is deleted before this returns.

    A sealed staging directory whose `iter_N` is absent may be the second half of a replacement, so it is
    published rather than deleted. One that all ranks' writers have completed after their trainers had died is sealed
    and published, too. The trackers move to it if the run has left what they were when it began to save, and they
    are that still. Everything else unfinished is deleted. What becomes of each is logged, and who has left it.
    """
    trash: list[Path] = []
    leftovers = list_checkpoints(save_dir).leftovers
    if leftovers:
        owner = ownership.predecessor_of(save_dir)
        whose = f"the run that had it before ({owner})" if owner else "an earlier run, which has not said who it is"
        logger.warning("%s holds %d unfinished things of %s", save_dir, len(leftovers), whose)
    kept = _inherit(save_dir)
    sealed = unpublished(save_dir)
    published = _not_tracked_yet(save_dir)
    for name in leftovers:
        path = save_dir / name
        target = staged_name(name)
        if name in kept:
            logger.warning("%s is left for the next start", path)
        elif target is not None and name in sealed:
            published[target] = inheritance.trackers_then(path)
            path.rename(save_dir / target)
            sync_directory(save_dir)
            logger.warning("published %s, which a crash had left complete as %s", target, name)
        elif target is not None:
            logger.warning("removing %s: a save that did not finish", path)
            trash.append(move_to_trash(path))
        elif path.is_dir() and not path.is_symlink():
            logger.warning("deleting %s: a deletion that did not finish", path)
            trash.append(path)
        else:
            logger.warning("deleting %s: a file that was not written to its end", path)
            commit.delete(path)
    _track(save_dir, published)
    if delete is not None:
        delete(trash)
        return
    for path in trash:
        commit.delete(path)


def _inherit(save_dir: Path) -> set[str]:
    """Seal what writers have completed; the names of what is to stay as it is."""
    kept = set()
    for name in staged(save_dir):
        path = save_dir / name
        if _is_sealed(path):
            continue
        try:
            inheritance.inherit(path)
        except OSError as error:
            logger.warning("%s is complete, but storage does not let it be published: %s", path, error)
            kept.add(name)
    return kept


def _not_tracked_yet(save_dir: Path) -> dict[str, str | None]:
    """Checkpoints that an earlier start has published for a run that died, before it could move the trackers."""
    found: dict[str, str | None] = {}
    for iteration in list_checkpoints(save_dir).iterations:
        path = save_dir / iteration_name(iteration)
        with contextlib.suppress(OSError):  # of a checkpoint that this run may not look into
            if (path / bequest_name(0)).exists():
                found[path.name] = inheritance.trackers_then(path)
    return found


def _track(save_dir: Path, published: Mapping[str, str | None]) -> None:
    """Move the trackers as the run that died would have done, unless somebody has moved them since.

    What writers have left is removed last: it is what the next start goes by if this one is cut short.

    Args:
        save_dir: the directory of checkpoints.
        published: names of checkpoints that were published for it, and what it has left of the trackers; None: nothing.
    """
    left = [name for name, then in published.items() if then is not None]
    now = commit.digest_of_trackers(save_dir)
    saved = [found for name in left if published[name] == now and (found := _manifest(save_dir / name)) is not None]
    if newest := max(saved, key=lambda manifest: (manifest.start, manifest.iteration), default=None):
        train_state = save_dir / iteration_name(newest.iteration) / TRAIN_STATE
        try:
            sync_directory(save_dir)  # an earlier start may have been cut short between the rename and this
            commit.move_trackers(save_dir, newest.iteration, train_state.read_bytes())
        except OSError as error:
            logger.warning("the trackers stay where they are until the next start: they cannot be moved: %s", error)
            return
    elif left:
        logger.warning("the trackers stay where they are: they were moved after %s was saved", ", ".join(left))
    for name in published:
        commit.remove_bequests(save_dir / name)


def recover_once(
    save_dir: Path,
    context: dict[str, Any] | None,
    setting: str = "checkpoint.save",
    wait_seconds: float | None = None,
) -> None:
    """Make a save directory ready, unless this process has it already: what is unfinished there may then be its own.

    It is made if need be, claimed for this process, cleaned by `recover`, and written to once: better to learn at
    the start of a run than hours later that nothing can be saved.

    Args:
        save_dir: the directory.
        context: the checkpointing context, whose trash deletes in the background; None deletes before this returns.
        setting: the one that names the directory, for messages.
        wait_seconds: for another process to end that has the directory; None is `ownership.WAIT_SECONDS`.

    Raises:
        CheckpointSaveError: the directory cannot be made or written.
        DirectoryInUseError: another process saves there.
    """
    try:
        if not commit.make_ready(save_dir, setting, wait_seconds):
            return
        try:
            recover(save_dir, None if context is None else trash_of(context).delete)
            commit.begin_staging(save_dir, 0).rmdir()
        except BaseException:
            ownership.give_up(save_dir)
            raise
    except OSError as error:
        raise CheckpointSaveError(
            f"{setting}: cannot save in {save_dir}: {_reason(save_dir, error)}; "
            "name a directory that can be made and written"
        ) from error


def _reason(save_dir: Path, error: OSError) -> str:
    for path in (save_dir, *save_dir.parents):
        if path.is_symlink() and not path.exists():
            return f"{path} is a link to {path.readlink()}, which does not exist"
        if path.exists() and not path.is_dir():
            return f"{path} is not a directory"
    return str(error)


def _manifest(directory: Path) -> Manifest | None:
    try:
        return read_manifest(directory)
    except CheckpointDamagedError:
        return None


def _is_sealed(staging: Path) -> bool:
    manifest = _manifest(staging)
    return manifest is not None and not find_damage(staging, manifest.files)
