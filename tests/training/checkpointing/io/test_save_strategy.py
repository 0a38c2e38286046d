"""megatron-core saves through the strategy what it loads by itself."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedObject, ShardedTensor
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper

from bridge.training.checkpointing.errors import CheckpointSaveError
from bridge.training.checkpointing.io import Patience, TorchDistLoadStrategy, TorchDistSaveStrategy
from bridge.training.checkpointing.safety.payload_metadata import read_payload_metadata
from tests.distributed.launch import init_ranks, run_ranks
from tests.training.checkpointing.io.test_strategy import assert_same, spread


def made(directory: Path) -> Path:
    if dist.get_rank() == 0:
        directory.mkdir()
    dist.barrier()
    return directory


def state(seed: int, *, fill: bool = True) -> dict[str, Any]:
    return spread(seed, dist.get_rank(), dist.get_world_size(), fill=fill)


def loaded(directory: Path, seed: int, strategy: Any = None) -> dict[str, Any]:
    return dist_checkpointing.load(state(seed, fill=False), str(directory), strategy)


def expected(seed: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in state(seed).items():
        found[key] = value.data if isinstance(value, (ShardedTensor, ShardedObject)) else value
    found["nested"] = {"object": state(seed)["nested"]["object"].data}
    return found


def save_in_every_way(directory: Path) -> list[str]:
    init_ranks()
    strategy = TorchDistSaveStrategy(files_per_rank=2)
    for number, seed in enumerate((1, 1, 2)):  # the same structure again, and another one
        place = made(directory / f"sync {number}")
        dist_checkpointing.save(state(seed), str(place), strategy)
        for load_strategy in (None, TorchDistLoadStrategy()):
            assert_same(loaded(place, seed, load_strategy), expected(seed))
    _save_in_parallel(made(directory / "parallel"), strategy)
    _save_in_the_background(directory, strategy)
    strategy.close()
    return sorted(path.name for path in (directory / "parallel").iterdir())


def _save_in_parallel(place: Path, strategy: TorchDistSaveStrategy) -> None:
    dist_checkpointing.save(state(3), str(place), FullyParallelSaveStrategyWrapper(strategy, dist.group.WORLD))
    assert_same(loaded(place, 3), expected(3))


def _save_in_the_background(directory: Path, strategy: TorchDistSaveStrategy) -> None:
    """With megatron-core's queue; training changes the tensors as soon as the save has returned."""
    queue = AsyncCallsQueue()
    for number, seed in enumerate((4, 4, 5)):
        place = made(directory / f"async {number}")
        saved = state(seed)
        request = dist_checkpointing.save(saved, str(place), strategy, async_sharded_save=True)
        for value in saved.values():
            if isinstance(value, ShardedTensor):
                value.data.zero_()
        queue.schedule_async_request(request)
        queue.maybe_finalize_async_calls(blocking=True)
        assert_same(loaded(place, seed), expected(seed))
    queue.close()


@pytest.mark.parametrize("ranks", [1, 2])
def test_megatron_loads_what_the_strategy_saves(tmp_path: Path, ranks: int) -> None:
    names = run_ranks(save_in_every_way, ranks, tmp_path)[0]
    assert [name for name in names if name.endswith(".distcp")] == [
        f"__{r}_{n}.distcp" for r in range(ranks) for n in (0, 1)
    ]


def fail_on_one_rank(directory: Path) -> list[str]:
    init_ranks()
    strategy = TorchDistSaveStrategy(patience=Patience(stall_seconds=60.0))
    problems = []

    def attempt(action: Any) -> None:
        try:
            action()
        except CheckpointSaveError as error:
            problems.append(str(error))

    blocked = made(directory / "blocked")
    if dist.get_rank() == 1:
        (blocked / "__1_0.distcp").mkdir()
    attempt(lambda: dist_checkpointing.save(state(1), str(blocked), strategy))

    def in_the_background() -> None:
        place = made(directory / "killed")
        if dist.get_rank() == 1:
            strategy._writer.warm(1 << 20, wait=True)
            os.kill(strategy._writer.pid or 0, signal.SIGSTOP)
        request = dist_checkpointing.save(state(1), str(place), strategy, async_sharded_save=True)
        if dist.get_rank() == 1:
            os.kill(strategy._writer.pid or 0, signal.SIGKILL)
        queue = AsyncCallsQueue()
        queue.schedule_async_request(request)
        queue.maybe_finalize_async_calls(blocking=True)

    attempt(in_the_background)
    place = made(directory / "after")
    dist_checkpointing.save(state(1), str(place), strategy, async_sharded_save=True).execute_sync()
    assert_same(loaded(place, 1), expected(1))
    strategy.close()
    return problems


def test_a_rank_that_cannot_write_is_an_error_on_all(tmp_path: Path) -> None:
    first, second = run_ranks(fail_on_one_rank, 2, tmp_path)
    assert first == second
    blocked, killed = first
    assert blocked.startswith(f"writing the files of the checkpoint failed on rank 1: writing {tmp_path}/blocked/__1_0")
    assert killed == (
        "writing the files of the checkpoint failed on rank 1: the process of the background writer was killed by "
        "SIGKILL"
    )
    assert not (tmp_path / "blocked" / "metadata.json").exists()
    assert not (tmp_path / "killed" / ".metadata").exists()


def save_alone(directory: Path) -> None:
    init_ranks()
    tensors = {"a": torch.rand(300, 7), "b": torch.arange(5, dtype=torch.int16), "c": torch.tensor(True)}
    saved = {key: ShardedTensor.from_rank_offsets(key, value) for key, value in tensors.items()}
    dist_checkpointing.save(saved, str(made(directory)), TorchDistSaveStrategy())
    found = {key: torch.zeros_like(value) for key, value in tensors.items()}
    dcp.load(found, checkpoint_id=directory, no_dist=True)
    assert all(torch.equal(found[key], value) for key, value in tensors.items())
    places = read_payload_metadata(directory).storage_data.values()
    assert {place.offset % 64 for place in places} == {0}


def test_torch_dcp_loads_what_the_strategy_saves(tmp_path: Path) -> None:
    run_ranks(save_alone, 1, tmp_path / "checkpoint")
