"""Loads that must not succeed, on two ranks: the same typed error everywhere, quickly, and nothing changed on disk."""

import errno
import json
import logging
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bridge.training.checkpointing import CheckpointError, load_checkpoint, ownership
from bridge.training.checkpointing.layout import new_saving_name
from bridge.training.checkpointing.loading import load_checkpoint_from_path
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


def test_what_the_run_itself_writes_does_not_make_a_directory_foreign(tmp_path: Path) -> None:
    for name in ("logs", "cache", ".gitkeep"):
        (tmp_path / name).mkdir()
    own: dict[str, Any] = {
        "logger": {"metrics_path": str(tmp_path / "logs" / "metrics.jsonl")},
        "dataset": {"path_to_cache": str(tmp_path / "cache")},
    }
    assert outcome(tmp_path, **own) == ("started", 0)
    assert outcome(tmp_path, logger=own["logger"])[0] == "NotACheckpointError"


@pytest.mark.parametrize("load", ["nothing", "a checkpoint", "the directory above"])
def test_a_save_directory_is_ready_when_a_run_has_started(saved: Path, tmp_path: Path, load: str) -> None:
    save = tmp_path / "save"
    (save / new_saving_name(2)).mkdir(parents=True)
    directory = {"nothing": None, "a checkpoint": str(saved), "the directory above": str(tmp_path)}[load]
    found = run_ranks(start, 2, tiny_config(train_iters=4, checkpoint={"save": str(save), "load": directory}))
    assert found == [("started", 4 if load == "a checkpoint" else 0)] * 2
    assert {path.name for path in save.iterdir()} == {".bridge-writer", ".bridge-events.jsonl"}


