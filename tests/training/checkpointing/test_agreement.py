"""Ranks act as one: results, errors and lost ranks, on real gloo ranks."""

import errno
import time
from collections.abc import Callable
from typing import Any

from bridge.training.checkpointing.agreement import Ranks
from bridge.training.checkpointing.errors import (
    CheckpointDamagedError,
    CheckpointError,
    CheckpointMismatchError,
    CheckpointNotFoundError,
    UnsafeCheckpointError,
)
from tests.distributed.launch import init_ranks, run_ranks


def outcome(action: Callable[[], Any]) -> tuple[str, str]:
    """What a call came to: its value, or the error's type and message."""
    try:
        return "returned", repr(action())
    except CheckpointError as error:
        return type(error).__name__, str(error)


def fail_on(ranks: Ranks, *failing: int, error: type[Exception] = OSError) -> Callable[[], int]:
    def action() -> int:
        if ranks.rank in failing:
            raise error("disk on fire")
        return ranks.rank

    return action


def exchanges() -> list[tuple[str, str]]:
    init_ranks()
    ranks = Ranks.current()
    assert Ranks.current() is ranks
    return [
        outcome(lambda: ranks.run("working", fail_on(ranks))),
        outcome(lambda: ranks.run("working", fail_on(ranks, 1))),
        outcome(lambda: ranks.run("working", fail_on(ranks, 0, 2))),
        outcome(lambda: ranks.run("working", fail_on(ranks, 1, error=CheckpointNotFoundError))),
        outcome(lambda: ranks.run("working", fail_on(ranks, 0, 1, 2, error=CheckpointNotFoundError))),
        outcome(lambda: ranks.run("working", fail_on(ranks, 0, 1, 2))),
        outcome(lambda: ranks.first("deciding", lambda: {"path": "a"})),
        outcome(lambda: ranks.first("deciding", fail_on(ranks, 0))),
        outcome(lambda: ranks.first("deciding", fail_on(ranks, 0, error=CheckpointNotFoundError))),
        outcome(lambda: ranks.gather_all("asking", ranks.rank * 10)),
        outcome(lambda: ranks.gather_first("asking", ranks.rank * 10)),
        outcome(lambda: ranks.all_true("asking", ranks.rank != 1)),
        outcome(lambda: ranks.all_true("asking", True)),
    ]


def test_every_rank_has_the_same_outcome() -> None:
    first, second, third = run_ranks(exchanges, 3)
    assert first[0] == ("returned", "0")
    assert third[0] == ("returned", "2")
    assert first[1:10] == second[1:10] == third[1:10]
    assert first[1:10] == [
        ("CheckpointError", "working failed on rank 1: OSError: disk on fire"),
        ("CheckpointError", "working failed on rank 0, 2: OSError: disk on fire"),
        ("CheckpointNotFoundError", "working failed on rank 1: disk on fire"),
        ("CheckpointNotFoundError", "disk on fire"),
        ("CheckpointError", "working failed: OSError: disk on fire"),
        ("returned", "{'path': 'a'}"),
        ("CheckpointError", "deciding: OSError: disk on fire"),
        ("CheckpointNotFoundError", "disk on fire"),
        ("returned", "[0, 10, 20]"),
    ]
    assert first[10] == ("returned", "[0, 10, 20]")
    assert second[10] == third[10] == ("returned", "None")
    assert [first[11], first[12]] == [("returned", "False"), ("returned", "True")]


def rank_one_leaves() -> tuple[str, str, float]:
    init_ranks()
    ranks = Ranks.current()
    ranks.run("meeting once", lambda: None)
    if ranks.rank == 1:
        return "left", "", 0.0
    begun = time.monotonic()
    kind, message = outcome(lambda: ranks.run("meeting again", lambda: None))
    return kind, message, time.monotonic() - begun


