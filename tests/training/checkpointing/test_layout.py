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
    ignored = [
        "lost+found",
        ".snapshot",
        ".nfs000000000123",
        ".gitkeep",
        ".bridge-writer",
        ".bridge-events.jsonl",
        ".bridge-events.1.jsonl",
        ".trash-1000",
        ".trash-a-xyz",
    ]
    for name in ["iter_0000010", "iter_0000002", "iter_best", "release", "tensorboard", *ignored, *leftovers]:
        (tmp_path / name).mkdir()
    (tmp_path / "latest_train_state.pt").touch()
    listing = layout.list_checkpoints(tmp_path)
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


@pytest.mark.parametrize("name", [layout.new_saving_name(5), "iter_0000005", "release", "a-b"], ids=range(4))
def test_every_trash_name_that_is_made_is_recognised(name: str) -> None:
    assert layout.is_leftover(layout.new_trash_name(name))


@pytest.mark.parametrize(
    "name", [".trash-", ".trash-1000", ".trash-iter_0000005", ".trash-a-12345", ".trash-a-1234567g"]
)
def test_what_only_looks_like_trash_is_left_alone(name: str) -> None:
    assert not layout.is_leftover(name)


def test_the_runs_own_paths_are_not_foreign_wherever_they_lie(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, elsewhere = tmp_path / "base", tmp_path / "elsewhere"
    for name in ("logs", "cache", "notes", "metrics"):
        (base / name).mkdir(parents=True)
    elsewhere.mkdir()
    (base / "linked").symlink_to(elsewhere)
    (tmp_path / "alias").symlink_to(base)
    monkeypatch.chdir(tmp_path)
    own = [
        Path("base/logs/deep/metrics.jsonl"),
        tmp_path / "alias" / "cache",
        base / "linked" / "m",
        tmp_path / "notes",
        base,
    ]
    assert layout.list_checkpoints(base, own).foreign == ("metrics", "notes")


def test_a_base_directory_with_a_stray_run_config_is_no_iteration_directory(tmp_path: Path) -> None:
    (tmp_path / "run_config.yaml").touch()
    assert not layout.is_iteration_directory(tmp_path)
    (tmp_path / "metadata.json").touch()
    assert layout.is_iteration_directory(tmp_path)
    (tmp_path / "latest_checkpointed_iteration.txt").touch()
    assert not layout.is_iteration_directory(tmp_path)
