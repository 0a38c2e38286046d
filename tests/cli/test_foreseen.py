"""What a crash has left complete counts: the next run publishes it before it loads."""

from __future__ import annotations

import shutil
from pathlib import Path

from bridge.training.checkpointing import commit
from bridge.training.checkpointing.catalog import list_all
from bridge.training.checkpointing.layout import LEGACY_TRACKER, TRACKER
from bridge.training.checkpointing.marks import is_marked, mark
from bridge.training.config import CheckpointConfig
from tests.cli.commands import Result, copied, flip, run_all
from tests.cli.test_repairing import files_in
from tests.distributed.launch import run_ranks
from tests.training.tiny import run_to_end, tiny_config

LEFT = ".saving-iter_0000006-3f9c12ab"


def left_unpublished(trained: Path, save_dir: Path) -> Path:
    """A crash between the two renames of a replacement."""
    copied(trained, save_dir)
    (save_dir / "iter_0000006").rename(save_dir / LEFT)
    return save_dir


def test_ls_and_doctor_name_what_the_run_resumes_from(trained: Path, tmp_path: Path) -> None:
    save_dir = left_unpublished(trained, tmp_path / "run")
    before = files_in(save_dir)
    data, text, doctor = run_all(["ls", save_dir, "--json"], ["ls", save_dir], ["doctor", save_dir])
    assert files_in(save_dir) == before
    resume = data.json["resume"]
    assert (resume["outcome"], resume["iteration"], resume["path"]) == ("resume", 6, str(save_dir / LEFT))
    assert resume["reason"] == f"{TRACKER} names it"
    assert data.json["leftovers"] == []
    assert [(each["iteration"], each["is_loaded"]) for each in data.json["checkpoints"]] == [
        (2, False),
        (4, False),
        (6, True),
    ]
    note = f"a crash has left iter_0000006 complete as {save_dir / LEFT}; the next run that saves here publishes it"
    assert f"note: {note}" in text.out
    assert "remains of" not in text.out
    assert f"A run that loads {save_dir} resumes from iteration 6: {TRACKER} names it.\n" in text.out
    assert note in doctor.out
    assert "bridge-view-" not in data.out + text.out + doctor.out
    cfg = tiny_config(train_iters=6, checkpoint={"load": str(save_dir), "save": str(save_dir)})
    assert [each["started at"] for each in run_ranks(run_to_end, 2, cfg)] == [6, 6]


def test_only_a_run_that_saves_there_publishes(trained: Path, tmp_path: Path) -> None:
    save_dir = left_unpublished(trained, tmp_path / "run")
    elsewhere = CheckpointConfig(load=str(save_dir), save=str(tmp_path / "other"))
    assert list_all(save_dir, elsewhere).choice.iteration == 4
    (save_dir / LEFT / "common.pt").unlink()  # no longer complete
    assert list_all(save_dir).choice.iteration == 4


def test_that_of_the_global_tier_counts_too(trained: Path, tmp_path: Path) -> None:
    save_dir = copied(trained, tmp_path / "run")
    beside = save_dir / "non_persistent"
    beside.mkdir()
    for iteration in (4, 6):
        shutil.move(save_dir / f"iter_000000{iteration}", beside)
        commit.move_trackers(beside, iteration, (beside / f"iter_000000{iteration}/train_state.pt").read_bytes())
    commit.move_trackers(save_dir, 2, (save_dir / "iter_0000002" / "train_state.pt").read_bytes())
    (beside / "iter_0000006").rename(beside / LEFT)
    cfg = CheckpointConfig(load=str(save_dir), save=str(save_dir), non_persistent_ckpt_type="global")
    choice = list_all(save_dir, cfg).choice
    assert choice.source is not None
    assert (choice.iteration, choice.source.path, choice.source.kind) == (6, beside / LEFT, "non_persistent_global")


def done_as_said(save_dir: Path, *, status: int = 0) -> Result:
    """What repair says that it would do is what it says that it has done."""
    plan, done, again = run_all(
        ["repair", save_dir, "--json"], ["repair", save_dir, "--apply", "--json"], ["repair", save_dir]
    )
    assert (plan.status, done.status) == (status, status), done
    assert [(each["kind"], each["text"]) for each in plan.json["repairs"]] == [
        (each["kind"], each["text"]) for each in done.json["repairs"]
    ]
    assert plan.json["problems"] == done.json["problems"]
    assert again.out == "there is nothing to repair\n" or status
    return done


def test_repair_does_what_it_says_about_trackers(trained: Path, tmp_path: Path) -> None:
    after_a_crash = left_unpublished(trained, tmp_path / "a")
    (after_a_crash / LEGACY_TRACKER).write_text("3")
    alone = left_unpublished(trained, tmp_path / "b")
    for name in ("iter_0000002", "iter_0000004", TRACKER, LEGACY_TRACKER):
        shutil.rmtree(alone / name) if (alone / name).is_dir() else (alone / name).unlink()
    marked = copied(trained, tmp_path / "c")
    for name in (TRACKER, LEGACY_TRACKER):
        (marked / name).unlink()
    mark(marked / "iter_0000006", "it was wrong once")
    twice = left_unpublished(trained, tmp_path / "d")
    shutil.copytree(twice / LEFT, twice / ".saving-iter_0000006-4f9c12ab")
    for save_dir in (after_a_crash, alone, marked, twice):
        done_as_said(save_dir)
        assert (save_dir / LEGACY_TRACKER).read_text() == "6"
        assert (save_dir / TRACKER).read_bytes() == (save_dir / "iter_0000006" / "train_state.pt").read_bytes()


def test_marks_that_stay(trained: Path, tmp_path: Path) -> None:
    """Of what is empty, and of what has no checksums, nobody knows that it is sound; the rest goes on."""
    save_dir = copied(trained, tmp_path / "run")
    shutil.rmtree(save_dir / "iter_0000002")
    (save_dir / "iter_0000002").mkdir()
    mark(save_dir / "iter_0000002", "it is empty")
    for name in ("manifest.json", "run_config.yaml"):
        (save_dir / "iter_0000004" / name).unlink()
    mark(save_dir / "iter_0000004", "nobody knows")
    mark(save_dir / "iter_0000006", "it was wrong once")
    done = done_as_said(save_dir)
    assert [each["kind"] for each in done.json["repairs"]] == ["unmark"]
    assert [is_marked(save_dir / f"iter_000000{n}") for n in (2, 4, 6)] == [True, True, False]


def test_what_repair_cannot_do_is_said_beside_what_it_has_done(trained: Path, tmp_path: Path) -> None:
    save_dir = copied(trained, tmp_path / "run")
    for iteration in (2, 4, 6):
        flip(save_dir / f"iter_000000{iteration}" / "common.pt")
    (save_dir / TRACKER).write_bytes(b"garbage")
    (save_dir / LEGACY_TRACKER).write_text("garbage")
    (save_dir / ".saving-iter_0000008-0123abcd").mkdir()
    done = done_as_said(save_dir, status=1)
    assert [each["kind"] for each in done.json["repairs"]] == ["remove"]
    (problem,) = done.json["problems"]
    assert problem.startswith("the trackers can be made to name nothing: ")
