"""Signals that a run answers at the end of a step instead of dying of them."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from types import FrameType, TracebackType
from typing import Any

FOR_THE_JOB = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
"""Signals that schedulers, launchers and terminals send to all processes of a job at once."""


def leave_signals_to_parent() -> None:
    """Ignore in a helper process what is sent to the whole job: its parent answers, and needs the helper for that."""
    for number in FOR_THE_JOB:
        signal.signal(number, signal.SIG_IGN)


class CaughtSignals:
    """Remembers signals while it is entered, and gives the handlers back afterwards.

    Enter it in the main thread: Python allows no other to set handlers. A signal that arrives again is remembered
    once, and interrupts nothing.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self._received: set[str] = set()
        self._previous: dict[str, Any] = {}

    def received(self, name: str) -> bool:
        """Whether this process has received the signal, and nobody has forgotten it since."""
        return name in self._received

    def forget(self, name: str) -> None:
        """Take the signal as answered."""
        self._received.discard(name)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self._received.add(signal.Signals(number).name)

    def __enter__(self) -> CaughtSignals:
        for name in self.names:
            self._previous[name] = signal.signal(signal.Signals[name], self._remember)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for name, handler in self._previous.items():
            # None stands for a handler that Python did not set and cannot set again.
            signal.signal(signal.Signals[name], signal.SIG_DFL if handler is None else handler)
        self._previous.clear()
