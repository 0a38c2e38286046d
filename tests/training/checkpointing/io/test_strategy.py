"""megatron-core loads through the strategy what it loads by itself."""

from __future__ import annotations

import pickle
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedObject, ShardedTensor
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

from bridge.training.checkpointing.agreement import Ranks
from bridge.training.checkpointing.errors import CheckpointDamagedError, CheckpointError
from bridge.training.checkpointing.formats import torch_dist
from bridge.training.checkpointing.formats.options import LoadOptions
from bridge.training.checkpointing.io import TorchDistLoadStrategy
from bridge.training.checkpointing.io.strategy import IoBackend
from tests.distributed.launch import init_ranks, run_ranks

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.uint8, torch.bool]


def spread(seed: int, rank: int, ranks: int, *, fill: bool) -> dict[str, Any]:
    """A random state of one rank: every tensor has the same global shape for all ways to spread it."""
    chance, state = random.Random(seed), {}
    for number in range(25):
        dtype, dims = chance.choice(DTYPES), chance.randint(0, 3)
        shape = [chance.choice([4, 8, 12, 64, 120]) for _ in range(dims)]
        divided = chance.random() < 0.8  # drawn whether it is used or not: all ways to spread it draw alike
        axis = chance.randrange(dims) if dims else None
        axis = axis if ranks > 1 and divided else None
        generator = torch.Generator().manual_seed(seed * 100 + number)
        whole = torch.randint(0, 2 if dtype is torch.bool else 100, shape, generator=generator).to(dtype)
        if axis is None:
            data, offsets = whole, ()
        else:
            size = shape[axis] // ranks
            data, offsets = whole.narrow(axis, rank * size, size), ((axis, rank, ranks),)
        replica = rank if axis is None else 0
        data = data.clone() if fill else torch.zeros_like(data)
        state[f"tensor.{number}"] = ShardedTensor.from_rank_offsets(f"key.{number}", data, *offsets, replica_id=replica)
    stacked = torch.full((3, 5), rank + 1.0) if fill else torch.zeros(3, 5)
    state["stacked"] = ShardedTensor.from_rank_offsets("stacked", stacked, (0, rank, ranks), prepend_axis_num=1)
    state["nested"] = {"object": ShardedObject("object", {"seed": seed} if fill else None, (1,), (0,), replica_id=rank)}
    state["common"] = seed if fill else None
    return state


def save(seed: int, directory: Path) -> None:
    """Stock megatron-core, two files a rank."""
    if dist.get_rank() == 0:
        directory.mkdir()
    dist.barrier()
    strategy = TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=2)
    state = spread(seed, dist.get_rank(), dist.get_world_size(), fill=True)
    dist_checkpointing.save(state, str(directory), strategy)


def load(directory: Path, template: dict[str, Any], strategy: Any) -> dict[str, Any]:
    return dist_checkpointing.load(template, str(directory), strategy)


