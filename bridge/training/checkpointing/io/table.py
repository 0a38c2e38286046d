"""What the files of a checkpoint hold, as columns of numbers, and the file `.metadata.bridge` that keeps them.

`.metadata` says all of it too, and more slowly: to parse it makes several objects of each tensor. The compact file
is made of the same values, is bound to the exact `.metadata` beside it by size and checksum, and is never needed.
Nothing in it can run code: it is JSON and columns of integers, and every value is checked.

    8 bytes    BRIDGEMD
    8 bytes    length of the header, little-endian, as all numbers
    header     JSON: version, what it is bound to, kinds, files, fingerprints, and the columns' names and sizes
    columns    one after the other, each compressed by zlib
    8 bytes    XXH3 of everything before
"""

from __future__ import annotations

import json
import math
import zlib
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import xxhash

from bridge.training.checkpointing.safety.containment import is_plain_name

Ints = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]

VERSION = 1
_MAGIC = b"BRIDGEMD"
_LEVEL = 1  # of zlib
_DIMENSIONS = 64
_SMALLEST_ENTRY = 16
"""Bytes that `.metadata` needs for a shard at the least. It bounds what the compact file can make of memory."""
_LARGEST_HEADER = 1 << 26
_LARGEST_PLAN = 1 << 31
"""Bytes of the `.metadata` that can be made of a plan."""
_PLAN_SHARE = 1 << 10
"""Bytes of it for each of the plan's, at the most."""
LAYOUTS = {str(value): value for value in vars(torch).values() if isinstance(value, torch.layout)}


class Spec(NamedTuple):
    """What shards have in common beside their key."""

    base: str
    """The key that all parts of an object share; empty for tensors."""
    dtype: str
    """As in `torch.float32`; empty for objects."""
    layout: str
    pinned: bool
    whole: tuple[int, ...]
    """Shape of the whole tensor; for objects, how many parts there are along each axis."""
    part: tuple[int, ...]
    """Shape of the shard, prepended axes included; empty for objects."""
    grid: tuple[int, ...] | None
    """How many shards there are along each axis; None where they do not lie in a grid."""

    @classmethod
    def from_json(cls, entry: Any) -> Spec:
        """From a list of its values, as JSON has them.

        Raises:
            ValueError: it is none.
        """
        base, dtype, layout, pinned, whole, part, grid = entry
        spec = cls(
            base, dtype, layout, pinned, _lengths(whole), _lengths(part), None if grid is None else _lengths(grid)
        )
        if not isinstance(base, str) or not isinstance(layout, str) or type(pinned) is not bool:
            raise ValueError("a kind of shards has values of other types")
        if not base and (len(spec.part) != len(spec.whole) or layout not in LAYOUTS):
            raise ValueError(f"a kind of shards has {len(spec.part)} axes of {len(spec.whole)}")
        if not base and math.prod(spec.whole) * dtype_of(dtype).itemsize >= 1 << 63:
            raise ValueError(f"a tensor of {list(spec.whole)} is larger than one can be")
        return spec

    @property
    def is_object(self) -> bool:
        return bool(self.base)

    @property
    def part_bytes(self) -> int:
        """Bytes of the shard; 0 for objects."""
        return 0 if self.base else math.prod(self.part) * dtype_of(self.dtype).itemsize


def dtype_of(name: str) -> torch.dtype:
    """The type of a name such as `torch.float32`.

    Raises:
        ValueError: there is no such type.
    """
    found = getattr(torch, name.removeprefix("torch."), None)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"{name[:40]!r} is no type of a tensor")
    return found


def _lengths(values: Any, most: int = _DIMENSIONS) -> tuple[int, ...]:
    if not isinstance(values, list | tuple) or len(values) > most:
        raise ValueError("a shape is no list of lengths")
    if not all(type(n) is int and 0 <= n < 1 << 63 for n in values):
        raise ValueError("a shape has a length that is none")
    return tuple(values)


