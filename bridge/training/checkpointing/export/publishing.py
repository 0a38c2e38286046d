"""A directory that appears as a whole: written beside its place under another name, synced, and renamed."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from bridge.training.checkpointing.errors import CheckpointSaveError, DirectoryInUseError
from bridge.training.checkpointing.export.plan import CONFIG, INDEX
from bridge.training.checkpointing.export.tokenizer_files import names_beside
from bridge.training.checkpointing.files import delete_trash, discard, exchange, make_directory, sync_directory

logger = logging.getLogger(__name__)

_SUFFIX = ".exporting"


def require_free(destination: Path, *, force: bool) -> None:
    """Check that an export may be put in a place.

    Raises:
        CheckpointSaveError: something is there; with `force`, something that no export has written.
    """
    if not destination.exists():
        return
    if not force:
        raise CheckpointSaveError(f"DST: {destination} exists; give --force to replace it, or name another directory")
    if not destination.is_dir():
        raise CheckpointSaveError(f"DST: {destination} is not a directory")
    beside = names_beside(destination)
    foreign = sorted(each.name for each in destination.iterdir() if not _is_of_export(each, beside))
    if foreign:
        raise CheckpointSaveError(
            f"DST: {destination} holds what no export has written ({', '.join(foreign[:5])}), and would be deleted "
            "with it; move that away, or name another directory"
        )


def _is_of_export(path: Path, beside: Collection[str]) -> bool:
    return path.is_file() and (path.suffix == ".safetensors" or path.name in (INDEX, CONFIG, *beside))


@contextmanager
def published(destination: Path, *, force: bool) -> Iterator[Path]:
    """A new directory to write into; it gets its name, and what had that before is deleted, if nothing is raised.

    What a killed export has left behind is deleted first.

    Args:
        destination: absolute, and no link.
        force: replace an export that is there.

    Raises:
        CheckpointSaveError: as `require_free`.
        DirectoryInUseError: another export writes there.
        OSError: storage failed; nothing was published.
    """
    require_free(destination, force=force)
    make_directory(destination.parent)
    temporary = destination.with_name(f".{destination.name}{_SUFFIX}")
    lock = _claim(temporary, destination)
    try:
        for path in temporary.iterdir():
            delete_trash(path)
        yield temporary
        sync_directory(temporary)
        require_free(destination, force=force)
        _rename(temporary, destination)
    except BaseException:
        _discard(temporary)
        raise
    finally:
        os.close(lock)


def _claim(directory: Path, destination: Path) -> int:
    """Make a directory and lock it; the lock ends with the process."""
    directory.mkdir(exist_ok=True)
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Whoever had it may have renamed it in between.
        mine = directory.exists() and os.path.samestat(os.fstat(descriptor), directory.stat())
    except OSError as error:
        # Some network file systems have no locks.
        mine = error.errno not in (errno.EWOULDBLOCK, errno.EAGAIN)
    if not mine:
        os.close(descriptor)
        raise DirectoryInUseError(
            f"DST: another export writes {destination}; wait until it has ended, or name another directory"
        )
    return descriptor


def _rename(temporary: Path, destination: Path) -> None:
    if not destination.exists():
        temporary.rename(destination)
        sync_directory(destination.parent)
        return
    if exchange(temporary, destination):
        replaced = temporary
    else:
        replaced = destination.with_name(f".{destination.name}.replaced")
        delete_trash(replaced)
        destination.rename(replaced)
        temporary.rename(destination)
    sync_directory(destination.parent)
    _discard(replaced)


def _discard(path: Path) -> None:
    try:
        if path.exists():
            discard(path)
    except OSError as error:
        logger.warning("could not delete %s: %s", path, error)
