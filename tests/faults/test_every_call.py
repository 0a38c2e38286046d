"""A fault at a system call of a save, a sweep, a replacement or a recovery costs at most the save in flight.

`make test` tries calls spread evenly over each situation, `make faults` tries all of them with one rank.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pytest

from tests.faults import job as jobs
from tests.faults.cases import Situation, Verdict, World, in_process, moments, side_by_side, verdict_of
from tests.faults.order import violations
from tests.faults.situations import OUTLIVED, situations
from tests.faults.summary import Summary
from tests.faults.tracer import Call, Fault

ERRORS = (errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EINTR)
LASTING = (errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EROFS)
"""EINTR is not among them: Python repeats an interrupted call until it succeeds."""

Planted = Callable[[], None] | None


def undisturbed_calls(situation: Situation, world: World, directory: Path, planted: Planted = None) -> list[Call]:
    """The calls of a run in which nothing fails; their order would survive a power loss."""
    job = situation.job(directory / "reference", world.data, planted)
    ran = in_process(lambda: jobs.run(job, missing=situation.missing))
    assert all(ended is not None and ended.error is None for ended in ran.ranks), ran.output
    assert ran.announced == list(situation.publishes)
    assert violations(ran.traced.calls) == []
    return ran.traced.calls


def try_all(
    situation: Situation, world: World, faults: Sequence[Fault], calls: Sequence[Call], planted: Planted = None
) -> list[Verdict]:
    """Carry out a case for each fault."""
    return side_by_side(
        [
            partial(verdict_of, situation, world, fault, f"{situation.name}: {fault} at {calls[fault.at - 1]}", planted)
            for fault in faults
        ]
    )


def assert_survived(
    situation: Situation,
    world: World,
    directory: Path,
    choose: Callable[[list[Call]], list[Fault]],
    summary: Summary,
    planted: Planted,
) -> None:
    """Try the chosen faults, count them, and tell all that was lost."""
    calls = undisturbed_calls(situation, world, directory, planted)
    faults = choose(calls)
    verdicts = try_all(situation, world, faults, calls, planted)
    for fault, verdict in zip(faults, verdicts, strict=True):
        if verdict.fired:
            summary.add(str(fault), situation.name, not verdict.problems, verdict.recovery_seconds)
    problems = [problem for verdict in verdicts for problem in verdict.problems]
    assert not problems, f"{len(problems)} problems in {len(faults)} cases, such as\n" + "\n\n".join(problems[:5])
    # The last few calls of a job may come in another number: a sweep's threads take turns.
    assert sum(verdict.fired for verdict in verdicts) >= 0.9 * len(faults)


def kills(tries: int | None) -> Callable[[list[Call]], list[Fault]]:
    """SIGKILL at all calls, or at so many."""
    return lambda calls: [Fault(moment) for moment in moments(calls, tries)]


def errors(tries: int | None, kinds: Sequence[int], lasting: bool) -> Callable[[list[Call]], list[Fault]]:
    """Each error at all calls, of writes that follow one another the first and the last, or so many in turn."""

    def choose(calls: list[Call]) -> list[Fault]:
        if tries is None:
            return [Fault(moment, kind, lasting) for kind in kinds for moment in moments(calls, len(calls))]
        return [Fault(moment, kinds[n % len(kinds)], lasting) for n, moment in enumerate(moments(calls, tries))]

    return choose


@pytest.mark.parametrize(
    ("name", "ranks", "tries"),
    [
        ("save", 1, 12),
        ("asynchronous save", 1, 12),
        ("retention", 1, 10),
        ("replacement", 1, 8),
        ("replacement by two renames", 1, 8),
        ("recovery", 1, 10),
        (OUTLIVED, 1, 8),
        ("save", 2, 4),
        ("asynchronous save", 2, 4),
        ("replacement", 2, 3),
    ],
)
def test_a_sample_of_kills(
    name: str, ranks: int, tries: int, world: World, seeds: Path, tmp_path: Path, summary: Summary, planted: Planted
) -> None:
    assert_survived(situations(seeds, ranks)[name], world, tmp_path, kills(tries), summary, planted)


@pytest.mark.parametrize(
    ("name", "ranks", "tries", "kinds", "lasting"),
    [
        ("save", 1, 5, ERRORS, False),
        ("asynchronous save", 1, 4, ERRORS, False),
        ("save with a retry", 1, 4, ERRORS, False),
        ("save with a retry", 1, 4, LASTING, True),
        ("asynchronous save with a retry", 1, 4, ERRORS, False),
        ("retention", 1, 4, ERRORS, False),
        ("replacement", 1, 4, ERRORS, False),
        ("recovery", 1, 4, ERRORS, False),
        (OUTLIVED, 1, 4, ERRORS, False),
        ("save", 2, 3, ERRORS, False),
        ("asynchronous save", 2, 3, LASTING, True),
    ],
)
def test_a_sample_of_errors(
    name: str,
    ranks: int,
    tries: int,
    kinds: Sequence[int],
    lasting: bool,
    world: World,
    seeds: Path,
    tmp_path: Path,
    summary: Summary,
    planted: Planted,
) -> None:
    assert_survived(situations(seeds, ranks)[name], world, tmp_path, errors(tries, kinds, lasting), summary, planted)


@pytest.mark.faults
@pytest.mark.parametrize(
    ("name", "ranks", "tries"),
    [
        *((name, 1, None) for name in ("save", "asynchronous save", "retention", "replacement")),
        *((name, 1, None) for name in ("replacement by two renames", "recovery", OUTLIVED)),
        ("asynchronous replacement", 1, 80),
        *((name, 2, 20) for name in ("save", "asynchronous save", "retention", "replacement", "recovery", OUTLIVED)),
    ],
)
def test_every_kill(
    name: str,
    ranks: int,
    tries: int | None,
    world: World,
    seeds: Path,
    tmp_path: Path,
    summary: Summary,
    planted: Planted,
) -> None:
    assert_survived(situations(seeds, ranks)[name], world, tmp_path, kills(tries), summary, planted)


@pytest.mark.faults
@pytest.mark.parametrize(
    ("name", "ranks", "tries", "kinds", "lasting"),
    [
        ("save", 1, None, ERRORS, False),
        *((name, 1, 80, ERRORS, False) for name in ("asynchronous save", "save with a retry", "retention")),
        *((name, 1, 80, ERRORS, False) for name in ("replacement", "replacement by two renames", "recovery", OUTLIVED)),
        *((name, 1, 40, ERRORS, False) for name in ("asynchronous save with a retry", "asynchronous replacement")),
        ("asynchronous save with a retry", 1, 40, LASTING, True),
        *((name, 1, 40, LASTING, True) for name in ("save with a retry", "asynchronous save", "retention")),
        *((name, 2, 20, ERRORS, False) for name in ("save", "asynchronous save", "retention", "replacement")),
        *((name, 2, 20, LASTING, True) for name in ("save", "asynchronous save", "asynchronous save with a retry")),
    ],
)
def test_every_error(
    name: str,
    ranks: int,
    tries: int | None,
    kinds: Sequence[int],
    lasting: bool,
    world: World,
    seeds: Path,
    tmp_path: Path,
    summary: Summary,
    planted: Planted,
) -> None:
    assert_survived(situations(seeds, ranks)[name], world, tmp_path, errors(tries, kinds, lasting), summary, planted)
