"""A sink that is made where it works: in the thread that brings it events, and not before it gets one."""

from __future__ import annotations

from collections.abc import Callable

from bridge.training.checkpointing.events.kinds import Event
from bridge.training.checkpointing.events.stream import Sink


class LateSink:
    """For programs that are elsewhere. One that cannot be reached costs events, and is tried again with the next."""

    def __init__(self, make: Callable[[], Sink]) -> None:
        """
        Args:
            make: makes the sink; it may take its time, and it may fail.
        """
        self._make = make
        self._sink: Sink | None = None

    def take(self, event: Event) -> None:
        """Take an event in. What making the sink raises passes through."""
        if self._sink is None:
            self._sink = self._make()
        self._sink.take(event)

    def close(self) -> None:
        """There is no further event."""
        if self._sink is not None:
            self._sink.close()
