"""Which checkpoints are kept: tables of entries and settings, with the exact set that stays."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridge.training.checkpointing.retention.policies import (
    Best,
    Entry,
    EveryHours,
    EveryIterations,
    Listed,
    MostRecent,
    Policy,
    policies_of,
    removable,
)
from bridge.training.config import CheckpointConfig


def entries(*iterations: int) -> list[Entry]:
    return [Entry(iteration) for iteration in iterations]


def by_hour(*hours: float) -> list[Entry]:
    """Iterations 1, 2, … that were committed at these hours."""
    return [Entry(number, hour * 3600) for number, hour in enumerate(hours, 1)]


def by_loss(*losses: float | None) -> list[Entry]:
    """Iterations 1, 2, … with these losses; None was not measured."""
    return [Entry(number, 0.0, {} if loss is None else {"loss": loss}) for number, loss in enumerate(losses, 1)]


@pytest.mark.parametrize(
    ("policy", "present", "kept"),
    [
        (MostRecent(1), entries(), set()),
        (MostRecent(1), entries(10, 20, 30), {30}),
        (MostRecent(2), entries(10, 20, 30), {20, 30}),
        (MostRecent(9), entries(10, 20, 30), {10, 20, 30}),
        (EveryIterations(20), entries(0, 10, 20, 30, 40), {0, 20, 40}),
        (EveryIterations(7), entries(10, 20), set()),
        (EveryHours(2), by_hour(0, 1, 1.9, 2, 3, 4.5, 6, 6.5), {1, 4, 6, 8}),
        (EveryHours(2), by_hour(5), {1}),
        # The clock is set back by less than a span, by more, and forward.
        (EveryHours(4), by_hour(10, 11, 9, 10, 13.5, 14), {1, 6}),
        (EveryHours(4), by_hour(10, 11, 2, 3, 5, 6.5), {1, 3, 6}),
        (EveryHours(4), by_hour(10, 1e6, 1e6 + 1, 12, 13), {1, 2, 4}),
        (Best(1, "loss"), by_loss(3, 1, 2), {2}),
        (Best(2, "loss"), by_loss(3, 1, 2), {2, 3}),
        (Best(2, "loss", "max"), by_loss(3, 1, 2), {1, 3}),
        (Best(1, "loss"), by_loss(1, 1, 2), {2}),
        (Best(1, "loss", "max"), by_loss(2, 2, 1), {2}),
        (Best(2, "loss"), by_loss(None, 5, None, 4, None), {2, 4}),
        (Best(1, "perplexity"), by_loss(3, 1, 2), {1, 2, 3}),
        (Listed(frozenset({20, 50})), entries(10, 20, 30), {20}),
    ],
)
def test_what_a_policy_keeps(policy: Policy, present: list[Entry], kept: set[int]) -> None:
    assert policy.keeps(present) == kept


@pytest.mark.parametrize(
    ("settings", "policies"),
    [
        ({}, ()),
        ({"most_recent_k": 3}, (MostRecent(3),)),
        ({"save_retain_interval": 100}, (EveryIterations(100),)),
        ({"retain_every_hours": 2.0}, (EveryHours(2.0),)),
        ({"retain_best_k": 2, "retain_best_metric": "loss"}, (Best(2, "loss", "min"),)),
        (
            {"retain_best_k": 2, "retain_best_metric": "accuracy", "retain_best_mode": "max"},
            (Best(2, "accuracy", "max"),),
        ),
        ({"most_recent_k": 1, "retain_iterations": [5, 7]}, (MostRecent(1), Listed(frozenset({5, 7})))),
        ({"retain_iterations": [5]}, ()),
        (
            {"most_recent_k": 1, "save_retain_interval": 100, "retain_every_hours": 2.0},
            (MostRecent(1), EveryIterations(100), EveryHours(2.0)),
        ),
    ],
)
def test_the_settings_that_make_policies(settings: dict[str, Any], policies: tuple[Policy, ...]) -> None:
    assert policies_of(CheckpointConfig(**settings)) == policies


@pytest.mark.parametrize(
    ("present", "policies", "tracked", "protected", "removed"),
    [
        # Nothing is asked for: everything stays.
        ((10, 20, 30), [], 30, (), []),
        ((10, 20, 30), [MostRecent(1)], 30, (), [10, 20]),
        # Any policy is enough.
        ((10, 20, 30, 40), [MostRecent(1), EveryIterations(20)], 40, (), [10, 30]),
        # As in Megatron-LM, an interval keeps its multiples and the last.
        ((10, 20, 30, 50), [EveryIterations(20)], 50, (), [10, 30]),
        ((10, 20, 30), [Listed(frozenset({99}))], 30, (), [10, 20]),
        # A protected one takes no place from those that a policy chooses.
        ((10, 20, 30), [MostRecent(2)], 30, (10,), []),
        ((10, 20, 30, 40), [MostRecent(2)], 40, (10,), [20]),
        # After a rollback to 1000: what is newer than the tracker's target stays, and takes no place either.
        ((2000, 3000, 1500), [MostRecent(1)], 1500, (1500,), []),
        ((1000, 1500, 1600, 2000, 3000), [MostRecent(2)], 1600, (1600,), [1000]),
        # Once the run has passed them, they are like any other.
        ((1500, 2000, 3000, 3100), [MostRecent(1)], 3100, (3100,), [1500, 2000, 3000]),
        # The checkpoint just saved is older than the one that the tracker names.
        ((10, 20, 30), [MostRecent(1)], 30, (10,), [20]),
    ],
)
def test_what_is_removed(
    present: tuple[int, ...], policies: list[Policy], tracked: int, protected: tuple[int, ...], removed: list[int]
) -> None:
    assert removable(entries(*present), policies, tracked, protected) == removed


@pytest.mark.parametrize(
    ("present", "left_behind", "policies", "removed"),
    [
        # 20 and 30 were left behind by a start that went on from 10: 10 keeps its place, and they keep theirs.
        ((10, 20, 30, 35), (20, 30), [MostRecent(2)], [20]),
        ((10, 20, 30, 35, 40), (20, 30), [MostRecent(2)], [10, 20, 30]),
        ((10, 20, 30, 35), (20, 30), [MostRecent(1)], [10, 20, 30]),
        ((10, 20, 30, 35), (), [MostRecent(2)], [10, 20]),
    ],
)
def test_what_was_left_behind_takes_no_place_from_the_others(
    present: tuple[int, ...], left_behind: tuple[int, ...], policies: list[Policy], removed: list[int]
) -> None:
    found = [Entry(iteration, left_behind=iteration in left_behind) for iteration in present]
    assert removable(found, policies, present[-1], (present[-1],)) == removed


@pytest.mark.parametrize(
    ("told", "policies", "removed"),
    [
        # 10 and 20 may both have been left behind, or one of them, or none: each may be the one before 30.
        ({10: None, 20: None, 30: False}, [MostRecent(2)], []),
        ({10: None, 20: None, 30: False, 40: False}, [MostRecent(2)], [10, 20]),
        ({10: False, 20: None, 30: None, 40: False}, [MostRecent(2)], []),
        ({5: False, 10: False, 20: None, 30: None, 40: False}, [MostRecent(2)], [5]),
        ({10: None, 20: True, 30: None, 40: False}, [MostRecent(1)], [10, 20, 30]),
        ({10: None, 20: None, 30: None}, [MostRecent(1)], []),
        ({10: None, 20: None, 30: None}, [EveryIterations(20)], [10]),
    ],
)
def test_what_nobody_knows_takes_no_place_either(
    told: dict[int, bool | None], policies: list[Policy], removed: list[int]
) -> None:
    found = [Entry(iteration, left_behind=left) for iteration, left in told.items()]
    assert removable(found, policies, max(told)) == removed


POLICIES = st.lists(
    st.one_of(
        st.builds(MostRecent, st.integers(1, 4)),
        st.builds(EveryIterations, st.integers(1, 5)),
        st.builds(EveryHours, st.sampled_from([1.0, 2.5])),
        st.builds(Best, st.integers(1, 3), st.just("loss"), st.sampled_from(["min", "max"])),
        st.builds(Listed, st.frozensets(st.integers(0, 12), max_size=3)),
    ),
    max_size=3,
)
_told = st.sampled_from([False, False, True, None])
ENTRIES = st.dictionaries(
    st.integers(0, 12),
    st.tuples(st.floats(-1e5, 1e5), st.dictionaries(st.just("loss"), st.sampled_from([1.0, 2.0, 3.0])), _told),
).map(lambda found: [Entry(iteration, *about) for iteration, about in found.items()])


@given(ENTRIES, POLICIES, st.integers(0, 12), st.sets(st.integers(0, 12)))
def test_a_second_sweep_finds_nothing_more(
    present: list[Entry], policies: list[Policy], tracked: int, protected: set[int]
) -> None:
    """What is kept is kept for a reason that does not depend on what was deleted beside it."""
    removed = set(removable(present, policies, tracked, protected))
    assert not removed & ({tracked} | protected)
    assert all(iteration < tracked for iteration in removed)
    left = [entry for entry in present if entry.iteration not in removed]
    assert removable(left, policies, tracked, protected) == []


@given(ENTRIES, POLICIES, st.integers(0, 12), st.sets(st.integers(0, 12)))
def test_to_know_what_was_left_behind_never_removes_anything_more(
    present: list[Entry], policies: list[Policy], tracked: int, protected: set[int]
) -> None:
    unknown = [Entry(entry.iteration, entry.created, entry.metrics) for entry in present]
    removed = removable(present, policies, tracked, protected)
    assert set(removed) <= set(removable(unknown, policies, tracked, protected))


@given(ENTRIES, POLICIES, st.integers(0, 12), st.lists(st.booleans(), min_size=13, max_size=13))
def test_whatever_is_true_of_what_nobody_knows_no_more_is_removed_than_if_it_was_known(
    present: list[Entry], policies: list[Policy], tracked: int, truth: list[bool]
) -> None:
    # Which spans of hours there are depends on all that there is; then nobody can say what each truth would keep.
    among = [policy for policy in policies if not isinstance(policy, EveryHours)]
    known = [
        replace(entry, left_behind=truth[entry.iteration]) if entry.left_behind is None else entry for entry in present
    ]
    assert set(removable(present, among, tracked)) <= set(removable(known, among, tracked))
