"""When a run saves and when it ends: tables of settings, moments and the exact decision."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridge.training.config import CheckpointConfig, TrainingConfig
from bridge.training.save_decisions import (
    AnyOf,
    AtIteration,
    Decision,
    EveryIterations,
    MinutesRunning,
    MinutesSinceSave,
    Moment,
    OnRequest,
    OnSignal,
    SaveDecisions,
    Trigger,
    watched_signals,
)

TERM = "SIGTERM was received"
LATE = "train.exit_duration_in_mins (1.5) has passed"
EXIT_3 = "iteration 6 is a multiple of train.exit_interval (3)"
EVERY_2 = "iteration 6 is a multiple of checkpoint.save_interval (2)"
LOCAL_3 = "iteration 6 is a multiple of checkpoint.non_persistent_save_interval (3)"
MINUTES = "checkpoint.save_interval_minutes (0.5) has passed since the last save"
USR1 = "SIGUSR1 was received"
REQUEST = "SAVE_NOW was found in checkpoint.save"
END = "train.train_iters (6) reached"
NOTHING = Decision()


@pytest.mark.parametrize(
    ("trigger", "moment", "why"),
    [
        (EveryIterations(2, "every"), Moment(6), "iteration 6 is a multiple of every (2)"),
        (EveryIterations(4, "every"), Moment(6), None),
        (MinutesSinceSave(0.5), Moment(6, seconds_since_save=29.9), None),
        (MinutesSinceSave(0.5), Moment(6, seconds_since_save=30.0), MINUTES),
        (MinutesSinceSave(0.5), Moment(6, seconds_running=300.0), None),
        (MinutesRunning(1.5), Moment(6, seconds_running=89.9), None),
        (MinutesRunning(1.5), Moment(6, seconds_running=90.0), LATE),
        (MinutesRunning(1.5), Moment(6, seconds_since_save=300.0), None),
        (OnSignal("SIGUSR1"), Moment(6, frozenset({"SIGTERM", "SIGUSR1"})), USR1),
        (OnSignal("SIGUSR1"), Moment(6, frozenset({"SIGTERM"})), None),
        (OnRequest(), Moment(6, requested=True), REQUEST),
        (OnRequest(), Moment(6), None),
        (AtIteration(6), Moment(5), None),
        (AtIteration(6), Moment(6), END),
        (AtIteration(6), Moment(7), END),
        (AnyOf(), Moment(6), None),
        (AnyOf((AtIteration(9), OnRequest())), Moment(6), None),
        (AnyOf((AtIteration(9), OnRequest())), Moment(6, requested=True), REQUEST),
        (AnyOf((AtIteration(6), OnRequest())), Moment(6, requested=True), END),
    ],
)
def test_a_trigger_says_why_it_is_met(trigger: Trigger, moment: Moment, why: str | None) -> None:
    assert trigger.due(moment) == why


TERMINATED = Moment(6, frozenset({"SIGTERM"}))
LONG = Moment(6, seconds_running=90.0, seconds_since_save=90.0)
HANDLED: dict[str, Any] = {"exit_signal_handler": True}
LOCAL: dict[str, Any] = {"non_persistent_save_interval": 3, "non_persistent_ckpt_type": "local"}


@pytest.mark.parametrize(
    ("train", "checkpoint", "moment", "expected"),
    [
        ({}, {"save": "dir", "save_interval": 2}, Moment(6), Decision("persistent", EVERY_2)),
        ({}, {"save": "dir", "save_interval": 4}, Moment(6), NOTHING),
        ({}, {"save": "dir"}, Moment(6), NOTHING),
        ({}, {"save": "dir", "save_interval": 0}, Moment(6), NOTHING),
        ({}, {"save_interval": 2}, Moment(6), NOTHING),
        # minutes, signals and requests
        ({}, {"save": "dir", "save_interval_minutes": 0.5}, LONG, Decision("persistent", MINUTES)),
        ({}, {"save": "dir", "save_interval_minutes": 2.0}, LONG, NOTHING),
        ({}, {"save_interval_minutes": 0.5}, LONG, NOTHING),
        ({}, {"save": "dir", "save_interval": 0, "save_interval_minutes": 0.5}, LONG, Decision("persistent", MINUTES)),
        (
            {},
            {"save": "dir", "save_signal": "SIGUSR1"},
            Moment(6, frozenset({"SIGUSR1"})),
            Decision("persistent", USR1),
        ),
        ({}, {"save": "dir", "save_interval": 0}, Moment(6, requested=True), Decision("persistent", REQUEST)),
        # early exits
        (HANDLED, {"save": "dir", "save_interval": 4}, TERMINATED, Decision("persistent", TERM, TERM)),
        (HANDLED, {"save": "dir", "save_interval": 0}, TERMINATED, Decision("persistent", TERM, TERM)),
        (HANDLED, {"save_interval": 2}, TERMINATED, Decision(exit_reason=TERM)),
        ({}, {"save": "dir", "save_interval": 4}, TERMINATED, NOTHING),
        (
            HANDLED | {"exit_signal": "SIGINT"},
            {"save": "dir"},
            Moment(6, frozenset({"SIGINT"})),
            Decision("persistent", "SIGINT was received", "SIGINT was received"),
        ),
        ({"exit_duration_in_mins": 1.5}, {"save": "dir"}, LONG, Decision("persistent", LATE, LATE)),
        ({"exit_duration_in_mins": 1.5}, {}, LONG, Decision(exit_reason=LATE)),
        ({"exit_interval": 3}, {"save": "dir", "save_interval": 2}, Moment(6), Decision("persistent", EXIT_3, EXIT_3)),
        ({"exit_interval": 3}, {}, Moment(6), Decision(exit_reason=EXIT_3)),
        ({"exit_interval": 5}, {"save": "dir", "save_interval": 4}, Moment(6), NOTHING),
        # non-persistent saves give way to persistent ones, whatever calls for these
        ({}, {"save": "dir", "save_interval": 4, **LOCAL}, Moment(6), Decision("non-persistent", LOCAL_3)),
        ({}, {"save": "dir", "save_interval": 2, **LOCAL}, Moment(6), Decision("persistent", EVERY_2)),
        ({}, {"save": "dir", **LOCAL}, Moment(6, requested=True), Decision("persistent", REQUEST)),
        ({}, LOCAL, Moment(6), Decision("non-persistent", LOCAL_3)),
        ({"exit_interval": 3}, {"save": "dir", **LOCAL}, Moment(6), Decision("persistent", EXIT_3, EXIT_3)),
        ({"exit_interval": 3}, LOCAL, Moment(6), Decision("non-persistent", LOCAL_3, EXIT_3)),
        (HANDLED, {"save": "dir", **LOCAL}, TERMINATED, Decision("persistent", TERM, TERM)),
    ],
)
def test_after_step_6_of_100(
    train: dict[str, Any], checkpoint: dict[str, Any], moment: Moment, expected: Decision
) -> None:
    decisions = SaveDecisions.of(TrainingConfig(**train), CheckpointConfig(**checkpoint), train_iters=100)
    assert decisions.after_step(moment) == expected


@pytest.mark.parametrize(
    ("train", "checkpoint", "moment", "expected"),
    [
        ({}, {"save": "dir"}, Moment(6), Decision("persistent", END, END)),
        ({}, {"save": "dir", "save_interval": 4}, Moment(6), Decision("persistent", END, END)),
        ({}, {"save": "dir", "save_interval": 3}, Moment(6), Decision("persistent", END, END)),
        ({}, {"save": "dir", "save_interval": 0}, Moment(6), Decision(exit_reason=END)),
        ({}, {"save_interval": 3}, Moment(6), Decision(exit_reason=END)),
        ({}, {"save": "dir", **LOCAL}, Moment(6), Decision("persistent", END, END)),
        ({}, {"save": "dir", "save_interval": 0, **LOCAL}, Moment(6), Decision(exit_reason=END)),
        (HANDLED, {"save": "dir", "save_interval": 0}, TERMINATED, Decision("persistent", TERM, END)),
        ({}, {"save": "dir", "save_interval": 0}, Moment(6, requested=True), Decision("persistent", REQUEST, END)),
    ],
)
def test_after_the_last_step(
    train: dict[str, Any], checkpoint: dict[str, Any], moment: Moment, expected: Decision
) -> None:
    decisions = SaveDecisions.of(TrainingConfig(**train), CheckpointConfig(**checkpoint), train_iters=6)
    assert decisions.after_step(moment) == expected


@pytest.mark.parametrize(
    ("save", "worth_saving", "expected"),
    [
        ("dir", True, Decision("persistent", "not a number", "not a number")),
        ("dir", False, Decision(exit_reason="not a number")),
        (None, True, Decision(exit_reason="not a number")),
    ],
)
def test_after_a_step_that_was_not_taken(save: str | None, worth_saving: bool, expected: Decision) -> None:
    decisions = SaveDecisions.of(TrainingConfig(), CheckpointConfig(save=save, save_interval=0), train_iters=6)
    assert decisions.after_failed_step("not a number", worth_saving) == expected


@pytest.mark.parametrize(
    ("kind", "is_over", "checkpoint", "expected"),
    [
        (None, False, {"save": "dir"}, NOTHING),
        (None, True, {"save": "dir"}, NOTHING),
        ("persistent", True, {"save": "dir"}, NOTHING),
        ("in_memory", False, {"save": "dir"}, Decision("persistent", "it was restored from memory")),
        ("in_memory", True, {"save": "dir"}, Decision("persistent", "it was restored from memory")),
        ("in_memory", True, {}, NOTHING),
        ("local", False, {"save": "dir"}, NOTHING),
        ("local", True, {"save": "dir"}, Decision("persistent", "the end of training is in no persistent checkpoint")),
        ("local", True, {"save": "dir", "save_interval": 0}, NOTHING),
        (
            "non_persistent_global",
            True,
            {"save": "dir"},
            Decision("persistent", "the end of training is in no persistent checkpoint"),
        ),
    ],
)
def test_after_a_load(kind: Any, is_over: bool, checkpoint: dict[str, Any], expected: Decision) -> None:
    decisions = SaveDecisions.of(TrainingConfig(), CheckpointConfig(**checkpoint), train_iters=6)
    assert decisions.after_load(kind, is_over) == expected


INTERVALS = st.one_of(st.none(), st.integers(1, 8))


@given(
    start=st.integers(0, 20),
    length=st.integers(1, 20),
    save_interval=INTERVALS,
    non_persistent=INTERVALS,
    exit_interval=INTERVALS,
    requests=st.sets(st.integers(0, 40)),
)
def test_every_run_ends_with_a_persistent_save_of_its_last_step_and_saves_no_step_twice(
    start: int,
    length: int,
    save_interval: int | None,
    non_persistent: int | None,
    exit_interval: int | None,
    requests: set[int],
) -> None:
    checkpoint = CheckpointConfig(
        save="dir",
        save_interval=save_interval,
        non_persistent_save_interval=non_persistent,
        non_persistent_ckpt_type=None if non_persistent is None else "local",
    )
    decisions = SaveDecisions.of(TrainingConfig(exit_interval=exit_interval), checkpoint, start + length)
    step, decision = start, Decision()
    persistent, others = [], []
    while decision.exit_reason is None:
        step += 1
        decision = decisions.after_step(Moment(step, requested=step in requests))
        if decision.save is not None:
            (persistent if decision.save == "persistent" else others).append(step)
        assert (decision.save is None) is (decision.why is None)
    steps = range(start + 1, step + 1)
    assert step == start + length or (exit_interval is not None and step % exit_interval == 0)
    assert persistent[-1] == step
    assert set(persistent) == {
        n for n in steps if n == step or n in requests or (save_interval is not None and n % save_interval == 0)
    }
    due = {n for n in steps if non_persistent is not None and n % non_persistent == 0}
    assert set(others) == due - set(persistent)
    assert len(persistent) + len(others) == len({*persistent, *others})


@pytest.mark.parametrize(
    ("handler", "exit_signal", "save_signal", "watched"),
    [
        (False, "SIGTERM", None, ()),
        (True, "SIGTERM", None, ("SIGTERM",)),
        (True, "SIGINT", "SIGUSR2", ("SIGINT", "SIGUSR2")),
        (False, "SIGTERM", "SIGUSR1", ("SIGUSR1",)),
    ],
)
def test_only_signals_with_a_meaning_are_watched(
    handler: bool, exit_signal: Any, save_signal: Any, watched: tuple[str, ...]
) -> None:
    train = TrainingConfig(exit_signal_handler=handler, exit_signal=exit_signal)
    assert watched_signals(train, CheckpointConfig(save_signal=save_signal)) == watched
