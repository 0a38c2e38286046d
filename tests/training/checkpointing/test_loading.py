"""Loads that must not succeed, on two ranks: the same typed error everywhere, quickly, and nothing changed on disk."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bridge.training.setup import setup
from tests.distributed.launch import run_ranks
from tests.training.tiny import run_to_end, tiny_config


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of iterations 2 and 4, from two ranks."""
    save = tmp_path_factory.mktemp("saved")
    run_ranks(run_to_end, 2, tiny_config(train_iters=4, checkpoint={"save": str(save), "save_interval": 2}))
    return save


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    """A copy of `saved` to damage."""
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def start(cfg: Any) -> tuple[str, str | int]:
    """Set a run up: the error that it raises, or the iteration that it starts from."""
    try:
        run = setup(cfg)
    except Exception as error:
        names = [base.__name__ for base in type(error).__mro__ if base.__name__ in ("FileNotFoundError",)]
        return "/".join([type(error).__name__, *names]), str(error)
    return "started", run.state.train_state.step


def outcome(load: Path, **settings: Any) -> tuple[str, str | int]:
    """What starting from `load` comes to; both ranks must agree, and the directory must stay as it is."""
    before = snapshot(load)
    checkpoint = {"load": str(load), **settings.pop("checkpoint", {})}
    first, second = run_ranks(start, 2, tiny_config(train_iters=4, checkpoint=checkpoint, **settings), timeout=60)
    assert first == second
    assert snapshot(load) == before
    return first


def snapshot(path: Path) -> dict[str, bytes | None]:
    return {str(entry): entry.read_bytes() if entry.is_file() else None for entry in sorted(path.rglob("*"))}


def test_the_tracker_names_what_is_loaded_and_a_step_beats_it(saved: Path) -> None:
    assert outcome(saved) == ("started", 4)
    assert outcome(saved, checkpoint={"ckpt_step": 2}) == ("started", 2)
    assert outcome(saved / "iter_0000002") == ("started", 2)


def test_a_missing_step_is_file_not_found_on_every_rank(saved: Path) -> None:
    kind, message = outcome(saved, checkpoint={"ckpt_step": 3})
    assert kind == "CheckpointNotFoundError/FileNotFoundError"
    assert message == (f"checkpoint.ckpt_step: 3 is not in {saved} (iter_0000003 does not exist; there are 2, 4)")
    kind, _ = outcome(saved / "absent", checkpoint={"ckpt_step": 3})
    assert kind == "CheckpointNotFoundError/FileNotFoundError"


def test_an_empty_directory_starts_afresh_or_is_an_error_by_the_setting(tmp_path: Path) -> None:
    assert outcome(tmp_path / "absent") == ("started", 0)
    assert outcome(tmp_path) == ("started", 0)
    kind, message = outcome(tmp_path, checkpoint={"exit_on_missing_checkpoint": True})
    assert kind == "CheckpointNotFoundError/FileNotFoundError"
    assert message == (
        f"checkpoint.load: there is no checkpoint in {tmp_path}, and checkpoint.exit_on_missing_checkpoint is set"
    )


