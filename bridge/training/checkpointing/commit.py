"""The commit: how a finished save becomes a checkpoint in one step, and how crashes are cleaned up.

At any instant, SIGKILL and power loss included, `iter_N` is whole or absent and the trackers name a
whole checkpoint:

1. everything is written and synced in a staging directory with a name of its own (`begin_staging`);
2. the manifest is written last, and all directories are synced (`seal`);
3. one rename publishes it, and the parent is synced (`publish`);
4. only then the trackers move, each by one rename (`move_trackers`).

All of this runs on rank 0. What a crash leaves behind has a `.saving-` or `.trash-` name and is swept
by `recover` before the next save. Only the one process that has claimed the directory does any of this.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from bridge.training.checkpointing import ownership
from bridge.training.checkpointing.errors import CheckpointDamagedError, CheckpointSaveError
from bridge.training.checkpointing.files import (
    delete_trash,
    discard,
    exchange,
    make_directory,
    move_to_trash,
    replace_file,
    sync_directory,
    sync_tree,
)
from bridge.training.checkpointing.integrity import FileRecord, Manifest, find_damage, read_manifest, write_manifest
from bridge.training.checkpointing.layout import (
    LEGACY_TRACKER,
    MANIFEST,
    TRACKER,
    iteration_name,
    list_checkpoints,
    new_saving_name,
    new_trash_name,
    staged_name,
)
from bridge.training.checkpointing.retention.trash import trash_of

logger = logging.getLogger(__name__)


def make_ready(save_dir: Path, setting: str = "checkpoint.save", wait_seconds: float | None = None) -> bool:
    """Make a directory and claim it for this process; there is nothing to do where that is done.

    The arguments are those of `ownership.claim`.

    Returns:
        Whether this process did not have it before.

    Raises:
        DirectoryInUseError: another process saves there.
        OSError: it cannot be made or written.
    """
    make_directory(save_dir)
    return ownership.claim(save_dir, setting, wait_seconds)


def begin_staging(save_dir: Path, iteration: int) -> Path:
    """Make the directory in which the ranks write one save; nothing in it counts until it is published."""
    staging = save_dir / new_saving_name(iteration)
    make_staging(staging)
    return staging


def make_staging(staging: Path) -> None:
    """`begin_staging`, with a name that all ranks know. It may be called again after it has failed."""
    make_directory(staging.parent)
    staging.mkdir(exist_ok=True)


def seal(staging: Path, manifest: Manifest) -> None:
    """Check that the staging directory holds exactly the manifest's files, then write the manifest.

    It may be called again after it has failed.

    Raises:
        CheckpointSaveError: a file is missing, of another size, or not accounted for.
    """
    (staging / MANIFEST).unlink(missing_ok=True)
    problems = find_damage(staging, manifest.files)
    expected = {record.name for record in manifest.files}
    found = {path.relative_to(staging).as_posix() for path in staging.rglob("*") if not path.is_dir()}
    problems += [f"{name} was written by nobody" for name in sorted(found - expected)]
    if problems:
        raise CheckpointSaveError(f"the files in {staging} are not those that were written: {'; '.join(problems)}")
    sync_tree(staging)
    write_manifest(staging, manifest)
    sync_directory(staging)


def publish(staging: Path, iteration: int) -> Path:
    """Rename a sealed staging directory to `iter_N`, replacing an `iter_N` that is there as a whole.

    Returns:
        The path of the published checkpoint.
    """
    final = staging.parent / iteration_name(iteration)
    replaced: Path | None = None
    if final.is_symlink() or final.exists():
        replaced = staging.parent / new_trash_name(final.name)
        if exchange(staging, final):
            staging.rename(replaced)
        else:
            # Between these two renames a crash leaves no `iter_N`; `recover` finds the sealed staging directory.
            final.rename(replaced)
            try:
                staging.rename(final)
            except BaseException:
                replaced.rename(final)
                raise
    else:
        staging.rename(final)
    sync_directory(final.parent)
    if replaced is not None:
        logger.warning("replaced the checkpoint that was in %s", final)
        _delete(replaced)
    return final


def move_trackers(save_dir: Path, iteration: int, train_state: bytes) -> None:
    """Point both trackers at a published checkpoint.

    Args:
        save_dir: the directory of checkpoints.
        iteration: the published iteration.
        train_state: the bytes of its `train_state.pt`.
    """
    replace_file(save_dir / TRACKER, train_state)
    replace_file(save_dir / LEGACY_TRACKER, str(iteration).encode())


def abandon(staging: Path) -> None:
    """Remove the staging directory of a save that failed; a failure to do so is only logged."""
    try:
        if staging.exists():
            discard(staging)
    except OSError as error:
        logger.warning("could not remove the failed save in %s: %s", staging, error)


def unpublished(save_dir: Path) -> dict[str, str]:
    """What `recover` publishes: sealed staging directories, and the names that they get. Nothing is changed.

    Of several that would get one name it is the first.
    """
    found: dict[str, str] = {}
    for name in list_checkpoints(save_dir).leftovers:
        target = staged_name(name)
        if target is None or target in found.values() or (save_dir / target).exists():
            continue
        if _is_sealed(save_dir / name):
            found[name] = target
    return found


def recover(save_dir: Path, delete: Callable[[list[Path]], None] | None = None) -> None:
    """Clean up after saves and deletions that a crash cut short.

    Call it when no save is in progress, in the process that has claimed the directory. `delete` is given what is to
    be deleted, under names that never count; by default it is deleted before this returns.

    A sealed staging directory whose `iter_N` is absent may be the second half of a replacement, so it is
    published rather than deleted; the trackers stay where they are. Everything else unfinished is deleted. What
    becomes of each is logged, and who has left it.
    """
    trash: list[Path] = []
    leftovers = list_checkpoints(save_dir).leftovers
    if leftovers:
        owner = ownership.predecessor_of(save_dir)
        whose = f"the run that had it before ({owner})" if owner else "an earlier run, which has not said who it is"
        logger.warning("%s holds %d unfinished things of %s", save_dir, len(leftovers), whose)
    sealed = unpublished(save_dir)
    for name in leftovers:
        path = save_dir / name
        target = staged_name(name)
        if target is not None and name in sealed:
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
            _delete(path)
    if delete is not None:
        delete(trash)
        return
    for path in trash:
        _delete(path)


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
        if not make_ready(save_dir, setting, wait_seconds):
            return
        try:
            recover(save_dir, None if context is None else trash_of(context).delete)
            begin_staging(save_dir, 0).rmdir()
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


def _is_sealed(staging: Path) -> bool:
    try:
        manifest = read_manifest(staging)
    except CheckpointDamagedError:
        return False
    return manifest is not None and not find_damage(staging, manifest.files)


def _delete(path: Path) -> None:
    try:
        delete_trash(path)
    except OSError as error:
        logger.warning("could not delete %s: %s", path, error)


def describe_files(directory: Path, files: Iterable[FileRecord | str], checksum: str) -> list[FileRecord]:
    """Records of files in a staging directory, for the manifest; those given by name alone are read."""
    return [file if isinstance(file, FileRecord) else FileRecord.of(directory, file, checksum) for file in files]
