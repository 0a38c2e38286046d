"""What may be deleted, as a property and on a real directory."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridge.training.checkpointing import CheckpointDamagedError, cleanup_old_non_persistent_checkpoint
from bridge.training.checkpointing.commit import move_trackers
from bridge.training.checkpointing.contents.train_state import train_state_sidecar
from bridge.training.checkpointing.retention import stale_iterations
from bridge.training.state import TrainState


@given(st.sets(st.integers(0, 50)), st.integers(1, 10), st.sets(st.integers(0, 50)))
def test_the_newest_and_the_protected_are_never_stale(iterations: set[int], keep: int, protected: set[int]) -> None:
    stale = stale_iterations(iterations, keep, protected)
    kept = iterations - set(stale)
    assert set(stale) <= iterations
    assert not protected & set(stale)
    assert set(sorted(iterations)[-keep:]) <= kept
    assert kept <= set(sorted(iterations)[-keep:]) | protected


def directory_of(tmp_path: Path, *iterations: int, tracked: int) -> Path:
    for iteration in iterations:
        (tmp_path / f"iter_{iteration:07d}" / "sub").mkdir(parents=True)
        (tmp_path / f"iter_{iteration:07d}" / "sub" / "file").touch()
    move_trackers(tmp_path, tracked, train_state_sidecar(TrainState(step=tracked), 0).data)
    return tmp_path


def names(path: Path) -> set[str]:
    return {entry.name for entry in path.iterdir() if not entry.name.startswith("latest_")}


@pytest.mark.parametrize("do_async", [False, True])
def test_only_old_iterations_go(tmp_path: Path, do_async: bool) -> None:
    save = directory_of(tmp_path, 100, 200, 300, 400, tracked=400)
    for other in ("iter_best", "iter_0000100_bak", "release", "non_persistent/iter_0000001"):
        (save / other).mkdir(parents=True)
    cleanup_old_non_persistent_checkpoint(str(save), leave_ckpt_num=2, do_async=do_async)
    visible = {name for name in names(save) if not name.startswith(".trash-")}
    assert visible == {
        *("iter_0000300", "iter_0000400"),
        *("iter_best", "iter_0000100_bak", "release", "non_persistent"),
    }
    assert (save / "non_persistent" / "iter_0000001").exists()


def test_after_a_rollback_the_trackers_target_stays_although_newer_ones_exist(tmp_path: Path) -> None:
    save = directory_of(tmp_path, 1500, 2000, 3000, tracked=1500)
    cleanup_old_non_persistent_checkpoint(str(save), leave_ckpt_num=1)
    assert names(save) == {"iter_0001500", "iter_0003000"}


def test_none_to_keep_is_refused_and_an_unreadable_tracker_deletes_nothing(tmp_path: Path) -> None:
    save = directory_of(tmp_path, 1, 2, 3, tracked=3)
    with pytest.raises(ValueError, match="the number of checkpoints to keep is 0; it must be at least 1"):
        cleanup_old_non_persistent_checkpoint(str(save), leave_ckpt_num=0)
    (save / "latest_train_state.pt").write_bytes(b"torn")
    with pytest.raises(CheckpointDamagedError):
        cleanup_old_non_persistent_checkpoint(str(save), leave_ckpt_num=1)
    assert names(save) == {"iter_0000001", "iter_0000002", "iter_0000003"}


def test_a_link_and_an_absent_directory_are_left_alone(tmp_path: Path) -> None:
    save = directory_of(tmp_path / "save", 2, 3, tracked=3)
    (tmp_path / "elsewhere").mkdir()
    (save / "iter_0000001").symlink_to(tmp_path / "elsewhere")
    cleanup_old_non_persistent_checkpoint(str(save), leave_ckpt_num=1)
    assert names(save) == {"iter_0000001", "iter_0000003"}
    assert (tmp_path / "elsewhere").exists()
    cleanup_old_non_persistent_checkpoint(str(tmp_path / "absent"))