@dataclass(frozen=True)
class StoredTable:
    """Every shard and object that a checkpoint's files hold: by rank, and in the order in which it planned them."""

    keys: list[str]
    """Of tensors, and the unique keys of objects."""
    specs: list[Spec]
    files: list[str]
    file_rank: Ints
    """The rank that writes each file."""
    key: Ints
    spec: Ints
    offset: Ints
    """A row for each shard: its place in the whole tensor, with zeros behind where others have more axes."""
    file: Ints
    place: Ints
    """Position in the state of the rank that writes it."""
    fingerprints: list[str]
    """By rank, of the structures that the plan was made for."""
    at: Ints
    """Where the record begins in its file, in bytes. Empty before it is written."""
    length: Ints
    """Bytes of the record; likewise."""

    def __len__(self) -> int:
        return len(self.key)

    @property
    def rank(self) -> Ints:
        """The rank that writes each shard."""
        return self.file_rank[self.file] if len(self) else self.file

    @property
    def is_object(self) -> Flags:
        """Which of them are objects."""
        flags = np.array([spec.is_object for spec in self.specs] or [False], np.bool_)
        return flags[self.spec]

    def to_bytes(self, metadata: bytes) -> bytes:
        """The compact file beside a `.metadata` of these bytes."""
        keys = [key.encode("utf-8", "surrogatepass") for key in self.keys]
        columns = {
            "keys": b"".join(keys),
            "key_bytes": np.array([len(key) for key in keys], np.uint32).tobytes(),
            **{name: getattr(self, name).astype(np.uint32).tobytes() for name in _SMALL},
            **{name: getattr(self, name).astype(np.int64).tobytes() for name in _LARGE},
            "offset": np.ascontiguousarray(self.offset.T).tobytes(),
        }
        packed = {name: zlib.compress(data, _LEVEL) for name, data in columns.items()}
        header = {
            "version": VERSION,
            "metadata": {"size": len(metadata), "xxh3": xxhash.xxh3_64_hexdigest(metadata)},
            "shards": len(self),
            "axes": self.offset.shape[1],
            "keys": len(keys),
            "kinds": self.specs,
            "files": self.files,
            "file_ranks": self.file_rank.tolist(),
            "fingerprints": self.fingerprints,
            "columns": [[name, len(data), len(columns[name])] for name, data in packed.items()],
        }
        lists = json.dumps(header).encode()
        body = b"".join((_MAGIC, len(lists).to_bytes(8, "little"), lists, *packed.values()))
        return body + xxhash.xxh3_64_digest(body)

    def planned_bytes(self) -> bytes:
        """The same of what is only planned, so that there is no `.metadata` yet."""
        nowhere = np.zeros(len(self), np.int64)
        return replace(self, at=nowhere, length=nowhere).to_bytes(b"")

    @classmethod
    def from_planned_bytes(cls, data: bytes) -> StoredTable:
        """What `planned_bytes` has made.

        Raises:
            ValueError: it is something else.
        """
        return cls._parsed(data, b"", min(_LARGEST_PLAN, _PLAN_SHARE * len(data)))

    @classmethod
    def from_bytes(cls, data: bytes, metadata: bytes) -> StoredTable:
        """Read a compact file.

        Args:
            data: the file.
            metadata: the `.metadata` beside it.

        Raises:
            ValueError: it is damaged, of another version, or belongs to another `.metadata`; in words.
        """
        return cls._parsed(data, metadata, len(metadata))

    @classmethod
    def _parsed(cls, data: bytes, metadata: bytes, most: int) -> StoredTable:
        """
        Args:
            data: the file.
            metadata: that it is bound to.
            most: bytes of a `.metadata` that says the same. They bound what is made of memory.
        """
        try:
            return cls._from_bytes(data, metadata, most)
        except (KeyError, TypeError, AttributeError, IndexError, OverflowError, RecursionError, zlib.error) as error:
            raise ValueError(f"it is garbled: {type(error).__name__}") from error

    @classmethod
    def _from_bytes(cls, data: bytes, metadata: bytes, most: int) -> StoredTable:
        if data[:8] != _MAGIC or xxhash.xxh3_64_digest(memoryview(data)[:-8]) != data[-8:]:
            raise ValueError("it is cut short or garbled")
        size = int.from_bytes(data[8:16], "little")
        if size > min(len(data), _LARGEST_HEADER):
            raise ValueError("its header is longer than the file")
        header = json.loads(data[16 : 16 + size])
        if header["version"] != VERSION:
            raise ValueError(f"it is of version {header['version']!r}")
        if header["metadata"] != {"size": len(metadata), "xxh3": xxhash.xxh3_64_hexdigest(metadata)}:
            raise ValueError("it belongs to another .metadata")
        count, axes, keys = header["shards"], header["axes"], header["keys"]
        if not all(type(n) is int for n in (count, axes, keys)) or not 0 <= axes <= _DIMENSIONS:
            raise ValueError("it does not say how many shards there are")
        if not 0 <= count <= most // _SMALLEST_ENTRY:
            raise ValueError(f"it has {count} shards, more than a .metadata of {most} bytes can have")
        if not 0 <= keys <= count:
            raise ValueError(f"it has {keys} keys for {count} shards")
        sizes = {
            "keys": most,  # .metadata has every key
            "key_bytes": 4 * keys,
            **dict.fromkeys(_SMALL, 4 * count),
            **dict.fromkeys(_LARGE, 8 * count),
            "offset": 8 * count * axes,
        }
        columns = _columns(data, 16 + size, _list(header["columns"]), sizes)
        small = {name: np.frombuffer(columns[name], np.uint32).astype(np.int64) for name in _SMALL}
        large = {name: np.frombuffer(columns[name], np.int64) for name in _LARGE}
        offset = np.frombuffer(columns["offset"], np.int64).reshape(axes, count).T
        table = cls(
            _texts(columns["keys"], np.frombuffer(columns["key_bytes"], np.uint32)),
            [Spec.from_json(entry) for entry in _list(header["kinds"])],
            _list(header["files"]),
            np.array(_lengths(header["file_ranks"], 1 << 32), np.int64),
            offset=offset,
            fingerprints=_list(header["fingerprints"]),
            **small,
            **large,
        )
        table._check()
        return table

    def _check(self) -> None:
        if len(set(self.keys)) != len(self.keys):
            raise ValueError("it has a key twice")
        if not all(type(name) is str and is_plain_name(name) for name in self.files):
            raise ValueError("it names a file that leaves the checkpoint")
        if len(set(self.files)) != len(self.files):
            raise ValueError("it has a file twice")
        if not all(type(name) is str for name in self.fingerprints):
            raise ValueError("a fingerprint is no text")
        if len(self.file_rank) != len(self.files) or not _within(self.file_rank, max(1, len(self.fingerprints))):
            raise ValueError("it has files of no rank")
        for name, end in (("key", len(self.keys)), ("spec", len(self.specs)), ("file", len(self.files))):
            if not _within(getattr(self, name), end):
                raise ValueError(f"its column {name!r} leads to nothing")
        if (
            (self.at < 0).any()
            or (self.length < 0).any()
            or (self.at > (1 << 62)).any()
            or (self.length > (1 << 62)).any()
        ):
            raise ValueError("it has a place in a file that is none")
        kinds: dict[tuple[object, ...], int] = {}
        of_spec = [kinds.setdefault((spec.base, spec.dtype, spec.whole), len(kinds)) for spec in self.specs] or [0]
        kind = np.array(of_spec)[self.spec]
        of_key = np.zeros(max(1, len(self.keys)), np.int64)
        of_key[self.key] = kind
        if (of_key[self.key] != kind).any():
            raise ValueError("shards of one tensor are of several kinds")
        depth = self.offset.shape[1]
        ends = np.full((max(1, len(self.specs)), depth), 1 << 62, np.int64)
        for number, spec in enumerate(self.specs):
            if len(spec.whole) > depth:
                raise ValueError("its offsets have fewer axes than its tensors")
            if not spec.is_object:
                ends[number] = 0
                ends[number, : len(spec.whole)] = [w - p for w, p in zip(spec.whole, spec.part, strict=True)]
        for axis in range(depth):
            if (self.offset[:, axis] < 0).any() or (self.offset[:, axis] > ends[self.spec, axis]).any():
                raise ValueError("it has a shard outside of its tensor")


