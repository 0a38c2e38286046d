"""Publishing a directory whole: a crash at any moment leaves it complete or absent."""

from __future__ import annotations

import os
from pathlib import Path


def fsync(path: Path) -> None:
    """Force a file's content, or a directory's entries, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish_directory(staging: Path, target: Path, aside: Path | None = None) -> None:
    """Give the finished directory `staging` its final name, durably.

    All paths must have the same parent. An existing `target` is renamed to `aside` first; without
    `aside`, the target must be absent, or an empty directory.

    Raises:
        OSError: the target exists with content, or the file system refuses; an old target is back in its
            place then.
    """
    for path in sorted(staging.rglob("*")):
        fsync(path)
    fsync(staging)
    moved = aside is not None and target.exists()
    if aside is not None and moved:
        target.rename(aside)
    try:
        staging.rename(target)
    except OSError:
        if aside is not None and moved:
            aside.rename(target)
        raise
    fsync(target.parent)
