"""The commit on a real directory: whole or absent, replaced as a whole, recovered after a crash."""

import errno
import os
from pathlib import Path

import pytest

from bridge.training.checkpointing import commit
from bridge.training.checkpointing.errors import CheckpointSaveError
from bridge.training.checkpointing.integrity import FileRecord, Manifest
from bridge.training.checkpointing.layout import WRITER, new_saving_name, new_trash_name
from bridge.training.checkpointing.retention.trash import trash_of


def stage(save_dir: Path, iteration: int, contents: dict[str, bytes], *, seal: bool = True) -> Path:
    """A staging directory as a save leaves it just before it is published."""
    staging = commit.begin_staging(save_dir, iteration)
    for name, data in contents.items():
        (staging / name).parent.mkdir(parents=True, exist_ok=True)
        (staging / name).write_bytes(data)
    if seal:
        commit.seal(staging, manifest_of(staging, iteration, list(contents)))
    return staging


def manifest_of(staging: Path, iteration: int, names: list[str]) -> Manifest:
    records = tuple(FileRecord.of(staging, name) for name in names)
    return Manifest(iteration, "torch_dist", 1, {}, {}, records)


def tree(path: Path) -> set[str]:
    return {entry.relative_to(path).as_posix() for entry in path.rglob("*")} - {WRITER}


def test_a_save_is_published_under_its_iteration_with_exactly_its_files(tmp_path: Path) -> None:
    staging = stage(tmp_path / "new" / "save", 10, {"a": b"1", "tokenizer/b": b"2"})
    final = commit.publish(staging, 10)
    assert final == tmp_path / "new" / "save" / "iter_0000010"
    assert tree(tmp_path / "new" / "save") == {
        "iter_0000010",
        "iter_0000010/a",
        "iter_0000010/manifest.json",
        "iter_0000010/tokenizer",
        "iter_0000010/tokenizer/b",
    }


@pytest.mark.parametrize("can_exchange", [True, False])
def test_saving_again_replaces_the_whole_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, can_exchange: bool
) -> None:
    if not can_exchange:
        monkeypatch.setattr(commit, "exchange", lambda first, second: False)
    commit.publish(stage(tmp_path, 10, {"__0_0.distcp": b"old", "__1_0.distcp": b"of a larger world"}), 10)
    commit.publish(stage(tmp_path, 10, {"__0_0.distcp": b"new"}), 10)
    assert tree(tmp_path) == {"iter_0000010", "iter_0000010/__0_0.distcp", "iter_0000010/manifest.json"}
    assert (tmp_path / "iter_0000010" / "__0_0.distcp").read_bytes() == b"new"


def test_a_replacement_that_fails_half_way_puts_the_old_checkpoint_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit.publish(stage(tmp_path, 10, {"__0_0.distcp": b"old"}), 10)
    staging = stage(tmp_path, 10, {"__0_0.distcp": b"new"})
    real = Path.rename

    def refuse(self: Path, target: Path) -> Path:
        if self == staging:
            raise OSError(errno.ESTALE, "Stale file handle", str(self))
        return real(self, target)

    monkeypatch.setattr(commit, "exchange", lambda first, second: False)
    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(OSError, match="Stale file handle"):
        commit.publish(staging, 10)
    assert tree(tmp_path) == {
        *("iter_0000010", "iter_0000010/__0_0.distcp", "iter_0000010/manifest.json"),
        *(staging.name, f"{staging.name}/__0_0.distcp", f"{staging.name}/manifest.json"),
    }
    assert (tmp_path / "iter_0000010" / "__0_0.distcp").read_bytes() == b"old"


def test_trackers_move_as_whole_files(tmp_path: Path) -> None:
    commit.move_trackers(tmp_path, 10, b"ten")
    commit.move_trackers(tmp_path, 20, b"twenty")
    assert tree(tmp_path) == {"latest_train_state.pt", "latest_checkpointed_iteration.txt"}
    assert (tmp_path / "latest_train_state.pt").read_bytes() == b"twenty"
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == "20"


def test_files_that_nobody_wrote_or_that_vanished_stop_the_commit(tmp_path: Path) -> None:
    staging = stage(tmp_path, 10, {"a": b"1", "b": b"2"}, seal=False)
    manifest = manifest_of(staging, 10, ["a", "b"])
    (staging / "b").unlink()
    (staging / "stray").touch()
    with pytest.raises(CheckpointSaveError) as caught:
        commit.seal(staging, manifest)
    assert "b is missing; stray was written by nobody" in str(caught.value)
    assert not (staging / "manifest.json").exists()


