"""Sharded states of every kind of shard, for any number of ranks, and saving and loading them by a format."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor

from bridge.training.checkpointing.agreement import Ranks
from bridge.training.checkpointing.detection import format_on_all_ranks
from bridge.training.checkpointing.formats.options import LoadOptions, SaveOptions
from bridge.training.checkpointing.formats.registry import format_named

LAYERS = 4
EDGES = (3, 13, 16, 21)
"""Where the pieces of the flat tensor begin, beside the ranks' ranges."""


def values() -> dict[str, torch.Tensor]:
    """The global tensors, the same in every process."""
    generator = torch.Generator().manual_seed(7)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    return {
        "rows": random(8, 6),
        "columns": random(3, 8).to(torch.bfloat16),
        "e4m3": random(4, 4).to(torch.float8_e4m3fn),
        "e5m2": random(4, 4).to(torch.float8_e5m2),
        "half": random(4, 1).half(),
        "flags": random(8) > 0,
        "counts": torch.arange(8),
        "scalar": torch.tensor(3.5, dtype=torch.float64),
        "zeros": torch.zeros(4, 2),
        "layers.weight (of a, b)": random(LAYERS, 2, 8),
        "flat/buffer": random(32),
        "padded": random(10, 3),
    }


def shards(world_size: int, rank: int, *, whole: bool = False) -> dict[str, Any]:
    """This rank's state, with its values; `whole`: every rank has everything."""
    of = values()
    n, r = (1, 0) if whole else (world_size, rank)

    def split(key: str, axis: int) -> ShardedTensor:
        replica = rank if whole else 0
        part = of[key].chunk(n, axis)[r].contiguous()
        return ShardedTensor.from_rank_offsets(key, part, (axis, r, n), replica_id=replica)

    def replicated(key: str) -> ShardedTensor:
        return ShardedTensor.from_rank_offsets(key, of[key].clone(), replica_id=(rank, 0))

    layers = [
        ShardedTensor.from_rank_offsets(
            "layers.weight (of a, b)",
            of["layers.weight (of a, b)"][layer].clone(),
            (0, layer, LAYERS),
            replica_id=rank if whole else 0,
            prepend_axis_num=1,
        )
        for layer in range(LAYERS // n * r, LAYERS // n * (r + 1))
    ]
    state: dict[str, Any] = {
        "rows": split("rows", 0),
        "columns": split("columns", 1),
        "layers": layers,
        "flat": _flat(of["flat/buffer"], n, r, rank if whole else 0),
        "padded": replicated("padded"),
    }
    state["padded"].allow_shape_mismatch = True
    for key in ("e4m3", "e5m2", "half", "flags", "counts", "zeros"):
        state[key] = split(key, 0)
    state["scalar"] = replicated("scalar")
    state["objects"] = {
        "one": ShardedObject("one", {"text": "of all"}, (1,), (0,), replica_id=rank),
        "each": ShardedObject("each", [rank], (world_size,), (rank,)),
    }
    state["iteration"] = 3
    return state


def _flat(values: torch.Tensor, n: int, r: int, replica: int) -> dict[str, ShardedTensor]:
    """A rank's range in pieces of any length, as a distributed optimizer has its parameters in it."""
    size = len(values) // n
    start, end = r * size, (r + 1) * size
    edges = sorted({start, end, *(edge for edge in EDGES if start < edge < end)})
    return {
        str(left): ShardedTensor(
            "flat/buffer",
            values[left:right].clone(),
            values.dtype,
            (right - left,),
            (len(values),),
            (left,),
            None,
            replica_id=replica,
        )
        for left, right in itertools.pairwise(edges)
    }


def template(world_size: int, rank: int, *, whole: bool = False, rows: int = 10) -> dict[str, Any]:
    """The same without the values; `rows` of the padded tensor."""
    state = shards(world_size, rank, whole=whole)
    del state["iteration"]
    for item in _tensors(state):
        item.data = torch.full_like(item.data.float(), 99).to(item.dtype)
    state["padded"].data = torch.full((rows, 3), 99.0)
    state["padded"].local_shape = state["padded"].global_shape = (rows, 3)
    return state


def _tensors(state: Any) -> list[ShardedTensor]:
    if isinstance(state, ShardedTensor):
        return [state]
    children = state.values() if isinstance(state, dict) else state if isinstance(state, list) else ()
    return [tensor for child in children for tensor in _tensors(child)]


def save(
    state: dict[str, Any],
    directory: Path,
    name: str = "zarr",
    group: Any = None,
    around_write: Callable[[Callable[[], Any]], Any] = lambda write: write(),
    **options: Any,
) -> Any:
    """Save as a run would, without the commit. Collective; returns what the format keeps for the next save.

    `around_write` is given what writes this rank's files of the format, and returns what that returns.
    """
    ranks = Ranks.current()
    ranks.first("making the directory", lambda: directory.mkdir(parents=True))
    how = SaveOptions(parallelization_group=group, **options)
    payload, kept = format_named(name).plan_save(state, directory, {"kind": "test"}, ranks, how)

    def write() -> tuple[list[str], Any]:
        files, result = around_write(lambda: payload.write("xxh3"))
        for sidecar in payload.sidecars:
            path = directory / sidecar.name
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(sidecar.data)
        return [getattr(file, "name", file) for file in [*files, *payload.sidecars]], result

    written = ranks.gather_all("writing", ranks.run("writing", write))
    added = ranks.first("finishing", lambda: payload.finish([result for _, result in written]))
    assert sorted([*(name for names, _ in written for name in names), *added]) == files_in(directory)
    return kept


def load(template: dict[str, Any], directory: Path, group: Any = None, strictness: str = "raise_all") -> Any:
    """Load by the format that the directory is in. Collective."""
    ranks = Ranks.current()
    return format_on_all_ranks(directory, ranks).load(
        template, directory, ranks, LoadOptions(strictness=strictness, parallelization_group=group)
    )


def files_in(directory: Path) -> list[str]:
    """Every file in it, by name."""
    return sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file())


def require_equal(loaded: dict[str, Any], world_size: int, rank: int, *, whole: bool = False) -> None:
    """Compare what was loaded with the values, to the last bit."""
    expected = shards(world_size, rank, whole=whole)
    _compare(loaded, expected, "")


def _compare(found: Any, expected: Any, place: str) -> None:
    if isinstance(expected, dict):
        for key, value in expected.items():
            _compare(found[key], value, f"{place}.{key}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), place
        for number, value in enumerate(expected):
            _compare(found[number], value, f"{place}.{number}")
    elif isinstance(expected, ShardedTensor):
        assert found.dtype == expected.dtype, place
        assert torch.equal(_bits(found), _bits(expected.data)), place
    elif isinstance(expected, ShardedObject):
        assert found == expected.data, place
    else:
        assert found == expected, place


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().view(-1).view(torch.uint8) if tensor.numel() else tensor


def world() -> tuple[int, int]:
    """(world size, rank)."""
    return dist.get_world_size(), dist.get_rank()