def leaves(state: dict[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in state.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    values = dict(leaves(found))
    assert values.keys() == dict(leaves(expected)).keys()
    for key, value in leaves(expected):
        if isinstance(value, torch.Tensor):
            assert values[key].dtype == value.dtype and torch.equal(values[key], value), key
        else:
            assert values[key] == value, key


@pytest.mark.parametrize("saved_by", [1, 2])
@pytest.mark.parametrize("loaded_by", [1, 2])
def test_random_states_are_loaded_as_megatron_core_loads_them(tmp_path: Path, saved_by: int, loaded_by: int) -> None:
    seeds = range(2)

    def saving() -> None:
        init_ranks()
        for seed in seeds:
            save(seed, tmp_path / str(seed))

    def loading() -> list[tuple[int, int]]:
        init_ranks()
        rank, ranks, counts = dist.get_rank(), dist.get_world_size(), []
        strategy = TorchDistLoadStrategy()
        for seed in seeds:

            def template(seed: int = seed) -> dict[str, Any]:
                state = spread(seed, rank, ranks, fill=False)
                if saved_by != ranks:  # each rank has stacked a tensor of its own
                    del state["stacked"]
                return state

            found = load(tmp_path / str(seed), template(), strategy)
            assert_same(found, load(tmp_path / str(seed), template(), None))
            assert sum(bool(found[f"tensor.{number}"].any()) for number in range(25)) > 15
            assert found["nested"]["object"] == {"seed": seed}
            counts.append((strategy.stats.tensors, strategy.stats.by_torch))
        return counts

    run_ranks(saving, saved_by)
    for counts in run_ranks(loading, loaded_by):
        assert all(tensors >= 25 and by_torch == 0 for tensors, by_torch in counts)


def test_tensors_are_read_into_the_memory_that_was_given(tmp_path: Path) -> None:
    def run() -> list[bool]:
        init_ranks()
        save(1, tmp_path / "saved")
        template = spread(1, 0, 1, fill=False)
        before = {key: item.data for key, item in template.items() if isinstance(item, ShardedTensor)}
        loaded = load(tmp_path / "saved", template, TorchDistLoadStrategy())
        return [loaded[key].data_ptr() == before[key].data_ptr() for key in before]

    assert all(run_ranks(run, 1)[0])


@pytest.mark.parametrize("io_backend", ["direct", "stock"])
def test_a_padded_tensor_keeps_the_rows_that_are_stored(tmp_path: Path, io_backend: IoBackend) -> None:
    """megatron-core's `allow_shape_mismatch`, for vocabularies that are padded differently."""

    def run() -> torch.Tensor:
        init_ranks()
        (tmp_path / "saved").mkdir()
        stored = ShardedTensor.from_rank_offsets("words", torch.ones(6, 4), allow_shape_mismatch=True)
        dist_checkpointing.save({"words": stored}, str(tmp_path / "saved"))
        wanted = ShardedTensor.from_rank_offsets("words", torch.full((8, 4), 9.0), allow_shape_mismatch=True)
        loaded = torch_dist.load(
            {"words": wanted},
            tmp_path / "saved",
            Ranks.current(),
            LoadOptions(strictness="assume_ok_unexpected", io_backend=io_backend),
        )
        return loaded.state_dict["words"]

    assert run_ranks(run, 1)[0].tolist() == [[1.0] * 4] * 6 + [[0.0] * 4] * 2


@pytest.mark.parametrize("io_backend", ["direct", "stock"])
def test_a_file_that_is_damaged_for_one_rank_is_an_error_on_all(tmp_path: Path, io_backend: IoBackend) -> None:
    def run() -> str:
        init_ranks()
        directory = tmp_path / "saved"
        save(2, directory)
        dist.barrier()
        mine = sorted(directory.glob("__1_*.distcp"))
        if dist.get_rank() == 0:
            for path in mine:
                path.write_bytes(bytes(path.stat().st_size))
        dist.barrier()
        template = {key: item for key, item in spread(2, dist.get_rank(), 2, fill=False).items() if key == "stacked"}
        with pytest.raises(CheckpointDamagedError) as caught:
            torch_dist.load(
                template,
                directory,
                Ranks.current(),
                LoadOptions(strictness="assume_ok_unexpected", io_backend=io_backend),
            )
        return str(caught.value)

    messages = run_ranks(run, 2)
    assert messages[0] == messages[1]
    assert "rank 1" in messages[0]


def test_what_does_not_fit_is_said_in_the_same_words(tmp_path: Path) -> None:
    def tensor(key: str) -> ShardedTensor:
        return ShardedTensor.from_rank_offsets(key, torch.zeros(3))

    changes: dict[str, tuple[Any, str]] = {
        "less is asked for": (lambda state: state.pop("tensor.0"), ""),
        "a key that is not there": (lambda state: state.update(new=tensor("new")), "new from model not in state dict"),
        "another shape": (lambda state: state.update(stacked=tensor("stacked")), "Global shape mismatch"),
        "a tensor where an object is stored": (
            lambda state: state.update(nested=tensor("object/shard_0_1")),
            "BytesStorageMetadata",
        ),
    }

    def attempt(change: Any, io_backend: IoBackend) -> str:
        template = spread(3, 0, 1, fill=False)
        change(template)
        try:
            torch_dist.load(
                template,
                tmp_path / "saved",
                Ranks.current(),
                LoadOptions(strictness="assume_ok_unexpected", validate_access=False, io_backend=io_backend),
            )
        except CheckpointError as error:
            return str(error)
        return ""

    def run() -> dict[str, tuple[str, str]]:
        init_ranks()
        save(3, tmp_path / "saved")
        return {name: (attempt(change, "direct"), attempt(change, "stock")) for name, (change, _) in changes.items()}

    for name, (direct, stock) in run_ranks(run, 1)[0].items():
        message = changes[name][1]
        assert direct == stock
        assert message in direct and bool(message) == bool(direct), name


@pytest.mark.parametrize("io_backend", ["direct", "stock"])
def test_a_chunk_that_the_metadata_has_lost_and_a_type_of_another_kind_are_errors(
    tmp_path: Path, io_backend: IoBackend
) -> None:
    directory = tmp_path / "saved"

    def attempt(dtype: torch.dtype) -> str:
        wanted = ShardedTensor.from_rank_offsets("stacked", torch.zeros(2, 3, 5, dtype=dtype))
        try:
            torch_dist.load(
                {"stacked": wanted},
                directory,
                Ranks.current(),
                LoadOptions(strictness="assume_ok_unexpected", validate_access=False, io_backend=io_backend),
            )
        except CheckpointError as error:
            return f"{type(error).__name__}: {error}"
        return "loaded"

    def run() -> tuple[str, str, str]:
        init_ranks()
        whole, other = attempt(torch.float32), attempt(torch.int64)
        metadata = pickle.loads((directory / ".metadata").read_bytes())
        entry = metadata.state_dict_metadata["stacked"]
        lost = entry.chunks.pop()
        for index in [i for i in metadata.storage_data if i.fqn == "stacked" and i.offset == lost.offsets]:
            del metadata.storage_data[index]
        (directory / ".metadata").write_bytes(pickle.dumps(metadata))
        return whole, other, attempt(torch.float32)

    run_ranks(lambda: (init_ranks(), save(4, directory)), 2)
    whole, other, incomplete = run_ranks(run, 1)[0]
    assert whole == "loaded"
    assert other.startswith("CheckpointMismatchError: ")
    assert "stacked has the type torch.int64 in this run, and torch.float32 in the checkpoint" in other
    assert incomplete.startswith("CheckpointDamagedError: ")
    assert "lacks values: 15 of the 30 that this rank needs are in the checkpoint" in incomplete
