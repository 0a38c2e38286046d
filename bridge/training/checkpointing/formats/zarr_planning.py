"""Planning a save as Zarr arrays: which rank writes which parts of which array, and how arrays are divided into chunks.

The plan is made on rank 0 from what all ranks hold, and is all that they need from one another: afterwards each writes
its own chunks. It depends on nothing but the structure of the state, so a later save of the same structure uses it
again.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, is_main_replica

from bridge.training.checkpointing.agreement import Ranks
from bridge.training.checkpointing.errors import CheckpointSaveError
from bridge.training.checkpointing.formats.names import directory_name
from bridge.training.checkpointing.formats.zarr_arrays import ArraySpec, ArrayWrite
from bridge.training.checkpointing.formats.zarr_grid import Box, GridError, Part, choose_chunks
from bridge.training.checkpointing.formats.zarr_metadata import stored_type


@dataclass(frozen=True)
class PlannedArray:
    """An array of which this rank writes something. Shards are named by their position in the rank's state."""

    spec: ArraySpec
    makes_metadata: bool
    parts: tuple[tuple[Box, int], ...]


@dataclass(frozen=True)
class ZarrPlan:
    """This rank's part of a plan. Holds no values and no directory."""

    job: str
    """The fingerprint of the ranks' structures that it was made for."""
    arrays: tuple[PlannedArray, ...]

    def writes(self, state: Sequence[Any]) -> list[ArrayWrite]:
        """What this rank writes of a state of that structure."""
        return [
            ArrayWrite(each.spec, each.makes_metadata, [(box, state[place].data) for box, place in each.parts])
            for each in self.arrays
        ]


@dataclass(frozen=True)
class _Held:
    """What one rank writes of one tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    boxes: tuple[Box, ...]


def make_plan(state: Sequence[Any], ranks: Ranks, *, job: str) -> ZarrPlan:
    """Plan a save. Collective.

    Args:
        state: this rank's shards and objects; main replicas are written.
        ranks: all ranks.
        job: the fingerprint of the ranks' structures.

    Raises:
        CheckpointSaveError: a tensor's type has no form in Zarr, or its shards lie too irregularly. Every rank raises.
    """
    held = ranks.run("planning what this rank writes", lambda: _held(state))
    gathered = ranks.gather_first("collecting what every rank writes", held)
    chunks = ranks.first("dividing the arrays into chunks", lambda: _divide(gathered or []))
    return ranks.run("planning what this rank writes", lambda: ZarrPlan(job, _own_part(state, chunks, ranks.rank)))


def _written(state: Sequence[Any]) -> dict[str, list[tuple[int, Box]]]:
    """What this rank writes, by key: places in the state, and in the tensor."""
    found: dict[str, list[tuple[int, Box]]] = defaultdict(list)
    for place, item in enumerate(state):
        if isinstance(item, ShardedTensor) and is_main_replica(item.replica_id):
            shape = (1,) * item.prepend_axis_num + tuple(item.local_shape)
            found[item.key].append((place, Box(tuple(item.global_offset), shape)))
        elif not isinstance(item, ShardedTensor | ShardedObject):
            raise CheckpointSaveError(f"a {type(item).__name__} is neither a sharded tensor nor a sharded object")
    return found


def _held(state: Sequence[Any]) -> dict[str, _Held]:
    held = {}
    for key, parts in _written(state).items():
        item = state[parts[0][0]]
        directory_name(key)
        stored_type(item.dtype)
        held[key] = _Held(tuple(item.global_shape), item.dtype, tuple(box for _, box in parts))
    return held


def _divide(gathered: Sequence[dict[str, _Held]]) -> dict[str, tuple[tuple[int, ...], int]]:
    """For each key the shape of its chunks, and the rank that makes its metadata."""
    parts: dict[str, list[Part]] = defaultdict(list)
    tensors: dict[str, _Held] = {}
    for rank, held in enumerate(gathered):
        for key, own in held.items():
            tensors.setdefault(key, own)
            parts[key].extend(Part(rank, box) for box in own.boxes)
    divided = {}
    for key, tensor in tensors.items():
        try:
            chunks = choose_chunks(tensor.shape, tensor.dtype.itemsize, parts[key])
        except GridError as error:
            raise CheckpointSaveError(
                f"{key} cannot be saved as a Zarr array: {error}; set checkpoint.ckpt_format to 'torch_dist'"
            ) from error
        divided[key] = chunks, parts[key][0].rank
    return divided


def _own_part(
    state: Sequence[Any], chunks: dict[str, tuple[tuple[int, ...], int]], rank: int
) -> tuple[PlannedArray, ...]:
    planned = []
    for key, parts in _written(state).items():
        item = state[parts[0][0]]
        chunk_shape, maker = chunks[key]
        spec = ArraySpec(directory_name(key), tuple(item.global_shape), item.dtype, chunk_shape)
        planned.append(PlannedArray(spec, maker == rank, tuple((box, place) for place, box in parts)))
    return tuple(planned)
