"""What a save leaves on disk, and what it leaves when one rank cannot write."""

import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core.utils import unwrap_model

from bridge.training.callbacks import CallbackManager
from bridge.training.checkpointing import CheckpointError, CheckpointSaveContext, save_checkpoint
from bridge.training.checkpointing.files import write_file
from bridge.training.checkpointing.integrity import find_damage, read_manifest
from bridge.training.config import ConfigError
from bridge.training.setup import Run, setup
from tests.distributed.launch import run_ranks
from tests.training.tiny import run_to_end, tiny_config

RANK_FILES = {"__0_0.distcp", "__1_0.distcp"}
COMMON_FILES = {
    ".metadata",
    ".metadata.bridge",
    "common.pt",
    "manifest.json",
    "metadata.json",
    "run_config.yaml",
    "train_state.pt",
}


def files_in(path: Path) -> set[str]:
    return {entry.relative_to(path).as_posix() for entry in path.rglob("*") if entry.is_file()}


def save(run: Run, callbacks: CallbackManager | None = None) -> None:
    context = CheckpointSaveContext(
        run.state, run.model, run.optimizer, run.scheduler, 7, train_data_iterator=run.train_data_iterator
    )
    run.manager.save(context, callbacks)


def outcome_of(action: Callable[[], Any]) -> str:
    try:
        action()
    except CheckpointError as error:
        return f"{type(error).__name__}: {error}"
    return "saved"


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_a_checkpoint_has_exactly_the_documented_files(tmp_path: Path, mode: str) -> None:
    checkpoint = {"save": str(tmp_path), "async_save": mode == "async"}
    run_ranks(run_to_end, 2, tiny_config(train_iters=2, checkpoint=checkpoint))
    iteration = tmp_path / "iter_0000002"
    assert {entry.name for entry in tmp_path.iterdir()} == {
        "iter_0000002",
        "latest_train_state.pt",
        "latest_checkpointed_iteration.txt",
        ".bridge-writer",
        ".bridge-starts",
        ".bridge-events.jsonl",
    }
    data = {f"dataloader_state/train_dataloader_dprank{rank:03d}.pt" for rank in (0, 1)}
    assert files_in(iteration) == COMMON_FILES | RANK_FILES | data
    manifest = read_manifest(iteration)
    assert manifest is not None
    assert {record.name for record in manifest.files} == files_in(iteration) - {"manifest.json"}
    assert find_damage(iteration, manifest.files, checksums=True) == []
    assert manifest.parallel_sizes["data"] == manifest.world_size == 2
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == "2"
    assert (tmp_path / "latest_train_state.pt").read_bytes() == (iteration / "train_state.pt").read_bytes()


def test_the_train_state_has_the_documented_fields(tmp_path: Path) -> None:
    run_ranks(run_to_end, 1, tiny_config(train_iters=2, checkpoint={"save": str(tmp_path)}))
    state = torch.load(tmp_path / "iter_0000002" / "train_state.pt", weights_only=True)
    assert {name: value.dtype for name, value in state.items()} == {
        "step": torch.int64,
        "consumed_train_samples": torch.int64,
        "skipped_train_samples": torch.int64,
        "consumed_valid_samples": torch.int64,
        "floating_point_operations_so_far": torch.float64,
        "do_train": torch.bool,
        "do_valid": torch.bool,
        "do_test": torch.bool,
    }
    assert (state["step"].item(), state["consumed_train_samples"].item()) == (2, 16)
    common = torch.load(tmp_path / "iter_0000002" / "common.pt", weights_only=True)
    assert {"checkpoint_version", "iteration", "content_metadata", "opt_param_scheduler", "optimizer"} == set(common)


def test_parts_that_are_switched_off_are_not_written(tmp_path: Path) -> None:
    checkpoint = {"save": str(tmp_path), "save_optim": False, "save_rng": False, "save_tokenizer_assets": False}
    run_ranks(run_to_end, 1, tiny_config(train_iters=2, checkpoint=checkpoint))
    common = torch.load(tmp_path / "iter_0000002" / "common.pt", weights_only=True)
    assert {"checkpoint_version", "iteration", "content_metadata"} == set(common)
    metadata = (tmp_path / "iter_0000002" / ".metadata").read_bytes()
    assert b"embedding.word_embeddings.weight" in metadata
    assert b"optimizer" not in metadata
    assert b"rng_state" not in metadata


