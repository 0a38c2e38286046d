"""Several steps under one agreement: each is told by its own name, on real gloo ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bridge.training.checkpointing.agreement import Ranks
from bridge.training.checkpointing.errors import CheckpointError, CheckpointSaveError
from bridge.training.checkpointing.failed_steps import attempted, step
from tests.distributed.launch import init_ranks, run_ranks


def outcome(action: Callable[[], Any]) -> str:
    try:
        return repr(action())
    except CheckpointError as error:
        return f"{type(error).__name__}: {error}"


def in_steps(ranks: Ranks, first: dict[int, Exception], second: dict[int, Exception], **for_all: bool) -> str:
    """Two steps under one agreement; `first` and `second` fail in one of them, by rank."""

    def act() -> str:
        for name, errors in (("reading", first), ("writing", second)):
            with step(name, **for_all):
                if ranks.rank in errors:
                    raise errors[ranks.rank]
        return "done"

    return outcome(lambda: ranks.run("doing both", act))


def failures() -> list[str]:
    init_ranks()
    ranks, gone, full = Ranks.current(), CheckpointSaveError("it is gone"), OSError(28, "No space left on device")
    return [
        in_steps(ranks, {}, {}),
        in_steps(ranks, {1: ValueError("broken")}, {}),
        in_steps(ranks, {}, {0: gone, 1: gone}),
        in_steps(ranks, {0: ValueError("broken")}, {1: OSError(5, "Input/output error")}),
        in_steps(ranks, {0: full}, {1: gone}, for_all=True),
    ]


def test_the_step_that_failed_is_named() -> None:
    first, second = run_ranks(failures, 2)
    assert first == second
    assert first == [
        "'done'",
        "CheckpointError: reading failed on rank 1: ValueError: broken",
        "CheckpointSaveError: it is gone",
        "CheckpointError: reading failed on rank 0: ValueError: broken; "
        "writing failed on rank 1: OSError: [Errno 5] Input/output error",
        "CheckpointError: reading: OSError: [Errno 28] No space left on device",
    ]


def questions(ranks: Ranks) -> list[Any]:
    """What exchanges say that carry questions, and the answers: of one that succeeds and of one that fails, too."""
    found: list[Any] = []

    def ask(exchange: Callable[[], Any], *flags: bool) -> None:
        asked = [ranks.ask_with_next(flag) for flag in flags]
        found.extend((exchange(), [answer() for answer in asked]))

    ask(lambda: ranks.run("asking", lambda: "own"), ranks.rank == 0, True)
    ask(lambda: ranks.same("asking", "text"), ranks.rank == 1, True)
    ask(lambda: outcome(lambda: ranks.run("asking", lambda: ranks.rank // (1 - ranks.rank))), True)
    ask(lambda: ranks.gather_all("asking", 2), ranks.rank == 0)  # carries nothing, so they are asked alone
    return found


def conclusions() -> list[Any]:
    init_ranks()
    ranks = Ranks.current()

    def conclude(values: list[int]) -> int:
        with step("adding up"):
            return sum(values) if sum(values) < 10 else 1 // 0

    def fail() -> int:
        return ranks.rank // (1 - ranks.rank)

    late = attempted("collecting", fail)
    return [
        outcome(lambda: ranks.conclude("asking", lambda: ranks.rank + 1, conclude)),
        outcome(lambda: ranks.conclude("asking", lambda: 10, conclude)),
        outcome(lambda: ranks.conclude("asking", fail, conclude)),
        outcome(lambda: ranks.run("going on", late)),
        *questions(ranks),
        ranks.new_name(),
        ranks.new_name(),
    ]


def test_what_follows_from_all_results_is_the_same_on_all_ranks() -> None:
    first, second = run_ranks(conclusions, 2)
    assert first == second
    *told, name, another = first
    assert told == [
        "3",
        "CheckpointError: adding up: ZeroDivisionError: integer division or modulo by zero",
        "CheckpointError: asking failed on rank 1: ZeroDivisionError: integer division or modulo by zero",
        "CheckpointError: collecting failed on rank 1: ZeroDivisionError: integer division or modulo by zero",
        *("own", [False, True]),
        *(True, [False, True]),
        *("CheckpointError: asking failed on rank 1: ZeroDivisionError: integer division or modulo by zero", [True]),
        *([2, 2], [False]),
    ]
    assert len({name, another}) == 2
    assert all(len(each) == 8 and int(each, 16) >= 0 for each in (name, another))


def test_an_only_rank_needs_nobody() -> None:
    ranks = Ranks(None, 0, 1)
    assert ranks.conclude("asking", lambda: 1, sum) == 1
    (is_so, is_not) = ranks.ask_with_next(True), ranks.ask_with_next(False)
    assert ranks.run("asking", lambda: "own") == "own"
    assert (is_so(), is_not(), ranks.ask_with_next(True)()) == (True, False, True)
    assert ranks.new_name() != ranks.new_name()
    assert in_steps(ranks, {0: ValueError("broken")}, {}) == "CheckpointError: reading failed: ValueError: broken"
