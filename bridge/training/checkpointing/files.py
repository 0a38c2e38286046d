"""Small files and directory operations that survive a power loss."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import sys
from pathlib import Path

from bridge.training.checkpointing.layout import TEMPORARY_SUFFIX, new_trash_name

_AT_FDCWD = -100  # <fcntl.h>
_RENAME_EXCHANGE = 2  # <linux/fs.h>


def write_file(path: Path, data: bytes) -> None:
    """Write a new file and force its bytes to storage. Its name is durable once its directory is synced."""
    with path.open("xb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


def replace_file(path: Path, data: bytes) -> None:
    """Give `path` new contents in one step: a reader, or a crash, sees the old file or the new one, whole."""
    temporary = path.parent / f".{path.name}{TEMPORARY_SUFFIX}"
    temporary.unlink(missing_ok=True)
    write_file(temporary, data)
    temporary.rename(path)
    sync_directory(path.parent)


def sync_file(path: Path) -> None:
    """Force the bytes of a file to storage that somebody else has written."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_directory(path: Path) -> None:
    """Make a directory, and those above it that are missing, so that their names survive a power loss."""
    if path.is_dir():
        return
    if not path.parent.is_dir():
        make_directory(path.parent)
    path.mkdir(exist_ok=True)
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Force a directory's entries to storage."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(path: Path) -> None:
    """Force the entries of a directory and of all directories below it to storage."""
    for directory, _, _ in os.walk(path):
        sync_directory(Path(directory))


def exchange(first: Path, second: Path) -> bool:
    """Swap two names in one atomic step. False, with nothing changed, where the system or file system cannot."""
    if not sys.platform.startswith("linux"):
        return False
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    if renameat2(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(first), None, str(second))


def discard(path: Path) -> None:
    """Delete a directory (or file): first out of sight by one rename, then for good.

    Killed half-way, it leaves a `.trash-` name, which never counts as a checkpoint.
    """
    delete_trash(move_to_trash(path))


def move_to_trash(path: Path) -> Path:
    """Rename a directory (or file) out of sight; durable once its parent is synced. Returns its new path."""
    trash = path.parent / new_trash_name(path.name)
    path.rename(trash)
    return trash


def delete_trash(path: Path) -> None:
    """Delete what `move_to_trash` has renamed; already gone is fine."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
