"""Faults of single processes: a rank that is killed, a background writer that is killed or stopped."""

from __future__ import annotations

import errno
import os
import signal
import threading
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from tests.faults import job as jobs
from tests.faults.cases import Situation, Verdict, World, in_process, moments, side_by_side, verdict_of
from tests.faults.job import Ran
from tests.faults.situations import situations
from tests.faults.summary import Summary
from tests.faults.tracer import Call, Fault

RANK_KILLED, WRITER_KILLED, WRITER_STOPPED = "one rank of two killed", "writer killed", "writer stopped"
TRAINERS_KILLED = "trainers killed, writers not"
STOPPED_SECONDS = 1.5


def calls_of(situation: Situation, world: World, directory: Path) -> list[Call]:
    """The calls of a run in which nothing fails."""
    job = situation.job(directory / "reference", world.data)
    return in_process(lambda: jobs.run(job)).traced.calls


def writer_calls(calls: list[Call], rank: int = 0) -> list[int]:
    """The numbers of the calls that a rank's background writers make."""
    return [call.number for call in calls if call.who == f"a child of rank {rank}"]


def assert_survived(verdicts: list[Verdict], failure: str, situation: Situation, summary: Summary) -> None:
    for verdict in verdicts:
        summary.add(failure, situation.name, verdict.fired and not verdict.problems, verdict.recovery_seconds)
    problems = [problem for verdict in verdicts for problem in verdict.problems]
    assert not problems, "\n\n".join(problems)
    assert all(verdict.fired for verdict in verdicts)


@pytest.mark.parametrize(
    ("name", "tries"),
    [
        ("save", 3),
        ("asynchronous save", 2),
        *(pytest.param(name, 20, marks=pytest.mark.faults) for name in ("save", "asynchronous save")),
    ],
)
def test_a_rank_that_is_killed_is_missed_by_the_other_one(
    name: str, tries: int, world: World, seeds: Path, tmp_path: Path, summary: Summary
) -> None:
    situation = situations(seeds, 2)[name]
    # While a save is written in the background, it is training that misses the rank first.
    expected = ("RankLostError: ", "RuntimeError: ") if name == "asynchronous save" else ("RankLostError: ",)

    def kill(rank: int) -> Callable[[Call, list[int]], None]:
        return lambda call, ranks: os.kill(ranks[rank], signal.SIGKILL)

    def misses(rank: int, ran: Ran) -> list[str]:
        other = ran.ranks[1 - rank]
        if other is None or ran.traced.statuses.get(rank) != -signal.SIGKILL:
            return [f"the ranks ended with {ran.traced.statuses}"]
        # Once the last save is published nobody misses a rank any more.
        return [] if other.error is None or other.error.startswith(expected) else [str(other.error)]

    chosen = moments(calls_of(situation, world, tmp_path), tries)
    cases = [
        partial(
            verdict_of,
            situation,
            world,
            Fault(moment, action=kill(rank)),
            f"rank {rank}",
            ends_as=partial(misses, rank),
        )
        for rank in (0, 1)
        for moment in chosen
    ]
    assert_survived(side_by_side(cases), RANK_KILLED, situation, summary)


@pytest.mark.parametrize("tries", [4, pytest.param(None, marks=pytest.mark.faults)])
def test_a_writer_finishes_a_save_whose_trainer_is_killed_and_the_next_start_publishes_it(
    tries: int | None, world: World, seeds: Path, tmp_path: Path, summary: Summary
) -> None:
    situation = situations(seeds)["asynchronous save"]
    calls = calls_of(situation, world, tmp_path)
    cases = [
        partial(
            verdict_of,
            situation,
            world,
            Fault(number, action=_kill_trainers),
            f"call {number}",
            ends_as=_were_killed,
            publishes_next=True,
        )
        for number in moments([call for call in calls if call.who == "a child of rank 0"], tries)
    ]
    assert_survived(side_by_side(cases), TRAINERS_KILLED, situation, summary)


@pytest.mark.parametrize("tries", [4, pytest.param(None, marks=pytest.mark.faults)])
def test_trainers_may_be_killed_at_any_call_while_their_writers_go_on(
    tries: int | None, world: World, seeds: Path, tmp_path: Path, summary: Summary
) -> None:
    situation = situations(seeds, 2)["asynchronous save"]
    cases = [
        partial(
            verdict_of, situation, world, Fault(number, action=_kill_trainers), f"call {number}", ends_as=_were_killed
        )
        for number in moments(calls_of(situation, world, tmp_path), tries)
    ]
    assert_survived(side_by_side(cases), TRAINERS_KILLED, situation, summary)


def test_a_writer_that_is_killed_is_an_error_on_all_ranks(
    world: World, seeds: Path, tmp_path: Path, summary: Summary
) -> None:
    situation = situations(seeds, 2)["asynchronous save"]

    def raised(ran: Ran) -> list[str]:
        errors = [None if ended is None else ended.error for ended in ran.ranks]
        right = all(error is not None and "was killed by SIGKILL" in error for error in errors)
        return [] if right and len(set(errors)) == 1 else [f"the ranks ended with {errors}"]

    calls = calls_of(situation, world, tmp_path)
    writers = [writer_calls(calls, 0)[3], writer_calls(calls, 1)[3]]
    cases = [
        partial(verdict_of, situation, world, Fault(number, action=_kill_writer), "writer killed", ends_as=raised)
        for number in writers
    ]
    assert_survived(side_by_side(cases), WRITER_KILLED, situation, summary)


