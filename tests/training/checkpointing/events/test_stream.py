"""The stream: whatever sinks do, whoever emits goes on at once."""

from __future__ import annotations

import logging
import os
import threading
import time

import pytest

from bridge.training.checkpointing.events import stream as streams
from bridge.training.checkpointing.events.kinds import Event, SaveStarted
from bridge.training.checkpointing.events.stream import CAPACITY, EventStream


class Kept:
    """Keeps what it takes."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.closed = 0

    def take(self, event: Event) -> None:
        self.events.append(event)

    def close(self) -> None:
        self.closed += 1


class Stuck(Kept):
    """Takes nothing before it is let go."""

    def __init__(self) -> None:
        super().__init__()
        self.go = threading.Event()

    def take(self, event: Event) -> None:
        self.go.wait()
        super().take(event)


class Broken(Kept):
    def take(self, event: Event) -> None:
        super().take(event)
        raise OSError(28, "No space left on device")


def events(count: int) -> list[SaveStarted]:
    return [SaveStarted(time=float(number), iteration=number) for number in range(count)]


def test_every_sink_gets_every_event_in_order() -> None:
    stream, sinks = EventStream(), [Kept(), Kept()]
    for index, sink in enumerate(sinks):
        stream.add(f"sink {index}", lambda sink=sink: sink)  # type: ignore[misc]
    for event in events(500):
        stream.emit(event)
    assert stream.flush()
    stream.close()
    for sink in sinks:
        assert (sink.events, sink.closed) == (events(500), 1)
    assert (stream.dropped, stream.failed) == (0, 0)


def test_without_a_sink_nothing_happens() -> None:
    threads = threading.active_count()
    stream = EventStream()
    for event in events(10_000):
        stream.emit(event)
    assert stream.flush(0.0)
    stream.close()
    assert threading.active_count() == threads


def test_one_name_has_one_sink() -> None:
    stream, first, second = EventStream(), Kept(), Kept()
    stream.add("it", lambda: first)
    stream.add("it", lambda: second)
    stream.emit(events(1)[0])
    stream.close()
    assert (len(first.events), len(second.events)) == (1, 0)


def test_a_sink_that_hangs_holds_up_neither_the_emitter_nor_another_sink(caplog: pytest.LogCaptureFixture) -> None:
    stream, stuck, kept = EventStream(), Stuck(), Kept()
    stream.add("stuck", lambda: stuck)
    stream.add("kept", lambda: kept)
    for start in range(0, 3000, 500):
        for event in events(3000)[start : start + 500]:
            stream.emit(event)
        while len(kept.events) < start + 500:
            time.sleep(0.001)
    assert kept.events == events(3000)
    assert stream.dropped == 3000 - CAPACITY - 1  # the sink holds one
    assert not stream.flush(0.05)
    with caplog.at_level(logging.WARNING):
        stream.close(0.2)
    stuck.go.set()
    dropped = 3000 - CAPACITY
    assert caplog.messages == [f"checkpoint events for stuck: {dropped} dropped, 0 failed, {CAPACITY} given up"]
    assert kept.closed == 1


def test_a_sink_that_fails_is_told_of_once_and_gets_what_comes_later(caplog: pytest.LogCaptureFixture) -> None:
    stream, broken = EventStream(), Broken()
    stream.add("the disk", lambda: broken)
    with caplog.at_level(logging.WARNING):
        for event in events(5):
            stream.emit(event)
        stream.flush()
        assert stream.failed == 5
        stream.close()
    assert broken.events == events(5)
    assert caplog.messages == [
        "CHECKPOINT EVENTS DO NOT REACH the disk (said once; saves go on): OSError: [Errno 28] No space left on device",
        "checkpoint events for the disk: 0 dropped, 5 failed, 0 given up",
    ]


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt(), GeneratorExit()], ids=repr)
def test_a_sink_that_wants_to_end_the_process_ends_nothing(error: BaseException) -> None:
    class Leaving(Kept):
        def take(self, event: Event) -> None:
            super().take(event)
            raise error

    stream, leaving = EventStream(), Leaving()
    stream.add("leaving", lambda: leaving)
    for event in events(3):
        stream.emit(event)
    assert stream.flush()
    stream.close()
    assert (leaving.events, stream.failed, leaving.closed) == (events(3), 3, 1)


def test_a_sink_may_be_told_what_came_before_it_once() -> None:
    stream, first, second, third = EventStream(), Kept(), Kept(), Kept()
    stream.add("first", lambda: first)
    for event in events(100)[:80]:
        stream.emit(event)
    stream.add("second", lambda: second, earlier=True)
    stream.emit(events(81)[80])
    stream.add("third", lambda: third, earlier=True)
    stream.emit(events(82)[81])
    stream.close()
    assert first.events == events(82)
    assert second.events == [*events(64), *events(82)[80:]]
    assert third.events == events(82)[81:]


def test_after_the_close_events_are_dropped_and_a_sink_may_come_again() -> None:
    stream, first, second = EventStream(), Kept(), Kept()
    stream.add("it", lambda: first)
    stream.close()
    stream.close()
    stream.emit(events(1)[0])
    stream.add("it", lambda: second)
    stream.emit(events(2)[1])
    stream.close()
    assert (first.events, second.events) == ([], [events(2)[1]])


def test_a_fork_of_the_process_emits_nothing_and_closes_nothing() -> None:
    stream, kept = EventStream(), Kept()
    stream.add("it", lambda: kept)
    child = os.fork()
    if child == 0:
        stream.emit(events(1)[0])
        stream.flush(5.0)
        stream.close(5.0)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    stream.emit(events(2)[1])
    stream.close()
    assert kept.events == [events(2)[1]]


def test_what_a_sink_raises_when_it_is_made_passes_through() -> None:
    def make() -> Kept:
        raise ValueError("wrong")

    stream = EventStream()
    with pytest.raises(ValueError, match="wrong"):
        stream.add("it", make)
    assert not stream.has("it")
    assert streams.CLOSE_SECONDS <= 10.0
