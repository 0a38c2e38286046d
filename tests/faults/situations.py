"""The situations in which faults come, and the save directories that they begin with."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

from bridge.training.checkpointing.layout import BEQUEST_PREFIX, SAVING_PREFIX, bequest_name, new_trash_name
from tests.faults import job as jobs
from tests.faults.cases import Situation, World, in_process
from tests.faults.job import Job
from tests.faults.tracer import Call, Fault

FINISHED, LEFT_OVER = "finished", "left-over"
OUTLIVED = "recovery of what writers have finished"


def make_seeds(directory: Path, world: World) -> None:
    """Make, for 1 and 2 ranks, the directories of a finished run, of one that writers have outlived, and one that is
    full of what dead runs have left.

    `finished-1` holds the checkpoints of iterations 1, 2 and 3. `left-over-1` too, but that of 2 was being replaced
    when the job died between two renames, on a file system that cannot exchange names. Beside it there are a save
    that was cut short, a deletion that was, and half a tracker. In `outlived-1` the checkpoint of iteration 4 is
    complete but for what rank 0 would have written when it published it.
    """
    for ranks in (1, 2):
        finished = Job(directory / f"run-{ranks}", world.data, 3, ranks)
        in_process(lambda finished=finished: jobs.run(finished))
        shutil.copytree(finished.save, directory / f"{FINISHED}-{ranks}")
        _leave_over(directory, world, ranks)
        _outlive(directory, world, ranks)


def _outlive(directory: Path, world: World, ranks: int) -> None:
    saving = Situation("", (4,), directory / f"{FINISHED}-{ranks}", 3, ranks, {"async_save": True})
    reference = saving.job(directory / f"undisturbed-{ranks}", world.data)
    calls = in_process(lambda: jobs.run(reference)).traced.calls
    sealing = next(call.number for call in calls if call.files[-1].endswith("/manifest.json"))
    dead = saving.job(directory / f"outlived-run-{ranks}", world.data)

    def kill(_: Call, pids: list[int]) -> None:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)

    in_process(lambda: jobs.run(dead, Fault(sealing, action=kill)))
    (staging,) = dead.save.glob(f"{SAVING_PREFIX}*")
    assert {path.name for path in staging.glob(f"{BEQUEST_PREFIX}*")} == {bequest_name(rank) for rank in range(ranks)}
    shutil.copytree(dead.save, directory / f"outlived-{ranks}")


def _leave_over(directory: Path, world: World, ranks: int) -> None:
    seed = directory / f"{FINISHED}-{ranks}"
    replacing = Situation("", (2,), seed, 3, ranks, {"ckpt_step": 1}, frozenset({"renameat2"}))
    run = replacing.job(directory / f"replaced-{ranks}", world.data)
    calls = in_process(lambda: jobs.run(run, missing=replacing.missing)).traced.calls
    second = next(call.number for call in calls if call.name == "rename" and call.files[-1] == "iter_0000002")
    dead = replacing.job(directory / f"dead-{ranks}", world.data)
    ran = in_process(lambda: jobs.run(dead, Fault(second), replacing.missing))
    assert ran.traced.killed and not (dead.save / "iter_0000002").exists(), ran.traced.calls[second - 1]
    unfinished = dead.save / ".saving-iter_0000004-0123abcd"
    shutil.copytree(dead.save / "iter_0000003", unfinished)
    (unfinished / "manifest.json").unlink()
    (unfinished / ".metadata").write_bytes(b"")
    deleted = dead.save / new_trash_name("iter_0000000")
    shutil.copytree(dead.save / "iter_0000001", deleted)
    (deleted / "common.pt").unlink()
    (dead.save / ".latest_train_state.pt.bridge-tmp").write_bytes(b"half")
    shutil.copytree(dead.save, directory / f"{LEFT_OVER}-{ranks}")


def situations(seeds: Path, ranks: int = 1) -> dict[str, Situation]:
    """All situations by name, for one rank or two."""
    words = "1 rank" if ranks == 1 else f"{ranks} ranks"
    finished, left_over = seeds / f"{FINISHED}-{ranks}", seeds / f"{LEFT_OVER}-{ranks}"
    outlived = seeds / f"outlived-{ranks}"
    rollback = {"ckpt_step": 1}
    found = [
        Situation("save", (1, 2)),
        Situation("asynchronous save", (1, 2), checkpoint={"async_save": True}),
        Situation("save with a retry", (1, 2), checkpoint={"save_retries": 1}),
        Situation("asynchronous save with a retry", (1, 2), checkpoint={"async_save": True, "save_retries": 1}),
        Situation("retention", (4,), finished, 3, checkpoint={"most_recent_k": 1}, keeps=frozenset({5})),
        Situation("replacement", (2,), finished, 3, checkpoint=rollback),
        Situation("asynchronous replacement", (2,), finished, 3, checkpoint={**rollback, "async_save": True}),
        Situation("replacement by two renames", (2,), finished, 3, 1, rollback, frozenset({"renameat2"})),
        Situation("recovery", (4,), left_over, 3),
        Situation(OUTLIVED, (5,), outlived, 4, falls_back_to=3),
    ]
    return {
        situation.name: Situation(
            f"{situation.name}, {words}",
            situation.publishes,
            situation.seed,
            situation.published,
            ranks,
            situation.checkpoint,
            situation.missing,
            situation.keeps,
            situation.falls_back_to,
        )
        for situation in found
    }
