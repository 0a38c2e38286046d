"""Events as lines of JSON in the save directory, for people, for `bridge-ckpt report`, and for the next start.

One line is one write at the end of the file, so a process that is killed leaves at most its last line torn; the next
line begins on a line of its own, and readers pass over what is not an event. Two files bound the size: a full one takes
the place of the one before.
"""

from __future__ import annotations

import contextlib
import errno
import os
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from bridge.training.checkpointing.events.kinds import Event, from_json, to_json
from bridge.training.checkpointing.layout import EARLIER_EVENTS, EVENTS

LIMIT = 4 << 20
"""Bytes of one file."""
_SHARE = 4
"""One event may take one part in so many of a file."""
_TRIES = 10
"""How often a reader looks again, when a file has taken the place of the other in the meantime."""
_READ_LIMIT = 64 << 20
"""Bytes of a file, its last, that are read: one that another program has filled is not taken into memory."""


class EventFile:
    """The sink that appends to the files of a directory."""

    def __init__(self, directory: Path, limit: int = LIMIT) -> None:
        """Make the file, if there is none. Where that fails, every event tries again.

        Args:
            directory: an existing directory that this run may write.
            limit: bytes of one file.
        """
        self._path = directory / EVENTS
        self._earlier = directory / EARLIER_EVENTS
        self._limit = limit
        self._descriptor: int | None = None
        self._is_torn = False
        with contextlib.suppress(OSError):
            self._open()

    def take(self, event: Event) -> None:
        """Append a line.

        Raises:
            OSError: it could not be written, or not all of it.
            ValueError: it is larger than a file may be; what is kept is not given up for it.
        """
        line = f"{to_json(event)}\n".encode()
        if len(line) > self._limit // _SHARE:
            raise ValueError(f"an event of {len(line)} bytes is too large for a file of {self._limit}")
        descriptor = self._open()
        if os.fstat(descriptor).st_size + len(line) >= self._limit:
            if self._is_current(descriptor):  # or another writer has made room
                self._path.replace(self._earlier)
            descriptor = self._open()
        line = b"\n" + line if self._is_torn else line
        self._is_torn = True  # until all of it is written
        written = os.write(descriptor, line)
        if written != len(line):
            raise OSError(errno.EIO, f"only {written} of {len(line)} bytes were written", str(self._path))
        self._is_torn = False

    def close(self) -> None:
        """Close the file."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _open(self) -> int:
        """The open file, opened anew where another one, or none, has taken its place."""
        if self._descriptor is not None:
            if self._is_current(self._descriptor):
                return self._descriptor
            self.close()
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW
        self._descriptor = os.open(self._path, flags, 0o666)
        size = os.fstat(self._descriptor).st_size
        self._is_torn = size > 0 and os.pread(self._descriptor, 1, size - 1) != b"\n"
        return self._descriptor

    def _is_current(self, descriptor: int) -> bool:
        try:
            there = self._path.lstat()
        except OSError:
            return False
        opened = os.fstat(descriptor)
        return (there.st_dev, there.st_ino) == (opened.st_dev, opened.st_ino)


@dataclass(frozen=True)
class EventLog:
    """What the files of a directory tell."""

    events: tuple[Event, ...]
    """In the order in which they were written."""
    unreadable: int = 0
    """Lines that are no event of this version: torn by a crash, or of another version."""


def read_events(directory: Path) -> EventLog:
    """Read the events of a directory of checkpoints; none if it has no files of events.

    Raises:
        OSError: a file is there and cannot be read.
    """
    events: list[Event] = []
    unreadable = 0
    with contextlib.ExitStack() as opened:
        for stream in _open_both(directory, opened):
            for line in _lines(stream):
                event = from_json(line)
                if event is not None:
                    events.append(event)
                elif line.strip():
                    unreadable += 1
    return EventLog(tuple(events), unreadable)


def _open_both(directory: Path, opened: contextlib.ExitStack) -> list[BinaryIO]:
    """The files that there are, the earlier one first; once open, it does no harm if they change their names."""
    earlier = directory / EARLIER_EVENTS
    streams: list[BinaryIO | None] = []
    for _ in range(_TRIES):
        streams = [_open_file(path, opened) for path in (earlier, directory / EVENTS)]
        if _is_at(earlier, streams[0]):
            break
    return [stream for stream in streams if stream is not None]


def _open_file(path: Path, opened: contextlib.ExitStack) -> BinaryIO | None:
    try:
        return opened.enter_context(path.open("rb")) if path.is_file() else None
    except FileNotFoundError:  # gone since
        return None


def _is_at(path: Path, opened: BinaryIO | None) -> bool:
    """Whether an open file is still the one at a path; None, whether there is still none."""
    try:
        there = path.stat()
    except FileNotFoundError:
        return opened is None
    return opened is not None and os.path.samestat(there, os.fstat(opened.fileno()))


def _lines(stream: BinaryIO) -> list[bytes]:
    size = os.fstat(stream.fileno()).st_size
    stream.seek(max(0, size - _READ_LIMIT))
    return stream.read(_READ_LIMIT).split(b"\n")
