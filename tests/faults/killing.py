"""Kill a whole job, from outside the code under test, at a chosen file operation.

Python reports every opening, renaming, making and removing of a file to its audit hooks, whoever asks for
it. A hook in each process of the job counts those that touch one directory, in one counter that all share,
and at the chosen one it sends SIGKILL to every process of the job's session: ranks, writers, everything.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.distributed.launch import run_ranks

_CHANGES = {"os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate", "os.link", "os.symlink"}


def run_until(
    operation: int | None, watched: Path, fn: Callable[..., Any], world_size: int, *args: Any
) -> tuple[bool, int]:
    """Run a job and kill it just before its `operation`-th file operation in `watched` (None: let it end).

    Returns:
        Whether the job was killed, and how many operations it began.
    """
    counter = multiprocessing.get_context("fork").Value("i", 0)
    leader = os.fork()
    if leader == 0:
        status = 1
        try:
            os.setsid()
            run_ranks(_watched, world_size, counter, operation, str(watched), fn, args)
            status = 0
        finally:
            os._exit(status)
    _, status = os.waitpid(leader, 0)
    _kill_session(leader)
    _wait_until_gone(leader)
    killed = os.WIFSIGNALED(status)
    if not killed and os.waitstatus_to_exitcode(status) != 0:
        raise AssertionError(f"the job failed by itself before operation {operation}")
    return killed, counter.get_obj().value  # not counter.value: a killed process may hold its lock


def _watched(counter: Any, operation: int | None, watched: str, fn: Callable[..., Any], args: tuple[Any, ...]) -> None:
    session = os.getsid(0)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if not _is_change(event, arguments) or not _touches(arguments, watched):
            return
        with counter.get_lock():
            counter.value += 1
            if counter.value == operation:
                _kill_session(session)

    sys.addaudithook(hook)
    fn(*args)


def _is_change(event: str, arguments: tuple[Any, ...]) -> bool:
    if event == "open":
        flags = arguments[2]
        return isinstance(flags, int) and bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_DIRECTORY))
    return event in _CHANGES


def _touches(arguments: tuple[Any, ...], watched: str) -> bool:
    return any(isinstance(a, (str, bytes, os.PathLike)) and os.fsdecode(a).startswith(watched) for a in arguments)


def _kill_session(session: int) -> None:
    """SIGKILL to every process of a session, the caller last if it is one of them."""
    for pid in sorted(_members(session), key=lambda pid: pid == os.getpid()):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _wait_until_gone(session: int) -> None:
    """Orphans that were killed hold their locks until they are gone, which takes a while on a busy machine."""
    deadline = time.monotonic() + 60
    while any(map(_is_alive, _members(session))):
        if time.monotonic() > deadline:
            raise AssertionError(f"processes of session {session} do not go away")
        time.sleep(0.01)


def _is_alive(pid: int) -> bool:
    """Whether any of a process's threads is left: the first may be over while others still hold its files."""
    try:
        states = [task.read_text().rpartition(")")[2].split()[0] for task in Path(f"/proc/{pid}/task").glob("*/stat")]
    except OSError:  # one has just gone
        return Path(f"/proc/{pid}").exists()
    return any(state not in "ZX" for state in states)


def _members(session: int) -> list[int]:
    numbers = map(int, filter(str.isdigit, [entry.name for entry in Path("/proc").iterdir()]))
    return [pid for pid in numbers if _session_of(pid) == session]


def _session_of(pid: int) -> int | None:
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return None
