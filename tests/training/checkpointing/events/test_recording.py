"""What a save and a load note of themselves, by a clock that the test turns."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

import pytest

from bridge.training.checkpointing.events.describing import describe
from bridge.training.checkpointing.events.kinds import (
    CheckpointLoaded,
    Event,
    SaveCommitted,
    SaveFailed,
    SaveStarted,
    SaveWritten,
    SnapshotTaken,
    UploadFailed,
    UploadFinished,
)
from bridge.training.checkpointing.events.recording import (
    Pace,
    Phases,
    SaveRecord,
    fell_back,
    record_load,
    record_retention,
    resolved,
)
from bridge.training.checkpointing.events.spans import Span, Spans
from bridge.training.checkpointing.events.stream import EventStream
from bridge.training.checkpointing.resolve import Offer, Persistent, Source, preference
from bridge.training.checkpointing.retention.sweeper import Swept
from bridge.training.checkpointing.transaction import Committed


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now

    def after(self, seconds: float) -> None:
        self.now += seconds


class Listener(EventStream):
    """Keeps the events, without their times."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[Event] = []

    def emit(self, event: Event) -> None:
        self.events.append(dataclasses.replace(event, time=0.0))


COMMITTED = Committed(Path("save/iter_0000008"), 8, "persistent", 2_000_000_000, 99.0, 4.0, {"loss": 1.5})
COMMON: dict[str, Any] = {"time": 0.0, "iteration": 8, "tier": "persistent", "checkpoint_format": "torch_dist"}


def begin(clock: Clock, listener: Listener, pace: Pace, background: bool) -> SaveRecord:
    record = SaveRecord(listener, pace, 8, "persistent", "torch_dist", clock(), background, clock)
    clock.after(1.0)
    record.begun(Path("save"))
    clock.after(2.0)
    record.captured()
    return record


def test_a_save_in_the_background_counts_what_training_waited_for(caplog: pytest.LogCaptureFixture) -> None:
    clock, listener, pace = Clock(), Listener(), Pace(resumed=-57.0)
    record = begin(clock, listener, pace, background=True)
    clock.after(10.0)
    record.written()
    clock.after(0.5)
    with caplog.at_level(logging.INFO):
        record.committed(COMMITTED, speak=True)
    assert listener.events == [
        SaveStarted(**COMMON, path="save", background=True),
        SnapshotTaken(**COMMON, blocking_seconds=3.0),
        SaveWritten(**COMMON, blocking_seconds=3.0, background_seconds=10.0),
        SaveCommitted(
            **COMMON,
            path="save/iter_0000008",
            blocking_seconds=3.5,
            background_seconds=10.0,
            total_bytes=2_000_000_000,
            write_seconds=4.0,
            since_seconds=70.5,
            metrics={"loss": 1.5},
        ),
    ]
    assert caplog.messages == [
        "saved the persistent checkpoint of iteration 8 to save/iter_0000008: 1.86 GiB at 0.50 GB/s, training stood "
        "still for 3.50 s (5.0 % of the 70.5 s since the save before), 10.00 s in the background"
    ]


def test_a_synchronous_save_is_all_waiting(caplog: pytest.LogCaptureFixture) -> None:
    clock, listener, pace = Clock(), Listener(), Pace()
    record = begin(clock, listener, pace, background=False)
    clock.after(10.0)
    record.written()
    clock.after(0.5)
    with caplog.at_level(logging.INFO):
        record.committed(COMMITTED, speak=False)
    last = listener.events[-1]
    assert isinstance(last, SaveCommitted)
    assert (last.blocking_seconds, last.background_seconds, last.since_seconds) == (13.5, 0.0, None)
    assert caplog.messages == []


def test_saves_that_are_too_slow_are_told_as_what_they_cost() -> None:
    """Training waits for the first when the second is due, and for the second at the end of the run."""
    clock, listener, pace = Clock(), Listener(), Pace(resumed=0.0)

    def begin_at_once() -> SaveRecord:
        record = SaveRecord(listener, pace, 8, "persistent", "torch_dist", clock(), True, clock)
        record.begun(Path("save"))
        clock.after(1.0)
        record.captured()
        return record

    def wait_for(record: SaveRecord) -> None:
        record.halted()
        clock.after(30.0)
        record.written()
        clock.after(5.0)
        record.committed(COMMITTED, speak=False)

    first = begin_at_once()
    clock.after(9.0)  # training
    wait_for(first)
    second = begin_at_once()
    clock.after(4.0)  # training
    into_memory = SaveRecord(listener, pace, 8, "in_memory", "torch_dist", clock(), False, clock)
    clock.after(1.0)
    into_memory.committed(COMMITTED, speak=False)
    wait_for(second)
    told = [event for event in listener.events if isinstance(event, SaveCommitted)]
    assert [(e.blocking_seconds, e.background_seconds, e.since_seconds) for e in told] == [
        (36.0, 9.0, 45.0),
        (1.0, 0.0, 51.0),  # the first one into memory
        (36.0, 5.0, 41.0),
    ]
    assert sum(e.since_seconds or 0.0 for e in told[::2]) == clock.now


def test_what_is_published_and_fails_all_the_same_is_told_so() -> None:
    clock, listener = Clock(), Listener()
    begin(clock, listener, Pace(), background=True).failed(OSError(5, "Input/output error"), published=True)
    (event,) = [event for event in listener.events if isinstance(event, SaveFailed)]
    assert event.published
    assert describe(event) == (
        "saving the persistent checkpoint of iteration 8 failed after it was published: OSError: [Errno 5] "
        "Input/output error"
    )


