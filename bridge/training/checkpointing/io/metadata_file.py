"""Making `.metadata` from columns: the pickle of torch's objects, without the objects.

What `pickle.load` makes of the bytes equals what torch and megatron-core would have written for the same plan. They
make about ten objects of each shard and pickle them one by one. Here all shards with as many axes have the same
bytes but for some numbers, so they are made together, as rows of one array; what several of them have in common is
said once and referred to.
"""

from __future__ import annotations

import struct
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch.distributed.checkpoint import filesystem, metadata, planner

from bridge.training.checkpointing.io.table import Ints, Spec, StoredTable

Bytes = npt.NDArray[np.uint8]
_Piece = bytes | tuple[bytes, Bytes]
"""What a record is made of: bytes that all have, or bytes and a row of an array behind them."""

_PROTOCOL, _STOP, _POP, _MARK = b"\x80\x04", b".", b"0", b"("
_NONE, _TRUE, _FALSE = b"N", b"\x88", b"\x89"
_EMPTY_TUPLE, _EMPTY_LIST, _EMPTY_DICT = b")", b"]", b"}"
_TUPLE, _TUPLE1, _APPENDS, _SET_ITEMS = b"t", b"\x85", b"e", b"u"
_CALL, _NEW, _BUILD = b"R", b"\x81", b"b"
_OBJECT = _EMPTY_TUPLE + _NEW
"""After a class: an object of it, made without arguments."""


def metadata_bytes(table: StoredTable, directory: Path) -> bytes:
    """The contents of `.metadata`.

    Args:
        table: what the files hold, with the places of the records.
        directory: where it is saved, which torch keeps in the file.
    """
    return _Writer(table).all_bytes(directory)


