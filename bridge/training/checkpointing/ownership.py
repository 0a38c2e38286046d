"""One writer for a save directory.

A run cleans up what crashes have left in its save directory, and a save in progress looks just like that.
So the run that saves there holds a lock, from its start to its end. It is a POSIX record lock: the kernel
releases it when the process dies, by SIGKILL too; forked writers do not inherit it; and it works over NFS.
Loading takes no lock: what is published is whole and nobody changes it, though retention may delete it.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import socket
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import NamedTuple

from bridge.training.checkpointing.errors import DirectoryInUseError
from bridge.training.checkpointing.layout import WRITER

logger = logging.getLogger(__name__)

WAIT_SECONDS = 60.0
"""How long a run waits for the one before it, which may be shutting down."""

_POLL_SECONDS = 0.5
_TAKEN = {errno.EACCES, errno.EAGAIN}
_UNSUPPORTED = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}


class _Claim(NamedTuple):
    descriptor: int
    pid: int
    """The process that made the claim: a forked one sees it but does not hold the lock."""


_claims: dict[Path, _Claim] = {}
"""By resolved save directory, for the whole process, because the kernel's locks are the process's: one that closes any
descriptor of a file loses its lock on it."""


def claim(save_dir: Path, setting: str = "checkpoint.save", wait_seconds: float | None = None) -> bool:
    """Make this process the only one that saves in `save_dir`, until it ends. Claiming again does nothing.

    If another process has the directory, wait up to `wait_seconds` for it to end. On a file system without
    locks, only a warning says that nothing is guarded.

    Args:
        save_dir: an existing directory.
        setting: the one that names it, for messages.
        wait_seconds: None is `WAIT_SECONDS`.

    Returns:
        Whether this process did not have it before: what is unfinished there is then of a run that is over.

    Raises:
        DirectoryInUseError: another process still has it.
        OSError: the lock file cannot be made or written.
    """
    directory = save_dir.resolve()
    if _is_held(directory):
        return False
    seconds = WAIT_SECONDS if wait_seconds is None else wait_seconds
    deadline = time.monotonic() + seconds
    announced = False
    while not _try_claim(directory):
        if time.monotonic() >= deadline:
            raise DirectoryInUseError(
                f"{setting}: {save_dir} is in use by another run ({owner_of(directory)}), and two runs cannot "
                f"save in one directory; stop that run, or set {setting} to another directory"
            )
        if not announced:
            logger.warning(
                "waiting up to %g s for the run that saves in %s: %s", seconds, save_dir, owner_of(directory)
            )
            announced = True
        time.sleep(min(_POLL_SECONDS, seconds))
    return True


def give_up(save_dir: Path) -> None:
    """Let another process have the directory, or this one claim it again."""
    held = _claims.pop(save_dir.resolve(), None)
    if held is not None:
        os.close(held.descriptor)


def _is_held(directory: Path) -> bool:
    held = _claims.get(directory)
    if held is None:
        return False
    if held.pid == os.getpid() and _is_at(held.descriptor, directory / WRITER):
        return True
    # Inherited by a fork, or the directory was deleted: neither is a lock on the file that is there now.
    del _claims[directory]
    os.close(held.descriptor)
    return False


def _try_claim(directory: Path) -> bool:
    descriptor = os.open(directory / WRITER, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _TAKEN:
            os.close(descriptor)
            return False
        if error.errno not in _UNSUPPORTED:
            os.close(descriptor)
            raise
        if _lives_here(directory):
            os.close(descriptor)
            return False
        logger.warning(
            "%s is on a file system without locks (%s): nothing will stop a second run from saving there too, "
            "and the two would destroy each other's saves",
            directory,
            error.strerror,
        )
    if not _is_at(descriptor, directory / WRITER):  # deleted between the opening and the lock
        os.close(descriptor)
        return False
    owner = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "start": datetime.now(timezone.utc).isoformat("T", "seconds"),
    }
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(owner).encode(), 0)
    except BaseException:
        os.close(descriptor)
        raise
    _claims[directory] = _Claim(descriptor, os.getpid())
    return True


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _lives_here(directory: Path) -> bool:
    """Whether another process of this machine says that it has the directory, and lives: all there is without locks."""
    try:
        owner = json.loads((directory / WRITER).read_bytes())
        if owner["host"] != socket.gethostname() or owner["pid"] == os.getpid():
            return False
        # A process of the same number that began later is another one.
        return _began(int(owner["pid"])) <= datetime.fromisoformat(owner["start"]).timestamp() + 1.0
    except (OSError, ValueError, KeyError, TypeError, OverflowError, IndexError):
        return False


def _began(process: int) -> float:
    """When a process of this machine began, Unix time in seconds: proc(5), field 22 of `stat`, and `btime`."""
    ticks = int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19])
    boot = next(line for line in Path("/proc/stat").read_text().splitlines() if line.startswith("btime"))
    return int(boot.split()[1]) + ticks / os.sysconf("SC_CLK_TCK")


def owner_of(directory: Path) -> str:
    """Who has the directory, for messages. The file is only a hint, so whatever it holds is no error."""
    try:
        owner = json.loads((directory / WRITER).read_bytes())
        return f"host {owner['host']}, process {owner['pid']}, since {owner['start']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "which has not said who it is"