def test_a_rank_that_is_gone_is_named_within_seconds() -> None:
    results = run_ranks(rank_one_leaves, 3, timeout=60)
    for kind, message, seconds in (results[0], results[2]):
        assert kind == "RankLostError"
        assert message.startswith("rank 1 did not arrive at the checkpoint layer's exchange after 'meeting again'")
        assert seconds < 30


def rank_one_is_stuck() -> tuple[str, str]:
    init_ranks()
    ranks = Ranks.current().waiting(0.02)
    ranks.run("meeting once", lambda: None)
    if ranks.rank == 1:
        time.sleep(12)  # past the limit and the roll call
        return "late", ""
    time.sleep(0.5 * ranks.rank)
    return outcome(lambda: ranks.run("meeting again", lambda: None))


def test_a_rank_that_is_stuck_is_named_when_the_time_is_up() -> None:
    first, stuck, third = run_ranks(rank_one_is_stuck, 3, timeout=60)
    message = "rank 1 did not arrive at the checkpoint layer's exchange after 'meeting again' (waited at most 1.2 s)"
    assert first == third == ("RankLostError", message)
    assert stuck == ("late", "")


def unsafe_on_one(ranks: Ranks) -> None:
    raise UnsafeCheckpointError("it runs code") if ranks.rank == 1 else CheckpointDamagedError("it is torn")


def test_an_unsafe_file_is_not_hidden_by_damage_on_another_rank() -> None:
    def act() -> tuple[str, str]:
        init_ranks()
        ranks = Ranks.current()
        return outcome(lambda: ranks.run("reading", lambda: unsafe_on_one(ranks)))

    found = ("UnsafeCheckpointError", "reading failed on rank 0: it is torn; rank 1: it runs code")
    assert run_ranks(act, 2) == [found, found]


def mixed_failures() -> list[tuple[str, str]]:
    init_ranks()
    ranks = Ranks.current()

    def fail_with(*errors: Exception | None) -> None:
        error = errors[ranks.rank]
        if error is not None:
            raise error

    torn, short = CheckpointDamagedError("it is torn"), CheckpointDamagedError("it is short")
    trouble = (OSError(errno.EMFILE, "too many open files"), MemoryError("no memory"))
    tried = [(torn, short), (torn, trouble[0]), (trouble[1], torn), (torn, CheckpointMismatchError("other keys"))]
    found = [outcome(lambda errors=errors: ranks.run("reading", lambda: fail_with(*errors))) for errors in tried]
    return [*found, outcome(lambda: ranks.collect("looking", lambda: fail_with(None, trouble[1])))]


def test_damage_is_only_said_if_all_failing_ranks_say_so() -> None:
    expected = [
        ("CheckpointDamagedError", "reading failed on rank 0: it is torn; rank 1: it is short"),
        (
            "CheckpointError",
            "reading failed on rank 0: it is torn; rank 1: OSError: [Errno 24] too many open files",
        ),
        ("CheckpointError", "reading failed on rank 0: MemoryError: no memory; rank 1: it is torn"),
        ("CheckpointMismatchError", "reading failed on rank 0: it is torn; rank 1: other keys"),
        ("CheckpointError", "looking failed on rank 1: MemoryError: no memory"),
    ]
    assert run_ranks(mixed_failures, 2) == [expected, expected]


def collected() -> list[str]:
    init_ranks()
    ranks = Ranks.current()
    return ranks.collect("asking", lambda: f"rank {ranks.rank}")


def test_what_is_collected_is_the_same_on_every_rank() -> None:
    assert run_ranks(collected, 2) == [["rank 0", "rank 1"]] * 2


def test_a_single_process_needs_no_torch_distributed() -> None:
    ranks = Ranks.current()
    assert (ranks.rank, ranks.size, ranks.is_first) == (0, 1, True)
    assert ranks.run("working", lambda: 5) == 5
    assert ranks.gather_first("asking", 7) == [7]
    assert outcome(lambda: ranks.run("working", fail_on(ranks, 0))) == (
        "CheckpointError",
        "working failed: OSError: disk on fire",
    )
