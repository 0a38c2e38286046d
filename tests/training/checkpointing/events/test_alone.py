"""Events of what no run has done, and of saves that were left out."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from bridge.training.checkpointing.events.file import read_events
from bridge.training.checkpointing.events.kinds import (
    CheckpointConverted,
    CheckpointRescued,
    Event,
    SaveSkipped,
    SaveStarted,
)
from bridge.training.checkpointing.events.recording import Pace, SaveRecord, record_alone, record_skipped
from bridge.training.checkpointing.events.report.view import Trouble, build_view
from bridge.training.checkpointing.events.stream import EventStream
from bridge.training.checkpointing.layout import EVENTS, RUN_CONFIG
from tests.training.checkpointing.events.samples import COMMON, committed


class Listener(EventStream):
    """Keeps what is emitted."""

    def __init__(self) -> None:
        super().__init__()
        self.heard: list[Event] = []

    def emit(self, event: Event) -> None:
        self.heard.append(event)


def test_of_skipped_saves_in_a_row_the_first_is_an_event() -> None:
    listener, pace = Listener(), Pace()

    def skip(iteration: int) -> bool:
        return record_skipped(listener, pace, iteration, "persistent", "torch_dist", Path("run"))

    assert [skip(3), skip(4), skip(5)] == [True, False, False]
    assert [(event.kind, event.iteration) for event in listener.heard] == [("save_skipped", 3)]
    assert listener.heard[0] == SaveSkipped(time=listener.heard[0].time, iteration=3, path="run", **COMMON)
    SaveRecord(listener, pace, 6, "persistent", "torch_dist", 0.0, True).begun(Path("run"))
    assert [skip(7), skip(8)] == [True, False]


def test_the_report_has_one_line_for_a_row_of_them() -> None:
    def skipped(iteration: int) -> SaveSkipped:
        return SaveSkipped(time=100.0 + iteration, iteration=iteration, path="run", **COMMON)

    events: list[Event] = [
        SaveStarted(time=101.0, iteration=1, **COMMON),
        *map(skipped, (2, 3, 4)),
        committed(1, 104.5),
        SaveStarted(time=105.0, iteration=5, **COMMON),
        skipped(6),
        committed(5, 107.0),
    ]
    assert build_view("run", events, made=200.0).troubles == (
        Trouble(102.0, 2, "saves skipped", "the one before was still being written; 3 in a row, up to iteration 4"),
        Trouble(106.0, 6, "save skipped", "the one before was still being written; 1 in a row, up to iteration 6"),
    )


RESCUED = CheckpointRescued(
    time=1.0, iteration=7, tier="persistent", checkpoint_format="torch_dist", total_bytes=3 << 20, path="p", seconds=1.5
)
CONVERTED = CheckpointConverted(
    time=2.0, iteration=7, tier="persistent", checkpoint_format="zarr", path="q", source="p", source_format="torch_dist"
)


def test_what_no_run_has_done_is_in_the_file_and_in_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "bridge")
    checkpoint = tmp_path / "iter_0000007"
    checkpoint.mkdir()
    for event in (RESCUED, CONVERTED):
        record_alone(event, checkpoint)
    assert read_events(tmp_path).events == (RESCUED, CONVERTED)
    assert caplog.messages == [
        "rescued the persistent checkpoint of iteration 7 from memory to p: 3.0 MiB, 1.50 s",
        "converted p (torch_dist) to q (zarr)",
    ]


def test_a_run_that_keeps_no_events_gets_none(tmp_path: Path) -> None:
    checkpoint = tmp_path / "iter_0000007"
    checkpoint.mkdir()
    (checkpoint / RUN_CONFIG).write_text("logger: {checkpoint_events: false}\n")
    record_alone(RESCUED, checkpoint)
    assert not (tmp_path / EVENTS).exists()


def test_what_cannot_be_kept_is_only_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    checkpoint = tmp_path / "iter_0000007"
    checkpoint.mkdir()
    (tmp_path / EVENTS).mkdir()
    record_alone(RESCUED, checkpoint)
    (checkpoint / RUN_CONFIG).write_text("no mapping")
    record_alone(CONVERTED, checkpoint)
    assert [message.split(":")[0] for message in caplog.messages] == [
        f"checkpoint_rescued is not kept in {tmp_path}",
        f"checkpoint_converted is not kept in {tmp_path}",
    ]
