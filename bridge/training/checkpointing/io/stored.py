"""What a load asks of a checkpoint: of which type and shape a tensor is, and in which pieces it lies where."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from bridge.training.checkpointing.io.compact import read_compact
from bridge.training.checkpointing.io.table import LAYOUTS, StoredTable, dtype_of
from bridge.training.checkpointing.layout import PAYLOAD_METADATA
from bridge.training.checkpointing.safety.payload_metadata import payload_metadata, read_payload_bytes

_FEW = 300_000
"""Shards of a checkpoint up to which lists are made of all of them."""
_MANY = 24
"""Chunks of a tensor from which arrays find those that are needed faster than a loop."""


class Place(NamedTuple):
    """Where a record lies."""

    file: str
    at: int
    length: int


class Chunk(NamedTuple):
    """A piece of a stored tensor."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]
    file: str
    at: int
    length: int


def open_stored(directory: Path) -> Stored:
    """What a checkpoint holds, from the compact file if that serves, else from `.metadata`. Local.

    Raises:
        UnsafeCheckpointError: `.metadata` names what it may not.
        CheckpointDamagedError: it is absent or unreadable.
    """
    data = read_payload_bytes(directory)
    table = read_compact(directory, data)
    if table is not None:
        return StoredByTable(table)
    return StoredByMetadata(payload_metadata(data, str(directory / PAYLOAD_METADATA)))


class StoredTensor:
    """A tensor that a checkpoint holds."""

    __slots__ = ("_bounds", "_by_offset", "chunks", "dtype", "shape")

    def __init__(self, dtype: torch.dtype, shape: tuple[int, ...], chunks: list[Chunk]) -> None:
        self.dtype = dtype
        self.shape = shape
        self.chunks = chunks
        self._by_offset: dict[tuple[int, ...], Chunk] | None = None
        self._bounds: tuple[np.ndarray, np.ndarray] | None = None

    def at(self, offset: tuple[int, ...]) -> Chunk | None:
        """The chunk that begins there."""
        if self._by_offset is None:
            self._by_offset = {chunk.offset: chunk for chunk in self.chunks}
        return self._by_offset.get(offset)

    def overlapping(self, offset: Sequence[int], shape: Sequence[int]) -> Iterator[tuple[Chunk, Overlap]]:
        """The chunks that have elements in a box, each with what they have in common."""
        for chunk in self._candidates(offset, shape):
            first = tuple(map(max, chunk.offset, offset))
            ends = [min(a + n, b + m) for a, n, b, m in zip(chunk.offset, chunk.shape, offset, shape, strict=True)]
            lengths = tuple(end - start for start, end in zip(first, ends, strict=True))
            if all(length > 0 for length in lengths):
                stored = tuple(a - b for a, b in zip(first, chunk.offset, strict=True))
                wanted = tuple(a - b for a, b in zip(first, offset, strict=True))
                yield chunk, Overlap(stored, wanted, lengths)

    def _candidates(self, offset: Sequence[int], shape: Sequence[int]) -> Sequence[Chunk]:
        if len(self.chunks) < _MANY or not self.shape:
            return self.chunks
        if self._bounds is None:
            first = np.array([chunk.offset for chunk in self.chunks], np.int64)
            self._bounds = first, first + np.array([chunk.shape for chunk in self.chunks], np.int64)
        first, last = self._bounds
        start = np.array(offset, np.int64)
        hit = ((first < start + np.array(shape, np.int64)) & (last > start)).all(axis=1)
        return [self.chunks[number] for number in np.flatnonzero(hit).tolist()]


class Overlap(NamedTuple):
    """What a stored chunk and a wanted one have in common."""

    stored: tuple[int, ...]
    """Its first indices in the stored chunk."""
    wanted: tuple[int, ...]
    """Its first indices in the wanted one."""
    lengths: tuple[int, ...]


class Stored(Protocol):
    """What a checkpoint holds."""

    def tensor(self, key: str) -> StoredTensor | None:
        """The tensor of a key; None where there is none."""

    def thing(self, key: str) -> Place | None:
        """Where the object of a unique key lies; None where there is none."""

    def metadata(self) -> Metadata:
        """The same as torch has it, without what loading does not use."""


