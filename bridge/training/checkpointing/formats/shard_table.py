"""The shards of all ranks as columns of numbers: what a plan is made of, whatever the number of shards. Pure.

Millions of shards have a few thousand keys and a few dozen shapes between them. So a rank sends two short lists, of
keys and of `Spec`s, and for each shard three numbers and its offset. Replicas send the same bytes except for one bit
a shard, which says who is the main one, and are unpacked once.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, is_main_replica

from bridge.training.checkpointing.errors import CheckpointSaveError
from bridge.training.checkpointing.io.table import Flags, Ints, Spec, StoredTable

_LEVEL = 1  # of zlib: faster than the network between two nodes


@dataclass(frozen=True)
class Packed:
    """One rank's shards as they travel."""

    body: bytes
    """Compressed; the same for replicas."""
    main: bytes
    """A bit for each shard: whether it is the main replica."""

    @property
    def size(self) -> int:
        """Bytes."""
        return len(self.body) + len(self.main)

    @classmethod
    def of(cls, state: Sequence[Any]) -> Packed:
        """Of a rank's shards and objects.

        Raises:
            CheckpointSaveError: something is neither a sharded tensor nor a sharded object.
        """
        rows = [row_of(item) for item in state]
        return cls.of_rows(rows, [is_main_replica(item.replica_id) for item in state])

    @classmethod
    def of_rows(cls, rows: Sequence[tuple[str, Spec, Sequence[int]]], main: Sequence[bool]) -> Packed:
        """Of key, kind and offset of each shard."""
        keys: dict[str, int] = {}
        specs: dict[Spec, int] = {}
        key = [keys.setdefault(row[0], len(keys)) for row in rows]
        spec = [specs.setdefault(row[1], len(specs)) for row in rows]
        depth = max((len(row[2]) for row in rows), default=0)
        offset = [(*row[2], *(0,) * (depth - len(row[2]))) for row in rows]
        lists = json.dumps([list(keys), list(specs), len(rows), depth], default=int).encode()  # lengths may be NumPy's
        columns = np.array([key, spec], np.uint32).tobytes()
        places = np.array(offset, np.int64).reshape(len(rows), depth).T.tobytes()
        body = zlib.compress(len(lists).to_bytes(8, "little") + lists + columns + places, _LEVEL)
        return cls(body, np.packbits(np.array(main, np.bool_)).tobytes())


class _Body(NamedTuple):
    keys: list[str]
    specs: list[Spec]
    key: Ints
    spec: Ints
    offset: Ints


def _unpack(body: bytes) -> _Body:
    data = zlib.decompress(body)
    start = 8 + int.from_bytes(data[:8], "little")
    keys, specs, count, depth = json.loads(data[8:start])
    columns = np.frombuffer(data, np.uint32, 2 * count, start).astype(np.int64).reshape(2, count)
    offset = np.frombuffer(data, np.int64, count * depth, start + 8 * count).reshape(depth, count).T
    return _Body(keys, [Spec.from_json(entry) for entry in specs], columns[0], columns[1], offset)


def row_of(item: Any) -> tuple[str, Spec, Sequence[int]]:
    """Key, kind and offset of a shard or an object.

    Raises:
        CheckpointSaveError: it is neither, or has no values.
    """
    if isinstance(item, ShardedTensor):
        shape = (1,) * item.prepend_axis_num + tuple(item.local_shape)
        grid = item.axis_fragmentations
        data = item.data
        if data is None:
            raise CheckpointSaveError(f"{item.key} has no values to save")
        spec = Spec(
            "",
            str(data.dtype),
            str(data.layout),
            data.is_pinned(),
            tuple(item.global_shape),
            shape,
            None if grid is None else tuple(grid),
        )
        return item.key, spec, item.global_offset
    if isinstance(item, ShardedObject):
        spec = Spec(item.key, "", "", False, tuple(item.global_shape), (), None)
        return item.unique_key, spec, item.global_offset
    raise CheckpointSaveError(f"a {type(item).__name__} is neither a sharded tensor nor a sharded object")


