"""The commit: how a finished save becomes a checkpoint in one step.

At any instant, SIGKILL and power loss included, `iter_N` is whole or absent and the trackers name a
whole checkpoint:

1. everything is written and synced in a staging directory with a name of its own (`begin_staging`);
2. the manifest is written last, and all directories are synced (`seal`);
3. one rename publishes it, and the parent is synced (`publish`);
4. only then the trackers move, each by one rename (`move_trackers`).

All of this runs on rank 0. What a crash leaves behind has a `.saving-` or `.trash-` name; what becomes of it before the
next save is the subject of `recovery`. Only the one process that has claimed the directory does any of this.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path

from bridge.training.checkpointing import ownership
from bridge.training.checkpointing.errors import CheckpointSaveError
from bridge.training.checkpointing.files import (
    delete_trash,
    discard,
    exchange,
    make_directory,
    replace_file,
    sync_directory,
    sync_tree,
)
from bridge.training.checkpointing.integrity import FileRecord, Manifest, find_damage, write_manifest
from bridge.training.checkpointing.layout import (
    BEQUEST_PREFIX,
    LEGACY_TRACKER,
    MANIFEST,
    TRACKER,
    bequest_name,
    iteration_name,
    new_saving_name,
    new_trash_name,
)

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
    found -= {name for name in found if name.startswith(BEQUEST_PREFIX)}  # of a trainer that has just died
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
            # Between these two renames a crash leaves no `iter_N`; `recovery` finds the sealed staging directory.
            final.rename(replaced)
            try:
                staging.rename(final)
            except BaseException:
                replaced.rename(final)
                raise
    else:
        staging.rename(final)
    sync_directory(final.parent)
    remove_bequests(final)
    if replaced is not None:
        logger.warning("replaced the checkpoint that was in %s", final)
        delete(replaced)
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


def digest_of_trackers(save_dir: Path) -> str:
    """Another one whenever a tracker is moved. What cannot be read counts as absent."""
    found = sha256()
    for name in (TRACKER, LEGACY_TRACKER):
        try:
            content = (save_dir / name).read_bytes()
        except OSError:
            content = b""
        found.update(len(content).to_bytes(8, "little") + content)
    return found.hexdigest()


def remove_bequests(directory: Path) -> None:
    """Remove what writers have left for a save that is published now. Trouble is only logged.

    That of rank 0 goes last: the next start knows by it that there may be more.
    """
    last = bequest_name(0)
    try:
        for path in sorted(directory.glob(f"{BEQUEST_PREFIX}*"), key=lambda path: path.name == last):
            path.unlink(missing_ok=True)
    except OSError as error:
        logger.warning("could not delete what writers have left in %s: %s", directory, error)


def abandon(staging: Path) -> None:
    """Remove the staging directory of a save that failed; a failure to do so is only logged."""
    try:
        if staging.exists():
            discard(staging)
    except OSError as error:
        logger.warning("could not remove the failed save in %s: %s", staging, error)


def delete(path: Path) -> None:
    """Delete what `move_to_trash` has renamed; a failure to do so is only logged."""
    try:
        delete_trash(path)
    except OSError as error:
        logger.warning("could not delete %s: %s", path, error)


def describe_files(directory: Path, files: Iterable[FileRecord | str], checksum: str) -> list[FileRecord]:
    """Records of files in a staging directory, for the manifest; those given by name alone are read."""
    return [file if isinstance(file, FileRecord) else FileRecord.of(directory, file, checksum) for file in files]
