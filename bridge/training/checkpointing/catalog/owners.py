"""Who saves in a directory, found out without becoming that one."""

from __future__ import annotations

import fcntl
import os
import struct
from dataclasses import dataclass
from pathlib import Path

from bridge.training.checkpointing.layout import WRITER
from bridge.training.checkpointing.ownership import last_run_of, owner_of

_FLOCK = "hhqqi"
"""`struct flock` of fcntl(2) on 64-bit Linux: type, whence, start, length, process."""


@dataclass(frozen=True)
class Owner:
    """What is known of the run that saves in a directory."""

    is_alive: bool | None
    """None where the file system has no locks, or the lock file cannot be opened, so that nobody can say."""
    description: str
    """Host, process and time, as the last owner has written them; empty if nobody has ever saved there."""

    @property
    def may_be_alive(self) -> bool:
        """Whether somebody has saved there of whom nobody can say whether he still does."""
        return self.is_alive is None and bool(self.description)


def find_owner(directory: Path) -> Owner:
    """Look who has a directory. Nothing is written, and no lock is taken.

    Args:
        directory: not one that this process itself has claimed: closing its lock file gives up the claim.
    """
    path = directory / WRITER
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return Owner(False, "")
    except OSError:
        return Owner(None, owner_of(directory))
    try:
        request = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        found = struct.unpack(_FLOCK, fcntl.fcntl(descriptor, fcntl.F_GETLK, request))
    except (OSError, struct.error):
        return Owner(None, owner_of(directory) if os.fstat(descriptor).st_size else "")
    finally:
        os.close(descriptor)
    is_alive = found[0] != fcntl.F_UNLCK
    return Owner(is_alive, owner_of(directory) if is_alive else last_run_of(directory))