def test_a_save_directory_that_cannot_be_used_stops_every_rank_at_the_start(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    first, second = run_ranks(start, 2, tiny_config(checkpoint={"save": str(file)}))
    assert first == second
    assert first[0] == "CheckpointSaveError"
    assert str(first[1]).startswith(f"checkpoint.save: cannot save in {file}: {file} is not a directory")


def test_a_directory_that_another_run_saves_in_can_only_be_loaded_from(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ownership, "WAIT_SECONDS", 0.2)
    ownership.claim(copy)
    in_flight = copy / new_saving_name(6)
    in_flight.mkdir()
    first, second = run_ranks(start, 2, tiny_config(train_iters=4, checkpoint={"load": str(copy), "save": str(copy)}))
    assert first == second
    assert first[0] == "DirectoryInUseError"
    assert f"checkpoint.save: {copy} is in use by another run (host " in str(first[1])
    assert f", process {os.getpid()}, since 2" in str(first[1])
    assert run_ranks(start, 2, tiny_config(train_iters=4, checkpoint={"load": str(copy)})) == [("started", 4)] * 2
    assert in_flight.is_dir()


def warnings_of_loads(cases: list[dict[str, Any]]) -> list[list[str]]:
    """What rank 0 warns of, about saving, for each combination of checkpoint settings."""
    run = setup(tiny_config(train_iters=4))
    logger = logging.getLogger("bridge.training.checkpointing.loading")
    warnings = []
    for case in cases:
        records: list[logging.LogRecord] = []
        handler = logging.Handler()
        handler.emit = records.append  # type: ignore[method-assign]
        logger.addHandler(handler)
        for name, value in {"load": None, "save": None, "finetune": False, "ckpt_step": None, **case}.items():
            setattr(run.cfg.checkpoint, name, value)
        load_checkpoint(run.state, run.model, run.optimizer, run.scheduler)
        logger.removeHandler(handler)
        warnings.append([r.getMessage() for r in records if r.getMessage().startswith("SAVING AMONG")])
    return warnings


def test_saving_among_the_checkpoints_of_another_run_is_warned_of(saved: Path, copy: Path, tmp_path: Path) -> None:
    among = {"save": str(copy)}
    quiet: list[dict[str, Any]] = [
        {"load": str(saved)},
        {"load": str(saved), "save": str(tmp_path / "new")},
        among | {"load": str(copy)},
        among | {"load": str(copy), "ckpt_step": 2},
        among | {"load": str(copy / "iter_0000002")},
    ]
    loud: list[dict[str, Any]] = [
        among,
        among | {"load": str(saved)},
        among | {"load": str(tmp_path / "absent")},
        among | {"load": str(copy), "finetune": True},
    ]
    found = run_ranks(warnings_of_loads, 2, quiet + loud)[0]
    assert found[: len(quiet)] == [[]] * len(quiet)
    message = (
        f"SAVING AMONG THE CHECKPOINTS OF ANOTHER RUN: checkpoint.save ({copy}) already holds checkpoints, the newest "
        "of iteration 4, and this run does not continue from there. "
    )
    assert [[text.startswith(message) for text in texts] for texts in found[len(quiet) :]] == [[True]] * len(loud)


def test_the_home_directory_may_be_abbreviated(saved: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(saved.parent))
    pretrained = {"pretrained_checkpoint": f"~/{saved.name}"}
    assert run_ranks(start, 2, tiny_config(train_iters=4, checkpoint=pretrained)) == [("started", 0)] * 2
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(saved, tmp_path / "mine")
    checkpoint = {"load": "~/mine", "save": "~/mine"}
    run_ranks(run_to_end, 2, tiny_config(train_iters=5, checkpoint=checkpoint))
    assert (tmp_path / "mine" / "iter_0000005").is_dir()


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
        "its format_version is 9; this version of bridge reads 1 and 2",
    ),
    "a half-written checkpoint of another program": (
        lambda c: (without_manifest(c), (c / "iter_0000004" / "metadata.json").unlink()),
        "CheckpointDamagedError",
        "iter_0000004 is damaged: it has no metadata.json",
    ),
    "another format": (
        lambda c: (
            without_manifest(c),
            (c / "iter_0000004" / "metadata.json").write_text('{"sharded_backend": "tar"}'),
        ),
        "CheckpointMismatchError",
        "iter_0000004 is in the format 'tar', and this cannot be read: there is no format 'tar'",
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
        "iter_0000004 is not a checkpoint: it has no manifest.json, metadata.json or .metadata; found in it: photo.jpg",
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
    found, text = outcome(copy, checkpoint={"fallback": False})
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


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tokenizer": {"vocab_size": 511}}, "the checkpoint's vocabulary has 256 ids and this run's has 512; use the"),
        (
            {"model": {"share_embeddings_and_output_weights": False}, "checkpoint": {"load_optim": False}},
            "output_layer.weight",
        ),
        (
            {"model": {"normalization": "RMSNorm"}, "checkpoint": {"dist_ckpt_strictness": "raise_all"}},
            "layer_norm_bias",
        ),
        (
            {"optimizer": {"optimizer": "sgd"}, "ddp": {"use_distributed_optimizer": False}},
            "which only a distributed optimizer can load",
        ),
    ],
    ids=["other vocabulary", "missing keys", "extra keys", "other optimizer"],
)
def test_what_does_not_fit_is_a_mismatch_on_every_rank(saved: Path, settings: dict[str, Any], message: str) -> None:
    kind, text = outcome(saved, **settings)
    assert kind == "CheckpointMismatchError"
    assert message in str(text)


def test_a_deeper_model_is_a_mismatch_on_every_rank(saved: Path) -> None:
    kind, _ = outcome(saved, model={"num_layers": 6}, checkpoint={"load_optim": False})
    assert kind == "CheckpointMismatchError"


def test_other_model_parallel_sizes_are_refused_before_reading_with_the_way_out(saved: Path) -> None:
    kind, message = outcome(saved, model={"tensor_model_parallel_size": 2})
    assert kind == "CheckpointMismatchError"
    assert "the tensor size was 1 and is 2" in str(message)
    assert "checkpoint.dist_ckpt_optim_fully_reshardable: true" in str(message)
    assert str(message).endswith("or set checkpoint.load_optim: false to take only the model")
    settings = {"load_optim": False}
    assert outcome(saved, model={"tensor_model_parallel_size": 2}, checkpoint=settings) == ("started", 4)


def test_loading_never_changes_the_configuration(saved: Path) -> None:
    def compare(cfg: Any) -> bool:
        before = cfg.to_yaml()
        setup(cfg)
        return cfg.to_yaml() == before

    assert run_ranks(compare, 2, tiny_config(train_iters=6, checkpoint={"load": str(saved)})) == [True, True]