@pytest.mark.faults
def test_a_writer_may_be_killed_at_any_of_its_calls(
    world: World, seeds: Path, tmp_path: Path, summary: Summary
) -> None:
    situation = situations(seeds)["asynchronous save"]

    def raised(ran: Ran) -> list[str]:
        error = ran.ranks[0] and ran.ranks[0].error
        return [] if "was killed by SIGKILL" in str(error) else [f"the rank ended with {error}"]

    cases = [
        partial(verdict_of, situation, world, Fault(number, action=_kill_writer), f"call {number}", ends_as=raised)
        for number in writer_calls(calls_of(situation, world, tmp_path))
    ]
    assert_survived(side_by_side(cases), WRITER_KILLED, situation, summary)


def test_the_save_after_that_of_a_killed_writer_has_a_new_one(
    world: World, seeds: Path, tmp_path: Path, summary: Summary
) -> None:
    situation = situations(seeds)["asynchronous save"]
    situation = replace(situation, checkpoint={"async_save": True, "on_save_failure": "warn"})

    def went_on(ran: Ran) -> list[str]:
        ended = ran.ranks[0]
        right = ended is not None and ended.error is None and ran.announced == [2]
        return [] if right else [f"published were {ran.announced}, and the rank ended so: {ended and ended.error}"]

    first = writer_calls(calls_of(situation, world, tmp_path))[3]
    case = partial(verdict_of, situation, world, Fault(first, action=_kill_writer), "goes on", ends_as=went_on)
    assert_survived([in_process(case)], WRITER_KILLED, situation, summary)


@pytest.mark.parametrize("tries", [3, pytest.param(None, marks=pytest.mark.faults)])
def test_an_error_that_passes_costs_nothing_where_a_writer_may_try_again(
    tries: int | None, world: World, seeds: Path, tmp_path: Path, summary: Summary
) -> None:
    situation = situations(seeds)["asynchronous save with a retry"]

    def all_published(ran: Ran) -> list[str]:
        ended = ran.ranks[0]
        right = ended is not None and ended.error is None and ran.announced == [1, 2]
        return [] if right else [f"published were {ran.announced}, and the rank ended so: {ended and ended.error}"]

    calls = calls_of(situation, world, tmp_path)
    chosen = moments([call for call in calls if call.who == "a child of rank 0"], tries)
    cases = [
        partial(verdict_of, situation, world, Fault(number, errno.EIO), f"call {number}", ends_as=all_published)
        for number in chosen
    ]
    assert_survived(side_by_side(cases), "EIO", situation, summary)


def test_a_writer_that_is_stopped_for_a_while_publishes_afterwards(
    world: World, seeds: Path, tmp_path: Path, summary: Summary
) -> None:
    situation = situations(seeds)["asynchronous save"]

    def all_published(ran: Ran) -> list[str]:
        return [] if ran.announced == [1, 2] else [f"published were {ran.announced}"]

    fault = Fault(writer_calls(calls_of(situation, world, tmp_path))[3], action=_stop_writer)
    case = partial(verdict_of, situation, world, fault, "stopped for a while", ends_as=all_published)
    assert_survived([in_process(case)], WRITER_STOPPED, situation, summary)


def test_a_writer_that_stays_stopped_is_an_error_on_all_ranks(
    world: World, seeds: Path, tmp_path: Path, summary: Summary
) -> None:
    situation = situations(seeds, 2)["asynchronous save"]
    situation = replace(situation, checkpoint={"async_save": True, "writer_stall_seconds": 1.0})

    def raised(ran: Ran) -> list[str]:
        errors = [None if ended is None else ended.error for ended in ran.ranks]
        right = all("is held by a signal and has done nothing for 1 s" in str(error) for error in errors)
        return [] if right and len(set(errors)) == 1 else [f"the ranks ended with {errors}"]

    fault = Fault(
        writer_calls(calls_of(situation, world, tmp_path), rank=1)[3],
        action=lambda call, ranks: os.kill(call.process, signal.SIGSTOP),
    )
    case = partial(verdict_of, situation, world, fault, "stays stopped", ends_as=raised)
    assert_survived([in_process(case)], WRITER_STOPPED, situation, summary)


def test_a_stopped_writer_ends_with_its_job(world: World, seeds: Path, tmp_path: Path, summary: Summary) -> None:
    situation = situations(seeds)["asynchronous save"]

    def stop_and_kill(call: Call, ranks: list[int]) -> None:
        os.kill(call.process, signal.SIGSTOP)
        threading.Timer(0.3, os.kill, (ranks[0], signal.SIGKILL)).start()

    def both_gone(ran: Ran) -> list[str]:
        return [] if ran.traced.statuses == {0: -signal.SIGKILL} else [f"the rank ended with {ran.traced.statuses}"]

    fault = Fault(writer_calls(calls_of(situation, world, tmp_path))[3], action=stop_and_kill)
    case = partial(verdict_of, situation, world, fault, "stopped", ends_as=both_gone)
    assert_survived([in_process(case)], WRITER_STOPPED, situation, summary)


def _kill_trainers(call: Call, ranks: list[int]) -> None:
    del call
    for pid in ranks:
        os.kill(pid, signal.SIGKILL)


def _were_killed(ran: Ran) -> list[str]:
    right = set(ran.traced.statuses.values()) == {-signal.SIGKILL}
    return [] if right else [f"the ranks ended with {ran.traced.statuses}"]


def _kill_writer(call: Call, ranks: list[int]) -> None:
    assert call.process not in ranks
    os.kill(call.process, signal.SIGKILL)


def _stop_writer(call: Call, ranks: list[int]) -> None:
    assert call.process not in ranks
    os.kill(call.process, signal.SIGSTOP)
    threading.Timer(STOPPED_SECONDS, os.kill, (call.process, signal.SIGCONT)).start()
