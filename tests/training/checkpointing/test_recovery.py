"""What the next start makes of a directory that a crash has left, and of one in which nothing can be saved."""

import os
from pathlib import Path

import pytest

from bridge.training.checkpointing import commit, recovery
from bridge.training.checkpointing.errors import CheckpointSaveError
from bridge.training.checkpointing.layout import WRITER, new_saving_name, new_trash_name
from bridge.training.checkpointing.retention.trash import trash_of
from tests.training.checkpointing.test_commit import stage, tree


def test_recovery_removes_what_did_not_finish(tmp_path: Path) -> None:
    commit.publish(stage(tmp_path, 10, {"a": b"1"}), 10)
    stage(tmp_path, 20, {"a": b"1"}, seal=False)
    (tmp_path / new_trash_name("iter_0000005") / "sub").mkdir(parents=True)
    (tmp_path / ".latest_train_state.pt.bridge-tmp").touch()
    (tmp_path / "notes.txt").touch()
    recovery.recover(tmp_path)
    assert tree(tmp_path) == {"iter_0000010", "iter_0000010/a", "iter_0000010/manifest.json", "notes.txt"}


def test_recovery_finishes_a_replacement_that_was_cut_between_its_renames(tmp_path: Path) -> None:
    old = commit.publish(stage(tmp_path, 10, {"a": b"old"}), 10)
    stage(tmp_path, 10, {"a": b"new"})
    old.rename(tmp_path / new_trash_name(old.name))
    recovery.recover(tmp_path)
    assert tree(tmp_path) == {"iter_0000010", "iter_0000010/a", "iter_0000010/manifest.json"}
    assert (tmp_path / "iter_0000010" / "a").read_bytes() == b"new"


def test_recovery_never_lets_a_leftover_replace_a_published_checkpoint(tmp_path: Path) -> None:
    commit.publish(stage(tmp_path, 10, {"a": b"published"}), 10)
    stage(tmp_path, 10, {"a": b"left over"})
    recovery.recover(tmp_path)
    assert (tmp_path / "iter_0000010" / "a").read_bytes() == b"published"
    assert tree(tmp_path) == {"iter_0000010", "iter_0000010/a", "iter_0000010/manifest.json"}


def test_recovery_does_not_publish_a_sealed_directory_that_lost_bytes(tmp_path: Path) -> None:
    staging = stage(tmp_path, 10, {"a": b"0123"})
    (staging / "a").write_bytes(b"012")
    recovery.recover(tmp_path)
    assert tree(tmp_path) == set()


@pytest.mark.parametrize("contexts", [({}, {}), (None, None), ({}, None)])
def test_recovery_runs_once_in_a_process_because_what_comes_later_is_its_own(
    tmp_path: Path, contexts: tuple[dict[str, object] | None, ...]
) -> None:
    left_behind = tmp_path / new_saving_name(10)
    left_behind.mkdir()
    recovery.recover_once(tmp_path, contexts[0])
    trash_of(contexts[0] or {}).finish()
    assert not left_behind.exists()
    in_flight = commit.begin_staging(tmp_path, 20)
    recovery.recover_once(tmp_path, contexts[1])
    assert in_flight.exists()


@pytest.mark.parametrize("place", ["absent", "absent/below", "."])
def test_a_save_directory_is_made_and_tried_and_left_empty(tmp_path: Path, place: str) -> None:
    recovery.recover_once(tmp_path / place, None)
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
            recovery.recover_once(path, context)
        assert str(caught.value).startswith(f"checkpoint.save: cannot save in {path}: ")
        assert str(caught.value).endswith(f"{reason}; name a directory that can be made and written")
