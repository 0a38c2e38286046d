"""Reading torch DCP files through megatron-core without running anything that they hold.

megatron-core's load strategy unpickles `.metadata`, and the objects among the shards, without restrictions. These are
its strategy, planner and reader with the three places replaced where a file decides what happens: the metadata is
parsed as data, objects are read with `weights_only`, and places are checked before they are read. torch's collective
load first lets every rank plan and then lets every rank read; objects are read and places checked while planning, so
what is refused is refused on all ranks before any rank has changed a tensor.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreLoadPlanner,
    TorchDistLoadShardedStrategy,
    _replace_sharded_keys_with_state_dict_keys,
    _replace_state_dict_keys_with_sharded_keys,
    _restore_dict_types,
    _unwrap_pyt_sharded_tensor,
    mcore_to_pyt_state_dict,
)
from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.filesystem import FileSystemReader, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.state_dict_loader import load_state_dict
from torch.distributed.checkpoint.utils import _DistWrapper
from torch.futures import Future

from bridge.training.checkpointing.dtypes import require_same_kind
from bridge.training.checkpointing.errors import CheckpointDamagedError, CheckpointMismatchError
from bridge.training.checkpointing.layout import PAYLOAD_METADATA
from bridge.training.checkpointing.readable import ReadableFile
from bridge.training.checkpointing.safety.containment import contained_file
from bridge.training.checkpointing.safety.payload_metadata import read_payload_metadata
from bridge.training.checkpointing.safety.safe_globals import load_error, load_torch_bytes


def safe_strategy(strategy: Any, directory: Path) -> Any:
    """megatron-core's load strategy for a checkpoint, or a safe one in its place. Local.

    Args:
        strategy: what megatron-core has registered for the checkpoint's format.
        directory: the checkpoint.

    Returns:
        A `SafeLoadStrategy` for megatron-core's own strategy. One that a program has registered is its own code,
        and is returned as it is.

    Raises:
        UnsafeCheckpointError: `.metadata` names what it may not.
        CheckpointDamagedError: `.metadata` is absent or unreadable.
    """
    if type(strategy) is not TorchDistLoadShardedStrategy:
        return strategy
    return SafeLoadStrategy(directory, read_payload_metadata(directory))


ReadTensors = Callable[[Sequence[ReadItem], LoadPlanner], None]
"""Reads the tensors of a plan into place, and commits them."""


class SafeLoadStrategy(TorchDistLoadShardedStrategy):  # type: ignore[misc]
    """megatron-core's load strategy for `torch_dist`, for one checkpoint whose metadata has been read."""

    def __init__(self, directory: Path, metadata: Metadata) -> None:
        super().__init__()
        self._directory = directory
        self.cached_global_metadata = metadata

    def load(self, sharded_state_dict: Any, checkpoint_dir: Any) -> Any:
        """As megatron-core's. Collective.

        Raises:
            CheckpointException: torch's, with the cause on every rank that failed.
        """
        requests: list[_Request] = []
        # Agreed on first: a rank that fails here would leave the others waiting in torch's own exchange.
        _DistWrapper(None, True, 0).all_gather("plan", lambda: requests.append(self._request(sharded_state_dict)))
        request = requests[0]
        load_state_dict(request.values, request.reader, planner=request.planner)
        return request.loaded()

    def prepare_alone(self, sharded_state_dict: Any, checkpoint_dir: Any) -> Callable[[], Any]:
        """Plan a load of this rank alone: check where everything lies, read the objects, change no tensor. Local.

        Returns:
            What reads the tensors into place and returns what `load` would. Local too.

        Raises:
            CheckpointError: as the planning of `load`, without torch's exception around it.
        """
        request = self._request(sharded_state_dict)
        planner, reader = request.planner, request.reader
        planner.set_up_planner(request.values, self.cached_global_metadata, True)
        reader.set_up_storage_reader(self.cached_global_metadata, True)
        plan = reader.prepare_local_plan(planner.create_local_plan())
        plan = planner.finish_plan(reader.prepare_global_plan(planner.create_global_plan([plan]))[0])

        def read() -> Any:
            reader.read_data(plan, planner).wait()
            return request.loaded()

        return read

    def _request(self, sharded_state_dict: Any) -> _Request:
        tensors = [v for v in nested_values(sharded_state_dict) if isinstance(v, ShardedTensor)]
        flat, flat_mapping, rename_mapping = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict)
        padded = [v for v in tensors if v.allow_shape_mismatch]
        values = _without_zeroing(padded, flat)
        planner = _Planner(
            shapes_validation_sharded_tensors=[v for v in tensors if not v.allow_shape_mismatch],
            allow_shape_mismatch_sharded_tensors={v.key: v for v in padded},
        )
        shared_by = {key: len(names) for key, names in rename_mapping.items()}
        padding = [v.data for v in padded]
        read = self._reads_tensors()
        reader = _Reader(self._directory, self.cached_global_metadata, shared_by, padding, read)
        return _Request(sharded_state_dict, values, planner, reader, flat_mapping, rename_mapping)

    def _reads_tensors(self) -> ReadTensors | None:
        """What reads tensors instead of torch's reader."""
        return None

    def load_tensors_metadata(self, checkpoint_dir: Any, metadata: Metadata | None = None) -> Any:
        """As megatron-core's."""
        return super().load_tensors_metadata(checkpoint_dir, metadata or self.cached_global_metadata)

    def load_sharded_metadata(self, checkpoint_dir: Any) -> Any:
        """As megatron-core's."""
        entries = self.cached_global_metadata.state_dict_metadata.items()
        objects = [
            ShardedObject.empty_from_unique_key(key)
            for key, entry in entries
            if isinstance(entry, BytesStorageMetadata)
        ]
        return {obj.unique_key: obj for obj in objects} | self.load_tensors_metadata(checkpoint_dir)