class StoredByTable:
    """What the compact file says. Nothing is made of what nobody asks for."""

    def __init__(self, table: StoredTable) -> None:
        self._table = table
        order = np.argsort(table.key, kind="stable")
        self._bounds: list[int] = np.searchsorted(table.key[order], np.arange(len(table.keys) + 1)).tolist()
        self._numbers = {key: number for number, key in enumerate(table.keys)}
        columns = (table.spec, table.file, table.at, table.length, table.offset)
        # A list is read faster, and takes long to make; who reads a few of millions does better without.
        self._has_lists = len(order) < _FEW
        self._columns: list[Any] = [column[order].tolist() if self._has_lists else column[order] for column in columns]
        if self._has_lists:
            self._columns[-1] = list(map(tuple, self._columns[-1]))
        self._dtypes = [None if spec.is_object else dtype_of(spec.dtype) for spec in table.specs]
        self._shapes = [(len(spec.whole), spec.whole, spec.part) for spec in table.specs]
        self._known: dict[str, StoredTensor] = {}

    def tensor(self, key: str) -> StoredTensor | None:
        """As `Stored`."""
        found = self._known.get(key)
        if found is None:
            number = self._numbers.get(key)
            if number is None:
                return None
            first = self._bounds[number]
            if self._has_lists and self._bounds[number + 1] == first + 1:
                kinds, files, at, length, offsets = self._columns
                kind = kinds[first]
                if (dtype := self._dtypes[kind]) is None:
                    return None
                axes, whole, part = self._shapes[kind]
                place = (offsets[first][:axes], part, self._table.files[files[first]], at[first], length[first])
                return StoredTensor(dtype, whole, [tuple.__new__(Chunk, place)])
            rows = self._rows(number)
            dtype = self._dtypes[rows[0][0]] if rows else None
            if dtype is None:
                return None
            axes, whole, _ = self._shapes[rows[0][0]]
            shapes, names = self._shapes, self._table.files
            chunks = [
                Chunk(tuple(offset[:axes]), shapes[kind][2], names[file], at, length)
                for kind, file, at, length, offset in rows
            ]
            found = self._known[key] = StoredTensor(dtype, whole, chunks)
        return found

    def thing(self, key: str) -> Place | None:
        """As `Stored`."""
        rows = self._rows(self._numbers.get(key))
        if not rows or self._dtypes[rows[0][0]] is not None:
            return None
        _, file, at, length, _ = rows[0]
        return Place(self._table.files[file], at, length)

    def metadata(self) -> Metadata:
        """As `Stored`."""
        table = self._table
        entries: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
        places: dict[MetadataIndex, _StorageInfo] = {}
        for number, key in enumerate(table.keys):
            rows = self._rows(number)
            if not rows:
                continue
            spec = table.specs[rows[0][0]]
            if spec.is_object:
                entries[key] = BytesStorageMetadata()
            else:
                properties = TensorProperties(dtype_of(spec.dtype), LAYOUTS[spec.layout], pin_memory=spec.pinned)
                entries[key] = entry = TensorStorageMetadata(properties, torch.Size(spec.whole), [])
            for kind, file, at, length, offset in rows:
                first = None if spec.is_object else torch.Size(offset[: len(spec.whole)])
                if first is not None:
                    entry.chunks.append(ChunkStorageMetadata(first, torch.Size(table.specs[kind].part)))
                places[MetadataIndex(key, first)] = _StorageInfo(table.files[file], at, length)
        return Metadata(entries, storage_data=places, storage_meta=StorageMeta(), version="1.0.0")

    def _rows(self, number: int | None) -> list[Any]:
        """Kind, file, place, length and offset of each shard of a key."""
        if number is None:
            return []
        first, last = self._bounds[number], self._bounds[number + 1]
        if last == first + 1 and self._has_lists:
            return [[column[first] for column in self._columns]]
        parts = [column[first:last] for column in self._columns]
        return list(zip(*(part if type(part) is list else part.tolist() for part in parts), strict=True))


class StoredByMetadata:
    """What `.metadata` says."""

    def __init__(self, metadata: Metadata) -> None:
        self._metadata = metadata
        self._places: dict[str, dict[tuple[int, ...], _StorageInfo]] = {}
        for index, place in metadata.storage_data.items():
            self._places.setdefault(index.fqn, {})[index.offset or ()] = place
        self._known: dict[str, StoredTensor] = {}

    def tensor(self, key: str) -> StoredTensor | None:
        """As `Stored`. A tensor of which a chunk lies nowhere is none."""
        found = self._known.get(key)
        if found is None:
            entry = self._metadata.state_dict_metadata.get(key)
            if not isinstance(entry, TensorStorageMetadata):
                return None
            places = self._places.get(key, {})
            if any(chunk.offsets not in places for chunk in entry.chunks):
                return None
            chunks = [
                Chunk(chunk.offsets, chunk.sizes, place.relative_path, place.offset, place.length)
                for chunk in entry.chunks
                for place in (places[chunk.offsets],)
            ]
            found = self._known[key] = StoredTensor(entry.properties.dtype, entry.size, chunks)
        return found

    def thing(self, key: str) -> Place | None:
        """As `Stored`."""
        place = self._places.get(key, {}).get(())
        if place is None or not isinstance(self._metadata.state_dict_metadata.get(key), BytesStorageMetadata):
            return None
        return Place(place.relative_path, place.offset, place.length)

    def metadata(self) -> Metadata:
        """As `Stored`."""
        return self._metadata
