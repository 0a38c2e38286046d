"""One case: a job in a certain situation, a fault at one of its calls, and what must hold afterwards.

After the fault every published checkpoint is whole. The next start begins where the last published checkpoint left
off, or at the one that was being published, and goes on bit for bit as a run that was never disturbed. After its next
save nothing is left of the fault.
"""

from __future__ import annotations

import ctypes
import os
import pickle
import shutil
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from bridge.training.checkpointing.integrity import find_damage, read_manifest
from bridge.training.checkpointing.layout import BEQUEST_PREFIX, TRACKER, is_leftover, iteration_name, list_checkpoints
from tests.distributed.forking import fork
from tests.faults import job as jobs
from tests.faults.job import Job, Ran
from tests.faults.order import violations
from tests.faults.tracer import Call, Fault

T = TypeVar("T")


@dataclass(frozen=True)
class Situation:
    """What a run is doing when the fault comes."""

    name: str
    publishes: tuple[int, ...]
    """The iterations that it saves, in order."""
    seed: Path | None = None
    """A save directory to begin with."""
    published: int | None = None
    """What the seed's tracker names."""
    ranks: int = 1
    checkpoint: dict[str, Any] = field(default_factory=dict)
    missing: frozenset[str] = frozenset()
    """Calls that the file system shall not have."""
    keeps: frozenset[int] | None = None
    """The checkpoints that are there after the next save, where retention decides it; None: all."""
    falls_back_to: int | None = None
    """Where the next run may also begin: a checkpoint that is published for a dead run has trackers a moment later."""

    def job(self, directory: Path, data: Path, prepare: Callable[[], None] | None = None) -> Job:
        """The run, in a fresh directory."""
        directory.mkdir(parents=True)
        job = Job(directory, data, self.publishes[-1], self.ranks, self.checkpoint, prepare)
        job.save.parent.mkdir()
        if self.seed is not None:
            shutil.copytree(self.seed, job.save, symlinks=True)
        return job


@dataclass(frozen=True)
class World:
    """What all cases share."""

    data: Path
    undisturbed: dict[int, list[dict[int, dict[str, str]]]]
    """By number of ranks and by rank, the digests after each iteration of a run without saves and faults."""


@dataclass(frozen=True)
class Verdict:
    """What came of one case."""

    title: str
    fired: bool
    """Whether the run came to the call."""
    problems: tuple[str, ...] = ()
    recovery_seconds: float | None = None
    """From the start of the next run's processes until it trains."""


def last_and_next(situation: Situation, announced: Sequence[int]) -> tuple[int | None, int | None]:
    """The checkpoint that was published last, and the one that the run was to publish after it."""
    done = len(announced)
    last = announced[-1] if announced else situation.published
    return last, situation.publishes[done] if done < len(situation.publishes) else None


