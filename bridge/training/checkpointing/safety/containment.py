"""Staying inside a checkpoint's directory: plain relative names, and no links that lead out.

A name that comes from a file of a checkpoint is checked before it is joined to a path, and what a checkpoint holds is
checked before any of it is opened.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from bridge.training.checkpointing.errors import CheckpointDamagedError, UnsafeCheckpointError


def is_plain_name(name: str) -> bool:
    """Whether `name` is a path inside a directory, with forward slashes, in its shortest form."""
    return "\0" not in name and not any(part in ("", ".", "..") for part in name.split("/"))


def require_contained(directory: Path) -> None:
    """Check that a checkpoint holds nothing but files and directories of its own.

    The directory itself may be reached through links, and a link inside it may lead to something inside it.

    Raises:
        UnsafeCheckpointError: a link leads out of the checkpoint.
        CheckpointDamagedError: something is neither a file nor a directory: a link to nothing, a pipe, a device.
    """
    home = Path(os.path.realpath(directory))
    pending = [directory]
    while pending:
        with os.scandir(pending.pop()) as entries:
            for entry in entries:
                if entry.is_symlink():
                    _require_inside(Path(entry.path), home)
                if entry.is_dir(follow_symlinks=False):
                    pending.append(Path(entry.path))
                elif not entry.is_file() and not entry.is_dir():
                    raise CheckpointDamagedError(f"{entry.path} is neither a file nor a directory")


def contained_file(directory: Path, name: str) -> tuple[Path, int]:
    """A file of a checkpoint, by the name that another file of it gives.

    Args:
        directory: the checkpoint.
        name: the name.

    Returns:
        Its path and its size in bytes.

    Raises:
        UnsafeCheckpointError: the name, or a link, leads out of the checkpoint.
        CheckpointDamagedError: there is no such file.
    """
    if not is_plain_name(name):
        raise UnsafeCheckpointError(f"{directory} names the file {name[:200]!r}, which leaves the checkpoint")
    path = directory / name
    _require_inside(path, Path(os.path.realpath(directory)))
    try:
        found = path.stat()
    except OSError as error:
        raise CheckpointDamagedError(f"{path} cannot be read: {error.strerror}") from error
    if not stat.S_ISREG(found.st_mode):
        raise CheckpointDamagedError(f"{path} is not a file")
    return path, found.st_size


def _require_inside(path: Path, home: Path) -> None:
    target = Path(os.path.realpath(path))
    if home not in target.parents and target != home:
        raise UnsafeCheckpointError(
            f"{path} is a link that leads out of the checkpoint, to {target}; if it is what you want to load, put a "
            "copy in its place (cp --dereference)"
        )