def fail_once_and_save_again(cfg: Any, break_rank: int) -> list[Any]:
    """Save iteration 0, fail to save iteration 1 on one rank, then save iteration 2."""
    run = setup(cfg)
    seen = []
    for step in range(3):
        run.state.train_state.step = step
        if step == 1 and dist.get_rank() == break_rank:
            run.train_data_iterator.save_state = _raise_disk_full  # type: ignore[union-attr]
        elif step == 2 and dist.get_rank() == break_rank:
            del run.train_data_iterator.save_state  # type: ignore[union-attr]
        seen.append(outcome_of(lambda: save(run)))
        run.manager.finalize_async_saves(run.state, blocking=True)
    return seen


def _raise_disk_full() -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("break_rank", [0, 1])
def test_one_rank_that_fails_fails_the_save_on_all_and_harms_nothing(tmp_path: Path, break_rank: int) -> None:
    cfg = tiny_config(checkpoint={"save": str(tmp_path), "async_save": True})
    message = f"collecting the state failed on rank {break_rank}: OSError: [Errno 28] No space left on device"
    for seen in run_ranks(fail_once_and_save_again, 2, cfg, break_rank):
        assert seen == ["saved", f"CheckpointError: {message}", "saved"]
    assert {entry.name for entry in tmp_path.iterdir()} == {
        "iter_0000000",
        "iter_0000002",
        "latest_train_state.pt",
        "latest_checkpointed_iteration.txt",
        ".bridge-writer",
        ".bridge-starts",
        ".bridge-events.jsonl",
    }


def break_and_mend(cfg: Any) -> dict[str, str]:
    """Let one rank fail in every step of a save that other ranks could wait in, then save."""
    run = setup(cfg)
    (chunk,) = unwrap_model(run.model)
    rank = dist.get_rank()

    def attempt(owner: Any, method: str, result: Callable[..., Any], broken_rank: int) -> str:
        run.state.train_state.step += 1
        if rank == broken_rank:
            setattr(owner, method, result)
        outcome = outcome_of(lambda: save(run))
        if rank == broken_rank:
            delattr(owner, method)
        return outcome

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise ValueError("broken")

    def compare(common: dict[str, Any]) -> dict[str, Any]:
        return fail() if rank == 1 else common

    def save_with_comparison() -> None:
        save_checkpoint(
            run.state, run.model, run.optimizer, run.scheduler, 0, {}, preprocess_common_state_dict_fn=compare
        )

    return {
        "first": attempt(run.scheduler, "unused", fail, 1),
        "model": attempt(chunk, "sharded_state_dict", fail, 1),
        "scheduler": attempt(run.scheduler, "state_dict", fail, 1),
        "unpicklable": attempt(run.scheduler, "state_dict", lambda: {"lr": lambda: 0}, 0),
        "comparison": outcome_of(save_with_comparison),
        "nothing": attempt(run.scheduler, "unused", fail, 1),
    }


@pytest.mark.parametrize("together", [True, False])
def test_a_rank_that_fails_before_a_collective_leaves_no_other_waiting_in_it(tmp_path: Path, together: bool) -> None:
    """Whether ranks need one another to collect their state, or first meet when they have."""
    cfg = tiny_config(
        rng={"data_parallel_random_init": together},
        checkpoint={"save": str(tmp_path), "dist_ckpt_optim_fully_reshardable": together},
    )
    first, second = run_ranks(break_and_mend, 2, cfg, timeout=60)
    assert first == second
    unpicklable = first.pop("unpicklable")
    assert unpicklable.startswith("CheckpointError: preparing the sharded state failed on rank 0: ")
    assert first == {
        "first": "saved",
        "model": "CheckpointError: collecting the model's state failed on rank 1: ValueError: broken",
        "scheduler": "CheckpointError: collecting the optimizer's state failed on rank 1: ValueError: broken",
        "comparison": "CheckpointError: preparing the sharded state failed on rank 1: ValueError: broken",
        "nothing": "saved",
    }
    assert {entry.name for entry in tmp_path.iterdir() if entry.is_dir()} == {"iter_0000001", "iter_0000005"}


def lose_the_staging_directory(cfg: Any) -> tuple[str, str]:
    """The directory vanishes between the capture and the end of the write; afterwards saving works again."""
    run = setup(cfg)
    run.state.train_state.step = 1
    save(run)
    ranks_ready = torch.zeros(1)
    dist.all_reduce(ranks_ready)
    if dist.get_rank() == 0:
        for entry in Path(cfg.checkpoint.save).glob(".saving-*"):
            entry.rename(entry.with_name("elsewhere"))
    dist.all_reduce(ranks_ready)
    failed = outcome_of(lambda: run.manager.finalize_async_saves(run.state, blocking=True))
    run.state.train_state.step = 2
    save(run)
    return failed, outcome_of(lambda: run.manager.finalize_async_saves(run.state, blocking=True))