def verdict_of(
    situation: Situation,
    world: World,
    fault: Fault,
    title: str,
    prepare: Callable[[], None] | None = None,
    ends_as: Callable[[Ran], list[str]] | None = None,
    starts_at: Collection[int] | None = None,
    publishes_next: bool = False,
) -> Verdict:
    """Carry out a case in a process of its own, which has no other children.

    Args:
        ends_as: says what is wrong with how the run ended; by default all ranks come to the end, or all raise a
            typed error.
        starts_at: where the next run may begin, if not at the last published checkpoint or the next. Where this is
            given, the directory was taken away, and the order of the calls in it says nothing.
        publishes_next: the next run has to begin at the checkpoint that was still being written.
    """
    directory = Path(tempfile.mkdtemp(prefix="fault-"))
    try:
        job = situation.job(directory / "trial", world.data, prepare)
        ran = jobs.run(job, fault, situation.missing)
        problems = [*_hung(ran), *(ends_as or ends_typed)(ran), *damage_in(job.save)]
        if starts_at is None:
            problems += violations(ran.traced.calls)
        if not ran.traced.fired:
            return Verdict(title, False, _titled(title, [*problems, *_unexpected_end(ran)]))
        if publishes_next:
            starts_at = [last_and_next(situation, ran.announced)[1] or -1]
        begun = resumes(situation, world, job, ran.announced, starts_at)
        problems += begun.problems
        text = [] if not problems else [f"{problem}\n{ran.output}" for problem in problems]
        return Verdict(title, True, _titled(title, text), begun.recovery_seconds)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def resumes(
    situation: Situation,
    world: World,
    job: Job,
    announced: Sequence[int],
    starts_at: Collection[int] | None = None,
) -> Verdict:
    """Start the run again, without a fault, and let it make one save more than it was to."""
    last, following = last_and_next(situation, announced)
    if starts_at is None:
        starts_at = [last or 0] if following is None else [last or 0, following]
        if situation.falls_back_to is not None:
            starts_at = [*starts_at, situation.falls_back_to]
    end = max(situation.publishes) + 1
    checkpoint = {name: value for name, value in situation.checkpoint.items() if name != "ckpt_step"}
    again = replace(job, train_iters=end, checkpoint=checkpoint, prepare=None)
    ran = jobs.run(again)
    problems = [*_unexpected_end(ran), *(f"{problem} (in the next run)" for problem in violations(ran.traced.calls))]
    if problems:
        return Verdict("", True, tuple(problems))
    for rank, ended in enumerate(ran.ranks):
        assert ended is not None
        expected = world.undisturbed[situation.ranks][rank]
        if ended.started_at not in starts_at:
            problems.append(f"the next run started at {ended.started_at} and not at one of {starts_at}")
        if ended.started_at and ended.at_start != expected[ended.started_at]:
            problems.append(
                f"what rank {rank} loaded differs: {_differences(ended.at_start, expected, ended.started_at)}"
            )
        if ended.at_end != expected[end]:
            problems.append(f"rank {rank} ended otherwise: {_differences(ended.at_end, expected, end)}")
    problems += [*damage_in(job.save), *_left(situation, job.save, end)]
    return Verdict("", True, tuple(problems), max(ended.setup_seconds for ended in ran.ranks if ended is not None))


def damage_in(save: Path) -> list[str]:
    """What is wrong with the published checkpoints and with what the tracker names."""
    problems = []
    listing = list_checkpoints(save)
    for iteration in listing.iterations:
        path = save / iteration_name(iteration)
        try:
            manifest = read_manifest(path)
        except Exception as error:
            problems.append(str(error))
            continue
        if manifest is None:
            problems.append(f"{path.name} has no manifest")
        else:
            problems += [f"{path.name}: {found}" for found in find_damage(path, manifest.files, checksums=True)]
    if (tracked := tracked_by(save)) is not None and tracked not in listing.iterations:
        problems.append(f"the tracker names {tracked} and there are {listing.iterations}")
    return problems


def tracked_by(save: Path) -> int | None:
    """The iteration that the tracker names."""
    import torch

    if not (save / TRACKER).exists():
        return None
    return int(torch.load(save / TRACKER, weights_only=False)["step"])


def _left(situation: Situation, save: Path, end: int) -> list[str]:
    names = sorted(entry.name for entry in save.iterdir())
    problems = [f"{name} is left after the next save" for name in names if is_leftover(name)]
    problems += [f"{path.relative_to(save)} is left" for path in save.glob(f"*/{BEQUEST_PREFIX}*")]
    listing = list_checkpoints(save)
    if listing.foreign:
        problems.append(f"foreign names: {listing.foreign}")
    if tracked_by(save) != end:
        problems.append(f"the tracker names {tracked_by(save)} and not {end}")
    if situation.keeps is not None and set(listing.iterations) != situation.keeps:
        problems.append(f"there are {listing.iterations} and not {sorted(situation.keeps)}")
    return problems


