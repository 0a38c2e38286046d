"""Retention on a real directory: what a sweep moves out of sight, what it must never touch, and what kills survive."""

import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from bridge.training.checkpointing import (
    CheckpointDamagedError,
    CheckpointNotFoundError,
    cleanup_old_non_persistent_checkpoint,
    commit,
    recovery,
)
from bridge.training.checkpointing.contents.train_state import train_state_sidecar
from bridge.training.checkpointing.integrity import FileRecord, Manifest, find_damage, merged_metrics, read_manifest
from bridge.training.checkpointing.layout import LEGACY_TRACKER, MANIFEST, TRACKER, is_leftover, list_checkpoints
from bridge.training.checkpointing.retention.policies import (
    Best,
    Entry,
    EveryHours,
    EveryIterations,
    MostRecent,
    Policy,
)
from bridge.training.checkpointing.retention.sweeper import (
    committed_entries,
    needed_again,
    plan_sweep,
    remove_old_checkpoints,
    sweep,
    sweep_after_save,
)
from bridge.training.checkpointing.retention.trash import Trash, trash_of
from bridge.training.checkpointing.starts import STARTS, Starts, write_starts
from bridge.training.checkpointing.transaction import numbers_among
from bridge.training.config import CheckpointConfig
from bridge.training.state import TrainState
from tests.distributed.launch import run_ranks
from tests.faults.killing import run_until
from tests.training.tiny import run_to_end, tiny_config

NEWEST: list[Policy] = [MostRecent(1)]


def save(save_dir: Path, iteration: int, created: float | None = 0.0, start: int = 0, **metrics: float) -> Path:
    """A checkpoint as the real commit leaves it, with a payload of a few bytes."""
    staging = commit.begin_staging(save_dir, iteration)
    (staging / "tokenizer").mkdir()
    names = ["__0_0.distcp", "tokenizer/vocab.json"]
    for name in names:
        (staging / name).write_bytes(b"%d" % iteration)
    records = tuple(FileRecord.of(staging, name) for name in names)
    manifest = Manifest(iteration, "torch_dist", 1, {}, {}, records, created=created, start=start, metrics=metrics)
    commit.seal(staging, manifest)
    path = commit.publish(staging, iteration)
    track(save_dir, iteration)
    return path


def track(save_dir: Path, iteration: int) -> None:
    commit.move_trackers(save_dir, iteration, train_state_sidecar(TrainState(step=iteration), 0).data)


def saved(save_dir: Path, *iterations: int) -> Path:
    """A directory with these checkpoints, saved in this order."""
    for iteration in iterations:
        save(save_dir, iteration)
    return save_dir


def visible(save_dir: Path) -> set[str]:
    return {entry.name for entry in save_dir.iterdir() if not entry.name.startswith((".", "latest_"))}


def iterations(save_dir: Path) -> set[int]:
    return {entry.iteration for entry in committed_entries(list_checkpoints(save_dir))}


def test_what_goes_is_out_of_sight_under_a_name_that_never_counts(tmp_path: Path) -> None:
    save_dir = saved(tmp_path, 100, 200, 300, 400)
    trash = sweep(save_dir, [MostRecent(1), EveryIterations(200)], saved=400)
    assert visible(save_dir) == {"iter_0000200", "iter_0000400"}
    assert len(trash) == 2
    assert all(path.parent == save_dir and is_leftover(path.name) for path in trash)
    assert {path.name for path in trash[0].iterdir()} == {"__0_0.distcp", "tokenizer", MANIFEST}


def test_without_policies_everything_stays(tmp_path: Path) -> None:
    save_dir = saved(tmp_path, 100, 200, 300)
    assert sweep(save_dir, [], saved=300) == []
    assert iterations(save_dir) == {100, 200, 300}


def test_after_a_rollback_the_checkpoint_just_saved_and_the_newer_ones_stay(tmp_path: Path) -> None:
    """With 2000 and 3000 there, a run that went back to 1000 saves 1500 and keeps one: 1500 must not go."""
    save_dir = saved(tmp_path, 1000, 2000, 3000, 1500)
    sweep(save_dir, NEWEST, saved=1500)
    assert iterations(save_dir) == {1500, 2000, 3000}
    save(save_dir, 1600)
    sweep(save_dir, NEWEST, saved=1600)
    assert iterations(save_dir) == {1600, 2000, 3000}
    save(save_dir, 3500)
    sweep(save_dir, NEWEST, saved=3500)
    assert iterations(save_dir) == {3500}