class Unreadable:
    """Files that this process can no longer open for reading: those whose path ends so."""

    def __init__(self) -> None:
        self.ending: str | None = None
        sys.addaudithook(self._opened)

    def _opened(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and self.ending is not None and str(arguments[0]).endswith(self.ending):
            raise OSError(errno.EIO, os.strerror(errno.EIO))


def zero_the_middle(path: Path) -> None:
    data = path.read_bytes()
    quarter = len(data) // 4
    path.write_bytes(data[:quarter] + bytes(2 * quarter) + data[3 * quarter :])


FAILED_READS: dict[str, tuple[str, str, str]] = {
    # The file that rank 1 cannot open, strictness, and the message, which follows the checkpoint's path.
    "common.pt on one rank": (
        "iter_0000004/common.pt",
        "assume_ok_unexpected",
        "/common.pt is not a readable common part of a checkpoint: OSError: [Errno 5] Input/output error",
    ),
    "metadata.json on one rank": (
        "iter_0000004/metadata.json",
        "assume_ok_unexpected",
        " cannot be read: OSError: [Errno 5] Input/output error",
    ),
    "metadata to plan with on one rank": (
        "iter_0000004/.metadata",
        "assume_ok_unexpected",
        "/.metadata cannot be read: [Errno 5] Input/output error",
    ),
    "metadata to compare with on one rank": (
        "iter_0000004/.metadata",
        "raise_all",
        "/.metadata cannot be read: [Errno 5] Input/output error",
    ),
    "the shards on one rank": (
        ".distcp",
        "assume_ok_unexpected",
        " cannot be read: OSError: [Errno 5] Input/output error (rank 1)",
    ),
    # Which of its tensors is met first, and so what is wrong with it, depends on who reads which.
    "a shard with zeros in its middle": ("zeroed", "assume_ok_unexpected", ""),
    "garbled metadata to plan with": (
        "garbled",
        "assume_ok_unexpected",
        "/.metadata is not readable: it uses an operation that plain data does not need: 0x67 at byte 2",
    ),
    "garbled metadata to compare with": ("garbled", "return_all", "/.metadata is not readable: it uses an operation "),
}


def try_to_read(cfg: Any, base: Path) -> dict[str, tuple[str, str]]:
    run = setup(cfg)
    run.state.cfg.checkpoint.integrity = "off"  # otherwise the verification meets some of it before
    unreadable = Unreadable()

    def attempt(path: Path) -> tuple[str, str]:
        try:
            load_checkpoint_from_path(str(path), run.state, run.model, run.optimizer, run.scheduler)
        except CheckpointError as error:
            return type(error).__name__, str(error)
        return "loaded", ""

    outcomes: dict[str, tuple[str, str]] = {}
    for parallel in (False, True):
        run.state.cfg.checkpoint.fully_parallel_load = parallel
        for name, (file, strictness, _) in FAILED_READS.items():
            run.state.cfg.checkpoint.dist_ckpt_strictness = strictness
            kind = file if file in ("zeroed", "garbled") else "whole"
            unreadable.ending = file if kind == "whole" and os.environ["RANK"] == "1" else None
            outcomes[f"{name}, parallel {parallel}"] = attempt(base / kind / "iter_0000004")
        unreadable.ending = None
        run.state.cfg.checkpoint.dist_ckpt_strictness = "assume_ok_unexpected"
        outcomes[f"afterwards, parallel {parallel}"] = attempt(base / "whole" / "iter_0000004")
    return outcomes


def test_what_one_rank_cannot_read_is_damage_on_every_rank_at_once(saved: Path, tmp_path: Path) -> None:
    for kind in ("whole", "zeroed", "garbled"):
        shutil.copytree(saved, tmp_path / kind)
    for kind in ("zeroed", "garbled"):
        without_manifest(tmp_path / kind)  # which would have told of a small file's damage before
    zero_the_middle(tmp_path / "zeroed" / "iter_0000004" / "__0_0.distcp")
    (tmp_path / "garbled" / "iter_0000004" / ".metadata").write_bytes(b"\x80\x05garbled")
    begun = time.monotonic()
    first, second = run_ranks(try_to_read, 2, tiny_config(train_iters=6), tmp_path, timeout=60)
    assert time.monotonic() - begun < 40
    assert first == second
    for parallel in (False, True):
        assert first.pop(f"afterwards, parallel {parallel}") == ("loaded", "")
    for name, (kind, message) in first.items():
        assert kind == "CheckpointDamagedError", (name, message)
        assert "iter_0000004" + FAILED_READS[name.split(", ")[0]][2] in message, (name, message)
        assert "dist_ckpt_strictness" not in message, (name, message)