class _Writer:
    """Writes one `.metadata`."""

    def __init__(self, table: StoredTable) -> None:
        self._table = table
        self._tensors = np.flatnonzero(~table.is_object)
        self._objects = np.flatnonzero(table.is_object)
        self._parts: list[bytes] = [_PROTOCOL]
        self._defined = 0
        self._size = self._define(_global("torch", "Size"))
        self._texts: dict[str, bytes] = {}
        self._classes: dict[Any, bytes] = {}

    def all_bytes(self, directory: Path) -> bytes:
        table = self._table
        properties = [self._properties(spec) for spec in table.specs]
        wholes = [self._shared_size(spec.whole) for spec in table.specs]
        self._part_refs = np.array([_number(self._shared_size(spec.part)) for spec in table.specs] or [0])
        self._property_refs = np.array([_number(ref) for ref in properties] or [0])
        self._whole_refs = np.array([_number(ref) for ref in wholes] or [0])
        names = [field.name for field in fields(metadata.Metadata)]
        # References to what is defined further down: a row for each shard.
        first = self._define_later(3 * len(table))
        self._chunk_refs, self._offset_refs, self._index_refs = (
            first + number * len(table) + np.arange(len(table)) for number in range(3)
        )
        keys = self._define_later(len(table.keys))
        self._key_refs = keys + np.arange(max(1, len(table.keys)))
        values: dict[str, Any] = {
            "state_dict_metadata": lambda: self._entries(keys, properties, wholes),
            "storage_data": self._storage,
            "storage_meta": lambda: self._storage_meta(directory),
            "version": lambda: self._add(_text(filesystem.CURRENT_DCP_VERSION)),
        }
        root = self._class(metadata.Metadata) + _OBJECT + _EMPTY_DICT + _MARK
        self._prepare_records()
        self._add(root)
        for name in [*names, "all_local_plans"]:
            self._add(_text(name))
            write = self._plans if name == "all_local_plans" else values.get(name, lambda: self._add(_NONE))
            write()
        self._add(_SET_ITEMS, _BUILD, _STOP)
        return b"".join(self._parts)

    # What is said once -----------------------------------------------------------------------------------------------

    def _add(self, *parts: bytes) -> None:
        self._parts += parts

    def _define(self, made: bytes) -> bytes:
        """Let the file make something that is referred to afterwards; the bytes that refer to it."""
        ref = _ref(self._defined)
        self._add(made, b"r", struct.pack("<I", self._defined), _POP)
        self._defined += 1
        return ref

    def _define_later(self, count: int) -> int:
        """Keep numbers free for references; the first of them."""
        self._defined += count
        return self._defined - count

    def _shared_text(self, text: str) -> bytes:
        if text not in self._texts:
            self._texts[text] = self._define(_text(text))
        return self._texts[text]

    def _class(self, kind: Any) -> bytes:
        if kind not in self._classes:
            self._classes[kind] = self._define(_global(kind.__module__, kind.__qualname__))
        return self._classes[kind]

    def _shared_size(self, lengths: Sequence[int]) -> bytes:
        return self._define(self._size + _MARK + b"".join(map(_integer, lengths)) + _TUPLE + _TUPLE1 + _CALL)

    def _properties(self, spec: Spec) -> bytes:
        if spec.is_object:
            return self._define(_NONE)
        encoding = metadata._MEM_FORMAT_ENCODING
        contiguous = _integer(encoding.TORCH_CONTIGUOUS_FORMAT.value) + _TUPLE1 + _CALL
        state = (
            _global("torch", spec.dtype.removeprefix("torch."))
            + _global("torch.serialization", "_get_layout")
            + (_text(spec.layout) + _TUPLE1 + _CALL + _FALSE)
            + (self._class(encoding) + contiguous)
            + (_TRUE if spec.pinned else _FALSE)
        )
        return self._define(self._class(metadata.TensorProperties) + _OBJECT + _MARK + state + _TUPLE + _BUILD)

    # Shards ----------------------------------------------------------------------------------------------------------

    def _prepare_records(self) -> None:
        """Define what records refer to before the first of them."""
        for text in ("offsets", "sizes", "fqn", "offset", "index", "relative_path", "length", "type", "chunk", "size"):
            self._shared_text(text)
        for text in ("bytes_io_data", "tensor_data", "properties", "chunks", *self._table.files):
            self._shared_text(text)
        classes: tuple[Any, ...] = (
            *(metadata.ChunkStorageMetadata, metadata.MetadataIndex, metadata.TensorStorageMetadata),
            *(metadata.BytesStorageMetadata, filesystem._StorageInfo),
            *(planner.WriteItem, planner.SavePlan, planner.TensorWriteData),
        )
        for kind in classes:
            self._class(kind)
        kinds = planner.WriteItemType
        self._shard, self._bytes = (
            self._define(self._class(kinds) + _integer(kind.value) + _TUPLE1 + _CALL)
            for kind in (kinds.SHARD, kinds.BYTE_IO)
        )

    def _entries(self, first_key: int, properties: list[bytes], wholes: list[bytes]) -> None:
        """`state_dict_metadata`: each tensor with its chunks."""
        table, text = self._table, self._shared_text
        order = self._tensors[np.argsort(table.key[self._tensors], kind="stable")]
        slices = self._chunks(order)
        begin = self._class(metadata.TensorStorageMetadata) + _OBJECT + _EMPTY_DICT + _MARK + text("properties")
        size, chunks = text("size"), text("chunks") + _EMPTY_LIST + _MARK
        self._add(_EMPTY_DICT, _MARK)
        add = self._parts.append
        for key, spec, records in slices:
            name = _text(table.keys[key]) + b"r" + struct.pack("<I", first_key + key)
            add(name + begin + properties[spec] + size + wholes[spec] + chunks)
            add(records)
            add(_APPENDS + _SET_ITEMS + _BUILD)
        thing = self._class(metadata.BytesStorageMetadata) + _OBJECT
        for key in table.key[self._objects].tolist():
            add(_text(table.keys[key]) + b"r" + struct.pack("<I", first_key + key) + thing)
        self._add(_SET_ITEMS)

    def _chunks(self, order: Ints) -> Iterator[tuple[int, int, bytes]]:
        """For each key of a tensor: its number, the number of its kind, and the bytes of its chunks."""
        table, text = self._table, self._shared_text
        axes = np.array([len(spec.whole) for spec in table.specs] or [0])[table.spec[order]]
        blobs: dict[int, tuple[memoryview, int]] = {}
        at = np.zeros(len(order), np.int64)
        for count in np.unique(axes).tolist():
            rows = order[axes == count]
            matrix = _records(
                len(rows),
                self._class(metadata.ChunkStorageMetadata) + _OBJECT,
                _put(self._chunk_refs[rows]),
                _EMPTY_DICT + _MARK + text("offsets") + self._size + _MARK,
                *[piece for axis in range(count) for piece in _integers(table.offset[rows, axis])],
                _TUPLE + _TUPLE1 + _CALL,
                _put(self._offset_refs[rows]),
                text("sizes"),
                _get(self._part_refs[table.spec[rows]]),
                _SET_ITEMS + _BUILD,
            )
            blobs[count] = memoryview(matrix.tobytes()), matrix.shape[1]
            at[axes == count] = np.arange(len(rows))
        starts = np.flatnonzero(np.diff(table.key[order], prepend=-1))
        stops = np.append(starts[1:], len(order))
        columns = (table.key[order][starts], table.spec[order][starts], axes[starts], at[starts], stops - starts)
        for key, spec, count, begin, number in zip(*(column.tolist() for column in columns), strict=True):
            blob, width = blobs[count]
            yield key, spec, bytes(blob[begin * width : (begin + number) * width])

    def _storage(self) -> None:
        """`storage_data`: where each shard lies."""
        table, text = self._table, self._shared_text
        files = np.array([_number(text(name)) for name in table.files] or [0])
        index = self._class(metadata.MetadataIndex) + _OBJECT
        self._add(_EMPTY_DICT, _MARK)
        for rows, is_object in ((self._tensors, False), (self._objects, True)):
            offset: list[_Piece] = [] if is_object else [text("offset"), _get(self._offset_refs[rows])]
            matrix = _records(
                len(rows),
                index,
                _put(self._index_refs[rows]),
                _EMPTY_DICT + _MARK + text("fqn"),
                _get(self._key_refs[table.key[rows]]),
                text("index") + _NONE,
                *offset,
                _SET_ITEMS + _BUILD + self._class(filesystem._StorageInfo) + _OBJECT + _EMPTY_DICT + _MARK,
                text("relative_path"),
                _get(files[table.file[rows]]),
                text("offset"),
                *_integers(table.at[rows]),
                text("length"),
                *_integers(table.length[rows]),
                _SET_ITEMS + _BUILD,
            )
            self._add(matrix.tobytes())
        self._add(_SET_ITEMS)

    def _plans(self) -> None:
        """`all_local_plans`: what each rank writes, which megatron-core keeps for later saves."""
        table, text = self._table, self._shared_text
        begin = self._class(planner.WriteItem) + _OBJECT + _EMPTY_DICT + _MARK + text("index")
        data = self._class(planner.TensorWriteData) + _OBJECT + _EMPTY_DICT + _MARK
        tensors = _records(
            len(self._tensors),
            begin,
            _get(self._index_refs[self._tensors]),
            text("type") + self._shard + text("bytes_io_data") + _NONE + text("tensor_data") + data + text("chunk"),
            _get(self._chunk_refs[self._tensors]),
            text("properties"),
            _get(self._property_refs[table.spec[self._tensors]]),
            text("size"),
            _get(self._whole_refs[table.spec[self._tensors]]),
            _SET_ITEMS + _BUILD + _SET_ITEMS + _BUILD,
        )
        objects = _records(
            len(self._objects),
            begin,
            _get(self._index_refs[self._objects]),
            text("type") + self._bytes + text("bytes_io_data") + _NONE + text("tensor_data") + _NONE,
            _SET_ITEMS + _BUILD,
        )
        plan = self._class(planner.SavePlan) + _OBJECT + _EMPTY_DICT + _MARK
        known = {field.name for field in fields(planner.SavePlan)}
        end = _text("storage_data") + _NONE + _text("planner_data") + _EMPTY_DICT
        end += _text("usable") + _TRUE if "usable" in known else b""
        self._add(_EMPTY_LIST, _MARK)
        runs = _interleaved(table, tensors, objects)
        for rank in range(len(table.fingerprints)):
            self._add(plan, _text("items"), _EMPTY_LIST, _MARK, *runs.get(rank, []), _APPENDS, end, _SET_ITEMS, _BUILD)
        self._add(_APPENDS)

    def _storage_meta(self, directory: Path) -> None:
        values = {"checkpoint_id": _text(str(directory)), "save_id": _text(str(uuid.uuid4()))}
        values |= {"load_id": _NONE, "modules": _EMPTY_LIST}
        known = [field.name for field in fields(metadata.StorageMeta)]
        state = b"".join(_text(name) + value for name, value in values.items() if name in known)
        kind = metadata.StorageMeta
        self._add(_global(kind.__module__, kind.__qualname__), _OBJECT, _EMPTY_DICT, _MARK, state, _SET_ITEMS, _BUILD)