class Unspeakable(Exception):
    def __str__(self) -> str:
        raise ValueError("broken")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (Unspeakable(), "what it says cannot be told"),
        (OSError("x" * 5000), f"{'x' * 2048} ... (904 characters are left out) ... {'x' * 2048}"),
        (OSError("GET https://bob:se@cret@host/path refused"), "GET https://host/path refused"),
    ],
    ids=["broken", "long", "with a password"],
)
def test_whatever_an_error_says_it_is_told(error: Exception, message: str) -> None:
    listener = Listener()
    begin(Clock(), listener, Pace(), background=False).failed(error)
    (event,) = [event for event in listener.events if isinstance(event, SaveFailed)]
    assert event.message == message


def test_where_a_load_comes_from_is_told_as_people_write_it() -> None:
    away = Source(
        Path("s3://bucket/run/iter_0000010"), False, "it is the newest", origin="s3://bucket/run/iter_0000010"
    )
    near = preference(Persistent(None, 0), [Offer("local", 12, Path("/tmp/snapshots"))], None)[0]
    assert (resolved(away).path, resolved(away).iteration) == ("s3://bucket/run/iter_0000010", 10)
    assert (resolved(near).iteration, resolved(near).tier) == (12, "local")
    fell = fell_back(near, away, ValueError("torn"))
    assert (fell.path, fell.iteration, fell.to) == ("/tmp/snapshots", 12, "s3://bucket/run/iter_0000010")


def test_a_failure_is_noted_once_and_not_after_the_publication() -> None:
    clock, listener = Clock(), Listener()
    begin(clock, listener, Pace(), background=True).failed(OSError(28, "No space left on device"))
    assert listener.events[-1] == SaveFailed(
        **COMMON,
        blocking_seconds=3.0,
        background_seconds=0.0,
        error="OSError",
        message="[Errno 28] No space left on device",
    )
    record = begin(clock, listener, Pace(), background=False)
    record.written()
    record.committed(COMMITTED, speak=False)
    record.failed(RuntimeError("a callback"))
    assert isinstance(listener.events[-1], SaveCommitted)


def test_retention_notes_what_went_and_how_many_stay() -> None:
    listener = Listener()
    record_retention(listener, Path("save"), 8, "persistent", Swept((2, 4), kept=3))
    assert [(event.kind, event.iteration) for event in listener.events] == [
        ("checkpoint_deleted", 2),
        ("checkpoint_deleted", 4),
        ("checkpoints_retained", 8),
    ]


def test_the_phases_of_a_load_add_up() -> None:
    clock, listener = Clock(), Listener()
    phases = Phases(clock)
    for name, seconds in (("examining", 1.0), ("preparing", 2.0), ("examining", 4.0), ("reading", 8.0)):
        clock.after(seconds)
        phases.end(name)
    line = record_load(
        listener,
        "a",
        3,
        "local",
        phases,
        checkpoint_format=None,
        total_bytes=None,
        bytes_read=5,
    )
    (event,) = listener.events
    assert event == CheckpointLoaded(
        time=0.0,
        iteration=3,
        tier="local",
        path="a",
        bytes_read=5,
        blocking_seconds=15.0,
        phases={"examining": 5.0, "preparing": 2.0, "reading": 8.0},
    )
    assert line == "loaded iteration 3 from a: 15.00 s (examining 5.00 s, preparing 2.00 s, reading 8.00 s)"


def test_spans_hold_what_was_inside_them() -> None:
    spans = Spans()
    common: dict[str, Any] = {"iteration": 8, "tier": "persistent"}
    assert spans.after(SaveStarted(time=100.0, **common)) == []
    assert spans.after(SnapshotTaken(time=102.0, **common)) == []
    assert spans.after(SaveWritten(time=110.0, **common)) == []
    (save,) = spans.after(SaveCommitted(time=111.0, **common, blocking_seconds=4.0, background_seconds=8.0, path="p"))
    assert save == Span(
        "checkpoint.save",
        99.0,
        111.0,
        {
            "checkpoint.iteration": 8,
            "checkpoint.tier": "persistent",
            "checkpoint.blocking_seconds": 4.0,
            "checkpoint.background_seconds": 8.0,
            "checkpoint.path": "p",
        },
        None,
        (
            Span("checkpoint.snapshot", 99.0, 102.0),
            Span("checkpoint.write", 102.0, 110.0),
            Span("checkpoint.publish", 110.0, 111.0),
        ),
    )
    (failed,) = spans.after(SaveFailed(time=120.0, **common, blocking_seconds=5.0, error="OSError", message="no"))
    assert (failed.start, failed.end, failed.error, failed.children) == (115.0, 120.0, "OSError: no", ())
    (upload,) = spans.after(UploadFinished(time=90.0, iteration=3, background_seconds=4.0, path="s3://b/i"))
    assert (upload.name, upload.start, upload.end, upload.error) == ("checkpoint.upload", 86.0, 90.0, None)
    assert upload.attributes["checkpoint.path"] == "s3://b/i"
    (refused,) = spans.after(UploadFailed(time=90.0, path="s3://b", message="refused"))
    assert (refused.start, refused.error) == (90.0, "refused")
    (load,) = spans.after(CheckpointLoaded(time=50.0, blocking_seconds=3.0, phases={"reading": 2.0, "applying": 1.0}))
    assert [(child.name, child.start, child.end) for child in load.children] == [
        ("checkpoint.reading", 47.0, 49.0),
        ("checkpoint.applying", 49.0, 50.0),
    ]
