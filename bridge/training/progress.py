"""How far long work has come, for whoever waits for it: load, verify, convert and export all show it with this.

On a terminal it is a bar that is drawn over itself, with rate and time left. Elsewhere, as in the log of a job, it is a
plain line now and then. Work that is over soon shows nothing, and `quiet` shows nothing ever. Of many ranks, rank 0
alone has one.

    with Progress(quiet=options.quiet) as progress:
        for name, size in files:
            check(name)
            done += size
            progress("verifying", done, total)
"""

from __future__ import annotations

import contextlib
import shutil
import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import TextIO

_PATIENCE = 0.5
"""Seconds of work before a bar is first drawn."""
_REDRAW = 0.2
"""Seconds between two drawings of a bar."""
_FIRST_LINE = 10.0
"""Seconds of work before the first plain line."""
_LINES = 30.0
"""Seconds between two plain lines."""
_CLEAR = "\r\x1b[K"
_BAR = 24


class Progress:
    """Shows how far each step of some work is. Any thread may call it."""

    def __init__(
        self,
        stream: TextIO | None = None,
        *,
        quiet: bool = False,
        unit: str = "bytes",
        say: Callable[[str], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            stream: where it is shown; None is standard error, and a process without one shows nothing there.
            quiet: show nothing.
            unit: what is counted; `bytes` are shown in powers of 1024.
            say: takes plain lines, a logger's method for one; None writes them to `stream`.
            clock: tells seconds, and never goes back.
        """
        self._stream: TextIO | None = sys.stderr if stream is None else stream
        self._quiet = quiet or (self._stream is None and say is None)
        self._unit = unit
        self._say = say or self._write_line
        self._clock = clock
        self._on_terminal = _is_terminal(self._stream)
        self._lock = threading.Lock()
        self._step = ""
        self._started = self._next = 0.0
        self._drawn = False

    def __call__(self, step: str, done: int, total: int) -> None:
        """Take in how far a step is, and show it if that is due.

        Args:
            step: what is being done. Another one begins anew.
            done: of it, so far.
            total: of it, altogether; 0 if that is not known.
        """
        if self._quiet:
            return
        with self._lock:
            now = self._clock()
            if step != self._step:
                self._step, self._started = step, now
                self._next = now + (_PATIENCE if self._on_terminal else _FIRST_LINE)
            if now < self._next:
                return
            self._next = now + (_REDRAW if self._on_terminal else _LINES)
            seconds = now - self._started
            if self._on_terminal:
                line = bar_line(step, done, total, seconds, shutil.get_terminal_size().columns - 1, self._unit)
                self._write(f"{_CLEAR}{line}")
                self._drawn = True
            else:
                self._say(progress_line(step, done, total, seconds, self._unit))

    def clear(self) -> None:
        """Take the bar away: the work is over, or something else is to be written."""
        with self._lock:
            if self._drawn:
                self._write(_CLEAR)
                self._drawn = False

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.clear()

    def _write_line(self, line: str) -> None:
        self._write(f"{line}\n")

    def _write(self, text: str) -> None:
        # The work does not fail because nobody can be shown how far it is.
        with contextlib.suppress(Exception):
            if self._stream is not None:
                self._stream.write(text)
                self._stream.flush()


def _is_terminal(stream: object) -> bool:
    """Whether it is one; what a program has put in the place of standard error need not be able to tell."""
    try:
        return bool(stream.isatty())  # type: ignore[attr-defined]
    except Exception:
        return False


def progress_line(step: str, done: int, total: int, seconds: float, unit: str = "bytes") -> str:
    """A step in words: how far, how fast, how long it is still going to take.

    Args:
        step: what is being done.
        done: of it, so far.
        total: of it, altogether; 0 if that is not known.
        seconds: since it began.
        unit: what is counted.
    """
    if not total:
        return f"{step} {_amount(done, unit)}{_rate(done, seconds, unit)}"
    return f"{step} {_amount(done, unit, total)}{_rate(done, seconds, unit)}{_left(done, total, seconds)}"


def bar_line(step: str, done: int, total: int, seconds: float, width: int, unit: str = "bytes") -> str:
    """The same with a bar before the numbers, no longer than `width`. The arguments are those of `progress_line`."""
    line = progress_line(step, done, total, seconds, unit)
    if not total:
        return line[:width]
    share = min(1.0, done / total)
    filled = int(share * _BAR)
    bar = f"{step} [{'#' * filled}{'-' * (_BAR - filled)}] {int(100 * share):3d} % {line[len(step) + 1 :]}"
    return bar if len(bar) <= width else line[:width]


def duration(seconds: float) -> str:
    """Seconds as `m:ss`, or `h:mm:ss` from an hour on."""
    whole = int(seconds)
    hours, rest = divmod(whole, 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"


def _amount(done: int, unit: str, total: int | None = None) -> str:
    if unit != "bytes":
        return f"{done} {unit}" if total is None else f"{done} of {total} {unit}"
    largest = done if total is None else total
    scale, name = (2**30, "GiB") if largest >= 2**30 else (2**20, "MiB")
    digits = 2 if scale == 2**30 else 1
    end = "" if total is None else f" of {total / scale:.{digits}f}"
    return f"{done / scale:.{digits}f}{end} {name}"


def _rate(done: int, seconds: float, unit: str) -> str:
    if not done or seconds <= 0:
        return ""
    rate = done / seconds
    return f", {rate / 2**20:.0f} MiB/s" if unit == "bytes" else f", {rate:.1f} {unit}/s"


def _left(done: int, total: int, seconds: float) -> str:
    if not done or seconds <= 0:
        return ""
    return f", {duration(max(0, total - done) * seconds / done)} left"
