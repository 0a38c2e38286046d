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
    is_in_storage: bool = False
    """Whether one of their threads is inside the kernel and takes no signals, as while it waits for storage."""

    def is_as_far_as(self, other: Progress) -> bool:
        """Whether neither has done anything that the other has not, nor been stopped or let go meanwhile."""
        mine, theirs = ((each.cpu_ticks, each.written, each.is_stopped) for each in (self, other))
        return mine == theirs


def progress_of(pid: int) -> Progress | None:
    """Look at a process and its children; None where the system does not say, or it has ended."""
    ticks = written = 0
    is_stopped = is_in_storage = False
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
                is_in_storage |= (task / "stat").read_text().rpartition(")")[2].split()[0] == "D"
        except (OSError, ValueError, IndexError):
            if current == pid:
                return None
            continue
        if current == pid:
            is_stopped = state in "Tt"
    return Progress(ticks, written, is_stopped, is_in_storage)


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
    storage_limit: float = 0.0
    """One that is found waiting for storage at every look is left alone until so long after the watch began, because
    others wait no longer; but never ended sooner than `limit` after it came to a halt."""
    _seen: Progress | None = None
    _since: float = field(default_factory=time.monotonic)
    _began: float = field(default_factory=time.monotonic)
    _looked: float = field(default_factory=time.monotonic)
    _looks: int = 0
    """In a row that have found nothing new."""
    _was_told: bool = False
    _idle_since: float = field(default_factory=time.monotonic)
    """Since when it has neither got on nor been found waiting for storage."""
    _was_told_of_storage: bool = False

    def problem(self) -> str | None:
        """What is wrong with the process, in words; None while it gets on, or where the system does not say."""
        now = time.monotonic()
        if now - self._looked < LOOK_SECONDS:
            return None
        self._looked = now
        found = progress_of(self.pid)
        if found is None:
            return None
        if self._seen is None or not found.is_as_far_as(self._seen):
            self._seen, self._since, self._idle_since, self._looks = found, now, now, 0
        elif found.is_in_storage:
            self._idle_since = now
        self._looks += 1
        how = "is held by a signal" if found.is_stopped else "neither computes nor writes"
        self._tell(found, how, now)
        # After a time in which the job as a whole was held, a first look says nothing.
        if self._looks < _FEWEST_LOOKS:
            return None
        if now - self._idle_since >= self.limit:
            return f"{how} and has done nothing for {self.limit:g} s"
        if now >= self._end_of_patience():
            return f"waits for storage and has done nothing for {now - self._since:.0f} s"
        return None

    def _end_of_patience(self) -> float:
        return max(self._since + self.limit, self._began + self.storage_limit)

    def _tell(self, found: Progress, how: str, now: float) -> None:
        if found.is_stopped and not self._was_told:
            self._was_told = True
            logger.error(
                "the process %d of %s %s; it is ended if that lasts %g s", self.pid, self.name, how, self.limit
            )
        if found.is_in_storage and now - self._since >= self.limit and not self._was_told_of_storage:
            self._was_told_of_storage = True
            logger.error(
                "the process %d of %s has waited %g s for storage, which has not failed yet; it is ended if that lasts "
                "until %g s after its beginning",
                self.pid,
                self.name,
                self.limit,
                max(self._since - self._began + self.limit, self.storage_limit),
            )