def test_the_runs_own_metrics_file_does_not_make_a_directory_foreign(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    metrics.touch()
    assert outcome(tmp_path, logger={"metrics_path": str(metrics)}) == ("started", 0)
    assert outcome(tmp_path)[0] == "NotACheckpointError"


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def edit_manifest(copy: Path, **changes: Any) -> None:
    path = copy / "iter_0000004" / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def without_manifest(copy: Path) -> None:
    """Make iteration 4 look like another program's: no manifest, and a configuration of another package."""
    iteration = copy / "iter_0000004"
    (iteration / "manifest.json").unlink()
    config = iteration / "run_config.yaml"
    config.write_text(config.read_text().replace("_target_: bridge.", "_target_: another."))


DAMAGE: dict[str, tuple[Callable[[Path], Any], str, str]] = {
    "unreadable tracker": (
        lambda c: truncate(c / "latest_train_state.pt"),
        "CheckpointDamagedError",
        "latest_train_state.pt is not a readable train state",
    ),
    "empty tracker": (
        lambda c: (c / "latest_train_state.pt").write_bytes(b""),
        "CheckpointDamagedError",
        "latest_train_state.pt is not a readable train state",
    ),
    "tracker of something else": (
        lambda c: torch.save({"weight": torch.zeros(2)}, c / "latest_train_state.pt"),
        "CheckpointDamagedError",
        "latest_train_state.pt is not a readable train state",
    ),
    "tracker's target gone": (
        lambda c: shutil.rmtree(c / "iter_0000004"),
        "CheckpointDamagedError",
        "latest_train_state.pt names iter_0000004, which does not exist (there is 2)",
    ),
    "unreadable text tracker": (
        lambda c: (
            (c / "latest_train_state.pt").unlink(),
            (c / "latest_checkpointed_iteration.txt").write_text("soon"),
        ),
        "CheckpointDamagedError",
        "latest_checkpointed_iteration.txt holds 'soon' where an iteration or 'release' belongs",
    ),
    "truncated shard": (
        lambda c: truncate(c / "iter_0000004" / "__1_0.distcp"),
        "CheckpointDamagedError",
        "iter_0000004 is damaged: __1_0.distcp has",
    ),
    "missing shard": (
        lambda c: (c / "iter_0000004" / "__0_0.distcp").unlink(),
        "CheckpointDamagedError",
        "iter_0000004 is damaged: __0_0.distcp is missing",
    ),
    "missing manifest": (
        lambda c: (c / "iter_0000004" / "manifest.json").unlink(),
        "CheckpointDamagedError",
        "iter_0000004 is damaged: manifest.json is missing, the last file that a save writes",
    ),
    "torn manifest": (
        lambda c: truncate(c / "iter_0000004" / "manifest.json"),
        "CheckpointDamagedError",
        "manifest.json is not a readable manifest",
    ),
    "manifest of a later version": (
        lambda c: edit_manifest(c, format_version=9),
        "CheckpointDamagedError",
        "its format_version is 9; this version of bridge reads 1",
    ),
    "a half-written checkpoint of another program": (
        lambda c: (without_manifest(c), (c / "iter_0000004" / "metadata.json").unlink()),
        "CheckpointDamagedError",
        "iter_0000004 is damaged: it has no metadata.json",
    ),
    "another format": (
        lambda c: (
            without_manifest(c),
            (c / "iter_0000004" / "metadata.json").write_text('{"sharded_backend": "zarr"}'),
        ),
        "CheckpointMismatchError",
        "is in the format 'zarr', and this version reads 'torch_dist'",
    ),
    "something else in the directory": (
        lambda c: (shutil.rmtree(c), c.mkdir(), (c / "thesis.tex").touch()),
        "NotACheckpointError",
        "holds no checkpoint but something else (thesis.tex)",
    ),
    "something else in the iteration": (
        lambda c: (
            shutil.rmtree(c / "iter_0000004"),
            (c / "iter_0000004").mkdir(),
            (c / "iter_0000004" / "photo.jpg").touch(),
        ),
        "NotACheckpointError",
        "iter_0000004 is not a checkpoint: it has no metadata.json, .metadata, common.pt; found in it: photo.jpg",
    ),
    "no tracker and nothing whole": (
        lambda c: (
            (c / "latest_train_state.pt").unlink(),
            (c / "latest_checkpointed_iteration.txt").unlink(),
            [shard.unlink() for shard in c.rglob("*.distcp")],
        ),
        "CheckpointDamagedError",
        "has no tracker, and none of its checkpoints is whole (there are 2, 4)",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_and_foreign_directories_are_errors_and_never_a_fresh_start(copy: Path, damage: str) -> None:
    inflict, kind, message = DAMAGE[damage]
    inflict(copy)
    found, text = outcome(copy)
    assert found == kind
    assert message in str(text)


def test_a_file_in_place_of_the_directory_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    kind, message = outcome(tmp_path / "file")
    assert (kind, message) == ("NotACheckpointError", f"checkpoint.load: {tmp_path / 'file'} is not a directory")


def test_a_checkpoint_without_tracker_is_found_by_its_manifest(copy: Path) -> None:
    (copy / "latest_train_state.pt").unlink()
    (copy / "latest_checkpointed_iteration.txt").unlink()
    assert outcome(copy) == ("started", 4)
    truncate(copy / "iter_0000004" / "__0_0.distcp")
    assert outcome(copy) == ("started", 2)


def test_another_programs_checkpoint_needs_no_manifest(copy: Path) -> None:
    without_manifest(copy)
    assert outcome(copy) == ("started", 4)


def test_a_model_of_another_size_is_a_mismatch_on_every_rank(saved: Path) -> None:
    kind, message = outcome(saved, model={"hidden_size": 32})
    assert kind == "CheckpointMismatchError"
    assert "Global shape mismatch" in str(message)


def test_a_deeper_model_is_a_mismatch_on_every_rank(saved: Path) -> None:
    kind, _ = outcome(saved, model={"num_layers": 6}, checkpoint={"load_optim": False})
    assert kind == "CheckpointMismatchError"


def test_other_model_parallel_sizes_are_refused_before_reading_with_the_way_out(saved: Path) -> None:
    kind, message = outcome(saved, model={"tensor_model_parallel_size": 2})
    assert kind == "CheckpointMismatchError"
    assert "the tensor size was 1 and is 2; keep the sizes, or set checkpoint.load_optim: false" in str(message)
    settings = {"load_optim": False}
    assert outcome(saved, model={"tensor_model_parallel_size": 2}, checkpoint=settings) == ("started", 4)


def test_loading_never_changes_the_configuration(saved: Path) -> None:
    def compare(cfg: Any) -> bool:
        before = cfg.to_yaml()
        setup(cfg)
        return cfg.to_yaml() == before

    assert run_ranks(compare, 2, tiny_config(train_iters=6, checkpoint={"load": str(saved)})) == [True, True]
