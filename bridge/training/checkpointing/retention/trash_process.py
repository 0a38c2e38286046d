"""Deletes directories, slowly and in parallel, as a program of its own.

    python -I -S trash_process.py PARENT FILES_PER_SECOND    (0: as fast as it goes)

It reads the paths from its standard input, each followed by a zero byte, and ends when they are gone, or when the
process PARENT has. For each path that is left it writes a JSON list `[path, how many errors, the first of them]`.
Nothing but the standard library is imported, so that it starts at once and stays small.
"""

from __future__ import annotations

import json
import os
import signal
import stat
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

PREFIX = ".trash-"
"""Nothing with another name is deleted, whatever it is told."""

THREADS = 4
_WATCH_SECONDS = 0.2


class Errors:
    """How many errors there were, and the first; from any thread."""

    def __init__(self) -> None:
        self.count = 0
        self.first = ""

    def add(self, error: OSError) -> None:
        """Note an error; that something is gone already is none."""
        if isinstance(error, FileNotFoundError):
            return
        self.first = self.first or str(error)
        self.count += 1


class Pace:
    """Lets through so many files in a second, evenly."""

    def __init__(self, files_per_second: float) -> None:
        self._seconds = 1 / files_per_second if files_per_second else 0.0
        self._next = time.monotonic()

    def wait(self) -> None:
        """Wait for the turn of the next file."""
        delay = self._next - time.monotonic()
        if delay > 0:
            time.sleep(delay)
        self._next = max(self._next, time.monotonic() - 1.0) + self._seconds


def delete(path: str, pool: ThreadPoolExecutor, pace: Pace) -> Errors:
    """Delete a directory with all that is in it, or a file. Links are deleted, never followed."""
    errors = Errors()
    try:
        if not os.path.basename(path).startswith(PREFIX):  # noqa: PTH119 (pathlib would double the time to start)
            raise PermissionError(f"its name does not begin with {PREFIX}")
        if _is_directory(path):
            _delete_tree(path, pool, pace, errors)
        else:
            os.unlink(path)  # noqa: PTH108
    except OSError as error:
        errors.add(error)
    return errors


def _delete_tree(path: str, pool: ThreadPoolExecutor, pace: Pace, errors: Errors) -> None:
    def attempt(operation: Callable[..., None], name: str, directory: int) -> None:
        try:
            operation(name, dir_fd=directory)
        except OSError as error:
            errors.add(error)

    for _, directories, files, descriptor in os.fwalk(path, topdown=False, onerror=errors.add):
        links = [name for name in directories if not _is_directory(name, descriptor)]
        removals = []
        for name in [*files, *links]:
            pace.wait()
            removals.append(pool.submit(attempt, os.unlink, name, descriptor))
        for removal in removals:
            removal.result()
        for name in set(directories).difference(links):
            attempt(os.rmdir, name, descriptor)
    os.rmdir(path)  # noqa: PTH106


def _is_directory(path: str, directory: int | None = None) -> bool:
    try:
        return stat.S_ISDIR(os.stat(path, dir_fd=directory, follow_symlinks=False).st_mode)
    except FileNotFoundError:
        return False


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_WATCH_SECONDS)
    os._exit(1)


def main(parent: int, files_per_second: float) -> None:
    """Run the program."""
    # A signal for the job is its main process's to handle, and this one ends with that.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    paths = os.fsdecode(sys.stdin.buffer.read()).split("\0")[:-1]
    pace = Pace(files_per_second)
    with ThreadPoolExecutor(THREADS) as pool:
        for path in paths:
            errors = delete(path, pool, pace)
            if errors.count:
                print(json.dumps([path, errors.count, errors.first]), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]))
