"""Runs that crash between persistent checkpoints and go on from local ones or from memory, bit for bit."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from bridge.training import train as loop
from bridge.training.callbacks import CallbackContext, CallbackManager
from bridge.training.checkpointing import CheckpointSaveContext
from bridge.training.checkpointing.errors import KeeperLostError
from bridge.training.rerun import StepFailed
from bridge.training.setup import Run, setup
from bridge.training.train import train
from tests.distributed.launch import run_ranks
from tests.training.checkpointing.tiers.keepers import end_all_keepers_below, end_keeper, keepers_of
from tests.training.tiny import LAYOUTS, digests, run_to_end, tiny_config

KINDS = ["local", "in_memory"]


@pytest.fixture(autouse=True)
def no_keepers_left(tmp_path: Path) -> Iterator[None]:
    yield
    end_all_keepers_below(tmp_path)


def config(root: Path, kind: str, *, train_iters: int = 6, model: dict[str, Any] | None = None, **more: Any) -> Any:
    """A run that saves persistently every 4 iterations and non-persistently at every other one."""
    node = int(os.environ.get("RANK", "0")) // max(1, int(os.environ.get("WORLD_SIZE", "1")) // 2)
    settings: dict[str, Any] = {
        "save": str(root / "run"),
        "load": str(root / "run"),
        "save_interval": 4,
        "non_persistent_save_interval": 1,
        "non_persistent_ckpt_type": kind,
    }
    if kind == "local":
        settings["non_persistent_local_ckpt_dir"] = str(root / f"node{node}")
    return tiny_config(train_iters=train_iters, model=model or {}, checkpoint=settings | more)


class Lost(Exception):
    """Ends a run as a crash would."""


def run_and_lose(cfg: Any, after: int) -> dict[int, dict[str, str]]:
    """Train until iteration `after` is saved, then raise in the next; what the run was at each save."""

    def lose(context: CallbackContext) -> None:
        if context.state.train_state.step == after + 1:
            raise Lost

    callbacks = CallbackManager()
    callbacks.register("on_train_step_end", lose)
    run = setup(cfg, callbacks)
    seen: dict[int, dict[str, str]] = {}
    keep_digests(run, seen)
    with pytest.raises(Lost):
        train(run)
    return seen


def keep_digests(run: Run, seen: dict[int, dict[str, str]]) -> None:
    """Have the manager note what the run was at each save, by iteration."""
    save = run.manager.save

    def save_and_note(context: CheckpointSaveContext, callbacks: CallbackManager | None) -> None:
        save(context, callbacks)
        seen[run.state.train_state.step] = digests(run)

    run.manager.save = save_and_note  # type: ignore[method-assign]


def resume(cfg: Any) -> tuple[str | None, int, dict[str, str]]:
    run = setup(cfg)
    return run.state.loaded_kind, run.state.train_state.step, digests(run)


@pytest.mark.parametrize(
    ("layout", "kind"),
    [
        *((layout, kind) for layout in ("DP2", "TP2") for kind in KINDS),
        *(("PP2 with VPP2", "in_memory"), ("EP2", "local")),
        *(pytest.param(*both, marks=pytest.mark.slow) for both in (("PP2 with VPP2", "local"), ("EP2", "in_memory"))),
    ],
)
def test_a_restart_goes_on_from_the_newest_snapshot(tmp_path: Path, kind: str, layout: str) -> None:
    size, model = LAYOUTS[layout]
    algo = "atomic" if layout in ("TP2", "EP2") else "fully_parallel"
    settings = {"model": model, "non_persistent_local_ckpt_algo": algo}
    lost = run_ranks(lambda: run_and_lose(config(tmp_path, kind, **settings), after=3), size)
    resumed = run_ranks(lambda: resume(config(tmp_path, kind, **settings)), size)
    assert resumed == [(kind, 3, seen[3]) for seen in lost]
    ended = run_ranks(lambda: run_to_end(config(tmp_path, kind, **settings)), size)
    straight = run_ranks(lambda: run_to_end(config(tmp_path / "straight", kind, **settings)), size)
    assert [each["digests"] for each in ended] == [each["digests"] for each in straight]
    assert ended[0]["saved"][-1] == ("iter_0000006", 6, "persistent")


def test_an_asynchronous_local_save_is_resumed_from(tmp_path: Path) -> None:
    """The save of iteration 4 is published or not when the run is lost; that of 3 is, because 4 was begun after it."""
    settings = {"async_save": True, "save_interval": 100}
    lost = run_ranks(lambda: run_and_lose(config(tmp_path, "local", **settings), after=4), 2)
    resumed = run_ranks(lambda: resume(config(tmp_path, "local", **settings)), 2)
    step = resumed[0][1]
    assert step in (3, 4)
    assert resumed == [("local", step, seen[step]) for seen in lost]


def run_and_lose_what_is_not_finalized(cfg: Any, at: int) -> None:
    """Raise in iteration `at`, when the snapshots of the save under way are written and nobody has noticed it."""

    def lose(context: CallbackContext) -> None:
        queue = context.state.async_calls_queue
        if context.state.train_state.step == at:
            assert queue is not None
            (pending,) = queue._pending
            assert pending.call is not None and pending.call.poll(None)
            dist.barrier()  # the others are as far
            raise Lost

    callbacks = CallbackManager()
    callbacks.register("on_train_step_end", lose)
    with pytest.raises(Lost):
        train(setup(cfg, callbacks))


def test_an_asynchronous_local_save_that_is_whole_outlives_the_end_of_its_run(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"async_save": True, "save_interval": 100, "non_persistent_save_interval": 5}
    cfg = config(tmp_path, "local", train_iters=12, **settings)
    run_ranks(run_and_lose_what_is_not_finalized, 2, cfg, 6)
    assert [found[:2] for found in run_ranks(resume, 2, cfg)] == [("local", 5)] * 2


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_replaces_what_one_node_lost(tmp_path: Path, kind: str) -> None:
    settings = {"replication": True, "replication_jump": 1, "replication_factor": 2}
    lost = run_ranks(lambda: run_and_lose(config(tmp_path, kind, **settings), after=3), 2)
    if kind == "local":
        shutil.rmtree(tmp_path / "node1")
    else:
        end_keeper(tmp_path / "run", rank=1)
    resumed = run_ranks(lambda: resume(config(tmp_path, kind, **settings)), 2)
    assert resumed == [(kind, 3, seen[3]) for seen in lost]


def test_without_copies_the_loss_of_a_node_goes_back_to_the_persistent_checkpoint(tmp_path: Path) -> None:
    run_ranks(lambda: run_and_lose(config(tmp_path, "local", train_iters=9), after=6), 2)
    shutil.rmtree(tmp_path / "node1")
    resumed = run_ranks(lambda: resume(config(tmp_path, "local")), 2)
    assert [(kind, step) for kind, step, _ in resumed] == [("persistent", 4)] * 2


def test_a_damaged_snapshot_is_passed_over_on_all_ranks(tmp_path: Path) -> None:
    run_ranks(lambda: run_and_lose(config(tmp_path, "local", train_iters=9), after=6), 2)
    (file,) = (tmp_path / "node1").rglob("iter_0000006_1_local.pt")
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    resumed = run_ranks(lambda: resume(config(tmp_path, "local")), 2)
    assert [(kind, step) for kind, step, _ in resumed] == [("persistent", 4)] * 2


def test_snapshots_of_other_parallel_sizes_are_passed_over(tmp_path: Path) -> None:
    run_ranks(lambda: run_and_lose(config(tmp_path, "local", train_iters=9), after=6), 2)
    tp2 = {"tensor_model_parallel_size": 2}
    resumed = run_ranks(lambda: resume(config(tmp_path, "local", model=tp2, load_optim=False)), 2)
    assert [(kind, step) for kind, step, _ in resumed] == [("persistent", 4)] * 2


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_rollback_left_behind_never_wins(tmp_path: Path, kind: str) -> None:
    """W22: snapshots of iterations 5 to 7 exist when the run goes back to 4 and saves 5 again."""
    run_ranks(lambda: run_and_lose(config(tmp_path, kind, train_iters=9, save_interval=4), after=7), 2)
    back = run_ranks(lambda: run_and_lose(config(tmp_path, kind, ckpt_step=4), after=5), 2)
    resumed = run_ranks(lambda: resume(config(tmp_path, kind)), 2)
    assert resumed == [(kind, 5, seen[5]) for seen in back]


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_run_without_the_tier_left_behind_never_wins(tmp_path: Path, kind: str) -> None:
    """W22: iteration 7 is out of reach when the run goes back to 4 and makes 5 persistent, and comes back later."""
    run_ranks(lambda: run_and_lose(config(tmp_path, kind, train_iters=9, save_interval=4), after=7), 2)
    without = {"non_persistent_ckpt_type": None, "non_persistent_save_interval": None, "save_interval": 1}
    back = run_ranks(lambda: run_and_lose(config(tmp_path, kind, ckpt_step=4, **without), after=5), 2)
    resumed = run_ranks(lambda: resume(config(tmp_path, kind)), 2)
    assert resumed == [("persistent", 5, seen[5]) for seen in back]
    asked_for = run_ranks(lambda: resume(config(tmp_path, kind, ckpt_step=7)), 2)
    assert [(kind, step) for kind, step, _ in asked_for] == [(kind, 7)] * 2


def test_what_another_node_brings_back_never_wins(tmp_path: Path) -> None:
    """W22: the run goes back on another node, where iteration 7 is not, and returns to the first."""
    run_ranks(lambda: run_and_lose(config(tmp_path, "local", train_iters=9), after=7), 2)
    for node in (0, 1):
        (tmp_path / f"node{node}").rename(tmp_path / f"away{node}")
    back = run_ranks(lambda: run_and_lose(config(tmp_path, "local", save_interval=5), after=5), 2)
    for node in (0, 1):
        shutil.rmtree(tmp_path / f"node{node}", ignore_errors=True)
        (tmp_path / f"away{node}").rename(tmp_path / f"node{node}")
    resumed = run_ranks(lambda: resume(config(tmp_path, "local")), 2)
    assert resumed == [("persistent", 5, seen[5]) for seen in back]


def test_trouble_with_memory_does_not_stop_a_persistent_save(tmp_path: Path) -> None:
    """What the run has left behind cannot be deleted in rank 1's keeper, which is gone by then."""

    def case() -> list[str]:
        run = setup(config(tmp_path, "in_memory", ckpt_step=4, train_iters=5, non_persistent_save_interval=None))
        if torch.distributed.get_rank() == 1:
            manager = run.manager.checkpointing_context["local_checkpoint_manager"]  # type: ignore[attr-defined]
            manager.forget_newer = lambda iteration: (_ for _ in ()).throw(KeeperLostError("it does not answer"))
        train(run)
        return sorted(path.name for path in (tmp_path / "run").glob("iter_*"))

    run_ranks(lambda: run_and_lose(config(tmp_path, "in_memory", train_iters=9), after=7), 2)
    assert run_ranks(case, 2) == [["iter_0000004", "iter_0000005"]] * 2