@dataclass(frozen=True)
class ShardTable:
    """The shards of all ranks, in the order of ranks and of their states."""

    ranks: int
    keys: list[str]
    """Of tensors, and the unique keys of objects."""
    specs: list[Spec]
    rank: Ints
    place: Ints
    """Position in the rank's state."""
    key: Ints
    """Number of the key."""
    spec: Ints
    """Number of the kind."""
    offset: Ints
    """A row for each shard: its place in the whole tensor, with zeros behind where others have more axes."""
    main: Flags
    """Whether it is the main replica."""

    @classmethod
    def of(cls, tables: Iterable[Packed]) -> ShardTable:
        """Of the tables of all ranks, in their order."""
        keys: dict[str, int] = {}
        specs: dict[Spec, int] = {}
        known: dict[bytes, tuple[Ints, Ints, Ints]] = {}
        columns: list[tuple[Ints, Ints, Ints]] = []
        main: list[Flags] = []
        for table in tables:
            if table.body not in known:
                body = _unpack(table.body)
                of_key = np.array([keys.setdefault(key, len(keys)) for key in body.keys], np.int64)
                of_spec = np.array([specs.setdefault(spec, len(specs)) for spec in body.specs], np.int64)
                empty = np.zeros(0, np.int64)
                known[table.body] = (
                    of_key[body.key] if len(of_key) else empty,
                    of_spec[body.spec] if len(of_spec) else empty,
                    body.offset,
                )
            columns.append(known[table.body])
            count = len(columns[-1][0])
            main.append(np.unpackbits(np.frombuffer(table.main, np.uint8), count=count).astype(np.bool_))
        depth = max((offset.shape[1] for _, _, offset in columns), default=0)
        counts = [len(key) for key, _, _ in columns]
        offset = np.zeros((sum(counts), depth), np.int64)
        at = 0
        for _, _, own in columns:
            offset[at : at + len(own), : own.shape[1]] = own
            at += len(own)
        return cls(
            len(columns),
            list(keys),
            list(specs),
            np.repeat(np.arange(len(counts)), counts),
            _joined([np.arange(count) for count in counts]),
            _joined([key for key, _, _ in columns]),
            _joined([spec for _, spec, _ in columns]),
            offset,
            np.concatenate(main) if main else np.zeros(0, np.bool_),
        )

    @classmethod
    def of_stored(cls, stored: StoredTable) -> ShardTable:
        """Of what a checkpoint holds: all of it is written."""
        columns = (stored.rank, stored.place, stored.key, stored.spec, stored.offset)
        return cls(len(stored.fingerprints), stored.keys, stored.specs, *columns, np.ones(len(stored), np.bool_))

    def __len__(self) -> int:
        return len(self.rank)

    @cached_property
    def position(self) -> Ints:
        """Offsets as single numbers, which differ where the offsets of two shards of a tensor do."""
        strides = np.zeros((max(1, len(self.specs)), self.offset.shape[1]), np.int64)
        for number, spec in enumerate(self.specs):
            # Shards without elements may begin where the tensor ends.
            lengths = [n + 1 for n in spec.whole]
            if math.prod(lengths) >= 1 << 63:
                lengths = [max(1, n) for n in spec.whole]
            for axis in range(len(lengths)):
                strides[number, axis] = math.prod(lengths[axis + 1 :])
        found = np.zeros(len(self), np.int64)
        for axis in range(self.offset.shape[1]):
            found += self.offset[:, axis] * strides[self.spec, axis]
        return found

    @cached_property
    def is_object(self) -> Flags:
        """Which of them are objects."""
        flags: Flags = self.of_spec([spec.is_object for spec in self.specs], np.bool_)[self.spec]
        return flags

    @cached_property
    def bytes(self) -> Ints:
        """Bytes of each shard; 0 for objects."""
        sizes: Ints = self.of_spec([spec.part_bytes for spec in self.specs])[self.spec]
        return sizes

    def of_spec(self, values: Sequence[Any], kind: Any = np.int64) -> Any:
        """Values by the number of the kind, as an array that is never empty."""
        return np.array(values if len(values) else [0], kind)


def _joined(parts: list[Ints]) -> Ints:
    return np.concatenate(parts).astype(np.int64, copy=False) if parts else np.zeros(0, np.int64)
