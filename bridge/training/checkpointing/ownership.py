"""One writer for a save directory.

A run cleans up what crashes have left in its save directory, and a save in progress looks just like that.
So the run that saves there holds a lock, from its start to its end. It is a POSIX record lock: the kernel
releases it when the process dies, by SIGKILL too; forked writers do not inherit it; and it works over NFS.
Loading takes no lock: what is published is whole and nobody changes it, though retention may delete it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import socket
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

from bridge.training.checkpointing.errors import DirectoryInUseError
from bridge.training.checkpointing.layout import WRITER

logger = logging.getLogger(__name__)

WAIT_SECONDS = 60.0
"""How long a run waits for the one before it, which may be shutting down."""

PROGRESS_SECONDS = 30.0
"""How often it says that it still waits."""

_POLL_SECONDS = 0.5
_LARGEST = 1 << 16
"""Bytes of the lock file that are looked at."""
_NOBODY = "which has not said who it is"
_LONGEST_END = 3600.0
"""Seconds; more is not believed."""
_ENDING = "ends_within"
"""Key in the lock file: seconds that a run which is at its planned end may need for what it deletes and uploads."""
_SAID = "announced"
"""Key in the lock file: when it said so, which tells one announcement from the next."""
_LAST_RUN = "last_run"
"""Key in the lock file, of a passing claim: what the file said before, as text."""
_TAKEN = {errno.EACCES, errno.EAGAIN}
_UNSUPPORTED = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}


class _Claim(NamedTuple):
    descriptor: int
    pid: int
    """The process that made the claim: a forked one sees it but does not hold the lock."""
    owner: dict[str, Any]
    """What the lock file says."""
    before: str = ""
    """Who had the directory before, for messages; empty if nobody says."""
    put_back: bytes | None = None
    """What the lock file is to say when the claim is given up; None: what it says now."""


_claims: dict[Path, _Claim] = {}
"""By resolved save directory, for the whole process, because the kernel's locks are the process's: one that closes any
descriptor of a file loses its lock on it."""


def claim(
    save_dir: Path, setting: str = "checkpoint.save", wait_seconds: float | None = None, *, passing: bool = False
) -> bool:
    """Make this process the only one that saves in `save_dir`, until it ends. Claiming again does nothing.

    If another process has the directory, wait up to `wait_seconds` for it to end. Whoever names no time waits longer
    for one that has come to its planned end and still deletes or uploads: for as long as it announced last. On a file
    system without locks, only a warning says that nothing is guarded.

    Args:
        save_dir: an existing directory.
        setting: the one that names it, for messages.
        wait_seconds: None is `WAIT_SECONDS`.
        passing: the claim is no run's: when it is given up, the lock file says of the last run what it said before.

    Returns:
        Whether this process did not have it before: what is unfinished there is then of a run that is over.

    Raises:
        DirectoryInUseError: another process still has it.
        OSError: the lock file cannot be made or written.
    """
    directory = save_dir.resolve()
    if _is_held(directory):
        return False
    shortest = seconds = WAIT_SECONDS if wait_seconds is None else wait_seconds
    begun = announced = time.monotonic()
    told, ending = False, _Ending()
    while not _try_claim(directory, passing):
        now = time.monotonic()
        found = _Ending() if wait_seconds is not None else _announced_end(directory)
        if found != ending:
            # Whoever announces nothing is another one that has it by now, or is about to say more.
            told, ending = False, found
            seconds = min(now - begun + max(shortest, found.seconds), max(shortest, _LONGEST_END))
        is_ending = ending.seconds > 0
        if now - begun >= seconds:
            raise DirectoryInUseError(_in_use(save_dir, setting, directory, is_ending))
        if not told:
            told, announced = True, now
            logger.warning(
                "waiting up to %.3g s for the run that saves in %s: %s%s",
                seconds,
                save_dir,
                owner_of(directory),
                "; it is at its end, and deletes or uploads checkpoints" if is_ending else "",
            )
        elif now - announced >= PROGRESS_SECONDS:
            announced = now
            logger.warning("still waiting for it, for %.0f of %.3g s", now - begun, seconds)
        time.sleep(min(_POLL_SECONDS, seconds))
    return True


def _in_use(save_dir: Path, setting: str, directory: Path, is_ending: bool) -> str:
    if is_ending:
        return (
            f"{setting}: {save_dir} is still in use by a run that has announced its end ({owner_of(directory)}), and "
            "has not come to it in the time that it had for deleting and uploading; end that process, or set "
            f"{setting} to another directory"
        )
    return (
        f"{setting}: {save_dir} is in use by another run ({owner_of(directory)}), and two runs cannot "
        f"save in one directory; stop that run, or set {setting} to another directory"
    )


def announce_end(save_dir: Path, seconds: float) -> None:
    """Tell a run that waits for the directory that this one ends within so long. Trouble is no error: it is a hint."""
    held = _claims.get(save_dir.resolve())
    if held is not None and held.pid == os.getpid():
        with contextlib.suppress(OSError):
            said = {_ENDING: seconds, _SAID: datetime.now(timezone.utc).isoformat()}
            _write(held.descriptor, held.owner | said)


class _Ending(NamedTuple):
    """What the run that has the directory says of its end."""

    seconds: float = 0.0
    """0 if it says nothing."""
    announcement: str = ""
    """Tells it from others."""


def _announced_end(directory: Path) -> _Ending:
    try:
        content = _content(directory)
        told = json.loads(content)
        seconds = float(told[_ENDING])
        return _Ending(min(seconds, _LONGEST_END), repr(content)) if seconds > 0 else _Ending()
    except (OSError, ValueError, TypeError, KeyError, OverflowError, RecursionError):
        return _Ending()


def _content(directory: Path) -> bytes:
    with (directory / WRITER).open("rb") as stream:
        return stream.read(_LARGEST)


def predecessor_of(save_dir: Path) -> str:
    """Who had the directory before this process claimed it, for messages; empty if nobody says."""
    held = _claims.get(save_dir.resolve())
    return "" if held is None else held.before


def give_up(save_dir: Path, *, is_done: bool = True) -> None:
    """Let another process have the directory, or this one claim it again.

    Args:
        save_dir: the directory.
        is_done: whether nothing unfinished is left there. Where it is not, a passing claim still says whose that is.
    """
    directory = save_dir.resolve()
    held = _claims.pop(directory, None)
    if held is None:
        return
    is_passing = held.put_back is not None and held.pid == os.getpid()
    try:
        if is_done and is_passing and _is_at(held.descriptor, directory / WRITER):
            if held.put_back:
                _write_bytes(held.descriptor, held.put_back)
            else:
                (directory / WRITER).unlink()  # no run has ever saved here
    except OSError as error:
        logger.warning("%s does not say again which run saved there last: %s", directory / WRITER, error)
    finally:
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


def _try_claim(directory: Path, passing: bool) -> bool:
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
    owner: dict[str, Any] = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "start": datetime.now(timezone.utc).isoformat("T", "seconds"),
    }
    try:
        # Through this descriptor: to open and close the file once more would give up the lock.
        before = os.pread(descriptor, _LARGEST, 0)
        of_run = _of_run(before)
        if passing:
            owner[_LAST_RUN] = of_run.decode("utf-8", "replace")
        _write(descriptor, owner)
    except BaseException:
        os.close(descriptor)
        raise
    put_back = of_run if passing else None
    _claims[directory] = _Claim(descriptor, os.getpid(), owner, _in_words(before) if before else "", put_back)
    return True


def _write(descriptor: int, owner: dict[str, Any]) -> None:
    _write_bytes(descriptor, json.dumps(owner).encode())


def _write_bytes(descriptor: int, content: bytes) -> None:
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, content, 0)


def _of_run(content: bytes) -> bytes:
    """What a lock file that nobody holds says of the last run, also where a passing claim was killed."""
    try:
        kept = json.loads(content)[_LAST_RUN]
    except (ValueError, KeyError, TypeError, RecursionError):
        return content
    return kept.encode() if isinstance(kept, str) else content


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
        return _in_words(_content(directory))
    except OSError:
        return _NOBODY


def last_run_of(directory: Path) -> str:
    """The run that had the directory last, for messages, where nobody has it now; empty if there has been none."""
    try:
        content = _of_run(_content(directory))
    except OSError:
        return _NOBODY
    return _in_words(content) if content else ""


def _in_words(content: bytes) -> str:
    try:
        owner = json.loads(content)
        return f"host {owner['host']}, process {owner['pid']}, since {owner['start']}"
    except (ValueError, KeyError, TypeError, RecursionError):
        return _NOBODY