def test_memory_that_no_persistent_checkpoint_has_stays_when_a_run_ends_without_saving(tmp_path: Path) -> None:
    """The run ends by itself after iteration 3, because the next step cannot be trusted."""

    def fail(*arguments: Any) -> StepFailed | None:
        run = arguments[0]
        return StepFailed(save=False, exit_code=17) if run.state.train_state.step == 3 else iterate(*arguments)

    iterate = loop._iterate

    def case() -> int:
        loop._iterate = fail  # type: ignore[assignment]
        return train(setup(config(tmp_path, "in_memory"))).exit_code

    assert run_ranks(case, 2) == [17, 17]
    resumed = run_ranks(lambda: resume(config(tmp_path, "in_memory")), 2)
    assert [(kind, step) for kind, step, _ in resumed] == [("in_memory", 3)] * 2


def test_another_run_that_shares_the_directory_sees_nothing(tmp_path: Path) -> None:
    shared = {"non_persistent_local_ckpt_dir": str(tmp_path / "shared")}
    run_ranks(lambda: run_and_lose(config(tmp_path / "a", "local", **shared), after=3), 2)
    resumed = run_ranks(lambda: resume(config(tmp_path / "b", "local", **shared)), 2)
    assert [(kind, step) for kind, step, _ in resumed] == [(None, 0)] * 2
    # Nor does the same directory of checkpoints, deleted and begun anew.
    shutil.rmtree(tmp_path / "a" / "run")
    resumed = run_ranks(lambda: resume(config(tmp_path / "a", "local", **shared)), 2)
    assert [(kind, step) for kind, step, _ in resumed] == [(None, 0)] * 2


def test_a_clean_end_frees_the_memory_and_a_crash_does_not(tmp_path: Path) -> None:
    run_ranks(lambda: run_and_lose(config(tmp_path, "in_memory"), after=3), 2)
    assert keepers_of(tmp_path / "run").keys() == {0, 1}
    run_ranks(lambda: run_to_end(config(tmp_path, "in_memory")), 2)
    assert keepers_of(tmp_path / "run") == {}


def test_what_was_restored_from_memory_is_made_persistent_at_once(tmp_path: Path) -> None:
    run_ranks(lambda: run_and_lose(config(tmp_path, "in_memory"), after=3), 2)
    ended = run_ranks(lambda: run_to_end(config(tmp_path, "in_memory", train_iters=5)), 2)
    assert ended[0]["saved"] == [
        *(("iter_0000003", 3, "persistent"), ("iter_0000004", 4, "persistent"), ("iter_0000005", 5, "persistent")),
    ]