def _interleaved(table: StoredTable, tensors: Bytes, objects: Bytes) -> dict[int, list[bytes]]:
    """The records of each rank, tensors and objects in their order."""
    if not len(table):
        return {}
    is_object, rank = table.is_object, table.rank
    turns = (np.diff(rank, prepend=-1) != 0) | (np.diff(is_object, prepend=is_object[:1]) != 0)
    starts = np.flatnonzero(turns)
    numbers = np.where(is_object, np.cumsum(is_object) - 1, np.cumsum(~is_object) - 1)
    runs: dict[int, list[bytes]] = {}
    for start, stop in zip(starts.tolist(), [*starts[1:].tolist(), len(table)], strict=True):
        records = objects if is_object[start] else tensors
        first = int(numbers[start])
        runs.setdefault(int(rank[start]), []).append(records[first : first + stop - start].tobytes())
    return runs


# Operations of pickle -------------------------------------------------------------------------------------------------


def _global(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def _text(text: str) -> bytes:
    data = text.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(data)) + data


def _integer(value: int) -> bytes:
    return b"J" + struct.pack("<i", value) if value < 1 << 31 else b"\x8a\x08" + struct.pack("<q", value)


def _ref(number: int) -> bytes:
    return b"j" + struct.pack("<I", number)


def _number(ref: bytes) -> int:
    return int(struct.unpack("<I", ref[1:])[0])