def test_recovery_removes_what_did_not_finish(tmp_path: Path) -> None:
    commit.publish(stage(tmp_path, 10, {"a": b"1"}), 10)
    stage(tmp_path, 20, {"a": b"1"}, seal=False)
    (tmp_path / new_trash_name("iter_0000005") / "sub").mkdir(parents=True)
    (tmp_path / ".latest_train_state.pt.bridge-tmp").touch()
    (tmp_path / "notes.txt").touch()
    commit.recover(tmp_path)
    assert tree(tmp_path) == {"iter_0000010", "iter_0000010/a", "iter_0000010/manifest.json", "notes.txt"}


def test_recovery_finishes_a_replacement_that_was_cut_between_its_renames(tmp_path: Path) -> None:
    old = commit.publish(stage(tmp_path, 10, {"a": b"old"}), 10)
    stage(tmp_path, 10, {"a": b"new"})
    old.rename(tmp_path / new_trash_name(old.name))
    commit.recover(tmp_path)
    assert tree(tmp_path) == {"iter_0000010", "iter_0000010/a", "iter_0000010/manifest.json"}
    assert (tmp_path / "iter_0000010" / "a").read_bytes() == b"new"


def test_recovery_never_lets_a_leftover_replace_a_published_checkpoint(tmp_path: Path) -> None:
    commit.publish(stage(tmp_path, 10, {"a": b"published"}), 10)
    stage(tmp_path, 10, {"a": b"left over"})
    commit.recover(tmp_path)
    assert (tmp_path / "iter_0000010" / "a").read_bytes() == b"published"
    assert tree(tmp_path) == {"iter_0000010", "iter_0000010/a", "iter_0000010/manifest.json"}


def test_recovery_does_not_publish_a_sealed_directory_that_lost_bytes(tmp_path: Path) -> None:
    staging = stage(tmp_path, 10, {"a": b"0123"})
    (staging / "a").write_bytes(b"012")
    commit.recover(tmp_path)
    assert tree(tmp_path) == set()


@pytest.mark.parametrize("contexts", [({}, {}), (None, None), ({}, None)])
def test_recovery_runs_once_in_a_process_because_what_comes_later_is_its_own(
    tmp_path: Path, contexts: tuple[dict[str, object] | None, ...]
) -> None:
    left_behind = tmp_path / new_saving_name(10)
    left_behind.mkdir()
    commit.recover_once(tmp_path, contexts[0])
    trash_of(contexts[0] or {}).finish()
    assert not left_behind.exists()
    in_flight = commit.begin_staging(tmp_path, 20)
    commit.recover_once(tmp_path, contexts[1])
    assert in_flight.exists()


@pytest.mark.parametrize("place", ["absent", "absent/below", "."])
def test_a_save_directory_is_made_and_tried_and_left_empty(tmp_path: Path, place: str) -> None:
    commit.recover_once(tmp_path / place, None)
    assert (tmp_path / place / WRITER).is_file()
    assert tree(tmp_path / place) == set()


def unusable(kind: str, directory: Path) -> tuple[Path, str]:
    """A path where nothing can be saved, and what the message says of it."""
    if kind == "file":
        (directory / "file").touch()
        return directory / "file", f"{directory / 'file'} is not a directory"
    if kind == "file above":
        (directory / "file").touch()
        return directory / "file" / "save", f"{directory / 'file'} is not a directory"
    if kind == "dangling link":
        (directory / "link").symlink_to(directory / "gone")
        return directory / "link", f"{directory / 'link'} is a link to {directory / 'gone'}, which does not exist"
    if kind == "refused by the file system":
        return Path("/proc/save"), "No such file or directory: '/proc/save'"
    directory.chmod(0o500)
    return directory, f"Permission denied: '{directory / WRITER}'"


@pytest.mark.parametrize("kind", ["file", "file above", "dangling link", "refused by the file system", "no permission"])
def test_a_place_that_cannot_be_saved_in_is_an_error_that_names_the_setting(tmp_path: Path, kind: str) -> None:
    if kind == "no permission" and os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    path, reason = unusable(kind, tmp_path)
    context: dict[str, object] = {}
    for _ in range(2):  # a failure is not remembered as done
        with pytest.raises(CheckpointSaveError) as caught:
            commit.recover_once(path, context)
        assert str(caught.value).startswith(f"checkpoint.save: cannot save in {path}: ")
        assert str(caught.value).endswith(f"{reason}; name a directory that can be made and written")