_SMALL = ("key", "spec", "file", "place")
_LARGE = ("at", "length")


def _list(value: Any) -> list[Any]:
    if type(value) is not list:
        raise ValueError("it has something else where a list belongs")
    return value


def _columns(data: bytes, at: int, described: list[Any], sizes: dict[str, int]) -> dict[str, bytes]:
    """The columns that lie one after the other up to the checksum, each of exactly its size, but for the keys."""
    names = [name for name, _, _ in described]
    if len(names) != len(sizes) or {*names} != {*sizes}:
        raise ValueError("it has other columns")
    if not all(type(n) is int and n >= 0 for _, packed, unpacked in described for n in (packed, unpacked)):
        raise ValueError("a column has a size that is none")
    if at + sum(packed for _, packed, _ in described) != len(data) - 8:
        raise ValueError("its columns do not fill the file")
    columns = {}
    for name, packed, unpacked in described:
        if unpacked > sizes[name] or (name != "keys" and unpacked != sizes[name]):
            raise ValueError(f"its column {name!r} has {unpacked} bytes")
        columns[name] = _inflated(data[at : at + packed], unpacked)
        at += packed
    return columns


def _texts(joined: bytes, lengths: npt.NDArray[np.uint32]) -> list[str]:
    ends = np.cumsum(lengths, dtype=np.int64).tolist()
    if (ends[-1] if ends else 0) != len(joined):
        raise ValueError("its keys have other lengths")
    return [joined[start:end].decode("utf-8", "surrogatepass") for start, end in pairwise([0, *ends])]


def _within(values: Ints, end: int) -> bool:
    return not len(values) or (int(values.min()) >= 0 and int(values.max()) < end)


def _inflated(data: bytes, size: int) -> bytes:
    """Exactly `size` bytes, and never more memory than that."""
    inflater = zlib.decompressobj()
    found = inflater.decompress(data, size + 1)
    if len(found) != size or not inflater.eof or inflater.unused_data:
        raise ValueError("a column has another size than it says")
    return found
