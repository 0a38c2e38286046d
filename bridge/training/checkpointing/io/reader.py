"""A storage reader for torch DCP that reads tensors straight into place."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.futures import Future

from bridge.training.checkpointing.collector import without_collector
from bridge.training.checkpointing.errors import CheckpointDamagedError
from bridge.training.checkpointing.io.plan import Want
from bridge.training.checkpointing.io.reading import ReadOptions, ReadStats, read_wants
from bridge.training.checkpointing.io.stored import open_stored
from bridge.training.checkpointing.safety.containment import contained_file
from bridge.training.checkpointing.safety.safe_globals import load_torch_bytes


class DirectReader(FileSystemReader):
    """torch's `FileSystemReader`, which reads tensors straight into their memory, and only the bytes that are needed.

    For `torch.distributed.checkpoint.load(state_dict, storage_reader=DirectReader(path))`. Objects, and tensors that
    are stored in a way that it does not know, are read by torch's reader. `.metadata` is parsed as data, so the file
    cannot run anything.
    """

    def __init__(self, path: str | os.PathLike[str], options: ReadOptions | None = None) -> None:
        """
        Args:
            path: the checkpoint.
            options: how tensors are read.
        """
        super().__init__(path)
        self.stats = ReadStats()
        """What the last load took."""
        self._options = options
        self._metadata: Metadata | None = None

    # Without further parameters: torch would fall back to a metadata file of each rank if it took `rank`.
    def read_metadata(self) -> Metadata:
        """What the checkpoint holds, from `.metadata`.

        Raises:
            CheckpointError: the file is absent or unreadable, or names what it may not.
        """
        with without_collector():
            self._metadata = open_stored(Path(self.path)).metadata()
        return self._metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Carry out a plan.

        Raises:
            CheckpointError: a file is absent or unreadable, or leads out of the checkpoint.
        """
        if self._metadata is None:
            raise RuntimeError("read_metadata comes before read_data")
        tensors = [item for item in plan.items if item.type is not LoadItemType.BYTE_IO]
        self.stats = read_items(tensors, planner, self._metadata, Path(self.path), self._options)
        objects = [item for item in plan.items if item.type is LoadItemType.BYTE_IO]
        for item in objects:  # torch's planner unpickles them as they are
            self._require_safe(item, self._metadata)
        return super().read_data(replace(plan, items=objects), planner)

    def _require_safe(self, item: ReadItem, metadata: Metadata) -> None:
        place = metadata.storage_data[item.storage_index]
        path, _ = contained_file(Path(self.path), place.relative_path)
        with path.open("rb") as stream:
            stream.seek(place.offset)
            load_torch_bytes(stream.read(place.length), f"{path} ({item.storage_index.fqn})", "object")


def read_items(
    items: Iterable[ReadItem],
    planner: LoadPlanner,
    metadata: Metadata,
    directory: Path,
    options: ReadOptions | None = None,
) -> ReadStats:
    """Read the tensors of a plan into place. Local.

    Raises:
        CheckpointError: a file is absent or unreadable, or leads out of the checkpoint.
    """
    shapes = ChunkShapes(metadata)
    wants, waiting = [], []
    for item in items:
        target = planner.resolve_tensor(item)
        wants.append(want_of(item, target, metadata, shapes))
        if type(target) is torch.Tensor or type(target) is torch.nn.Parameter:
            waiting.append((item, target))
            continue
        # megatron-core's planner hands out one FP8 tensor at a time.
        read_wants([wants.pop()], paths_of([item], metadata, directory), options)
        planner.commit_tensor(item, target)
    stats = read_wants(wants, paths_of((item for item, _ in waiting), metadata, directory), options)
    for item, target in waiting:
        planner.commit_tensor(item, target)
    return stats


def want_of(item: ReadItem, target: torch.Tensor, metadata: Metadata, shapes: ChunkShapes) -> Want:
    """What one item of a plan reads."""
    index = item.storage_index
    place = metadata.storage_data[index]
    shape, lengths = shapes.of(index), tuple(item.lengths)
    if tuple(target.shape) != lengths:
        raise CheckpointDamagedError(
            f"{index.fqn!r} is {list(target.shape)} in this run, and {list(lengths)} of it are to be read"
        )
    box = None if lengths == shape else (tuple(item.storage_offsets), lengths)
    entry = metadata.state_dict_metadata[index.fqn]
    if not isinstance(entry, TensorStorageMetadata):
        raise CheckpointDamagedError(f"{index.fqn!r} is to be read as a tensor, and is an object")
    dtype = entry.properties.dtype
    return Want(index.fqn, place.relative_path, place.offset, place.length, dtype, shape, target, box)


def paths_of(items: Iterable[ReadItem], metadata: Metadata, directory: Path) -> Mapping[str, Path]:
    """The files that items are in, by name.

    Raises:
        CheckpointError: one is absent, or leads out of the checkpoint.
    """
    names = {metadata.storage_data[item.storage_index].relative_path for item in items}
    return {name: contained_file(directory, name)[0] for name in names}


class ChunkShapes:
    """The shapes of stored chunks by their place in the tensor, each looked up once."""

    def __init__(self, metadata: Metadata) -> None:
        self._entries: Mapping[str, Any] = metadata.state_dict_metadata
        self._known: dict[str, dict[tuple[int, ...], tuple[int, ...]]] = {}

    def of(self, index: MetadataIndex) -> tuple[int, ...]:
        """The shape of the chunk that an index names."""
        return self.by_offset(index.fqn)[tuple(index.offset or ())]

    def by_offset(self, key: str) -> Mapping[tuple[int, ...], tuple[int, ...]]:
        """The shapes of all chunks of a tensor."""
        found = self._known.get(key)
        if found is None:
            entry = self._entries[key]
            chunks = entry.chunks if isinstance(entry, TensorStorageMetadata) else []
            found = self._known[key] = {tuple(chunk.offsets): tuple(chunk.sizes) for chunk in chunks}
        return found