def _without_zeroing(padded: list[Any], flat: Any) -> Any:
    """megatron-core's tensors for torch; it would zero the padded ones, before it is known whether they can be read."""
    for value in padded:
        value.allow_shape_mismatch = False
    try:
        return mcore_to_pyt_state_dict(flat, True)
    finally:
        for value in padded:
            value.allow_shape_mismatch = True


@dataclass(frozen=True)
class _Request:
    """One load: what is wanted, in torch's form, and what plans and reads it."""

    sharded_state_dict: Any
    values: Any
    planner: _Planner
    reader: _Reader
    flat_mapping: Any
    rename_mapping: Any

    def loaded(self) -> Any:
        """What was read, in the structure of what was asked for."""
        unwrapped = {key: _unwrap_pyt_sharded_tensor(value) for key, value in self.values.items()}
        loaded = _replace_sharded_keys_with_state_dict_keys(unwrapped, self.flat_mapping, self.rename_mapping)
        _restore_dict_types(loaded, self.sharded_state_dict)
        return loaded


class _Planner(MCoreLoadPlanner):  # type: ignore[misc]
    def create_local_plan(self) -> LoadPlan:
        plan: LoadPlan = super().create_local_plan()
        for item in plan.items:
            key = item.dest_index.fqn
            if item.type is LoadItemType.BYTE_IO and not isinstance(self.state_dict[key], io.BytesIO):
                raise CheckpointMismatchError(f"{key!r} is a tensor in this run, and in the checkpoint it is none")
        self._require_all_parts(plan)
        return plan

    def _require_all_parts(self, plan: LoadPlan) -> None:
        """Make sure that the stored parts make up the tensors of this run whose shapes have to be the same."""
        found: dict[Any, dict[Any, int]] = {}  # by place in the tensor, which a run may want twice
        for item in plan.items:
            if item.type is not LoadItemType.BYTE_IO:
                key = item.dest_index.fqn
                found.setdefault(item.dest_index, {})[item.dest_offsets] = prod(item.lengths)
                stored = self.metadata.state_dict_metadata[key]
                require_same_kind(key, self.lookup_tensor(item.dest_index).dtype, stored.properties.dtype)
        for index, parts in found.items():
            elements = sum(parts.values())
            expected = self.lookup_tensor(index).numel()
            if index.fqn not in self.allow_shape_mismatch_sharded_tensors and elements != expected:
                raise CheckpointDamagedError(
                    f"{index.fqn!r} lacks values: {elements} of the {expected} that this rank needs are in the "
                    "checkpoint"
                )

    def place_object(self, item: ReadItem, value: Any) -> None:
        """In place of `load_bytes`, which unpickles: take over an object that has been read."""
        key = item.dest_index.fqn
        self.state_dict[key] = value
        if self.flatten_state_dict:
            set_element(self.original_state_dict, self.mappings[key], value)

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        raise NotImplementedError("objects are read by the reader")


