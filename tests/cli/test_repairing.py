"""repair and prune: nothing changes without --apply, what they say is what they do, and nobody is disturbed."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
from pathlib import Path

import click
import pytest

from bridge.cli.application import parse
from bridge.training.checkpointing import ownership
from bridge.training.checkpointing.catalog import Owner, find_owner
from bridge.training.checkpointing.layout import LEGACY_TRACKER, TRACKER, WRITER
from bridge.training.checkpointing.marks import is_marked, mark
from tests.cli.commands import Result, _run, commit_small, copied, flip, run, run_all
from tests.cli.test_rescue import claimed
from tests.distributed.launch import run_ranks


def files_in(directory: Path) -> dict[str, bytes]:
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name != ".bridge-writer"
    }


def run_without_privileges(*lines: list[object]) -> list[Result]:
    """Run command lines in a process for which the modes of files hold, also where the tests run as root."""

    def work() -> list[Result]:
        libc = ctypes.CDLL(None, use_errno=True)
        header, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
        assert libc.capget(header, sets) == 0
        sets[0] &= ~0b110  # CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH, of the effective ones
        assert libc.capset(header, sets) == 0
        return [_run(line) for line in lines]

    (results,) = run_ranks(work, 1)
    return results


def test_repair_sets_trackers_remains_and_marks_right(trained: Path, tmp_path: Path) -> None:
    save_dir = copied(trained, tmp_path / "run")
    (save_dir / ".saving-iter_0000008-0123abcd").mkdir()
    (save_dir / ".saving-iter_0000008-0123abcd" / "__0_0.distcp").write_bytes(b"half")
    (save_dir / "iter_0000006").rename(save_dir / ".saving-iter_0000006-4567abcd")  # a crash between two renames
    mark(save_dir / "iter_0000004", "it was wrong once")
    mark(save_dir / "iter_0000002", "it is wrong")
    flip(save_dir / "iter_0000002" / "__0_0.distcp")
    (save_dir / LEGACY_TRACKER).write_text("3")
    before = files_in(save_dir)
    plan, unchanged = run_all(["repair", save_dir, "--json"], ["repair", save_dir])
    assert files_in(save_dir) == before
    assert [each["kind"] for each in plan.json["repairs"]][:3] == ["publish", "remove", "unmark"]
    assert f"To do it: bridge-ckpt repair {save_dir} --apply\n" in unchanged.out
    done, again, sound = run_all(["repair", save_dir, "--apply"], ["repair", save_dir], ["verify", save_dir, "--json"])
    assert done.status == 0
    assert "did: publish iter_0000006, which a crash has left complete as .saving-iter_0000006-4567abcd\n" in done.out
    assert "did: remove .saving-iter_0000008-0123abcd: a save that did not finish\n" in done.out
    assert "did: take the mark of damage off iter_0000004: every byte of it is right\n" in done.out
    assert again.out == "there is nothing to repair\n"
    assert {path.name for path in save_dir.iterdir()} == {
        *("iter_0000002", "iter_0000004", "iter_0000006"),
        *(TRACKER, LEGACY_TRACKER),
    }
    assert [is_marked(save_dir / f"iter_000000{n}") for n in (2, 4, 6)] == [True, False, False]
    assert (save_dir / LEGACY_TRACKER).read_text() == "6"
    assert (save_dir / TRACKER).read_bytes() == (save_dir / "iter_0000006" / "train_state.pt").read_bytes()
    assert [each["is_sound"] for each in sound.json["checkpoints"]] == [False, True, True]


def test_repair_makes_trackers_name_what_is_there(trained: Path, tmp_path: Path) -> None:
    save_dir = copied(trained, tmp_path / "run")
    shutil.rmtree(save_dir / "iter_0000006")
    done, listed = run_all(["repair", save_dir, "--apply"], ["ls", save_dir, "--json"])
    assert done.out.startswith("did: make the trackers name iter_0000004: ")
    assert listed.json["resume"]["reason"] == f"{TRACKER} names it"
    assert listed.json["resume"]["iteration"] == 4


def test_they_refuse_where_a_run_saves(tmp_path: Path) -> None:
    commit_small(tmp_path, 1)
    commit_small(tmp_path, 2)
    with claimed(tmp_path):
        results = run_all(
            ["repair", tmp_path],
            ["repair", tmp_path, "--apply"],
            ["prune", tmp_path, "--most-recent-k", 1, "--apply"],
            ["doctor", tmp_path, "--json"],
        )
    for found in results[:3]:
        assert found.status == 1
        assert found.err.startswith(f"error: DIR: a run saves in {tmp_path} (host ")
    assert any(each["text"].startswith("a run saves here now: host ") for each in results[3].json["findings"])
    assert (tmp_path / "iter_0000001").is_dir()


def test_prune_shows_what_each_rule_keeps_and_then_does_it(tmp_path: Path) -> None:
    for iteration in range(1, 9):
        commit_small(tmp_path, iteration, metrics={"loss": float(abs(iteration - 3))})
    (tmp_path / "best").symlink_to("iter_0000001")
    mark(tmp_path / "iter_0000002", "it is wrong")
    rules = ["--most-recent-k", 2, "--save-retain-interval", 4, "--retain-best-k", 1, "--retain-best-metric", "loss"]
    plan, text = run_all(["prune", tmp_path, *rules, "--json"], ["prune", tmp_path, *rules])
    found = {each["iteration"]: each["reasons"] for each in plan.json["checkpoints"]}
    assert found == {
        1: ["a link or a setting leads to it"],
        2: ["marked as damaged, to be looked at"],
        3: ["among the 1 with the lowest loss"],
        4: ["a multiple of 4"],
        5: [],
        6: [],
        7: ["among the 2 most recent"],
        8: ["the tracker names it", "among the 2 most recent", "a multiple of 4"],
    }
    assert "2 checkpoints would be deleted, " in text.out
    assert len(list(tmp_path.glob("iter_*"))) == 8
    done = run("prune", tmp_path, *rules, "--apply", "--json")
    assert done.json["removed"] == [5, 6]
    kept = sorted(path.name for path in tmp_path.glob("iter_*"))
    assert kept == [f"iter_000000{n}" for n in (1, 2, 3, 4, 7, 8)]
    assert not list(tmp_path.glob(".trash-*"))


def test_prune_by_a_recipe_and_without_a_rule(tmp_path: Path) -> None:
    save_dir = tmp_path / "run"
    save_dir.mkdir()
    for iteration in range(1, 4):
        commit_small(save_dir, iteration)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("checkpoint:\n  most_recent_k: 1\n")
    by_recipe, without, alone, missing = run_all(
        ["prune", save_dir, "--recipe", recipe, "--json"],
        ["prune", save_dir],
        ["prune", save_dir, "--retain-best-k", 1],
        ["prune", tmp_path / "missing", "--most-recent-k", 1],
    )
    assert [each["iteration"] for each in by_recipe.json["checkpoints"] if not each["stays"]] == [1, 2]
    assert without.status == alone.status == 2
    assert without.err.startswith("error: there is no rule to prune by: give --most-recent-k, ")
    assert alone.err.startswith("error: --retain-best-k and --retain-best-metric belong together")
    assert missing.err == f"error: DIR: {tmp_path}/missing is not a directory; name a directory of checkpoints\n"


def test_they_refuse_where_nobody_can_say(tmp_path: Path) -> None:
    """A lock file that cannot be asked: it was somebody's, and perhaps still is."""
    commit_small(tmp_path, 1)
    commit_small(tmp_path, 2)
    (tmp_path / ".bridge-writer").symlink_to(".bridge-writer")
    before = files_in(tmp_path)
    refused = run_all(
        ["repair", tmp_path], ["repair", tmp_path, "--apply"], ["prune", tmp_path, "--most-recent-k", 1, "--apply"]
    )
    for found in refused:
        assert found.status == 1
        assert found.err.startswith(
            f"error: DIR: nobody can say whether the run that has saved in {tmp_path} is alive "
        )
    assert files_in(tmp_path) == before
    sure = run("repair", tmp_path, "--no-run-saves-here")
    assert (sure.status, sure.out) == (0, "there is nothing to repair\n")


