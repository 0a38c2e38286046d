"""Which checkpoints may go, and their removal.

Deleting is the one thing here that can lose data, so the choice is a pure function, and a directory is
first renamed out of sight: killed half-way, a deletion leaves a name that never counts as a checkpoint.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Collection, Iterable
from pathlib import Path

from bridge.training.checkpointing.files import delete_trash, sync_directory
from bridge.training.checkpointing.layout import iteration_name, list_checkpoints, new_trash_name
from bridge.training.checkpointing.source import read_tracker

logger = logging.getLogger(__name__)


def stale_iterations(iterations: Iterable[int], keep: int, protected: Collection[int] = ()) -> list[int]:
    """The iterations that are not among the newest `keep` and not protected, ascending.

    A protected iteration that is old does not take the place of a newer one.

    Raises:
        ValueError: `keep` is less than 1; there is always a checkpoint to resume from.
    """
    if keep < 1:
        raise ValueError(f"the number of checkpoints to keep is {keep}; it must be at least 1")
    ordered = sorted(set(iterations))
    return [iteration for iteration in ordered[:-keep] if iteration not in protected]


def remove_old_checkpoints(save_dir: str | os.PathLike[str], leave_ckpt_num: int = 1, do_async: bool = False) -> None:
    """Keep the newest checkpoints of a directory and delete the others.

    Only directories with exactly the name of an iteration count, directly in `save_dir`; the one that the tracker
    names is kept whatever its number. When this returns, the others are out of sight.

    Args:
        save_dir: directory of checkpoints; nothing happens if it does not exist.
        leave_ckpt_num: how many to keep, at least 1.
        do_async: delete what is out of sight in a background thread, which the process waits for at its end.

    Raises:
        ValueError: `leave_ckpt_num` is less than 1.
        CheckpointDamagedError: the tracker is unreadable, so it is not known what to keep; nothing was deleted.
    """
    listing = list_checkpoints(Path(save_dir))
    tracked = read_tracker(listing) if listing.exists else None
    protected = () if tracked is None or tracked.release else (tracked.iteration,)
    trash = []
    for iteration in stale_iterations(listing.iterations, leave_ckpt_num, protected):
        path = listing.path / iteration_name(iteration)
        if path.is_symlink():
            continue  # somebody put it there; what it points to is not ours to delete
        target = path.with_name(new_trash_name(path.name))
        path.rename(target)
        logger.info("removing the old checkpoint %s", path)
        trash.append(target)
    if not trash:
        return
    sync_directory(listing.path)
    if do_async:
        threading.Thread(target=_delete, args=(trash,), name="remove_old_checkpoints").start()
    else:
        _delete(trash)


def _delete(trash: list[Path]) -> None:
    for path in trash:
        try:
            delete_trash(path)
        except OSError as error:
            logger.warning("could not delete %s (the next start tries again): %s", path, error)
