"""megatron-core load strategies for `torch_dist` that read tensors straight into place.

megatron-core gives every tensor to torch DCP, which makes several objects of each, plans with them, gathers all ranks'
plans on one rank, and then reads tensor by tensor. Here a rank plans for itself, from what it wants and what
`.metadata` says. What is unusual (padded tensors, anything that does not fit) is left to the slower way, on all ranks
if on one, which also has the words for what is wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, Literal

import torch
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor
from megatron.core.dist_checkpointing.strategies.torch import (
    TorchDistLoadShardedStrategy,
    _replace_sharded_keys_with_state_dict_keys,
    _replace_state_dict_keys_with_sharded_keys,
    _restore_dict_types,
)
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlanner, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.utils import _DistWrapper

from bridge.training.checkpointing.dtypes import require_same_kind
from bridge.training.checkpointing.errors import CheckpointDamagedError
from bridge.training.checkpointing.io.plan import Want
from bridge.training.checkpointing.io.reader import ChunkShapes, read_items
from bridge.training.checkpointing.io.reading import ReadOptions, ReadStats, read_wants
from bridge.training.checkpointing.safety.containment import contained_file
from bridge.training.checkpointing.safety.payload_metadata import read_payload_metadata, without_collector
from bridge.training.checkpointing.safety.safe_reading import (
    ReadTensors,
    SafeLoadStrategy,
    read_object,
    safe_strategy,
)

IoBackend = Literal["direct", "stock"]
"""Who reads and writes the files: this package, or torch."""


def reading_strategy(strategy: Any, directory: Path, io_backend: IoBackend = "direct") -> Any:
    """What loads a checkpoint. Local.

    Args:
        strategy: what megatron-core has registered for the checkpoint's format.
        directory: the checkpoint.
        io_backend: who reads the files.

    Returns:
        As `safe_strategy`, which reads by the `io_backend`.

    Raises:
        UnsafeCheckpointError: `.metadata` names what it may not.
        CheckpointDamagedError: `.metadata` is absent or unreadable.
    """
    if io_backend == "stock" or type(strategy) is not TorchDistLoadShardedStrategy:
        return safe_strategy(strategy, directory)
    return DirectLoadStrategy(directory, read_payload_metadata(directory))


def direct_reading(metadata: Metadata, directory: Path, options: ReadOptions | None = None) -> ReadTensors:
    """What reads the tensors of a plan that torch has made.

    Args:
        metadata: what the checkpoint holds.
        directory: the checkpoint.
        options: how tensors are read.
    """

    def read(items: Sequence[ReadItem], planner: LoadPlanner) -> None:
        read_items(items, planner, metadata, directory, options)

    return read


class DirectLoadStrategy(SafeLoadStrategy):
    """Loads one `torch_dist` checkpoint whose metadata has been read."""

    def __init__(self, directory: Path, metadata: Metadata, options: ReadOptions | None = None) -> None:
        super().__init__(directory, metadata)
        self.stats = ReadStats()
        """What the last load of this rank took, if nothing was unusual."""
        self._options = options
        self._places: Mapping[str, Mapping[tuple[int, ...], _StorageInfo]] | None = None

    def load(self, sharded_state_dict: Any, checkpoint_dir: Any) -> Any:
        """As megatron-core's. Collective.

        Raises:
            CheckpointException: torch's, with the cause on every rank that failed.
        """
        ranks = _DistWrapper(None, True, 0)
        plans: list[_Plan] = []

        def plan() -> bool:
            found = self._plan(sharded_state_dict)
            if found is not None:
                plans.append(found)
            return found is not None

        if not all(ranks.all_gather("plan", plan)):
            return super().load(sharded_state_dict, checkpoint_dir)
        loaded: list[Any] = []
        ranks.all_gather("read", lambda: loaded.append(self._read(plans[0])))
        return loaded[0]

    def prepare_alone(self, sharded_state_dict: Any, checkpoint_dir: Any) -> Callable[[], Any]:
        """Plan a load of this rank alone, as `SafeLoadStrategy.prepare_alone`. Local."""
        plan = self._plan(sharded_state_dict)
        if plan is None:
            return super().prepare_alone(sharded_state_dict, checkpoint_dir)
        return lambda: self._read(plan)

    def _reads_tensors(self) -> ReadTensors:
        return direct_reading(self.cached_global_metadata, self._directory, self._options)

    def _plan(self, sharded_state_dict: Any) -> _Plan | None:
        if self._places is None:
            self._places = _places(self.cached_global_metadata)
        planning = _Planning(self._directory, self.cached_global_metadata, self._places)
        with without_collector():
            return planning.plan(sharded_state_dict)

    def _read(self, plan: _Plan) -> Any:
        self.stats = read_wants(plan.wants, plan.paths, self._options)
        return plan.loaded()


class TorchDistLoadStrategy(TorchDistLoadShardedStrategy):  # type: ignore[misc]
    """A load strategy for megatron-core: `dist_checkpointing.load(state_dict, directory, TorchDistLoadStrategy())`.

    It loads what megatron-core's own loads, any checkpoint of the format `torch_dist`, and nothing in the checkpoint
    can run code. It may be used again, for other checkpoints too.
    """

    def __init__(self, options: ReadOptions | None = None) -> None:
        """
        Args:
            options: how tensors are read.
        """
        super().__init__()
        self.stats = ReadStats()
        """What the last load of this rank took, if nothing was unusual."""
        self._options = options

    def load(self, sharded_state_dict: Any, checkpoint_dir: Any) -> Any:
        """As megatron-core's. Collective.

        Raises:
            CheckpointException: torch's, with the cause on every rank that failed.
        """
        opened: list[DirectLoadStrategy] = []
        _DistWrapper(None, True, 0).all_gather("plan", lambda: opened.append(self._open(checkpoint_dir)))
        strategy = opened[0]
        loaded = strategy.load(sharded_state_dict, checkpoint_dir)
        self.cached_global_metadata, self.stats = strategy.cached_global_metadata, strategy.stats
        return loaded

    def prepare_alone(self, sharded_state_dict: Any, checkpoint_dir: Any) -> Callable[[], Any]:
        """Plan a load of this rank alone, as `SafeLoadStrategy.prepare_alone`. Local."""
        return self._open(checkpoint_dir).prepare_alone(sharded_state_dict, checkpoint_dir)

    def load_tensors_metadata(self, checkpoint_dir: Any, metadata: Metadata | None = None) -> Any:
        """As megatron-core's."""
        return self._open(checkpoint_dir).load_tensors_metadata(checkpoint_dir, metadata)

    def load_sharded_metadata(self, checkpoint_dir: Any) -> Any:
        """As megatron-core's."""
        return self._open(checkpoint_dir).load_sharded_metadata(checkpoint_dir)

    def _open(self, checkpoint_dir: Any) -> DirectLoadStrategy:
        directory = Path(checkpoint_dir)
        return DirectLoadStrategy(directory, read_payload_metadata(directory), self._options)