def test_they_leave_what_is_known_of_the_run_that_saved(trained: Path, tmp_path: Path) -> None:
    save_dir = copied(trained, tmp_path / "run")
    said = (trained / WRITER).read_bytes()
    (save_dir / WRITER).write_bytes(said)
    (save_dir / LEGACY_TRACKER).write_text("3")
    done = run_all(["repair", save_dir, "--apply"], ["prune", save_dir, "--most-recent-k", 2, "--apply"])
    assert [each.status for each in done] == [0, 0]
    assert not (save_dir / "iter_0000002").exists()
    assert (save_dir / WRITER).read_bytes() == said


def test_one_that_is_killed_leaves_it_too(tmp_path: Path) -> None:
    commit_small(tmp_path, 1)
    run_of = {"host": "far", "pid": 1, "start": "2026-01-01T00:00:00+00:00"}
    words = "host far, process 1, since 2026-01-01T00:00:00+00:00"
    (tmp_path / WRITER).write_text(json.dumps(run_of))
    with claimed(tmp_path, passing=True) as pid:
        owner = find_owner(tmp_path)
        assert owner.is_alive
        assert f"process {pid}, since " in owner.description  # a run that waits is told whom it waits for
    assert find_owner(tmp_path) == Owner(False, words)
    with claimed(tmp_path, passing=True):
        pass
    assert find_owner(tmp_path) == Owner(False, words)
    assert run("repair", tmp_path, "--apply").status == 0
    assert json.loads((tmp_path / WRITER).read_text()) == run_of
    with claimed(tmp_path) as pid:
        pass
    assert json.loads((tmp_path / WRITER).read_text())["pid"] == pid  # a run's own claim stays
    with claimed(tmp_path, passing=True) as pid:
        pass
    ownership.claim(tmp_path)
    assert f"process {pid}, since " in ownership.predecessor_of(tmp_path)  # what is unfinished there is that one's
    ownership.give_up(tmp_path)


