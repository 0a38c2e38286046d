"""What the first asynchronous save needs is there before it, and no more than that."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from bridge.training.callbacks import CallbackContext, CallbackManager
from bridge.training.checkpointing.io.background_writer import BACKGROUND_WRITER, BackgroundWriter
from bridge.training.checkpointing.save_plans import writer_of
from bridge.training.setup import setup
from bridge.training.train import train
from tests.distributed.launch import run_ranks
from tests.training.tiny import tiny_config


def warmed(cfg: Any) -> dict[str, Any]:
    """Whether there is a process and how much memory there is, by step and when a checkpoint was saved."""
    callbacks, found = CallbackManager(), {}  # type: tuple[CallbackManager, dict[str, Any]]
    run = setup(cfg, callbacks)
    context = run.manager.checkpointing_context  # type: ignore[attr-defined]

    def look(name: str) -> None:
        writer = context.get(BACKGROUND_WRITER)
        if writer is not None:
            writer._finish_warming()
            found[name] = writer.pid, writer.memory

    callbacks.register("on_train_step_end", lambda _: look(f"step {run.state.train_state.step}"))

    def saved(context: CallbackContext) -> None:
        assert context.checkpoint is not None
        files = context.checkpoint.path.glob(f"__{dist.get_rank()}_*.distcp")
        found["written"] = sum(file.stat().st_size for file in files)
        look("saved")

    callbacks.register("on_checkpoint_save", saved)
    train(run)
    return found


FORMS: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "a distributed optimizer": (2, {}, {"dist_ckpt_optim_fully_reshardable": True}),
    "an optimizer on every rank": (2, {"use_distributed_optimizer": False}, {}),
    "without an optimizer": (1, {}, {"save_optim": False}),
}


@pytest.mark.parametrize("form", FORMS)
def test_the_process_and_the_memory_are_there_before_the_first_save(tmp_path: Path, form: str) -> None:
    ranks, ddp, settings = FORMS[form]
    checkpoint = {"save": str(tmp_path), "async_save": True, "save_interval": 3, **settings}
    cfg = tiny_config(train_iters=3, checkpoint=checkpoint, ddp=ddp, model={"hidden_size": 256})
    for found in run_ranks(warmed, ranks, cfg):
        (pid, nothing), warm, saved = found["step 1"], found["step 2"], found["saved"]
        assert pid is not None
        assert nothing == 0
        assert warm == saved, "the save needs no other process, and no more memory"
        assert found["written"] > 4 << 20
        assert found["written"] <= warm[1] <= found["written"] + (4 << 20)


@pytest.mark.parametrize("settings", [{"async_save": False}, {"io_backend": "stock"}, {"save_interval": None}], ids=str)
def test_nothing_is_made_ready_that_nobody_needs(tmp_path: Path, settings: dict[str, Any]) -> None:
    checkpoint = {"save": str(tmp_path), "async_save": True, "save_interval": 3, **settings}
    (found,) = run_ranks(warmed, 1, tiny_config(train_iters=2, checkpoint=checkpoint))
    assert not {"step 1", "step 2"} & found.keys()


def test_memory_is_ready_when_it_is_used() -> None:
    writer = BackgroundWriter()
    writer.warm(64 << 20)
    writer.warm(66 << 20, wait=True)
    assert writer.memory == 66 << 20
    writer.warm(128 << 20)
    writer.close()
    assert (writer.memory, writer.pid) == (0, None)


def test_a_context_has_one_writer() -> None:
    context: dict[str, Any] = {}
    assert writer_of(context) is writer_of(context) is context[BACKGROUND_WRITER]
