"""When a run saves and when it ends."""

from __future__ import annotations

import os
import signal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridge.training.config import CheckpointConfig, TrainingConfig
from bridge.training.exit_conditions import (
    ExitWatch,
    SignalFlag,
    StepDecision,
    decide_after_step,
    final_save_due,
)

TERM = "SIGTERM was received"
LATE = "train.exit_duration_in_mins (1.5) has passed"
INTERVAL = "iteration 6 is a multiple of train.exit_interval (3)"


@pytest.mark.parametrize(
    ("save", "save_interval", "exit_interval", "signalled", "late", "expected"),
    [
        ("dir", 2, None, False, False, StepDecision(True, None)),
        ("dir", 4, None, False, False, StepDecision(False, None)),
        ("dir", None, None, False, False, StepDecision(False, None)),
        ("dir", 0, None, False, False, StepDecision(False, None)),
        (None, 2, None, False, False, StepDecision(False, None)),
        ("dir", 4, None, True, False, StepDecision(True, TERM)),
        ("dir", 2, None, True, True, StepDecision(True, TERM)),
        (None, 2, None, True, False, StepDecision(False, TERM)),
        ("dir", 0, None, True, False, StepDecision(True, TERM)),
        ("dir", 4, 3, False, True, StepDecision(True, LATE)),
        (None, None, None, False, True, StepDecision(False, LATE)),
        ("dir", 4, 3, False, False, StepDecision(True, INTERVAL)),
        ("dir", 2, 3, False, False, StepDecision(True, INTERVAL)),
        (None, 2, 3, False, False, StepDecision(False, INTERVAL)),
        ("dir", 4, 5, False, False, StepDecision(False, None)),
    ],
)
def test_after_step_6(
    save: str | None,
    save_interval: int | None,
    exit_interval: int | None,
    signalled: bool,
    late: bool,
    expected: StepDecision,
) -> None:
    train = TrainingConfig(exit_interval=exit_interval, exit_duration_in_mins=1.5)
    checkpoint = CheckpointConfig(save=save, save_interval=save_interval)
    assert decide_after_step(6, train, checkpoint, signal_received=signalled, duration_exceeded=late) == expected


@pytest.mark.parametrize(
    ("step", "first_step", "last_saved", "save", "save_interval", "due"),
    [
        (10, 0, None, "dir", None, True),
        (10, 0, 8, "dir", 4, True),
        (10, 0, 10, "dir", 5, False),
        (10, 0, None, "dir", 0, False),
        (10, 0, None, None, 4, False),
        (10, 10, None, "dir", 4, False),
        (0, 0, None, "dir", 4, False),
        (10, 9, None, "dir", 5, True),
    ],
)
def test_final_save(
    step: int, first_step: int, last_saved: int | None, save: str | None, save_interval: int | None, due: bool
) -> None:
    checkpoint = CheckpointConfig(save=save, save_interval=save_interval)
    assert final_save_due(step, first_step, last_saved, checkpoint) is due


@given(
    start=st.integers(0, 20),
    length=st.integers(0, 20),
    save_interval=st.one_of(st.none(), st.integers(1, 8)),
    exit_interval=st.one_of(st.none(), st.integers(1, 8)),
)
def test_every_run_saves_its_last_step_exactly_once(
    start: int, length: int, save_interval: int | None, exit_interval: int | None
) -> None:
    train = TrainingConfig(exit_interval=exit_interval)
    checkpoint = CheckpointConfig(save="dir", save_interval=save_interval)
    step, saved, exit_reason = start, [], None
    while step < start + length and exit_reason is None:
        step += 1
        decision = decide_after_step(step, train, checkpoint)
        exit_reason = decision.exit_reason
        if decision.save:
            saved.append(step)
    if exit_reason is None and final_save_due(step, start, saved[-1] if saved else None, checkpoint):
        saved.append(step)
    assert saved == sorted(set(saved))
    assert (saved[-1:] == [step]) is (length > 0)


def test_the_flag_remembers_sigterm_and_gives_the_handler_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with SignalFlag(enabled=True) as flag:
        assert not flag.received
        os.kill(os.getpid(), signal.SIGTERM)
        assert flag.received
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_disabled_flag_leaves_the_handler_alone() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with SignalFlag(enabled=False):
        assert signal.getsignal(signal.SIGTERM) is before


def test_without_conditions_ranks_do_not_communicate() -> None:
    # torch.distributed does not run here, so a collective would raise.
    assert ExitWatch(TrainingConfig(), SignalFlag(enabled=False)).agree() == (False, False)