def _get(numbers: Ints) -> tuple[bytes, Bytes]:
    return b"j", _as_bytes(numbers, "<u4")


def _put(numbers: Ints) -> tuple[bytes, Bytes]:
    return b"r", _as_bytes(numbers, "<u4")


def _integers(values: Ints) -> list[tuple[bytes, Bytes]]:
    if len(values) and int(values.max()) >= 1 << 31:
        return [(b"\x8a\x08", _as_bytes(values, "<i8"))]
    return [(b"J", _as_bytes(values, "<i4"))]


def _as_bytes(values: Ints, kind: str) -> Bytes:
    size = np.dtype(kind).itemsize
    return np.ascontiguousarray(values).astype(kind).view(np.uint8).reshape(len(values), size)


def _records(count: int, *pieces: _Piece) -> Bytes:
    """Rows of bytes: those of `bytes` are the same in all rows, others begin with some and end with their own."""
    columns: list[bytes | Bytes] = []
    for piece in pieces:
        columns += [piece] if isinstance(piece, bytes) else [*piece]
    width = sum(len(column) if isinstance(column, bytes) else column.shape[1] for column in columns)
    rows = np.empty((count, width), np.uint8)
    at = 0
    for column in columns:
        size = len(column) if isinstance(column, bytes) else column.shape[1]
        rows[:, at : at + size] = np.frombuffer(column, np.uint8) if isinstance(column, bytes) else column
        at += size
    return rows
