"""Names of a checkpoint directory: what counts, what is ours, what is foreign."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridge.training.checkpointing import layout


@given(st.integers(min_value=0, max_value=10**12))
def test_iteration_names_round_trip(iteration: int) -> None:
    assert layout.parse_iteration_name(layout.iteration_name(iteration)) == iteration


@pytest.mark.parametrize(
    "name", ["iter_best", "iter_0000100_bak", "iter_100", "iter_00000100", "xiter_0000100", "iter_0000100.tmp", "iter_"]
)
def test_names_that_are_not_ours_are_no_iterations(name: str) -> None:
    assert layout.parse_iteration_name(name) is None


def test_staging_names_are_unique_and_recognised() -> None:
    names = {layout.new_saving_name(20) for _ in range(100)}
    assert len(names) == 100
    assert {layout.staged_name(name) for name in names} == {"iter_0000020"}
    assert layout.staged_name("iter_0000020") is None
    assert layout.staged_name(".saving-iter_20-ab") is None


def test_listing_sorts_names_into_what_they_are(tmp_path: Path) -> None:
    leftovers = [".saving-iter_0000020-3f9c12ab", ".trash-iter_0000005-77b0e1d4", ".latest_train_state.pt.bridge-tmp"]
    for name in ["iter_0000010", "iter_0000002", "iter_best", "release", "tensorboard", "lost+found", *leftovers]:
        (tmp_path / name).mkdir()
    (tmp_path / "latest_train_state.pt").touch()
    (tmp_path / "metrics.jsonl").touch()
    listing = layout.list_checkpoints(tmp_path, own_files=[tmp_path / "metrics.jsonl"])
    assert listing == layout.Listing(
        path=tmp_path,
        exists=True,
        iterations=(2, 10),
        has_release=True,
        has_tracker=True,
        has_legacy_tracker=False,
        leftovers=tuple(sorted(leftovers)),
        foreign=("iter_best", "tensorboard"),
    )
    assert not listing.is_empty


def test_only_leftovers_count_as_empty(tmp_path: Path) -> None:
    (tmp_path / layout.new_saving_name(5)).mkdir()
    (tmp_path / layout.new_trash_name("iter_0000005")).mkdir()
    assert layout.list_checkpoints(tmp_path).is_empty
    assert layout.list_checkpoints(tmp_path / "absent").is_empty
    (tmp_path / "notes.txt").touch()
    assert not layout.list_checkpoints(tmp_path).is_empty


def test_a_base_directory_with_a_stray_run_config_is_no_iteration_directory(tmp_path: Path) -> None:
    (tmp_path / "run_config.yaml").touch()
    assert not layout.is_iteration_directory(tmp_path)
    (tmp_path / "metadata.json").touch()
    assert layout.is_iteration_directory(tmp_path)
    (tmp_path / "latest_checkpointed_iteration.txt").touch()
    assert not layout.is_iteration_directory(tmp_path)
