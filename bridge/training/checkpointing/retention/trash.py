"""The background deletion of what has been renamed out of sight.

It runs in a small process of its own, started without a fork of this one. A thread would take turns at Python's
lock with the training loop for every file, and there would be a thread where asynchronous saves fork; a forked
process would cost a copy of the page tables. The small process ends with this one, however that ends. What is left
then has a `.trash-` name, so it never counts as a checkpoint, and the next run deletes it at its start.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any, NamedTuple

logger = logging.getLogger(__name__)

FILES_PER_SECOND = 200.0
"""How fast files are deleted while training goes on: a thousand ranks' checkpoint in less than half a minute, at a
load that a file system shared with the training does not feel."""

FINISH_SECONDS = 300.0
"""How long the planned end of a run waits for its deletions; they then go as fast as they can."""

EXIT_SECONDS = 10.0
"""How long any other end of the process waits for them: after an error the other ranks wait for it too."""

_PROGRAM = Path(__file__).with_name("trash_process.py")
_CONTEXT_KEY = "trash"


class _Deletion(NamedTuple):
    """What is being deleted."""

    process: subprocess.Popen[bytes]
    paths: list[Path]
    report: IO[bytes]
    """What the process says of it."""


class Trash:
    """The deletions of this process: one after the other in one background process at a time.

    No method raises: a deletion that fails is logged as an error, and the next run tries it again.
    """

    def __init__(self, files_per_second: float = FILES_PER_SECOND) -> None:
        self._files_per_second = files_per_second
        self._waiting: list[Path] = []
        self._running: _Deletion | None = None
        self._owner = os.getpid()

    @property
    def is_empty(self) -> bool:
        """Whether nothing is waiting or being deleted, as far as the last `delete` or `finish` has seen."""
        return not self._waiting and self._running is None

    def delete(self, paths: Iterable[Path] = ()) -> None:
        """Begin to delete `paths`, which have `.trash-` names, and report on earlier deletions that have ended."""
        self._waiting += paths
        if self._running is not None and self._running.process.poll() is not None:
            self._collect()
        if self._running is None and self._waiting:
            self._start(self._files_per_second)

    def finish(self, timeout: float = FINISH_SECONDS) -> None:
        """Delete what is left as fast as possible, and wait for it.

        Args:
            timeout: seconds; what is left after them stays for the next run, with a warning.
        """
        if os.getpid() != self._owner:  # a fork has this object but not the process
            return
        atexit.unregister(self._finish_at_exit)
        if self._running is not None:
            # Started anew without a limit: a deletion may be cut anywhere, and goes on where it was.
            self._running.process.kill()
            self._wait(timeout, cut=True)
        if self._running is None and self._waiting:
            self._start(0.0)
            self._wait(timeout)
        unfinished = [] if self._running is None else self._running.paths
        left = [path for path in [*self._waiting, *unfinished] if os.path.lexists(path)]
        if left:
            logger.warning(
                "left for the next run that saves there to delete, after %.0f s at most: %s", timeout, _listed(left)
            )
        self._waiting, self._running = [], None

    def _start(self, files_per_second: float) -> None:
        command = [sys.executable, "-I", "-S", str(_PROGRAM), str(os.getpid()), str(files_per_second)]
        try:
            # A file, because a pipe that nobody reads yet would stop the process when it is full.
            report = tempfile.TemporaryFile()  # noqa: SIM115 (closed when it has been read)
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=report)
        except OSError as error:
            logger.error("could not start the process that deletes old checkpoints, trying again later: %s", error)
            return
        atexit.register(self._finish_at_exit)
        self._running = _Deletion(process, self._waiting, report)
        self._waiting = []
        paths = b"".join(os.fsencode(path.absolute()) + b"\0" for path in self._running.paths)
        with contextlib.suppress(BrokenPipeError), process.stdin as stream:  # type: ignore[union-attr]
            stream.write(paths)

    def _finish_at_exit(self) -> None:
        self.finish(EXIT_SECONDS)

    def _wait(self, timeout: float, cut: bool = False) -> None:
        """Wait for the running process, and end it if it takes too long."""
        if self._running is None:
            return
        try:
            self._running.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self._running.process.kill()
        else:
            self._collect(cut)

    def _collect(self, cut: bool = False) -> None:
        """Take in what the ended process has reported, and what it has not come to."""
        if self._running is None:
            return
        process, paths, report = self._running
        self._running = None
        with report:
            report.seek(0)
            failed = _log_errors(report.read())
        if process.returncode == 0:
            return
        left = [path for path in paths if str(path.absolute()) not in failed and os.path.lexists(path)]
        if left and not cut:
            logger.error(
                "the process that deletes old checkpoints ended with status %d and left, for another try: %s",
                process.returncode,
                _listed(left),
            )
        self._waiting = left + self._waiting


def _log_errors(report: bytes) -> set[str]:
    """Log what a process could not delete, and return its paths."""
    failed = set()
    for line in report.splitlines():
        with contextlib.suppress(ValueError):  # of a process that was ended
            path, count, first = json.loads(line)
            failed.add(path)
            logger.error(
                "could not delete %s, which the next run that saves there tries again: %s%s",
                path,
                first,
                f" (and {count - 1} further errors)" if count > 1 else "",
            )
    return failed


def _listed(paths: list[Path]) -> str:
    return ", ".join(map(str, paths[:5])) + (f" and {len(paths) - 5} more" if len(paths) > 5 else "")


def trash_of(context: dict[str, Any]) -> Trash:
    """The trash of a checkpointing context."""
    trash: Trash = context.setdefault(_CONTEXT_KEY, Trash())
    return trash
