"""What the order of calls gives away: tables of calls and findings."""

from __future__ import annotations

import pytest

from tests.faults.order import violations
from tests.faults.tracer import Call

STAGING = ".saving-iter_0000002-01234567"
STAGED = [("mkdir", STAGING), ("openat", f"{STAGING}/a"), ("write", f"{STAGING}/a"), ("fsync", f"{STAGING}/a")]
SEALED = [
    *STAGED,
    ("fsync", STAGING),
    ("openat", f"{STAGING}/manifest.json"),
    ("write", f"{STAGING}/manifest.json"),
    ("fsync", f"{STAGING}/manifest.json"),
    ("fsync", STAGING),
]
PUBLISH = ("rename", STAGING, "iter_0000002")
NEW_TRACKER = [("openat", ".t"), ("write", ".t"), ("fsync", ".t"), ("rename", ".t", "latest_train_state.pt")]
SYNC = ("fsync", ".")
RETIRE = ("rename", "iter_0000001", ".trash-iter_0000001-01234567")


def calls(*described: tuple[str, ...]) -> list[Call]:
    return [
        Call(number, "rank 0", name, tuple(files), 1, 0, creates=name == "openat")
        for number, (name, *files) in enumerate(described, 1)
    ]


def test_a_commit_as_it_should_be() -> None:
    legacy = ("rename", ".t", "latest_checkpointed_iteration.txt")
    assert violations(calls(*SEALED, PUBLISH, SYNC, *NEW_TRACKER, SYNC, *NEW_TRACKER[:3], legacy, SYNC, RETIRE)) == []


@pytest.mark.parametrize(
    ("described", "found"),
    [
        ([*STAGED[:3], ("fsync", STAGING), ("openat", f"{STAGING}/manifest.json")], "before the fsync of"),
        ([*SEALED[:-1], PUBLISH], f"comes before the fsync of {STAGING}"),
        ([*SEALED[:-2], ("fsync", STAGING), PUBLISH], f"comes before the fsync of {STAGING}/manifest.json"),
        ([*SEALED, PUBLISH, *NEW_TRACKER], "moves a tracker before the names are synced of iter_0000002"),
        ([("mkdir", "."), *SEALED, PUBLISH, SYNC, *NEW_TRACKER], "moves a tracker before the names are synced of ."),
        ([*SEALED, PUBLISH, SYNC, *NEW_TRACKER[:2], NEW_TRACKER[3]], "comes before the fsync of .t"),
        ([*SEALED, *NEW_TRACKER], "moves the tracker though no checkpoint was published"),
        ([*SEALED, RETIRE], "puts a checkpoint away while a save is under way"),
    ],
)
def test_a_call_that_comes_too_early(described: list[tuple[str, ...]], found: str) -> None:
    (problem,) = violations(calls(*described))
    assert problem.startswith("call ") and found in problem


def test_a_replaced_checkpoint_may_go_while_its_replacement_is_sealed() -> None:
    replaced = ("rename", "iter_0000002", ".trash-iter_0000002-01234567")
    assert violations(calls(*SEALED, replaced, PUBLISH)) == []


def test_calls_that_failed_change_nothing() -> None:
    failed = calls(*SEALED[:-1], PUBLISH)
    failed[-1].error = 28
    assert violations(failed) == []
