"""What a process and those that it has started take of the machine (Linux)."""

from __future__ import annotations

import os
import threading
from pathlib import Path

_TICKS = os.sysconf("SC_CLK_TCK")


def tree(pid: int) -> list[int]:
    """A process and all that descend from it, as far as they live."""
    found, waiting = [], [pid]
    while waiting:
        process = waiting.pop()
        found.append(process)
        try:
            tasks = [*Path(f"/proc/{process}/task").iterdir()]
        except OSError:
            continue
        for task in tasks:
            try:
                waiting += map(int, (task / "children").read_text().split())
            except OSError:
                continue
    return found


def memory_of(pid: int) -> int:
    """Bytes that a process and its descendants hold; what several of them share counts once."""
    total = 0
    for process in tree(pid):
        try:
            lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
        except OSError:  # it has ended
            continue
        total += sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
    return total


def processor_seconds(pid: int) -> float:
    """Seconds of the processor that a process and its descendants have taken, ended children included."""
    total = 0
    for process in tree(pid):
        try:
            after_name = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        total += sum(map(int, after_name[11:15]))
    return total / _TICKS


class PeakMemory:
    """The most that a process and its descendants hold while it is entered, as far as looks at it see that."""

    def __init__(self, pid: int, seconds: float = 0.02) -> None:
        """
        Args:
            pid: the process.
            seconds: between two looks.
        """
        self.bytes = 0
        self._pid, self._seconds = pid, seconds
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PeakMemory:
        self.bytes = memory_of(self._pid)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(self._seconds):
            self.bytes = max(self.bytes, memory_of(self._pid))

    def __exit__(self, *details: object) -> None:
        self._done.set()
        self._thread.join()
