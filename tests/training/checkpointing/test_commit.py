"""The commit on a real directory: whole or absent, replaced as a whole."""

import errno
from pathlib import Path

import pytest

from bridge.training.checkpointing import commit
from bridge.training.checkpointing.errors import CheckpointSaveError
from bridge.training.checkpointing.integrity import FileRecord, Manifest
from bridge.training.checkpointing.layout import WRITER


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
