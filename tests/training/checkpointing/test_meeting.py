"""Ranks that never wait for one another agree on the poll at which they finish: whatever the order of their polls."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from bridge.training.checkpointing import agreement
from bridge.training.checkpointing import meeting as meeting_module
from bridge.training.checkpointing.agreement import Ranks
from bridge.training.checkpointing.meeting import Meeting
from tests.distributed.launch import init_ranks, run_ranks


def test_an_only_rank_finishes_when_it_is_done() -> None:
    meeting = Meeting(None, "save", 0, 1)
    assert [meeting.due(done) for done in (False, False, True)] == [False, False, True]


class Counting:
    """torch's store, with a count of what is asked of it."""

    def __init__(self, store: Any) -> None:
        self.store = store
        self.calls = 0

    def __getattr__(self, name: str) -> Any:
        self.calls += 1
        return getattr(self.store, name)


def simulate(
    seed: int, size: int, skew: int, reached: Callable[[Any], Any] = lambda store: store
) -> tuple[list[int], list[int]]:
    """By rank, the poll at which it finished, and the last at which it had not written.

    The ranks take turns at random, and none is more than `skew` polls ahead of another. One that is due waits, as in
    a collective, so the others must come to the same poll without it.
    """
    chance, store = random.Random(seed), dist.HashStore()
    meetings = [Meeting(reached(store), f"save{seed}", rank, size) for rank in range(size)]
    ready = [chance.randrange(20) for _ in range(size)]
    polls, finished = [0] * size, [0] * size
    for _ in range(20_000):
        if all(finished):
            break
        able = [r for r in range(size) if not finished[r] and polls[r] - min(polls) < skew]
        assert able, f"ranks have locked each other out at {polls}, finished at {finished}"
        rank = chance.choice(able)
        polls[rank] += 1
        if meetings[rank].due(polls[rank] > ready[rank]):
            finished[rank] = polls[rank]
    for meeting in meetings:
        meeting.close()
    assert store.num_keys() == 0 or isinstance(reached(store), Failing)
    return finished, ready


@pytest.mark.parametrize("skew", [1, 2, 5, 40])
def test_all_ranks_finish_at_the_same_poll(skew: int) -> None:
    for seed in range(60):
        finished, ready = simulate(seed, 1 + seed % 5, skew)
        assert len(set(finished)) == 1 and finished[0] > max(ready), (seed, finished)


def test_ranks_in_step_agree_at_once() -> None:
    finished, ready = simulate(3, 4, 1)
    assert finished[0] <= max(ready) + 5


def test_a_rank_that_has_not_written_asks_nothing_of_the_store() -> None:
    store = Counting(dist.HashStore())
    meeting = Meeting(store, "save", 1, 2)
    assert not any(meeting.due(False) for _ in range(100))
    assert store.calls == 0


class Failing:
    """torch's store, which fails three times at most: it may have done what it was asked for all the same."""

    def __init__(self, store: Any, chance: random.Random) -> None:
        self.store, self.chance, self.left = store, chance, 3

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> Any:
            fails = self.left > 0 and self.chance.random() < 0.2
            self.left -= fails
            if fails and name != "add" and self.chance.random() < 0.5:
                raise dist.DistNetworkError("it was not heard")
            answer = getattr(self.store, name)(*arguments)
            if fails:
                raise dist.DistNetworkError("the answer was not heard")
            return answer

        return call


def test_a_store_that_fails_for_a_moment_takes_no_rank_away_from_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting_module, "_RETRY_SECONDS", 0.0)
    for seed in range(60):
        chance = random.Random(seed)
        finished, ready = simulate(seed, 1 + seed % 5, 5, lambda store, chance=chance: Failing(store, chance))
        assert len(set(finished)) == 1 and finished[0] > max(ready), (seed, finished)


class Gone:
    """A store whose server has died."""

    def __getattr__(self, name: str) -> Any:
        raise dist.DistNetworkError("the connection is closed")


def test_a_store_that_is_gone_leaves_it_to_the_exchange_that_follows() -> None:
    meeting = Meeting(Gone(), "save", 0, 2)  # type: ignore[arg-type]
    assert not meeting.due(False)
    assert meeting.due(True)


def meet() -> list[int]:
    init_ranks()
    ranks, found = Ranks.current(), []
    for number in range(3):
        meeting = ranks.meeting()
        poll = 1
        while not meeting.due(poll > 2 + 3 * ranks.rank):
            poll += 1
            dist.barrier()  # as training would keep them together
        found.append(poll)
        ranks.all_true(f"finishing {number}", True)
        meeting.close()
    return found


def test_it_works_with_the_store_of_a_job() -> None:
    first, second = run_ranks(meet, 2)
    assert first == second
    assert all(poll <= 12 for poll in first)


def start_twice() -> list[bool]:
    """Ranks that count from the beginning again, with the store that they had before, as after a restart in place."""
    init_ranks()
    seen = []
    for start in range(2):
        agreement._of_group.clear()
        ranks = Ranks.current()
        with torch.device("meta"):
            assert ranks.same("under another default device", "")
        meeting = ranks.meeting()
        polls = [meeting.due(start == 0 or ranks.rank == 0) for _ in range(8) if ranks.all_true("a step", True)]
        seen.append(any(polls))
    return seen


def test_what_an_earlier_start_has_left_in_the_store_counts_for_nothing() -> None:
    assert run_ranks(start_twice, 2) == [[True, False]] * 2
