"""Global non-persistent checkpoints: where they go, which one a restart takes, and what a rollback leaves."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from bridge.training.callbacks import CallbackContext, CallbackManager
from bridge.training.checkpointing import CheckpointNotFoundError, DirectoryInUseError
from bridge.training.checkpointing.agreement import Ranks
from bridge.training.checkpointing.layout import list_checkpoints
from bridge.training.checkpointing.retention.trash import Trash
from bridge.training.checkpointing.tiers.global_directory import GlobalTier
from bridge.training.setup import setup
from bridge.training.train import train
from tests.distributed.launch import run_ranks
from tests.training.tiny import digests, run_to_end, tiny_config


def config(save: Path, *, train_iters: int = 5, **checkpoint: Any) -> Any:
    settings: dict[str, Any] = {
        "save": str(save),
        "load": str(save),
        "save_interval": 4,
        "non_persistent_save_interval": 1,
        "non_persistent_ckpt_type": "global",
    }
    return tiny_config(train_iters=train_iters, checkpoint=settings | checkpoint)


class Lost(Exception):
    """Ends a run as a crash would."""


def run_and_lose(cfg: Any, after: int) -> dict[int, dict[str, str]]:
    """Train until `after` iterations are saved, then raise; what the run was at each save, by iteration."""
    seen: dict[int, dict[str, str]] = {}

    def lose(context: CallbackContext) -> None:
        if context.state.train_state.step == after + 1:
            raise Lost

    callbacks = CallbackManager()
    callbacks.register("on_train_step_end", lose)
    run = setup(cfg, callbacks)
    original = run.manager.save

    def save(context: Any, manager: Any) -> None:
        original(context, manager)
        seen[run.state.train_state.step] = digests(run)

    run.manager.save = save  # type: ignore[method-assign]
    with pytest.raises(Lost):
        train(run)
    return seen


def names(directory: Path) -> set[str]:
    return {entry.name for entry in directory.iterdir()}


@pytest.mark.parametrize("async_save", [False, True])
def test_a_restart_takes_the_newest_of_both_tiers_bit_for_bit(tmp_path: Path, async_save: bool) -> None:
    def case() -> None:
        cfg = config(tmp_path / "run", async_save=async_save)
        torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=torch.distributed.HashStore())
        saved = run_and_lose(cfg, after=3)
        # With async_save the crash comes before that of iteration 3 is published, or just after.
        published = list_checkpoints(tmp_path / "run" / "non_persistent").iterations[-1]
        assert published in ((2, 3) if async_save else (3,))
        resumed = setup(cfg)
        assert resumed.state.loaded_kind == "non_persistent_global"
        assert resumed.state.train_state.step == published
        assert digests(resumed) == saved[published]

    run_ranks(case, 1)


def test_files_after_persistent_and_non_persistent_saves(tmp_path: Path) -> None:
    save = tmp_path / "run"
    (result,) = run_ranks(lambda: run_to_end(config(save, train_iters=6)), 1)
    assert result["saved"] == [
        *(("iter_0000001", 1, "non_persistent_global"), ("iter_0000002", 2, "non_persistent_global")),
        *(("iter_0000003", 3, "non_persistent_global"), ("iter_0000004", 4, "persistent")),
        *(("iter_0000005", 5, "non_persistent_global"), ("iter_0000006", 6, "persistent")),
    ]
    both = {"latest_train_state.pt", "latest_checkpointed_iteration.txt", ".bridge-writer"}
    own = {".bridge-session", ".bridge-starts", ".bridge-events.jsonl"}
    assert names(save) == {"iter_0000004", "iter_0000006", "non_persistent", *own, *both}
    assert names(save / "non_persistent") == {"iter_0000005", *both}


def test_what_a_rollback_left_behind_never_wins(tmp_path: Path) -> None:
    """W22: iterations 1 to 5 exist, the run goes back to 4 and saves 4 + 1 persistently; 6 of before is newer."""
    save = tmp_path / "run"
    run_ranks(lambda: run_to_end(config(save, train_iters=4)), 1)
    stale = config(save, train_iters=9, save_interval=None)
    run_ranks(lambda: run_and_lose(stale, after=8), 1)
    assert list_checkpoints(save / "non_persistent").iterations == (8,)

    back = config(save, train_iters=5, ckpt_step=4, non_persistent_save_interval=None)
    (result,) = run_ranks(lambda: run_to_end(back), 1)
    assert (result["started at"], result["iteration"]) == (4, 5)
    assert list_checkpoints(save / "non_persistent").iterations == ()

    (result,) = run_ranks(lambda: run_to_end(config(save, train_iters=6)), 1)
    assert (result["started at"], result["loaded from"]) == (5, str(save / "iter_0000005"))


def test_an_explicit_step_is_looked_for_in_every_tier(tmp_path: Path) -> None:
    save = tmp_path / "run"
    run_ranks(lambda: run_and_lose(config(save), after=3), 1)
    cfg = config(save, ckpt_step=3)
    (result,) = run_ranks(lambda: run_to_end(cfg), 1)
    assert result["loaded from"] == str(save / "non_persistent" / "iter_0000003")

    def missing() -> str:
        with pytest.raises(CheckpointNotFoundError) as caught:
            setup(config(save, ckpt_step=2))
        return str(caught.value)

    (message,) = run_ranks(missing, 1)
    assert message == (
        f"checkpoint.ckpt_step: 2 is not in {save} (iter_0000002 does not exist; there are 4, 5); "
        "non-persistent checkpoints: 3 (global non-persistent checkpoint)"
    )


def test_a_damaged_non_persistent_checkpoint_is_passed_over(tmp_path: Path) -> None:
    save = tmp_path / "run"
    run_ranks(lambda: run_and_lose(config(save, train_iters=8), after=6), 1)
    next((save / "non_persistent" / "iter_0000006").glob("*.distcp")).unlink()
    (result,) = run_ranks(lambda: run_to_end(config(save, train_iters=5)), 1)
    assert result["loaded from"] == str(save / "iter_0000004")


def refusal(save: Path, shared: Path) -> str:
    with pytest.raises(DirectoryInUseError) as caught:
        setup(config(save, non_persistent_global_ckpt_dir=str(shared)))
    return str(caught.value)


def test_a_directory_of_another_run_is_refused(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    run_ranks(lambda: run_to_end(config(tmp_path / "a", train_iters=2, non_persistent_global_ckpt_dir=str(shared))), 1)

    (message,) = run_ranks(lambda: refusal(tmp_path / "b", shared), 1)
    assert message.startswith(f"checkpoint.non_persistent_global_ckpt_dir: {shared} holds checkpoints of another run")
    # A save directory that was deleted and made anew is another run's too.
    shutil.rmtree(tmp_path / "a")
    (message,) = run_ranks(lambda: refusal(tmp_path / "a", shared), 1)
    assert "holds checkpoints of another run" in message


def test_the_persistent_checkpoints_of_another_run_are_not_taken_for_ones_own(tmp_path: Path) -> None:
    other = config(tmp_path / "a", non_persistent_ckpt_type=None, non_persistent_save_interval=None)
    run_ranks(lambda: run_to_end(other), 1)
    before = names(tmp_path / "a")

    (message,) = run_ranks(lambda: refusal(tmp_path / "b", tmp_path / "a"), 1)
    assert message == (
        f"checkpoint.non_persistent_global_ckpt_dir: {tmp_path / 'a'} holds checkpoints that are not this run's "
        "non-persistent ones; name an empty or new directory"
    )
    assert names(tmp_path / "a") == before


def test_a_save_directory_may_be_moved_with_what_is_in_it(tmp_path: Path) -> None:
    run_ranks(lambda: run_and_lose(config(tmp_path / "old", train_iters=9), after=6), 1)
    (tmp_path / "old").rename(tmp_path / "new")
    (result,) = run_ranks(lambda: run_to_end(config(tmp_path / "new", train_iters=7)), 1)
    assert result["loaded from"] == str(tmp_path / "new" / "non_persistent" / "iter_0000006")


def purge(cfg: Any, directory: Path) -> list[int]:
    """The iterations that are there when the directory has been deleted after iteration 2."""
    callbacks = CallbackManager()

    def delete(context: CallbackContext) -> None:
        if context.state.train_state.step == 2:
            shutil.rmtree(directory)

    callbacks.register("on_train_step_end", delete)
    train(setup(cfg, callbacks))
    return [*list_checkpoints(directory).iterations]


@pytest.mark.parametrize("purged", ["run", "apart"])
def test_a_directory_that_is_purged_while_the_run_goes_on_is_made_again(tmp_path: Path, purged: str) -> None:
    apart = None if purged == "run" else str(tmp_path / "apart")
    cfg = config(tmp_path / "run", train_iters=6, non_persistent_global_ckpt_dir=apart)
    assert run_ranks(lambda: purge(cfg, tmp_path / purged), 1) == [[4, 6] if purged == "run" else [5]]
    (result,) = run_ranks(lambda: run_to_end(cfg), 1)
    assert result["loaded from"] == str(tmp_path / "run" / "iter_0000006")


def test_its_checkpoints_do_not_count_for_a_run_that_loads_from_elsewhere(tmp_path: Path) -> None:
    run_ranks(lambda: run_to_end(config(tmp_path / "old", train_iters=4)), 1)
    fork = config(tmp_path / "new", train_iters=7, load=str(tmp_path / "old"), save_interval=None)
    run_ranks(lambda: run_and_lose(fork, after=5), 1)
    (result,) = run_ranks(lambda: run_to_end(fork), 1)
    assert result["loaded from"] == str(tmp_path / "old" / "iter_0000004")


def test_forgetting_moves_the_tracker_back_to_a_whole_checkpoint(tmp_path: Path) -> None:
    save = tmp_path / "run"
    cfg = config(save, train_iters=6, save_interval=1, non_persistent_ckpt_type=None, non_persistent_save_interval=None)
    run_ranks(lambda: run_to_end(cfg), 1)
    tier = GlobalTier(save, "", Trash())
    (save / "iter_0000004" / "common.pt").unlink()
    (save / "iter_0000009").mkdir()
    (save / "iter_0000008").symlink_to("iter_0000002")
    tier.forget_newer(4, Ranks.current())
    (save / "iter_0000009").rmdir()
    (save / "iter_0000008").unlink()
    assert list_checkpoints(save).iterations == (1, 2, 3, 4)
    assert (save / "latest_checkpointed_iteration.txt").read_text() == "3"
    assert [offer.iteration for offer in tier.offers(Ranks.current())] == [3, 2, 1]
    tier.forget_newer(0, Ranks.current())
    assert tier.offers(Ranks.current()) == []
    assert not list((save).glob("latest_*"))
