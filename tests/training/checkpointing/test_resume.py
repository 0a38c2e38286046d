"""A run that was stopped and resumed ends bit for bit where one that never stopped ends."""

import json
from pathlib import Path
from typing import Any

import pytest

from bridge.training.checkpointing import CheckpointSaveContext
from bridge.training.setup import setup
from tests.distributed.launch import run_ranks
from tests.training.tiny import LAYOUTS, run_to_end, tiny_config

RUNS: dict[str, tuple[int, dict[str, Any]]] = {
    **{name: (world_size, {"model": model}) for name, (world_size, model) in LAYOUTS.items()},
    "DP2, plain optimizer": (2, {"ddp": {"use_distributed_optimizer": False}}),
    "DP2, SGD": (2, {"optimizer": {"optimizer": "sgd"}, "ddp": {"use_distributed_optimizer": False}}),
    "one rank, SGD without momentum": (
        1,
        {"optimizer": {"optimizer": "sgd", "sgd_momentum": 0.0}, "ddp": {"use_distributed_optimizer": False}},
    ),
    "DP2, bf16": (2, {"model": {"precision": "bf16"}}),
    "DP2, torch's own reader": (2, {"checkpoint": {"io_backend": "stock"}}),
    "DP2, two files a rank, shared reading": (
        2,
        {"checkpoint": {"storage_writers_per_rank": 2, "fully_parallel_load": True}},
    ),
}
"""Name → (world size, settings)."""


def losses(path: Path) -> dict[int, str]:
    """Loss by iteration, exactly as written."""
    return {entry["iteration"]: repr(entry["loss"]) for entry in map(json.loads, path.read_text().splitlines())}


@pytest.mark.parametrize("mode", ["sync", "async"])
@pytest.mark.parametrize("layout", RUNS)
def test_resume_is_bitwise(tmp_path: Path, layout: str, mode: str) -> None:
    world_size, settings = RUNS[layout]
    save = tmp_path / "save"
    checkpoint = {
        "save": str(save),
        "async_save": mode == "async",
        "save_interval": 2,
        **settings.get("checkpoint", {}),
    }

    def config(metrics: str, **more: Any) -> Any:
        sections = {**settings, "checkpoint": checkpoint | more, "logger": {"metrics_path": str(tmp_path / metrics)}}
        return tiny_config(train_iters=6, **sections)

    expected = run_ranks(run_to_end, world_size, config("never_stopped.jsonl"))
    found = run_ranks(run_to_end, world_size, config("resumed.jsonl", load=str(save), ckpt_step=4))
    for rank in range(world_size):
        assert expected[rank]["saved"] == [(f"iter_{n:07d}", n, "persistent") for n in (2, 4, 6)]
        assert found[rank]["started at"] == 4
        assert found[rank]["loaded from"] == str(save / "iter_0000004")
        assert found[rank]["digests"] == expected[rank]["digests"]
    never_stopped = losses(tmp_path / "never_stopped.jsonl")
    assert losses(tmp_path / "resumed.jsonl") == {n: never_stopped[n] for n in (5, 6)}


def test_saving_does_not_change_training(tmp_path: Path) -> None:
    without = run_ranks(run_to_end, 2, tiny_config(train_iters=6))
    checkpoint = {"save": str(tmp_path), "save_interval": 1, "async_save": True}
    saving = run_ranks(run_to_end, 2, tiny_config(train_iters=6, checkpoint=checkpoint))
    assert [rank["digests"] for rank in saving] == [rank["digests"] for rank in without]


def test_another_data_parallel_size_continues_from_the_same_state(tmp_path: Path) -> None:
    checkpoint = {"save": str(tmp_path), "load": str(tmp_path)}
    saved, _ = run_ranks(run_to_end, 2, tiny_config(train_iters=3, checkpoint=checkpoint))
    (resumed,) = run_ranks(run_to_end, 1, tiny_config(train_iters=3, checkpoint=checkpoint))
    assert resumed["started at"] == 3
    assert resumed["saved"] == []  # nothing was left to train, and the last step is saved already
    same = {name for name, digest in resumed["digests"].items() if saved["digests"].get(name) == digest}
    assert {name for name in resumed["digests"] if not name.startswith("optimizer")} <= same


@pytest.mark.parametrize("distributed", [True, False])
def test_a_checkpoint_from_before_the_first_step_can_be_resumed(tmp_path: Path, distributed: bool) -> None:
    def save_at_once(cfg: Any) -> None:
        run = setup(cfg)
        run.manager.save(
            CheckpointSaveContext(
                run.state, run.model, run.optimizer, run.scheduler, 0, train_data_iterator=run.train_data_iterator
            ),
            None,
        )

    ddp = {"use_distributed_optimizer": distributed}
    run_ranks(save_at_once, 2, tiny_config(checkpoint={"save": str(tmp_path)}, ddp=ddp))
    expected = run_ranks(run_to_end, 2, tiny_config(train_iters=3, ddp=ddp))
    found = run_ranks(run_to_end, 2, tiny_config(train_iters=3, checkpoint={"load": str(tmp_path)}, ddp=ddp))
    for rank in range(2):
        assert found[rank]["loaded from"] == str(tmp_path / "iter_0000000")
        assert found[rank]["digests"] == expected[rank]["digests"]