def test_a_directory_that_vanishes_during_a_save_is_an_error_on_all_ranks(tmp_path: Path) -> None:
    cfg = tiny_config(checkpoint={"save": str(tmp_path), "async_save": True})
    (first, again), (second, again_too) = run_ranks(lose_the_staging_directory, 2, cfg)
    assert first == second
    assert first.startswith("Checkpoint")
    assert "No such file or directory" in first
    assert (again, again_too) == ("saved", "saved")
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == "2"
    assert not (tmp_path / "iter_0000001").exists()


class Agreeing:
    """A data iterator whose ranks talk to one another about its state."""

    def save_state(self) -> dict[str, int]:
        position = torch.ones(1)
        dist.all_reduce(position)
        return {"position": int(position)}


def save_where_a_file_is(cfg: Any) -> tuple[str, int]:
    """Rank 0 alone finds that there can be no directory; afterwards there can, and saving works."""
    run = setup(cfg)
    run.train_data_iterator = Agreeing()
    run.state.train_state.step = 1
    save(run)
    path = Path(cfg.checkpoint.save)
    if dist.get_rank() == 0:
        shutil.rmtree(path)
        path.write_text("")
    dist.barrier()
    run.state.train_state.step = 2
    failed = outcome_of(lambda: save(run))
    told = torch.ones(1)
    dist.all_reduce(told)  # nobody is left in an exchange of the save
    return failed, int(told)


def test_a_directory_that_cannot_be_made_leaves_no_rank_in_an_exchange_of_the_users(tmp_path: Path) -> None:
    path = tmp_path / "run"
    cfg = tiny_config(checkpoint={"save": str(path), "save_retries": 0})
    (first, told), (second, told_too) = run_ranks(save_where_a_file_is, 2, cfg, timeout=120)
    assert first == second
    assert first.startswith("CheckpointSaveError: ") and str(path) in first
    assert (told, told_too) == (2, 2)


def save_with_a_failing_callback(cfg: Any) -> str:
    run = setup(cfg)
    run.state.train_state.step = 5
    callbacks = CallbackManager()
    callbacks.register("on_checkpoint_save", lambda context: 1 / 0)
    return outcome_of(lambda: save(run, callbacks))


def test_a_failing_callback_does_not_undo_a_published_checkpoint(tmp_path: Path) -> None:
    cfg = tiny_config(checkpoint={"save": str(tmp_path)})
    assert run_ranks(save_with_a_failing_callback, 2, cfg) == ["saved", "saved"]
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == "5"


def train_on_after_capture(cfg: Any) -> dict[str, torch.Tensor]:
    """Change every parameter in place right after an asynchronous save has returned."""
    run = setup(cfg)
    run.state.train_state.step = 1
    before = {name: p.detach().clone().numpy() for name, p in run.model[0].named_parameters()}
    save(run)
    with torch.no_grad():
        for parameter in run.model[0].parameters():
            parameter.fill_(7777.0)
    run.state.train_state.step = 99
    run.manager.finalize_async_saves(run.state, blocking=True)
    return before


def loaded_parameters(cfg: Any) -> tuple[int, dict[str, Any]]:
    run = setup(cfg)
    return run.state.train_state.step, {name: p.detach().numpy() for name, p in run.model[0].named_parameters()}


def test_what_training_does_after_the_capture_does_not_reach_the_file(tmp_path: Path) -> None:
    saving = tiny_config(checkpoint={"save": str(tmp_path), "async_save": True})
    expected = run_ranks(train_on_after_capture, 2, saving)
    found = run_ranks(loaded_parameters, 2, tiny_config(checkpoint={"load": str(tmp_path)}))
    for rank in range(2):
        step, parameters = found[rank]
        assert step == 1
        assert all((parameters[name] == expected[rank][name]).all() for name in expected[rank])


def test_saving_without_a_directory_is_refused() -> None:
    def attempt(cfg: Any) -> str:
        return outcome_of(lambda: save(setup(cfg)))

    assert run_ranks(attempt, 1, tiny_config()) == [
        "CheckpointSaveError: checkpoint.save is not set; name the directory to save checkpoints in"
    ]


def test_contradicting_settings_are_refused_by_the_functions_too(tmp_path: Path) -> None:
    def attempt(cfg: Any) -> str:
        run = setup(cfg)
        cfg.checkpoint.most_recent_k = 0
        try:
            save(run)
        except ConfigError as error:
            return str(error)
        return "saved"

    (message,) = run_ranks(attempt, 1, tiny_config(checkpoint={"save": str(tmp_path)}))
    assert message.startswith("checkpoint.most_recent_k: 0 would keep nothing to resume from")


def test_files_follow_the_users_umask_and_never_overwrite(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_file(tmp_path / "file", b"1")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640
    with pytest.raises(FileExistsError):
        write_file(tmp_path / "file", b"2")
