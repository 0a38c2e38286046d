"""The stream of events: whoever saves and loads emits them, and sinks take them off the critical path."""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import queue
import threading
import time
from collections.abc import Callable
from typing import Protocol

from bridge.training.checkpointing.events.describing import error_text
from bridge.training.checkpointing.events.kinds import Event

logger = logging.getLogger(__name__)

CAPACITY = 1000
"""Events that may wait for a sink; what comes on top is counted and dropped."""
_EARLIER = 64
"""Events from the start of a run that are kept for a sink that comes later."""
CLOSE_SECONDS = 10.0
"""How long the end of a run waits for its sinks, all of them together."""


class Sink(Protocol):
    """Takes events, one after the other, in a thread of its own. It may be slow, and it may fail."""

    def take(self, event: Event) -> None:
        """Take an event in."""

    def close(self) -> None:
        """There is no further event."""


class _Lane:
    """The events that wait for one sink, and the thread that brings them there."""

    def __init__(self, name: str, sink: Sink) -> None:
        self.name = name
        self.dropped = 0
        self.failed = 0
        self._sink = sink
        self._pid = os.getpid()
        self._waiting: queue.Queue[Event | None] = queue.Queue(CAPACITY)
        self._ended = threading.Event()
        self._closing = False
        # Started at once: a fork, as that of a background writer, shall meet no thread that is just beginning.
        threading.Thread(target=self._run, name=f"events-{name}", daemon=True).start()

    def put(self, event: Event) -> None:
        if self._closing or os.getpid() != self._pid:
            return
        try:
            self._waiting.put_nowait(event)
        except queue.Full:
            self.dropped += 1

    def flush(self, deadline: float) -> bool:
        """Wait until what has been put is taken; return whether it is."""
        while self._waiting.unfinished_tasks:
            if time.monotonic() >= deadline or os.getpid() != self._pid:
                return False
            time.sleep(0.005)
        return True

    def ask_to_end(self) -> None:
        """Let the thread end when it has brought what waits; for that, an event goes from a queue that is full."""
        if os.getpid() != self._pid or self._closing:
            return
        self._closing = True
        while True:
            try:
                self._waiting.put_nowait(None)
                return
            except queue.Full:
                with contextlib.suppress(queue.Empty):
                    self._waiting.get_nowait()
                    self._waiting.task_done()
                    self.dropped += 1

    def wait(self, deadline: float) -> None:
        """Wait until the thread has ended, and say what did not come through."""
        if os.getpid() != self._pid:
            return
        if not self._ended.wait(max(0.0, deadline - time.monotonic())) or self.dropped or self.failed:
            given_up = 0 if self._ended.is_set() else max(0, self._waiting.unfinished_tasks - 1)
            logger.warning(
                "checkpoint events for %s: %d dropped, %d failed, %d given up",
                self.name,
                self.dropped,
                self.failed,
                given_up,
            )

    def _run(self) -> None:
        try:
            while self._bring(self._waiting.get()):
                pass
        finally:
            self._ended.set()

    def _bring(self, event: Event | None) -> bool:
        """Bring an event to the sink, or None for the end; return whether there may be more."""
        try:
            if event is None:
                self._sink.close()
            else:
                self._sink.take(event)
        except BaseException as error:  # even one that means to end the process: here it would end a thread
            self.failed += 1
            if self.failed == 1:
                logger.warning(
                    "CHECKPOINT EVENTS DO NOT REACH %s (said once; saves go on): %s: %s",
                    self.name,
                    type(error).__name__,
                    error_text(error),
                )
        finally:
            self._waiting.task_done()
        return event is not None


class EventStream:
    """Brings events to sinks. Without a sink, as on every rank but 0, it does nothing.

    `emit` neither waits nor raises. Each sink has a queue and a thread of its own, so one that hangs holds up no other
    either.
    """

    def __init__(self) -> None:
        self._lanes: dict[str, _Lane] = {}
        self._closed: list[_Lane] = []
        self._earlier: list[Event] | None = []
        """What came first; None when a sink has had it, or nobody will ask for it."""
        self._at_exit = False

    @property
    def dropped(self) -> int:
        """Events that a sink was too slow for."""
        return sum(lane.dropped for lane in [*self._lanes.values(), *self._closed])

    @property
    def failed(self) -> int:
        """Events that a sink failed to take."""
        return sum(lane.failed for lane in [*self._lanes.values(), *self._closed])

    def has(self, name: str) -> bool:
        """Whether there is a sink of this name."""
        return name in self._lanes

    def add(self, name: str, make: Callable[[], Sink], earlier: bool = False) -> None:
        """Bring events to a further sink; one of the same name is left as it is.

        Args:
            name: what messages call it.
            make: makes it, here and now; what it raises passes through.
            earlier: it gets what was emitted before, too, as the first sink that asks for that.
        """
        if name in self._lanes:
            return
        lane = _Lane(name, make())
        if earlier and self._earlier is not None:
            for event in self._earlier:
                lane.put(event)
            self._earlier = None
        self._lanes[name] = lane
        if not self._at_exit:
            self._at_exit = True
            atexit.register(self.close)

    def emit(self, event: Event) -> None:
        """Hand an event to every sink."""
        if self._earlier is not None and len(self._earlier) < _EARLIER:
            self._earlier.append(event)
        for lane in self._lanes.values():
            lane.put(event)

    def flush(self, seconds: float = CLOSE_SECONDS) -> bool:
        """Wait until all sinks have taken what was emitted; return whether they have in so many seconds."""
        deadline = time.monotonic() + seconds
        return all(lane.flush(deadline) for lane in self._lanes.values())

    def close(self, seconds: float = CLOSE_SECONDS) -> None:
        """Bring what waits to the sinks and close them; what takes longer than `seconds` is given up. May be repeated.

        Events are dropped from then on, and a sink may be added anew.
        """
        lanes, self._lanes = self._lanes, {}
        self._earlier = None
        self._closed += lanes.values()
        deadline = time.monotonic() + seconds
        for lane in lanes.values():
            lane.ask_to_end()
        for lane in lanes.values():
            lane.wait(deadline)
        if self._at_exit:
            self._at_exit = False
            atexit.unregister(self.close)
