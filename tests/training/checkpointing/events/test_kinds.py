"""Events as values and as lines of JSON."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest

from bridge.training.checkpointing.events import kinds
from bridge.training.checkpointing.events.describing import describe
from bridge.training.checkpointing.events.kinds import Event, SaveCommitted, from_json, to_json
from bridge.training.checkpointing.events.numbers import numbers_of

COMMITTED = SaveCommitted(
    time=1000.5,
    iteration=40,
    tier="persistent",
    checkpoint_format="torch_dist",
    total_bytes=3_000_000_000,
    blocking_seconds=0.5,
    background_seconds=2.0,
    path="runs/mine/iter_0000040",
    write_seconds=1.5,
    since_seconds=50.0,
    metrics={"loss": 2.5},
)


def filled(event: type[Event]) -> Event:
    """An event with something in every field."""
    values: dict[str, Any] = {}
    for item in dataclasses.fields(event):
        kind = str(item.type)
        if "CheckpointKind" in kind:
            values[item.name] = "local"
        elif kind.startswith("dict"):
            values[item.name] = {"a": 1.5}
        else:
            options = {"str": "text \ud800 \n", "int": 7, "float": 0.1, "bool": True}
            values[item.name] = next(value for name, value in options.items() if kind.startswith(name))
    return event(**values)


@pytest.mark.parametrize("event", kinds.KINDS.values(), ids=kinds.KINDS)
def test_every_event_comes_back_from_its_line(event: type[Event]) -> None:
    for given in (event(time=1.0), filled(event)):
        line = to_json(given)
        assert "\n" not in line
        assert from_json(line) == given
        assert describe(given)


def test_every_subclass_is_listed() -> None:
    assert set(kinds.KINDS.values()) == set(Event.__subclasses__())


def test_a_line_holds_what_is_known() -> None:
    assert json.loads(to_json(COMMITTED)) == {
        "event": "save_committed",
        "time": 1000.5,
        "iteration": 40,
        "tier": "persistent",
        "checkpoint_format": "torch_dist",
        "total_bytes": 3_000_000_000,
        "blocking_seconds": 0.5,
        "background_seconds": 2.0,
        "path": "runs/mine/iter_0000040",
        "write_seconds": 1.5,
        "since_seconds": 50.0,
        "metrics": {"loss": 2.5},
    }
    assert json.loads(to_json(kinds.LoadResolved(time=1.0))) == {"event": "load_resolved", "time": 1.0, "reason": ""}


@pytest.mark.parametrize(
    "line",
    [
        "",
        "{",
        "[]",
        "null",
        '{"event": "save_committed"}',
        '{"event": "of another version", "time": 1.0}',
        '{"event": ["save_failed"], "time": 1.0}',
        '{"event": "save_failed", "time": "now"}',
        '{"event": "save_failed", "time": NaN}',
        '{"event": "save_failed", "time": true}',
        '{"event": "save_failed", "time": 1.0, "iteration": 1.5}',
        '{"event": "save_failed", "time": 1.0, "tier": "cloud"}',
        '{"event": "save_committed", "time": 1.0, "metrics": {"loss": "low"}}',
        f'{{"event": "save_failed", "time": 1{"0" * 400}}}',
        '{"event": "save_failed", "time": 1e308}',
        '{"event": "save_failed", "time": -1.0}',
        f'{{"event": "save_failed", "time": 1.0, "iteration": 1{"0" * 400}}}',
        '{"event": "save_failed", "time": 1.0, "iteration": 9223372036854775808}',
        '{"event": "save_failed", "time": 1.0, "total_bytes": -1}',
        '{"event": "save_failed", "time": 1.0, "blocking_seconds": 1e308}',
        '{"event": "save_failed", "time": 1.0, "background_seconds": -5}',
        f'{{"event": "save_failed", "time": 1.0, "background_seconds": 1{"0" * 20}}}',
        '{"event": "checkpoint_loaded", "time": 1.0, "phases": {"reading": 1e300}}',
        '{"event": "save_committed", "time": 1.0, "metrics": {"loss": 1e308}}',
        '{"a":' * 100_000,
        to_json(COMMITTED)[:-5],
    ],
)
def test_what_is_no_event_is_none(line: str) -> None:
    assert from_json(line) is None
    assert from_json(line.encode()) is None


def test_fields_of_a_later_version_are_left_out() -> None:
    assert from_json('{"event": "save_failed", "time": 1, "colour": "red"}') == kinds.SaveFailed(time=1.0)


def test_numbers_that_are_not_finite_do_not_spoil_a_line() -> None:
    metrics = {"loss": math.nan, "grad_norm": 1e200, "reward": 0.5}
    event = dataclasses.replace(COMMITTED, blocking_seconds=math.inf, metrics=metrics)
    told = dataclasses.replace(COMMITTED, blocking_seconds=None, metrics={"reward": 0.5})
    assert from_json(to_json(event)) == told


def test_rate_and_share() -> None:
    assert COMMITTED.gigabytes_per_second == 2.0
    assert COMMITTED.stall_share == 0.01
    assert dataclasses.replace(COMMITTED, since_seconds=0.1).stall_share == 1.0
    unknown = SaveCommitted(time=1.0)
    assert (unknown.gigabytes_per_second, unknown.stall_share) == (None, None)
    for seconds in (0.0, 5e-324):
        assert dataclasses.replace(COMMITTED, write_seconds=seconds).gigabytes_per_second is None


DESCRIBED = [
    (
        COMMITTED,
        "saved the persistent checkpoint of iteration 40 to runs/mine/iter_0000040: 2.79 GiB at 2.00 GB/s, training "
        "stood still for 0.50 s (1.0 % of the 50.0 s since the save before), 2.00 s in the background",
    ),
    (
        SaveCommitted(iteration=1, tier="local", path="x", total_bytes=1 << 20, blocking_seconds=0.25),
        "saved the local checkpoint of iteration 1 to x: 1.0 MiB, training stood still for 0.25 s",
    ),
    (
        kinds.CheckpointLoaded(
            iteration=40, path="x", total_bytes=5 << 30, blocking_seconds=3.0, phases={"reading": 2.5, "applying": 0.5}
        ),
        "loaded iteration 40 from x: 5.00 GiB in 3.00 s (reading 2.50 s, applying 0.50 s)",
    ),
    (
        kinds.SaveFailed(iteration=3, tier="persistent", error="CheckpointSaveError", message="no room"),
        "saving the persistent checkpoint of iteration 3 failed: CheckpointSaveError: no room",
    ),
    (kinds.LoadResolved(reason="checkpoint.load is not set"), "nothing to load: checkpoint.load is not set"),
    (kinds.FellBack(path="a", to="b", message="a is damaged"), "passed over a, went back to b: a is damaged"),
    (
        kinds.UploadStarted(iteration=3, tier="persistent", path="s3://b/iter_0000003"),
        "uploading the persistent checkpoint of iteration 3 to s3://b/iter_0000003",
    ),
    (
        kinds.UploadFinished(
            iteration=3, tier="persistent", path="s3://b/iter_0000003", sent_bytes=1 << 30, background_seconds=2.0
        ),
        "uploaded the persistent checkpoint of iteration 3 to s3://b/iter_0000003: 1.00 GiB sent in 2.00 s, at 0.54 "
        "GB/s",
    ),
    (kinds.UploadFailed(path="s3://b", message="refused"), "uploading to s3://b failed: refused"),
    (
        kinds.UploadFailed(iteration=3, tier="persistent", path="s3://b/iter_0000003", message="refused"),
        "uploading the persistent checkpoint of iteration 3 to s3://b/iter_0000003 failed: refused",
    ),
]


@pytest.mark.parametrize(("event", "line"), DESCRIBED)
def test_events_in_words(event: Event, line: str) -> None:
    assert describe(event) == line


NUMBERS = [
    (
        COMMITTED,
        {
            "checkpoint/stall_seconds": 0.5,
            "checkpoint/background_seconds": 2.0,
            "checkpoint/gigabytes": 3.0,
            "checkpoint/gigabytes_per_second": 2.0,
            "checkpoint/stall_share": 0.01,
        },
    ),
    (SaveCommitted(tier="local", blocking_seconds=1.0), {"checkpoint/local/stall_seconds": 1.0}),
    (kinds.SaveFailed(tier="persistent"), {"checkpoint/failed": 1.0}),
    (kinds.CheckpointLoaded(tier="in_memory", blocking_seconds=2.0), {"checkpoint/in_memory/load_seconds": 2.0}),
    (kinds.FellBack(), {"checkpoint/fell_back": 1.0}),
    (kinds.CheckpointsRetained(kept=3, deleted=1), {"checkpoint/kept": 3.0, "checkpoint/deleted": 1.0}),
    (kinds.SaveStarted(), {}),
    (
        kinds.UploadFinished(tier="persistent", sent_bytes=3 * 10**9, background_seconds=1.5),
        {
            "checkpoint/upload_seconds": 1.5,
            "checkpoint/upload_gigabytes": 3.0,
            "checkpoint/upload_gigabytes_per_second": 2.0,
        },
    ),
    (kinds.UploadFailed(), {"checkpoint/upload_failed": 1.0}),
]


@pytest.mark.parametrize(("event", "numbers"), NUMBERS)
def test_events_in_numbers(event: Event, numbers: dict[str, float]) -> None:
    assert numbers_of(event) == numbers