def test_names_that_are_no_checkpoints_neither_go_nor_count(tmp_path: Path) -> None:
    save_dir = saved(tmp_path / "save", 100, 200)
    foreign = ["iter_best", "iter_0000100_bak", "iter_300", "release", "non_persistent/iter_0000300", "iter_0000300"]
    for name in foreign:
        shutil.copytree(save_dir / "iter_0000200", save_dir / name)  # iter_0000300 says that it is 200
    (save_dir / "iter_0000400").mkdir()
    shutil.copytree(save_dir / "iter_0000200", save_dir / "iter_0000050")
    manifest = (save_dir / "iter_0000050" / MANIFEST).read_text()
    (save_dir / "iter_0000050" / MANIFEST).write_text(manifest[: len(manifest) // 2])
    elsewhere = saved(tmp_path / "elsewhere", 70) / "iter_0000070"
    (save_dir / "iter_0000070").symlink_to(elsewhere)
    (save_dir / "iter_0000060").write_text("a file")
    before = visible(save_dir)
    assert len(sweep(save_dir, NEWEST, saved=200)) == 1
    assert before - visible(save_dir) == {"iter_0000100"}
    assert (save_dir / "non_persistent" / "iter_0000300" / MANIFEST).exists()
    assert (elsewhere / MANIFEST).exists()


@pytest.mark.parametrize(
    ("harm", "error", "message"),
    [
        (lambda d: (d / TRACKER).write_bytes(b"torn"), CheckpointDamagedError, "is not a readable train state"),
        (lambda d: (d / LEGACY_TRACKER).write_text("ten"), CheckpointDamagedError, "latest_checkpointed_iteration"),
        (lambda d: track(d, 999), CheckpointDamagedError, "names iteration 999, which is not whole there"),
        (lambda d: (d / "iter_0000300" / MANIFEST).unlink(), CheckpointDamagedError, "names iteration 300, which is"),
        (lambda d: [(d / n).unlink() for n in (TRACKER, LEGACY_TRACKER)], CheckpointNotFoundError, "has no tracker"),
    ],
)
def test_where_the_tracker_does_not_say_what_to_keep_nothing_goes_and_the_save_succeeds(
    tmp_path: Path, harm: Any, error: type[Exception], message: str, caplog: pytest.LogCaptureFixture
) -> None:
    save_dir = saved(tmp_path, 100, 200, 300)
    harm(save_dir)
    before = visible(save_dir)
    with pytest.raises(error, match=message):
        sweep(save_dir, NEWEST, saved=300)
    caplog.clear()
    sweep_after_save(save_dir, 300, NEWEST, Trash())
    assert visible(save_dir) == before
    loud = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert [record.getMessage() for record in loud] == [
        f"OLD CHECKPOINTS IN {save_dir} ARE NOT DELETED; the next save tries again"
    ]


@pytest.mark.parametrize("content", [b"", b"{}", None])
def test_where_nobody_knows_what_was_left_behind_nothing_goes(tmp_path: Path, content: bytes | None) -> None:
    for iteration, start in ((10, 1), (20, 1), (30, 1), (35, 2)):
        save(tmp_path, iteration, start=start)
    write_starts(tmp_path, Starts().followed_by(1, 0).followed_by(2, 10, 1))
    policies: list[Policy] = [MostRecent(2)]
    assert plan_sweep(tmp_path, policies, saved=35).removable == (20,), "10 is what there is to go back to"
    noted = (tmp_path / STARTS).read_bytes()
    (tmp_path / STARTS).unlink()
    if content is None:
        (tmp_path / STARTS).mkdir()  # cannot be read, whoever asks
    else:
        (tmp_path / STARTS).write_bytes(content)
    error = OSError if content is None else CheckpointDamagedError
    with pytest.raises(error):
        plan_sweep(tmp_path, policies, saved=35)
    with pytest.raises(error):
        remove_old_checkpoints(tmp_path, 2)
    assert sweep_after_save(tmp_path, 35, policies, Trash()) is None
    assert visible(tmp_path) == {f"iter_00000{number}" for number in (10, 20, 30, 35)}
    if content is not None:
        (tmp_path / STARTS).write_bytes(noted)
        remove_old_checkpoints(tmp_path, 2)
        assert visible(tmp_path) == {f"iter_00000{number}" for number in (10, 30, 35)}


def test_where_it_was_lost_what_was_left_behind_only_what_goes_in_any_case_goes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """20 and 30 were left behind. Neither their numbers nor their times tell."""
    for iteration, start in ((10, 1), (20, 1), (30, 1), (35, 2)):
        save(tmp_path, iteration, created=float(iteration), start=start)
    policies: list[Policy] = [MostRecent(2)]
    assert plan_sweep(tmp_path, policies, saved=35).removable == ()
    assert caplog.messages == [
        f"{tmp_path / STARTS} is gone, so nobody knows which checkpoints this run has left behind by going back; if "
        "the directory was copied, copy that file too"
    ]
    remove_old_checkpoints(tmp_path, 1)
    assert visible(tmp_path) == {f"iter_00000{number}" for number in (10, 20, 30, 35)}
    assert plan_sweep(tmp_path, [EveryIterations(20)], saved=35).removable == (10, 30)
    # The next start has counted itself: what it saves is certain, and that is enough once it is as many.
    write_starts(tmp_path, Starts().followed_by(1002, 35, 2))
    save(tmp_path, 40, created=40.0, start=1002)
    assert plan_sweep(tmp_path, policies, saved=40).removable == (10, 20, 30)
    assert plan_sweep(tmp_path, [MostRecent(3)], saved=40).removable == ()


def test_without_notes_the_checkpoints_of_one_start_are_in_the_order_of_their_iterations(tmp_path: Path) -> None:
    for iteration in (10, 20, 30):
        save(tmp_path, iteration, created=-float(iteration), start=3)
    assert plan_sweep(tmp_path, NEWEST, saved=30).removable == (10, 20)
    save(tmp_path, 5)  # of a time when starts had no numbers
    track(tmp_path, 30)
    assert plan_sweep(tmp_path, NEWEST, saved=30).removable == (5, 10, 20)


def test_the_tracker_of_other_readers_protects_its_target_too(tmp_path: Path) -> None:
    """A crash between the two trackers leaves them a save apart."""
    save_dir = saved(tmp_path, 100, 200, 300)
    (save_dir / LEGACY_TRACKER).write_text("200")
    sweep(save_dir, NEWEST)
    assert iterations(save_dir) == {200, 300}


def test_a_checkpoint_that_is_in_use_stays_however_it_is_reached(tmp_path: Path) -> None:
    save_dir = saved(tmp_path / "save", 100, 200, 300, 400, 500)
    (tmp_path / "link").symlink_to(save_dir / "iter_0000100")
    (tmp_path / "alias").symlink_to(save_dir)
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "iter_0000007").symlink_to(tmp_path / "alias" / "iter_0000200")
    in_use = [tmp_path / "link", tmp_path / "base" / "iter_0000007", tmp_path / "alias" / "iter_0000300"]
    sweep(save_dir, NEWEST, saved=500, in_use=[*in_use, tmp_path / "absent", save_dir])
    assert iterations(save_dir) == {100, 200, 300, 500}


@pytest.mark.parametrize(
    ("settings", "loaded_from", "base", "expected"),
    [
        ({"save": "s"}, None, None, []),
        # A run that continues itself finds what its tracker names.
        ({"save": "s", "load": "s"}, "s/iter_0000010", None, ["s"]),
        ({"save": "s", "load": "s", "ckpt_step": 10}, "s/iter_0000010", None, ["s", "s/iter_0000010"]),
        ({"save": "s", "load": "l"}, "l/iter_0000010", None, ["l", "l/iter_0000010"]),
        ({"save": "s", "pretrained_checkpoint": "p"}, "p/iter_0000010", None, ["p", "p/iter_0000010"]),
        (
            {"save": "s", "load": "s", "pretrained_checkpoint": "p"},
            "s/iter_0000010",
            "p/iter_0000020",
            ["s", "p", "p/iter_0000020"],
        ),
    ],
)
def test_what_a_restart_with_the_same_settings_needs(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, Any],
    loaded_from: str | None,
    base: str | None,
    expected: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("s", "l", "p"):
        Path(name).mkdir()
    assert needed_again(CheckpointConfig(**settings), loaded_from, base) == [Path(name) for name in expected]


def test_entries_say_when_and_what_was_measured_and_old_manifests_have_their_files_time(tmp_path: Path) -> None:
    save(tmp_path, 10, created=123.5, loss=2.0, grad_norm=0.5)
    path = save(tmp_path, 20)
    old = json.loads((path / MANIFEST).read_text())
    del old["created"], old["metrics"], old["own_checksum"]
    old["format_version"] = 1
    (path / MANIFEST).write_text(json.dumps(old))
    os.utime(path / MANIFEST, (1000, 2000))
    assert committed_entries(list_checkpoints(tmp_path)) == [
        Entry(10, 123.5, {"loss": 2.0, "grad_norm": 0.5}),
        Entry(20, 2000.0, {}),
    ]


@pytest.mark.parametrize("change", [{"created": "now"}, {"created": True}, {"metrics": []}, {"metrics": {"loss": "1"}}])
def test_a_manifest_with_another_kind_of_value_is_damaged(tmp_path: Path, change: dict[str, Any]) -> None:
    path = save(tmp_path, 10)
    content = json.loads((path / MANIFEST).read_text())
    (path / MANIFEST).write_text(json.dumps(content | change))
    with pytest.raises(CheckpointDamagedError):
        read_manifest(path)


def test_metrics_of_all_ranks_become_one_set() -> None:
    by_rank: list[dict[str, Any]] = [{}, {"loss": 2.0, "grad_norm": float("inf")}, {"loss": 3.0, "grad_norm": 1}]
    assert merged_metrics([numbers_among(metrics) for metrics in by_rank]) == {"loss": 2.0, "grad_norm": 1.0}


def test_a_metric_that_is_no_number_is_left_out() -> None:
    metrics = {"loss": torch.tensor(2.0), "name": "best", "none": None, "many": torch.zeros(2), "huge": 10**400}
    assert numbers_among(metrics) == {"loss": 2.0}


def test_policies_judge_by_what_the_manifests_say(tmp_path: Path) -> None:
    for iteration, hour, loss in ((10, 0, 3.0), (20, 1, 1.0), (30, 2, 2.0), (40, 3, 2.5)):
        save(tmp_path, iteration, created=hour * 3600.0, loss=loss)
    sweep(tmp_path, [EveryHours(2), Best(1, "loss")], saved=40)
    assert iterations(tmp_path) == {10, 20, 30, 40}
    sweep(tmp_path, [Best(1, "loss")], saved=40)
    assert iterations(tmp_path) == {20, 40}


def test_a_metric_that_was_not_measured_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save(tmp_path, 10, loss=1.0)
    save(tmp_path, 20, loss=2.0)
    assert sweep(tmp_path, [Best(1, "perplexity")], saved=20) == []
    assert (
        "checkpoint.retain_best_metric: 'perplexity' was not measured for the checkpoint of iteration 20, "
        "which has loss" in caplog.text
    )


def test_the_files_go_in_the_background_and_a_start_goes_on_with_what_is_left(tmp_path: Path) -> None:
    save_dir = saved(tmp_path, 100, 200, 300)
    slow = Trash(files_per_second=0.1)
    sweep_after_save(save_dir, 300, NEWEST, slow)
    assert visible(save_dir) == {"iter_0000300"}
    assert [entry.name for entry in save_dir.iterdir() if is_leftover(entry.name)]
    context: dict[str, Any] = {"trash": slow}
    recovery.recover_once(save_dir, context)
    assert visible(save_dir) == {"iter_0000300"}
    trash_of(context).finish()
    assert not [entry.name for entry in save_dir.iterdir() if is_leftover(entry.name)]


def test_a_checkpoint_that_cannot_be_moved_costs_a_message_and_the_others_go(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_dir = saved(tmp_path / "save", 100, 200, 300)
    real = Path.rename

    def refuse(self: Path, target: Path) -> Path:
        if self.name == "iter_0000100":
            raise PermissionError(13, "Permission denied", str(self))
        return real(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    assert len(sweep(save_dir, NEWEST, saved=300)) == 1
    assert iterations(save_dir) == {100, 300}
    assert f"could not remove the old checkpoint {save_dir / 'iter_0000100'}; the next save tries again" in caplog.text


def sweep_to_the_end(save_dir: str) -> None:
    """What a run does after its save, until its end."""
    context: dict[str, Any] = {}
    recovery.recover_once(Path(save_dir), context)
    sweep_after_save(Path(save_dir), 50, NEWEST, trash_of(context))
    trash_of(context).finish()


def test_a_kill_at_any_operation_of_a_sweep_leaves_only_whole_checkpoints_and_the_next_one_ends_it(
    tmp_path: Path,
) -> None:
    seed = saved(tmp_path / "seed", 10, 20, 30, 40, 50)
    shutil.copytree(seed, tmp_path / "undisturbed")
    killed, operations = run_until(None, tmp_path / "undisturbed", sweep_to_the_end, 1, str(tmp_path / "undisturbed"))
    assert not killed and iterations(tmp_path / "undisturbed") == {50}
    for operation in range(1, operations + 1):
        save_dir = tmp_path / f"at-{operation}"
        shutil.copytree(seed, save_dir)
        killed, _ = run_until(operation, save_dir, sweep_to_the_end, 1, str(save_dir))
        assert killed
        left = iterations(save_dir)  # the oldest go first
        assert left == {iteration for iteration in (10, 20, 30, 40, 50) if iteration >= min(left)}
        for iteration in left:
            path = save_dir / f"iter_{iteration:07d}"
            manifest = read_manifest(path)
            assert manifest is not None and find_damage(path, manifest.files, checksums=True) == []
        sweep_to_the_end(str(save_dir))
        assert visible(save_dir) == {"iter_0000050"}
        assert not [entry.name for entry in save_dir.iterdir() if is_leftover(entry.name)]


@pytest.mark.parametrize("async_save", [False, True])
def test_a_run_keeps_what_its_settings_say_and_nothing_of_the_rest(tmp_path: Path, async_save: bool) -> None:
    save_dir = tmp_path / "save"
    checkpoint = {
        **{"save": str(save_dir), "save_interval": 1, "async_save": async_save, "most_recent_k": 1},
        **{"retain_iterations": [2], "retain_best_k": 1, "retain_best_metric": "loss", "retain_best_mode": "max"},
    }
    (outcome, _) = run_ranks(run_to_end, 2, tiny_config(train_iters=6, checkpoint=checkpoint))
    assert [iteration for _, iteration, _ in outcome["saved"]] == [1, 2, 3, 4, 5, 6]
    entries = {entry.iteration: entry for entry in committed_entries(list_checkpoints(save_dir))}
    assert all(entry.metrics.keys() == {"loss", "grad_norm"} for entry in entries.values())
    assert entries.keys() >= {2, 6}
    best = max(entries.values(), key=lambda entry: entry.metrics["loss"]).iteration
    assert visible(save_dir) == {f"iter_{iteration:07d}" for iteration in {2, 6, best}}
    assert not [entry.name for entry in save_dir.iterdir() if is_leftover(entry.name)]


# cleanup_old_non_persistent_checkpoint


@pytest.mark.parametrize("do_async", [False, True])
def test_only_old_checkpoints_are_cleaned_up(tmp_path: Path, do_async: bool) -> None:
    save_dir = saved(tmp_path, 100, 200, 300, 400)
    for other in ("iter_best", "iter_0000100_bak", "release", "non_persistent/iter_0000001"):
        (save_dir / other).mkdir(parents=True)
    cleanup_old_non_persistent_checkpoint(str(save_dir), leave_ckpt_num=2, do_async=do_async)
    others = {"iter_best", "iter_0000100_bak", "release", "non_persistent"}
    assert visible(save_dir) == {"iter_0000300", "iter_0000400"} | others
    assert (save_dir / "non_persistent" / "iter_0000001").exists()
    if not do_async:
        assert not [entry for entry in save_dir.iterdir() if is_leftover(entry.name)]


def test_cleaning_up_keeps_the_trackers_target_and_all_that_is_newer(tmp_path: Path) -> None:
    save_dir = saved(tmp_path, 1000, 2000, 3000, 1500)
    cleanup_old_non_persistent_checkpoint(str(save_dir), leave_ckpt_num=1)
    assert iterations(save_dir) == {1500, 2000, 3000}


def test_cleaning_up_without_a_tracker_goes_by_the_numbers(tmp_path: Path) -> None:
    save_dir = saved(tmp_path, 1, 2, 3)
    for name in (TRACKER, LEGACY_TRACKER):
        (save_dir / name).unlink()
    cleanup_old_non_persistent_checkpoint(str(save_dir), leave_ckpt_num=2)
    assert iterations(save_dir) == {2, 3}


def test_none_to_keep_is_refused_and_an_unreadable_tracker_deletes_nothing(tmp_path: Path) -> None:
    save_dir = saved(tmp_path, 1, 2, 3)
    with pytest.raises(ValueError, match="the number of checkpoints to keep is 0; it must be at least 1"):
        cleanup_old_non_persistent_checkpoint(str(save_dir), leave_ckpt_num=0)
    (save_dir / TRACKER).write_bytes(b"torn")
    with pytest.raises(CheckpointDamagedError):
        cleanup_old_non_persistent_checkpoint(str(save_dir), leave_ckpt_num=1)
    assert iterations(save_dir) == {1, 2, 3}


def test_an_absent_directory_needs_no_cleaning(tmp_path: Path) -> None:
    cleanup_old_non_persistent_checkpoint(str(tmp_path / "absent"))


def test_what_a_link_in_the_directory_leads_to_stays(tmp_path: Path) -> None:
    save_dir = saved(tmp_path / "save", 100, 200, 300, 400)
    (save_dir / "best").symlink_to("iter_0000100")
    (save_dir / "elsewhere").symlink_to(tmp_path)
    (save_dir / "nowhere").symlink_to("iter_0000900")
    sweep(save_dir, NEWEST, saved=400)
    assert iterations(save_dir) == {100, 400}
