"""A second opinion: strace sees the calls that the suite's own tracer sees, and what it injects is survived too."""

from __future__ import annotations

import re
import shutil
from functools import partial
from pathlib import Path

import pytest

from tests.faults import job as jobs
from tests.faults.cases import Verdict, World, damage_in, in_process, resumes, side_by_side
from tests.faults.order import violations
from tests.faults.situations import situations
from tests.faults.summary import Summary
from tests.faults.test_processes import assert_survived
from tests.faults.tracer import Call
from tests.faults.under_strace import run_under_strace

if shutil.which("strace") is None:
    pytest.skip("strace is not installed", allow_module_level=True)

INJECTED = {
    "rename:signal=SIGKILL:when=1": "SIGKILL",
    "rename:signal=SIGKILL:when=4": "SIGKILL",
    "rename:signal=SIGKILL:when=6": "SIGKILL",
    "fsync:signal=SIGKILL:when=9": "SIGKILL",
    "fsync:error=EIO:when=2": "EIO",
    "fsync:error=EIO:when=12": "EIO",
    "mkdir:error=ENOSPC:when=5": "ENOSPC",
    "rename:error=EDQUOT:when=5": "EDQUOT",
}
"""What strace is told, for calls that a job of one rank makes in its save directory only."""


def shown(calls: list[Call]) -> list[tuple[str, tuple[str, ...], bool]]:
    """Calls without the parts of names that are new each time."""
    return [
        (call.name, tuple(re.sub("-[0-9a-f]{8}(?=/|$)", "-*", file) for file in call.files), call.error == 0)
        for call in calls
    ]


def test_strace_sees_the_same_calls_in_an_order_that_survives_a_power_loss(
    world: World, seeds: Path, tmp_path: Path
) -> None:
    situation = situations(seeds)["replacement"]
    first, second = (situation.job(tmp_path / name, world.data) for name in ("strace", "tracer"))
    seen = in_process(lambda: run_under_strace(first))
    assert seen.ended is not None and seen.ended.error is None
    assert shown(seen.calls) == shown(in_process(lambda: jobs.run(second)).traced.calls)
    assert violations(seen.calls) == []


def test_faults_that_strace_injects_are_survived(world: World, seeds: Path, tmp_path: Path, summary: Summary) -> None:
    situation = situations(seeds)["save"]

    def case(number: int, injected: str) -> Verdict:
        job = situation.job(tmp_path / str(number), world.data)
        seen = run_under_strace(job, "-e", f"inject={injected}")
        if "SIGKILL" in injected:
            problems = [] if seen.ended is None else [f"{injected} did not kill the job"]
        else:
            right = seen.ended is not None and seen.ended.error is not None and seen.ended.typed
            problems = [] if right else [f"{injected}: the run ended with {seen.ended}"]
        begun = resumes(situation, world, job, seen.announced)
        return Verdict(injected, True, (*problems, *damage_in(job.save), *begun.problems), begun.recovery_seconds)

    verdicts = side_by_side([partial(case, number, injected) for number, injected in enumerate(INJECTED)])
    for verdict in verdicts:
        assert_survived([verdict], INJECTED[verdict.title], situation, summary)
