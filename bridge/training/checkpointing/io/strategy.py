"""megatron-core load strategies for `torch_dist` that read tensors straight into place.

megatron-core gives every tensor to torch DCP, which makes several objects of each, plans with them, gathers all ranks'
plans on one rank, and then reads tensor by tensor. Here a rank plans for itself, from what it wants and what
`.metadata` says. What is unusual (padded tensors, anything that does not fit) is left to the slower way, on all ranks
if on one, which also has the words for what is wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, Literal

import torch
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_outplace, nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor
from megatron.core.dist_checkpointing.strategies.torch import TorchDistLoadShardedStrategy
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import LoadPlanner, ReadItem
from torch.distributed.checkpoint.utils import _DistWrapper

from bridge.training.checkpointing.collector import without_collector
from bridge.training.checkpointing.dtypes import require_same_kind
from bridge.training.checkpointing.errors import CheckpointDamagedError
from bridge.training.checkpointing.io.elsewhere import Shards
from bridge.training.checkpointing.io.plan import Want
from bridge.training.checkpointing.io.reader import read_items
from bridge.training.checkpointing.io.reading import ReadOptions, ReadStats, read_wants
from bridge.training.checkpointing.io.stored import Chunk, Stored, StoredByMetadata, StoredTensor, open_stored
from bridge.training.checkpointing.readable import ReadableFile
from bridge.training.checkpointing.safety.containment import contained_file
from bridge.training.checkpointing.safety.safe_reading import (
    ReadTensors,
    SafeLoadStrategy,
    read_object,
    safe_strategy,
)

IoBackend = Literal["direct", "stock"]
"""Who reads and writes the files: this package, or torch."""


def reading_strategy(
    strategy: Any, directory: Path, io_backend: IoBackend = "direct", shards: Shards | None = None
) -> Any:
    """What loads a checkpoint. Local.

    Args:
        strategy: what megatron-core has registered for the checkpoint's format.
        directory: the checkpoint.
        io_backend: who reads the files.
        shards: those that are not in the directory.

    Returns:
        As `safe_strategy`, which reads by the `io_backend`.

    Raises:
        UnsafeCheckpointError: `.metadata` names what it may not.
        CheckpointDamagedError: `.metadata` is absent or unreadable.
    """
    if io_backend == "stock" or type(strategy) is not TorchDistLoadShardedStrategy:
        if shards is not None:
            shards.fetch()
        return safe_strategy(strategy, directory)
    return DirectLoadStrategy(directory, open_stored(directory), shards=shards)


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

    def __init__(
        self,
        directory: Path,
        stored: Stored | Metadata,
        options: ReadOptions | None = None,
        shards: Shards | None = None,
    ) -> None:
        """
        Args:
            directory: the checkpoint.
            stored: what it holds.
            options: how tensors are read.
            shards: those that are not in the directory.
        """
        self._shards = shards
        self._stored = StoredByMetadata(stored) if isinstance(stored, Metadata) else stored
        self._metadata: Metadata | None = stored if isinstance(stored, Metadata) else None
        super().__init__(directory, self._metadata)  # type: ignore[arg-type]
        self.stats = ReadStats()
        """What the last load of this rank took, if nothing was unusual."""
        self._options = shards.options if options is None and shards is not None else options

    @property
    def cached_global_metadata(self) -> Metadata:
        """torch's form of what the checkpoint holds, made when somebody asks for it."""
        if self._metadata is None:
            with without_collector():
                self._metadata = self._stored.metadata()
        return self._metadata

    @cached_global_metadata.setter
    def cached_global_metadata(self, metadata: Metadata | None) -> None:
        self._metadata = metadata

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
            if self._shards is not None:
                ranks.all_gather("fetch", self._shards.fetch)
            return super().load(sharded_state_dict, checkpoint_dir)
        loaded: list[Any] = []
        ranks.all_gather("read", lambda: loaded.append(self._read(plans[0])))
        return loaded[0]

    def prepare_alone(self, sharded_state_dict: Any, checkpoint_dir: Any) -> Callable[[], Any]:
        """Plan a load of this rank alone, as `SafeLoadStrategy.prepare_alone`. Local."""
        plan = self._plan(sharded_state_dict)
        if plan is None:
            if self._shards is not None:
                self._shards.fetch()
            return super().prepare_alone(sharded_state_dict, checkpoint_dir)
        return lambda: self._read(plan)

    def _reads_tensors(self) -> ReadTensors:
        return direct_reading(self.cached_global_metadata, self._directory, self._options)

    def _plan(self, sharded_state_dict: Any) -> _Plan | None:
        with without_collector():
            return _Planning(self._directory, self._stored, self._shards).plan(sharded_state_dict)

    def _read(self, plan: _Plan) -> Any:
        self.stats = read_wants(plan.wants, plan.paths, self._options)
        return plan.loaded


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
        self.stats = strategy.stats
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
        return DirectLoadStrategy(directory, open_stored(directory), self._options)