class _Reader(FileSystemReader):
    """torch's reader, with metadata that has been read and objects that are read while planning."""

    def __init__(
        self,
        directory: Path,
        metadata: Metadata,
        shared_by: Mapping[str, int],
        padded: Sequence[torch.Tensor],
        read_tensors: ReadTensors | None = None,
    ) -> None:
        super().__init__(directory)
        self._padded = padded
        self._read_tensors = read_tensors
        self._directory = directory
        self._metadata = metadata
        self._shared_by = shared_by
        self._objects: dict[MetadataIndex, Any] = {}

    # Without further parameters: torch would fall back to a metadata file of each rank if it took `rank`.
    def read_metadata(self) -> Metadata:
        return self._metadata

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Check where everything lies, and read the objects.

        Raises:
            UnsafeCheckpointError: a file lies outside of the checkpoint, or an object's class is not allowed.
            CheckpointDamagedError: something is not where `.metadata` says.
        """
        for path, size, items in self._by_file(plan):
            for item in items:
                self._require_within(item, path, size)
            self._read_objects([item for item in items if item.type is LoadItemType.BYTE_IO], path)
        return plan

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read the tensors into place, and hand over the objects."""
        for tensor in self._padded:
            tensor.zero_()  # a checkpoint may hold only the first rows of them
        for path, _, items in self._by_file(plan):
            for item in items:
                if item.type is LoadItemType.BYTE_IO:
                    planner.place_object(item, self._objects.pop(item.storage_index))  # type: ignore[attr-defined]
            tensors = [item for item in items if item.type is not LoadItemType.BYTE_IO]
            if self._read_tensors is not None:
                continue
            try:
                super().read_data(replace(plan, items=tensors), planner)
            except pickle.UnpicklingError as error:
                raise load_error(error, str(path), "file of tensors") from error
        if self._read_tensors is not None:
            self._read_tensors([item for item in plan.items if item.type is not LoadItemType.BYTE_IO], planner)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _by_file(self, plan: LoadPlan) -> Iterator[tuple[Path, int, list[ReadItem]]]:
        """Every file that is read from, with its size in bytes and what is read from it."""
        by_name: dict[str, list[ReadItem]] = {}
        for item in plan.items:
            by_name.setdefault(self._place_of(item).relative_path, []).append(item)
        for name, items in by_name.items():
            yield *contained_file(self._directory, name), items

    def _place_of(self, item: ReadItem) -> _StorageInfo:
        place: _StorageInfo | None = self.storage_data.get(item.storage_index)
        if place is None:
            raise self._lie(item, "nowhere")
        return place

    def _require_within(self, item: ReadItem, path: Path, size: int) -> None:
        place = self._place_of(item)
        if place.offset + place.length > size:
            raise self._lie(
                item, f"at {place.offset} to {place.offset + place.length} of {path.name}, which has {size}"
            )
        entry = self._metadata.state_dict_metadata[item.storage_index.fqn]
        if isinstance(entry, TensorStorageMetadata):
            needed = prod(item.lengths) * entry.properties.dtype.itemsize
            if needed > place.length:
                raise self._lie(item, f"in {place.length} bytes of {path.name}, and {needed} are needed")

    def _lie(self, item: ReadItem, where: str) -> CheckpointDamagedError:
        file = self._directory / PAYLOAD_METADATA
        return CheckpointDamagedError(f"{file} says that {item.storage_index.fqn!r} lies {where}")

    def _read_objects(self, items: list[ReadItem], path: Path) -> None:
        for item in items:
            count = self._shared_by.get(item.dest_index.fqn)
            self._objects[item.storage_index] = read_object(path, self._place_of(item), item.storage_index.fqn, count)


def read_object(path: Path | ReadableFile, place: _StorageInfo, key: str, count: int | None) -> list[Any]:
    """An object of a checkpoint: the list of the values that `count` places of a state dict have. Local.

    Raises:
        UnsafeCheckpointError: its class is not allowed.
        CheckpointDamagedError: it is unreadable, or something else is stored there.
    """
    value = load_torch_bytes(_record(path, place), f"{path} ({key})", "object")
    if not isinstance(value, list) or len(value) != count:
        raise CheckpointDamagedError(f"{path} ({key}) does not hold the object that belongs there")
    return value


def _record(path: Path | ReadableFile, place: _StorageInfo) -> bytes:
    if isinstance(path, Path):
        with path.open("rb") as file:
            file.seek(place.offset)
            return file.read(place.length)
    data = bytearray(place.length)
    path.read(memoryview(data), place.offset)
    return bytes(data)
