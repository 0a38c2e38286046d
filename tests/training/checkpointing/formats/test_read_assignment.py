"""Who reads what, in which rounds, and what is sent to whom."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridge.training.checkpointing.formats.read_assignment import (
    Assignment,
    Message,
    Segment,
    assign,
    messages_of,
    rounds_of,
)


def wants(*ranks: dict[str, int]) -> list[dict[tuple[Any, ...], int]]:
    return [{(name,): size for name, size in rank.items()} for rank in ranks]


ASSIGNMENTS: dict[str, tuple[list[dict[str, int]], dict[str, int]]] = {
    "nothing": ([{}, {}], {}),
    "one rank reads all of its own": ([{"a": 4, "b": 2}], {"a": 0, "b": 0}),
    "equal tensors are dealt out": ([{"a": 1, "b": 1, "c": 1, "d": 1}] * 2, {"a": 0, "b": 1, "c": 0, "d": 1}),
    "the largest first, and the rest balances it": (
        [{"a": 1, "b": 1, "c": 3, "d": 1}] * 2,
        {"c": 0, "a": 1, "b": 1, "d": 1},
    ),
    "bytes count, not tensors": ([{"big": 100, "s": 1, "t": 1, "u": 1}] * 2, {"big": 0, "s": 1, "t": 1, "u": 1}),
    "what one rank wants it reads, and gets less of the rest": (
        [{"own": 5, "a": 3, "b": 2}, {"a": 3, "b": 2}],
        {"own": 0, "a": 1, "b": 1},
    ),
    "only those who want a tensor may read it": (
        [{"all": 1, "some": 8}, {"all": 1, "some": 8}, {"all": 1}],
        {"some": 0, "all": 1},
    ),
    "nobody reads what nobody wants": ([{"a": 1}, {}], {"a": 0}),
    "empty tensors have a reader too": ([{"a": 0}, {"a": 0}], {"a": 0}),
}


@pytest.mark.parametrize(("given_wants", "expected"), ASSIGNMENTS.values(), ids=ASSIGNMENTS.keys())
def test_each_shard_has_the_expected_reader(given_wants: list[dict[str, int]], expected: dict[str, int]) -> None:
    assert assign(wants(*given_wants)).reader_of == {(name,): rank for name, rank in expected.items()}


def test_ranks_that_disagree_about_a_size_are_told_so() -> None:
    with pytest.raises(ValueError, match=r"\('a',\) has 4 bytes on one rank and 8 on rank 1"):
        assign(wants({"a": 4}, {"a": 8}))


sizes = st.integers(0, 50)
groups = st.integers(1, 6).flatmap(
    lambda ranks: st.dictionaries(
        st.text("abcdefgh", min_size=1, max_size=2),
        st.tuples(sizes, st.sets(st.integers(0, ranks - 1), min_size=1)),
        max_size=20,
    ).map(
        lambda units: [
            {(name,): size for name, (size, holders) in units.items() if rank in holders} for rank in range(ranks)
        ]
    )
)


@given(groups)
def test_every_shard_is_read_by_one_of_those_who_want_it(group: list[dict[tuple[Any, ...], int]]) -> None:
    assignment = assign(group)
    assert set(assignment.reader_of) == {unit for rank in group for unit in rank}
    for unit, reader in assignment.reader_of.items():
        assert unit in group[reader]
        assert assignment.wanted_by[unit] == tuple(rank for rank, units in enumerate(group) if unit in units)
    shares = [assignment.read_by(rank) for rank in range(len(group))]
    assert sorted(unit for share in shares for unit in share) == sorted(assignment.reader_of)


@given(groups)
def test_the_order_in_which_wants_are_listed_does_not_matter(group: list[dict[tuple[Any, ...], int]]) -> None:
    assert assign([dict(reversed(rank.items())) for rank in group]) == assign(group)


@given(st.lists(sizes, max_size=30), st.integers(1, 6))
def test_what_all_want_is_divided_to_within_the_largest(listed: list[int], ranks: int) -> None:
    assignment = assign([{(number,): size for number, size in enumerate(listed)}] * ranks)
    shares = [assignment.bytes_read_by(rank) for rank in range(ranks)]
    assert sum(shares) == sum(listed)
    assert max(shares) - min(shares) <= max(listed, default=0)


@given(st.lists(sizes, max_size=30), st.integers(1, 60))
def test_rounds_keep_order_and_limit(listed: list[int], limit: int) -> None:
    size_of = {(number,): size for number, size in enumerate(listed)}
    rounds = rounds_of(list(size_of), size_of, limit)
    assert [unit for units in rounds for unit in units] == list(size_of)
    assert all(len(units) == 1 or sum(size_of[unit] for unit in units) <= limit for units in rounds)
    assert all(rounds)


def assignment_of(**units: tuple[int, tuple[int, ...]]) -> Assignment:
    """Sizes and ranks by name; the first of the ranks reads."""
    return Assignment(
        {(name,): size for name, (size, _) in units.items()},
        {(name,): tuple(sorted(ranks)) for name, (_, ranks) in units.items()},
        {(name,): ranks[0] for name, (_, ranks) in units.items()},
    )


def message(reader: int, receivers: tuple[int, ...], *parts: tuple[str, int, int]) -> Message:
    return Message(reader, receivers, tuple(Segment((name,), start, stop) for name, start, stop in parts))


MESSAGES: dict[str, tuple[Assignment, list[list[str]], list[Message]]] = {
    "nothing was read": (assignment_of(), [[], []], []),
    "what nobody else wants stays": (assignment_of(a=(9, (0,))), [["a"], []], []),
    "an empty tensor is not sent": (assignment_of(a=(0, (0, 1))), [["a"], []], []),
    "a large one goes in pieces": (
        assignment_of(a=(25, (1, 0))),
        [[], ["a"]],
        [message(1, (0,), ("a", 0, 10)), message(1, (0,), ("a", 10, 20)), message(1, (0,), ("a", 20, 25))],
    ),
    "small ones for the same ranks go together": (
        assignment_of(a=(3, (0, 1, 2)), b=(2, (0, 1)), c=(3, (0, 1, 2))),
        [["a", "b", "c"], [], []],
        [message(0, (1, 2), ("a", 0, 3), ("c", 0, 3)), message(0, (1,), ("b", 0, 2))],
    ),
    "as many as fit": (
        assignment_of(a=(4, (0, 1)), b=(4, (0, 1)), c=(4, (0, 1))),
        [["a", "b", "c"], []],
        [message(0, (1,), ("a", 0, 4), ("b", 0, 4)), message(0, (1,), ("c", 0, 4))],
    ),
    "readers take turns": (
        assignment_of(a=(15, (0, 1)), b=(15, (1, 0))),
        [["a"], ["b"]],
        [
            message(0, (1,), ("a", 0, 10)),
            message(1, (0,), ("b", 0, 10)),
            message(0, (1,), ("a", 10, 15)),
            message(1, (0,), ("b", 10, 15)),
        ],
    ),
}


@pytest.mark.parametrize(("assignment", "read", "expected"), MESSAGES.values(), ids=MESSAGES.keys())
def test_the_messages_of_a_round(assignment: Assignment, read: list[list[str]], expected: list[Message]) -> None:
    units = [[(name,) for name in names] for names in read]
    assert messages_of(units, assignment, limit=10, packed_below=5) == expected


@given(groups, st.integers(1, 40), st.integers(1, 20), st.integers(0, 30))
def test_every_rank_gets_every_byte_that_it_wants_once(
    group: list[dict[tuple[Any, ...], int]], round_limit: int, limit: int, packed_below: int
) -> None:
    assignment = assign(group)
    shares = [rounds_of(assignment.read_by(rank), assignment.size_of, round_limit) for rank in range(len(group))]
    got: list[dict[tuple[Any, ...], list[int]]] = [{} for _ in group]
    for at in range(max(map(len, shares))):
        read = [share[at] if at < len(share) else [] for share in shares]
        for sent in messages_of(read, assignment, limit=limit, packed_below=packed_below):
            assert 0 < sent.size <= limit
            for segment in sent.segments:
                assert segment.unit in read[sent.reader]
                for receiver in sent.receivers:
                    got[receiver].setdefault(segment.unit, []).extend(range(segment.start, segment.stop))
    for rank, units in enumerate(group):
        received = {unit: size for unit, size in units.items() if assignment.reader_of[unit] != rank and size}
        assert {unit: sorted(places) for unit, places in got[rank].items()} == {
            unit: list(range(size)) for unit, size in received.items()
        }
