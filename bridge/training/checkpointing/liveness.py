"""Whether a process of ours still gets somewhere: what it and its children have computed and written, by the kernel."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from pathlib import Path

logger = logging.getLogger(__name__)

_PROC = Path("/proc")
_FEWEST_LOOKS = 4
LOOK_SECONDS = 1.0
"""Between two looks at a process."""


@dataclass(frozen=True)
class Progress:
    """What a tree of processes has done since its start."""

    cpu_ticks: int
    written: int
    """Bytes that were handed to the system."""
    is_stopped: bool
    """Whether the first of them is held by a signal or a debugger."""


def progress_of(pid: int) -> Progress | None:
    """Look at a process and its children; None where the system does not say, or it has ended."""
    ticks = written = 0
    is_stopped = False
    pending = [pid]
    while pending:
        current = pending.pop()
        try:
            # After the name, which is in brackets and may hold anything: state, and from the 12th field on the times.
            state, *fields = (_PROC / str(current) / "stat").read_text().rpartition(")")[2].split()
            ticks += int(fields[10]) + int(fields[11])
            written += _written(current)
            for task in (_PROC / str(current) / "task").iterdir():
                pending += map(int, (task / "children").read_text().split())
        except (OSError, ValueError, IndexError):
            if current == pid:
                return None
            continue
        if current == pid:
            is_stopped = state in "Tt"
    return Progress(ticks, written, is_stopped)


def _written(pid: int) -> int:
    for line in (_PROC / str(pid) / "io").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == "wchar":
            return int(value)
    return 0


@dataclass
class Watch:
    """Notices that a process has stopped getting anywhere. Asked often, it looks every second."""

    pid: int
    name: str
    limit: float
    """Seconds without progress after which it counts as stuck."""
    _seen: Progress | None = None
    _since: float = field(default_factory=time.monotonic)
    _looked: float = field(default_factory=time.monotonic)
    _looks: int = 0
    """In a row that have found nothing new."""
    _was_told: bool = False

    def problem(self) -> str | None:
        """What is wrong with the process, in words; None while it gets on, or where the system does not say."""
        now = time.monotonic()
        if now - self._looked < LOOK_SECONDS:
            return None
        self._looked = now
        found = progress_of(self.pid)
        if found is None:
            return None
        if found != self._seen:
            self._seen, self._since, self._looks = found, now, 0
        self._looks += 1
        how = "is held by a signal" if found.is_stopped else "neither computes nor writes"
        if found.is_stopped and not self._was_told:
            self._was_told = True
            logger.error(
                "the process %d of %s %s; it is ended if that lasts %g s", self.pid, self.name, how, self.limit
            )
        # After a time in which the job as a whole was held, a first look says nothing.
        if now - self._since < self.limit or self._looks < _FEWEST_LOOKS:
            return None
        return f"{how} and has done nothing for {self.limit:g} s"