def ends_typed(ran: Ran) -> list[str]:
    """What is wrong unless the job was killed, all ranks came to the end, or all raised the same typed error."""
    if ran.traced.killed or ran.traced.hung:
        return []
    problems = []
    for rank, ended in enumerate(ran.ranks):
        if ended is None:
            problems.append(f"rank {rank} died with status {ran.traced.statuses.get(rank)}")
        elif not ended.typed:
            problems.append(f"rank {rank} raised {ended.error}")
    kinds = {None if ended is None or ended.error is None else ended.error.split(":")[0] for ended in ran.ranks}
    if len(kinds) > 1:
        problems.append(f"the ranks do not agree: {sorted(map(str, kinds))}")
    return problems


def _hung(ran: Ran) -> list[str]:
    return [f"hung: {', '.join(ran.traced.hung)}"] if ran.traced.hung else []


def _unexpected_end(ran: Ran) -> list[str]:
    problems = _hung(ran)
    for rank, ended in enumerate(ran.ranks):
        if ended is None or ended.error is not None:
            problems.append(f"rank {rank}: {'died' if ended is None else ended.error}\n{ran.output}")
    return problems


def _differences(found: dict[str, str], expected: dict[int, dict[str, str]], iteration: int) -> str:
    keys = sorted({*found, *expected[iteration]})
    return ", ".join(key for key in keys if found.get(key) != expected[iteration].get(key))[:300]


def _titled(title: str, problems: Sequence[str]) -> tuple[str, ...]:
    return tuple(f"{title}: {problem}" for problem in problems)


def in_process(work: Callable[[], T], timeout: float = 4 * jobs.TIMEOUT) -> T:
    """Call a function in a forked process that ends with this one; its exception is raised here."""
    return side_by_side([work], timeout)[0]


def side_by_side(works: Sequence[Callable[[], T]], timeout: float = 4 * jobs.TIMEOUT) -> list[T]:
    """Call functions in forked processes, as many at once as there are cores; their results, in order."""
    waiting = list(enumerate(works))
    running: dict[int, tuple[int, Path, float]] = {}
    results: dict[int, T] = {}
    with tempfile.TemporaryDirectory(prefix="cases-") as directory:
        try:
            while waiting or running:
                while waiting and len(running) < (os.cpu_count() or 1):
                    number, work = waiting.pop(0)
                    file = Path(directory) / f"{number}.pickle"
                    running[_forked(work, file)] = (number, file, time.monotonic() + timeout)
                ended = [pid for pid in running if os.waitpid(pid, os.WNOHANG)[0]]
                for pid in ended:
                    number, file, _ = running.pop(pid)
                    succeeded, value = pickle.loads(file.read_bytes())
                    if not succeeded:
                        raise AssertionError(value)
                    results[number] = value
                late = [number for number, _, deadline in running.values() if time.monotonic() > deadline]
                if late:
                    raise AssertionError(f"a case took more than {timeout:g} s: {works[late[0]]}")
                time.sleep(0.005)
        finally:
            for pid in running:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
    return [results[number] for number in range(len(works))]


def _forked(work: Callable[[], Any], file: Path) -> int:
    pid = fork()
    if pid:
        return pid
    try:
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: a test run that is killed leaves nothing behind
        try:
            outcome: tuple[bool, Any] = (True, work())
        except BaseException:
            outcome = (False, traceback.format_exc())
        file.write_bytes(pickle.dumps(outcome))
    finally:
        os._exit(0)


def moments(calls: Sequence[Call], tries: int | None) -> list[int]:
    """The numbers of the calls to fail at: all, or so many of them, spread evenly.

    In a sample, writes to one file that follow one another count as two, the first and the last of them: otherwise
    most of the tries would go to the writing of one file.
    """
    if tries is None:
        return [call.number for call in calls]
    distinct = []
    for before, call, after in zip([None, *calls], calls, [*calls[1:], None], strict=False):
        same = (call.name, call.files)
        inner = all(other is not None and (other.name, other.files) == same for other in (before, after))
        if not inner:
            distinct.append(call.number)
    if tries >= len(distinct):
        return distinct
    return [distinct[(2 * n + 1) * len(distinct) // (2 * tries)] for n in range(tries)]
