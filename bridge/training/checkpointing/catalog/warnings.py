"""What the package warns of, as values: a look at a directory tells it in its own words."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager


class _Collector(logging.Handler):
    def __init__(self, messages: list[str]) -> None:
        super().__init__(logging.WARNING)
        self._messages = messages

    def emit(self, record: logging.LogRecord) -> None:
        self._messages.append(record.getMessage())


@contextmanager
def collected() -> Iterator[list[str]]:
    """What the package warns of goes into a list instead of the log."""
    package = logging.getLogger("bridge")
    messages: list[str] = []
    handler = _Collector(messages)
    propagate = package.propagate
    package.addHandler(handler)
    package.propagate = False
    try:
        yield messages
    finally:
        package.propagate = propagate
        package.removeHandler(handler)
