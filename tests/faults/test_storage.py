"""Faults of storage as a whole: full, read-only, gone; and a clock that jumps."""

from __future__ import annotations

import ctypes
import itertools
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from bridge.training.checkpointing.layout import WRITER
from tests.faults import job as jobs
from tests.faults.cases import (
    Situation,
    Verdict,
    World,
    damage_in,
    ends_typed,
    in_process,
    moments,
    resumes,
    side_by_side,
    verdict_of,
)
from tests.faults.job import Ran
from tests.faults.situations import situations
from tests.faults.summary import Summary
from tests.faults.test_processes import assert_survived, calls_of
from tests.faults.tracer import Call, Fault

_CLONE_NEWNS = 0x00020000


def in_own_mounts(work: Callable[[], Any]) -> Any:
    """Call a function in a process with mounts of its own, which end with it; skip where that is not allowed."""

    def separated() -> Any:
        if ctypes.CDLL(None, use_errno=True).unshare(_CLONE_NEWNS) != 0:
            return None
        if not _mounts("--make-rprivate", "/"):
            return None
        return work()

    found = in_process(separated)
    if found is None:
        pytest.skip("mounting is not allowed here")
    return found


def _mounts(*arguments: str) -> bool:
    return subprocess.run(["mount", *arguments], capture_output=True, timeout=30).returncode == 0


def errors_of(ran: Ran) -> list[str | None]:
    return ["died" if ended is None else ended.error for ended in ran.ranks]


@pytest.mark.parametrize(
    ("checked", "message"), [(True, "NotEnoughSpaceError: "), (False, "[Errno 28] No space left on device")]
)
@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_full_file_system(
    checked: bool, message: str, asynchronous: bool, world: World, tmp_path: Path, summary: Summary
) -> None:
    settings = {"check_free_space": checked, "async_save": asynchronous}
    situation = Situation("save on a tmpfs, 2 ranks", (1, 2, 3, 4, 5), ranks=2, checkpoint=settings)

    def work() -> tuple[list[str | None], list[int], Verdict]:
        job = situation.job(tmp_path / "run", world.data)
        assert _mounts("-t", "tmpfs", "-o", "size=1m", "none", str(job.save.parent))
        ran = jobs.run(job)
        damage = (*damage_in(job.save), *ends_typed(ran))
        assert _mounts("-o", "remount,size=16m", str(job.save.parent))
        begun = resumes(situation, world, job, ran.announced)
        return errors_of(ran), ran.announced, replace(begun, problems=(*damage, *begun.problems))

    errors, announced, verdict = in_own_mounts(work)
    assert_survived([verdict], "full tmpfs", situation, summary)
    assert announced and announced == list(range(1, len(announced) + 1)) and len(announced) < 5
    assert all(error is not None and message in error for error in errors), errors


def test_a_read_only_file_system(world: World, seeds: Path, tmp_path: Path, summary: Summary) -> None:
    situation = situations(seeds, 2)["retention"]

    def work() -> tuple[list[str | None], Verdict]:
        job = situation.job(tmp_path / "run", world.data)
        kept = tmp_path / "kept"
        shutil.copytree(job.save, kept)
        assert _mounts("-t", "tmpfs", "none", str(job.save.parent))
        shutil.copytree(kept, job.save)
        assert _mounts("-o", "remount,ro", str(job.save.parent))
        ran = jobs.run(job)
        assert _mounts("-o", "remount,rw", str(job.save.parent))
        return errors_of(ran), resumes(situation, world, job, ran.announced)

    errors, verdict = in_own_mounts(work)
    assert_survived([verdict], "read-only file system", situation, summary)
    assert all(
        error is not None and "CheckpointSaveError: checkpoint.save: cannot save in" in error for error in errors
    )
    assert all("Read-only file system" in str(error) for error in errors)


@pytest.mark.parametrize("name", ["save", "asynchronous save"])
def test_a_directory_that_is_removed(name: str, world: World, seeds: Path, tmp_path: Path, summary: Summary) -> None:
    situation = situations(seeds)[name]
    place = tmp_path / "places"

    def remove(call: Call, ranks: Sequence[int]) -> None:
        # The case makes its own directory; the rank has the lock file in it open. It may have inherited others.
        targets = [Path(os.path.realpath(descriptor)) for descriptor in Path(f"/proc/{ranks[0]}/fd").iterdir()]
        for save in {target.parent for target in targets if target.name == WRITER and "/fault-" in str(target)}:
            save.rename(place / f"{call.number}-{name[0]}")

    place.mkdir()
    calls = calls_of(situation, world, tmp_path)
    chosen = [number for number in moments(calls, 4) if number > 8]
    cases = [
        partial(verdict_of, situation, world, Fault(number, action=remove), str(calls[number - 1]), starts_at=(0, 1, 2))
        for number in chosen
    ]
    assert_survived(side_by_side(cases), "directory removed", situation, summary)
    assert any(place.iterdir())


def _jumping_clock() -> None:
    """The wall clock goes years forwards and backwards from one look at it to the next."""
    real, jumps = time.time, itertools.cycle([0.0, 1e8, -1e8, 3e8, -1.5e9])
    time.time = lambda: real() + next(jumps)  # type: ignore[assignment]


def test_a_clock_that_jumps(world: World, seeds: Path, tmp_path: Path, summary: Summary) -> None:
    settings = {"most_recent_k": 1, "retain_every_hours": 1.0}
    situation = replace(
        situations(seeds)["retention"], name="retention by hours, 1 rank", checkpoint=settings, keeps=None
    )
    situation = replace(situation, publishes=(4, 5))
    calls = calls_of(situation, world, tmp_path)
    kills = [
        partial(verdict_of, situation, world, Fault(number), str(calls[number - 1]), _jumping_clock)
        for number in moments(calls, 2)
    ]

    def undisturbed() -> Verdict:
        job = situation.job(tmp_path / "run", world.data, _jumping_clock)
        ran = jobs.run(job)
        problems = [] if ran.announced == [4, 5] else [f"published were {ran.announced}\n{ran.output}"]
        begun = resumes(situation, world, job, ran.announced)
        return replace(begun, problems=(*problems, *damage_in(job.save), *begun.problems))

    assert_survived(side_by_side([undisturbed, *kills]), "clock that jumps", situation, summary)