def _places(metadata: Metadata) -> Mapping[str, Mapping[tuple[int, ...], _StorageInfo]]:
    """Where every chunk is stored, by key and place in the tensor; an object has the place ()."""
    places: dict[str, dict[tuple[int, ...], _StorageInfo]] = {}
    for index, place in metadata.storage_data.items():
        places.setdefault(index.fqn, {})[index.offset or ()] = place
    return places


@dataclass
class _Plan:
    """One rank's load: what is to be read, and the structure that it belongs in."""

    sharded_state_dict: Any
    wants: list[Want] = field(default_factory=list)
    paths: dict[str, Path] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)
    """By key: the tensors that are read into, or the objects, which have been read."""
    flat_mapping: Any = None
    rename_mapping: Any = None

    def loaded(self) -> Any:
        """What was read, in the structure of what was asked for."""
        loaded = _replace_sharded_keys_with_state_dict_keys(self.values, self.flat_mapping, self.rename_mapping)
        _restore_dict_types(loaded, self.sharded_state_dict)
        return loaded


class _UnusualError(Exception):
    """Something that is left to the slower way."""


class _Planning:
    """Plans one load."""

    def __init__(
        self, directory: Path, metadata: Metadata, places: Mapping[str, Mapping[tuple[int, ...], _StorageInfo]]
    ) -> None:
        self._directory = directory
        self._entries = metadata.state_dict_metadata
        self._places = places
        self._shapes = ChunkShapes(metadata)
        self._sizes: dict[str, int] = {}

    def plan(self, sharded_state_dict: Any) -> _Plan | None:
        """The plan, with objects read; None where something is unusual.

        Raises:
            CheckpointError: a file is absent or leads out of the checkpoint, or an object is unreadable or not allowed.
        """
        plan = _Plan(sharded_state_dict)
        flat, plan.flat_mapping, plan.rename_mapping = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict)
        try:
            for key, items in flat.items():
                if isinstance(items[0], ShardedObject):
                    plan.values[key] = self._object(key, len(items), plan)
                else:
                    plan.values[key] = [self._tensor(key, item, plan) for item in items]
        except _UnusualError:
            return None
        return plan

    def _tensor(self, key: str, item: Any, plan: _Plan) -> torch.Tensor:
        entry = self._entries.get(key)
        if (
            type(entry) is not TensorStorageMetadata
            or not isinstance(item, ShardedTensor)
            or item.flattened_range is not None
            or item.global_shape != entry.size
        ):
            raise _UnusualError
        if item.data is None:
            item.init_data(torch.device("cpu"), init_fn=torch.empty)
        elif item.data.requires_grad:
            item.data = item.data.detach()
        data: torch.Tensor = item.data
        require_same_kind(key, data.dtype, entry.properties.dtype)
        shape, target = item.local_shape, data
        if item.prepend_axis_num:
            shape = (1,) * item.prepend_axis_num + tuple(shape)
            target = data.view(shape)
        elif target.shape != shape:
            raise _UnusualError
        chunk = entry.chunks[0] if len(entry.chunks) == 1 else None
        if chunk is None or chunk.offsets != item.global_offset or chunk.sizes != shape:
            self._parts(key, entry, item.global_offset, shape, target, plan)
        else:
            plan.wants.append(self._want(key, entry, chunk.offsets, chunk.sizes, target, None, plan))
        return data

    def _parts(
        self,
        key: str,
        entry: TensorStorageMetadata,
        offset: tuple[int, ...],
        shape: tuple[int, ...],
        target: torch.Tensor,
        plan: _Plan,
    ) -> None:
        """The parts of stored chunks that make up one chunk of this run."""
        shapes = self._shapes.by_offset(key)
        if shapes.get(tuple(offset)) == tuple(shape):
            plan.wants.append(self._want(key, entry, tuple(offset), tuple(shape), target, None, plan))
            return
        chunk = ChunkStorageMetadata(torch.Size(offset), torch.Size(shape))
        found = 0
        for item in create_read_items_for_chunk_list(key, entry, [chunk]):
            stored, lengths = tuple(item.storage_index.offset or ()), tuple(item.lengths)
            part = narrow_tensor_by_index(target, item.dest_offsets, item.lengths)
            whole = shapes[stored]
            box = None if lengths == whole else (tuple(item.storage_offsets), lengths)
            plan.wants.append(self._want(key, entry, stored, whole, part, box, plan))
            found += prod(lengths)
        if found != prod(shape):
            raise CheckpointDamagedError(
                f"{key!r} lacks values: {found} of the {prod(shape)} that this rank needs are in the checkpoint"
            )

    def _want(
        self,
        key: str,
        entry: TensorStorageMetadata,
        offset: tuple[int, ...],
        shape: tuple[int, ...],
        target: torch.Tensor,
        box: Any,
        plan: _Plan,
    ) -> Want:
        place, dtype = self._place(key, offset, plan), entry.properties.dtype
        if prod(shape) * dtype.itemsize > place.length:
            raise _UnusualError
        return Want(key, place.relative_path, place.offset, place.length, dtype, shape, target, box)

    def _object(self, key: str, count: int, plan: _Plan) -> Any:
        if not isinstance(self._entries.get(key), BytesStorageMetadata):
            raise _UnusualError
        place = self._place(key, (), plan)
        return read_object(plan.paths[place.relative_path], place, key, count)

    def _place(self, key: str, offset: tuple[int, ...], plan: _Plan) -> _StorageInfo:
        place: _StorageInfo | None = self._places.get(key, {}).get(offset)
        if place is None:
            raise _UnusualError
        name = place.relative_path
        size = self._sizes.get(name)
        if size is None:
            plan.paths[name], size = contained_file(self._directory, name)
            self._sizes[name] = size
        if place.offset + place.length > size:
            raise _UnusualError
        return place