def test_one_that_fails_is_the_one_that_left_what_is_there(tmp_path: Path) -> None:
    run_of = json.dumps({"host": "far", "pid": 1, "start": "2026-01-01T00:00:00+00:00"})
    (tmp_path / WRITER).write_text(run_of)
    ownership.claim(tmp_path, passing=True)
    ownership.give_up(tmp_path, is_done=False)
    ownership.claim(tmp_path, passing=True)
    assert f"process {os.getpid()}, since " in ownership.predecessor_of(tmp_path)
    ownership.give_up(tmp_path)
    assert (tmp_path / WRITER).read_text() == run_of


@pytest.mark.parametrize(
    ("owner", "may_be"),
    [
        (Owner(None, "host a, process 1, since then"), True),
        (Owner(None, ""), False),  # a file system without locks, where nobody has ever saved
        (Owner(False, "host a, process 1, since then"), False),
        (Owner(True, "host a, process 1, since then"), False),  # that is known
    ],
)
def test_who_may_be_alive(owner: Owner, may_be: bool) -> None:
    assert owner.may_be_alive is may_be


@pytest.mark.parametrize("hours", ["nan", "inf", "0", "-1"])
def test_hours_are_a_finite_number(tmp_path: Path, hours: str) -> None:
    with pytest.raises(click.BadParameter, match="is not a finite number above 0"):
        parse(["prune", str(tmp_path), f"--retain-every-hours={hours}"])
    with pytest.raises(click.BadParameter, match="is not a finite number above 0"):
        parse(["diff", "a", "b", f"--memory-gib={hours}"])


def test_options_are_added_to_the_rules_of_a_recipe(tmp_path: Path) -> None:
    save_dir = tmp_path / "run"
    save_dir.mkdir()
    for iteration in range(1, 9):
        commit_small(save_dir, iteration)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("checkpoint: {most_recent_k: 3, retain_iterations: [1]}\n")
    more = ["--save-retain-interval", 4, "--most-recent-k", 1, "--retain-iterations", 2]
    found = run("prune", save_dir, "--recipe", recipe, *more, "--json")
    assert [each["iteration"] for each in found.json["checkpoints"] if each["stays"]] == [1, 2, 4, 6, 7, 8]


def test_what_cannot_be_deleted_is_not_called_deleted(tmp_path: Path) -> None:
    for iteration in (1, 2):
        commit_small(tmp_path, iteration)
    (tmp_path / ".bridge-writer").write_text("")
    trash = tmp_path / ".trash-iter_0000009-0123abcd"
    trash.mkdir()
    (trash / "file").write_text("")
    for path in (tmp_path, trash):
        path.chmod(0o555)
    rules = ["--most-recent-k", 1, "--apply"]
    pruned, data, repaired = run_without_privileges(
        ["prune", tmp_path, *rules],
        ["prune", tmp_path, *rules, "--json"],
        ["repair", tmp_path, "--apply"],
    )
    tmp_path.chmod(0o755)
    assert (pruned.status, data.status, repaired.status) == (1, 1, 1), repaired
    assert "0 checkpoints deleted, 0 B\n" in pruned.out
    assert f"FAILED: could not remove the old checkpoint {tmp_path}/iter_0000001" in pruned.out
    assert (data.json["removed"], data.json["freed_bytes"]) == ([], 0)
    assert "did: " not in repaired.out
    assert f"FAILED: could not delete {trash}: " in repaired.out
    assert (tmp_path / "iter_0000001").is_dir()


def test_one_that_cannot_be_read_takes_nothing_away(tmp_path: Path) -> None:
    for iteration in (1, 2, 3):
        commit_small(tmp_path, iteration)
    (tmp_path / "iter_0000003" / "manifest.json").chmod(0)
    results = run_without_privileges(*([name, tmp_path] for name in ("ls", "verify", "doctor", "repair")))
    for found in results:
        assert found.out, found.err
    listed, verified, doctor, repaired = results
    assert [line.split()[0] for line in listed.out.splitlines()[2:5]] == ["1", "2", "3"]
    assert f"A run that loads {tmp_path} FAILS: " in listed.out
    assert "iter_0000003  DAMAGED  it cannot be read: " in verified.out
    assert "ok      latest_train_state.pt names iter_0000003\n" in doctor.out
    assert repaired.out == "there is nothing to repair\n"


def test_prune_leaves_what_other_programs_have_saved(tmp_path: Path) -> None:
    (commit_small(tmp_path, 1) / "manifest.json").unlink()
    found = run("prune", tmp_path, "--most-recent-k", 1)
    assert (found.status, found.out) == (1, "")
    assert found.err.startswith(f"error: DIR: no checkpoint in {tmp_path} has a manifest.json, so another program ")