@dataclass
class _Plan:
    """One rank's load: what is to be read, and the state dict that it makes."""

    wants: list[Want] = field(default_factory=list)
    paths: dict[str, Path | ReadableFile] = field(default_factory=dict)
    loaded: Any = None
    """What was asked for with the tensors that are read into, and the objects, which have been read."""


class _UnusualError(Exception):
    """Something that is left to the slower way."""


class _Planning:
    """Plans one load."""

    def __init__(self, directory: Path, stored: Stored, shards: Shards | None = None) -> None:
        self._directory = directory
        self._shards = shards
        self._stored = stored
        self._sizes: dict[str, int] = {}
        self._objects: dict[str, list[ShardedObject]] = {}
        self._values: dict[str, Iterator[Any]] = {}
        self._plan = _Plan()

    def plan(self, sharded_state_dict: Any) -> _Plan | None:
        """The plan, with objects read; None where something is unusual.

        Raises:
            CheckpointError: a file is absent or leads out of the checkpoint, or an object is unreadable or not allowed.
        """
        for item in nested_values(sharded_state_dict):
            if type(item) is not ShardedTensor and isinstance(item, ShardedObject):
                self._objects.setdefault(item.unique_key, []).append(item)
        try:
            for key, items in self._objects.items():
                self._values[key] = iter(self._object(key, len(items)))
            self._plan.loaded = dict_list_map_outplace(self._value, sharded_state_dict)
        except _UnusualError:
            return None
        return self._plan

    def _value(self, item: Any) -> Any:
        if isinstance(item, ShardedTensor):
            return self._tensor(item)
        if isinstance(item, ShardedObject):
            return next(self._values[item.unique_key])
        raise _UnusualError

    def _tensor(self, item: ShardedTensor) -> torch.Tensor:
        key = item.key
        stored = self._stored.tensor(key)
        if stored is None or item.flattened_range is not None or item.global_shape != stored.shape:
            raise _UnusualError
        data: torch.Tensor | None = item.data
        if data is None:
            item.init_data(torch.device("cpu"), init_fn=torch.empty)
            data = item.data
        elif data.requires_grad:
            data = item.data = data.detach()
        assert data is not None  # noqa: S101  (made above)
        if data.dtype is not stored.dtype:
            require_same_kind(key, data.dtype, stored.dtype)
        shape, target, offset = item.local_shape, data, item.global_offset
        if item.prepend_axis_num:
            shape = (1,) * item.prepend_axis_num + tuple(shape)
            target = data.view(shape)
        elif target.shape != shape:
            raise _UnusualError
        chunks = stored.chunks
        chunk = chunks[0] if len(chunks) == 1 else stored.at(tuple(offset))
        if chunk is not None and chunk.offset == offset and chunk.shape == shape:
            self._want(key, stored.dtype, chunk, target, None)
        else:
            self._parts(key, stored, offset, shape, target)
        return data

    def _parts(
        self, key: str, stored: StoredTensor, offset: Sequence[int], shape: Sequence[int], target: torch.Tensor
    ) -> None:
        """The parts of stored chunks that make up one chunk of this run."""
        found = 0
        for chunk, overlap in stored.overlapping(offset, shape):
            part = narrow_tensor_by_index(target, overlap.wanted, overlap.lengths)
            box = None if overlap.lengths == chunk.shape else (overlap.stored, overlap.lengths)
            self._want(key, stored.dtype, chunk, part, box)
            found += prod(overlap.lengths)
        if found != prod(shape):
            raise CheckpointDamagedError(
                f"{key!r} lacks values: {found} of the {prod(shape)} that this rank needs are in the checkpoint"
            )

    def _want(self, key: str, dtype: torch.dtype, chunk: Chunk, target: torch.Tensor, box: Any) -> None:
        _, shape, file, at, length = chunk
        size = self._sizes.get(file)
        if size is None:
            size = self._size(file)
        if at + length > size or prod(shape) * dtype.itemsize > length:
            raise _UnusualError
        self._plan.wants.append(Want(key, file, at, length, dtype, shape, target, box))

    def _object(self, key: str, count: int) -> list[Any]:
        place = self._stored.thing(key)
        if place is None or place.at + place.length > self._size(place.file):
            raise _UnusualError
        return read_object(self._plan.paths[place.file], _StorageInfo(*place), key, count)

    def _size(self, file: str) -> int:
        """Bytes of a file, which is found to be in the checkpoint."""
        size = self._sizes.get(file)
        if size is None:
            if self._shards is None:
                self._plan.paths[file], size = contained_file(self._directory, file)
            else:
                self._plan.paths[file], size = self._shards.locate(file)
            self._sizes[file] = size
        return size
