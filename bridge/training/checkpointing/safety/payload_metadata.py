"""Reading `.metadata`: which tensors and objects a torch DCP checkpoint holds, and where in which file.

torch writes the file with pickle, and reads it with an unpickler that runs whatever the file says. Here it is parsed
as data, and torch's own objects are made from what it says once that has been checked. Only the names below may occur
in it; what loading does not need of them is checked for its form and dropped.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

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

from bridge.training.checkpointing.collector import without_collector
from bridge.training.checkpointing.errors import (
    CheckpointDamagedError,
    CheckpointMismatchError,
    UnsafeCheckpointError,
)
from bridge.training.checkpointing.layout import PAYLOAD_METADATA
from bridge.training.checkpointing.safety.containment import contained_file, is_plain_name
from bridge.training.checkpointing.safety.plain_pickle import (
    Global,
    Name,
    NameNotAllowedError,
    PickleError,
    Record,
    parse,
)
from bridge.training.checkpointing.safety.safe_globals import names_allowed_by_user, not_allowed

_METADATA = "torch.distributed.checkpoint.metadata"
_PLANNER = "torch.distributed.checkpoint.planner"
_MCORE = "megatron.core.dist_checkpointing.strategies.torch"

_ROOTS: tuple[Name, ...] = ((_METADATA, "Metadata"), (_MCORE, "MCoreMetadata"))
"""The second is megatron-core's name in some of its versions."""
_TENSOR: Name = (_METADATA, "TensorStorageMetadata")
_BYTES: Name = (_METADATA, "BytesStorageMetadata")
_CHUNK: Name = (_METADATA, "ChunkStorageMetadata")
_PROPERTIES: Name = (_METADATA, "TensorProperties")
_MEMORY_FORMAT: Name = (_METADATA, "_MEM_FORMAT_ENCODING")
_INDEX: Name = (_METADATA, "MetadataIndex")
_STORAGE: Name = ("torch.distributed.checkpoint.filesystem", "_StorageInfo")
_SIZE: Name = ("torch", "Size")
_LAYOUT: Name = ("torch.serialization", "_get_layout")

_DTYPES: Mapping[Name, torch.dtype] = {
    ("torch", name): value for name, value in vars(torch).items() if isinstance(value, torch.dtype)
}
_LAYOUTS = {str(value): value for value in vars(torch).values() if isinstance(value, torch.layout)}
_MEMORY_FORMATS = {0: torch.contiguous_format, 1: torch.channels_last, 2: torch.preserve_format}
"""By torch's numbers, those of `_MEM_FORMAT_ENCODING`."""

ALLOWED: frozenset[Name] = frozenset(
    {
        *_ROOTS,
        *(_TENSOR, _BYTES, _CHUNK, _PROPERTIES, _MEMORY_FORMAT, _INDEX, _STORAGE, _SIZE, _LAYOUT),
        *_DTYPES,
        # Who wrote the checkpoint and where: read by nobody.
        (_METADATA, "StorageMeta"),
        ("pathlib", "PosixPath"),
        ("pathlib", "WindowsPath"),
        ("pathlib", "PurePosixPath"),
        ("pathlib", "PureWindowsPath"),
        ("pathlib._local", "PosixPath"),
        ("pathlib._local", "WindowsPath"),
        # How each rank wrote its share: megatron-core keeps it for later saves.
        (_PLANNER, "SavePlan"),
        (_PLANNER, "WriteItem"),
        (_PLANNER, "WriteItemType"),
        (_PLANNER, "TensorWriteData"),
        (_PLANNER, "BytesIOWriteData"),
        ("torch.distributed.checkpoint.filesystem", "_StoragePrefix"),
        (_MCORE, "MCoreSavePlan"),
    }
)
"""Every name that `.metadata` may hold, beside those that the user allows. None is looked up by its name."""

_LARGEST_FILE = 1 << 32
"""Bytes."""
_LARGEST = 2**63 - 1
"""The largest number of elements, bytes or an offset that torch can express."""
_DIMENSIONS = 64
"""The most that torch's tensors can have."""


def read_payload_metadata(directory: Path) -> Metadata:
    """The contents of a checkpoint's `.metadata`, as torch's object without what loading does not use. Local.

    Args:
        directory: the checkpoint.

    Raises:
        UnsafeCheckpointError: the file names what it may not, or a file outside of the checkpoint.
        CheckpointMismatchError: its data is compressed.
        CheckpointDamagedError: it is absent, unreadable, or contradicts itself.
    """
    return payload_metadata(read_payload_bytes(directory), str(directory / PAYLOAD_METADATA))


def read_payload_bytes(directory: Path) -> bytes:
    """The bytes of a checkpoint's `.metadata`. Local.

    Raises:
        UnsafeCheckpointError: it is a link that leads out of the checkpoint.
        CheckpointDamagedError: it is absent or unreadable.
    """
    path, size = contained_file(directory, PAYLOAD_METADATA)
    if size > _LARGEST_FILE:
        raise CheckpointDamagedError(f"{path} is not readable: it has {size} bytes")
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointDamagedError(f"{path} cannot be read: {error}") from error


def payload_metadata(data: bytes, place: str) -> Metadata:
    """As `read_payload_metadata`, from the file's bytes; `place` says where they come from, for messages."""
    try:
        # Nothing that is made here refers to itself, and millions of new objects would be searched again and again.
        with without_collector():
            return _Conversion(place, len(data)).metadata(parse(data, ALLOWED | names_allowed_by_user()))
    except NameNotAllowedError as error:
        raise not_allowed(place, ".".join(error.name)) from error
    except (ValueError, KeyError) as error:  # PickleError is a ValueError
        reason = error if isinstance(error, PickleError) else f"it has a value out of range ({type(error).__name__})"
        raise CheckpointDamagedError(f"{place} is not readable: {reason}") from error


class _Conversion:
    """Makes torch's objects of records, checking every value."""

    def __init__(self, place: str, size: int) -> None:
        self._place = place
        self._size = size
        self._chunks = 0
        self._known_files: set[str] = set()

    def metadata(self, root: Any) -> Metadata:
        name = root.name if isinstance(root, Record) else None
        if name not in _ROOTS:
            raise PickleError("it holds no torch DCP metadata")
        state = _state(root, "state_dict_metadata", "storage_data")
        entries = _typed(state["state_dict_metadata"], dict)
        places = _typed(state["storage_data"], dict)
        return Metadata(
            {_typed(key, str): self._entry(key, entry) for key, entry in entries.items()},
            storage_data={self._index(index): self._storage(storage) for index, storage in places.items()},
            storage_meta=StorageMeta(),
            version=_optional(state.get("version"), str),
        )

    def _entry(self, key: str, record: Any) -> TensorStorageMetadata | BytesStorageMetadata:
        if isinstance(record, Record) and record.name == _BYTES:
            return BytesStorageMetadata()
        state = _state(_record(record, _TENSOR), "properties", "size", "chunks")
        properties, size = self._properties(state["properties"]), _size(state["size"])
        if math.prod(size) * properties.dtype.itemsize > _LARGEST:
            raise PickleError(f"{key[:200]!r} is larger than a tensor can be: {list(size)}")
        chunks = [self._chunk(key, size, chunk) for chunk in _typed(state["chunks"], list)]
        return TensorStorageMetadata(properties, size, chunks)

    def _chunk(self, key: str, whole: torch.Size, record: Any) -> ChunkStorageMetadata:
        # One list can stand for millions of tensors; a file that lists each chunk is longer than this.
        self._chunks += 1
        if self._chunks > self._size:
            raise PickleError("it describes more chunks than a file of its size can")
        state = _state(_record(record, _CHUNK), "offsets", "sizes")
        offsets, sizes = _size(state["offsets"]), _size(state["sizes"])
        fits = len(offsets) == len(sizes) == len(whole)
        if not fits or any(start + n > end for start, n, end in zip(offsets, sizes, whole, strict=True)):
            raise PickleError(f"{key[:200]!r} has a chunk outside of its shape {list(whole)}")
        return ChunkStorageMetadata(offsets, sizes)

    def _properties(self, record: Any) -> TensorProperties:
        state = _typed(_record(record, _PROPERTIES).state, tuple)
        dtype, layout, requires_grad, memory_format, pin_memory = state
        return TensorProperties(
            dtype=_DTYPES[_typed(dtype, Global).name],
            layout=_LAYOUTS[_argument(layout, _LAYOUT, str)],
            requires_grad=_typed(requires_grad, bool),
            memory_format=_MEMORY_FORMATS[_argument(memory_format, _MEMORY_FORMAT, int)],
            pin_memory=_typed(pin_memory, bool),
        )

    def _index(self, record: Any) -> MetadataIndex:
        state = _state(_record(record, _INDEX), "fqn")
        offset = state.get("offset")
        return MetadataIndex(
            _typed(state["fqn"], str), None if offset is None else _size(offset), _optional(state.get("index"), int)
        )

    def _storage(self, record: Any) -> _StorageInfo:
        state = _state(_record(record, _STORAGE), "relative_path", "offset", "length")
        if state.get("transform_descriptors"):
            raise CheckpointMismatchError(
                f"{self._place} says that the data is compressed, which this version does not read"
            )
        return _StorageInfo(self._file(state["relative_path"]), _natural(state["offset"]), _natural(state["length"]))

    def _file(self, value: Any) -> str:
        name: str = _typed(value, str)
        if name not in self._known_files:
            if not is_plain_name(name):
                raise UnsafeCheckpointError(f"{self._place} names the file {name[:200]!r}, which leaves the checkpoint")
            self._known_files.add(name)
        return name


def _record(value: Any, name: Name) -> Record:
    if type(value) is not Record or value.name != name:
        raise PickleError(f"it has something else where a {name[1]} belongs")
    return value


def _state(record: Record, *needed: str) -> dict[str, Any]:
    state: dict[str, Any] = _typed(record.state, dict)
    for key in needed:
        if key not in state:
            raise PickleError(f"a {record.name[1]} has no {key}")
    return state


def _argument(value: Any, name: Name, kind: type) -> Any:
    args = _record(value, name).args
    if len(args) != 1:
        raise PickleError(f"a {name[1]} has {len(args)} arguments")
    return _typed(args[0], kind)


def _size(value: Any) -> torch.Size:
    # Megatron FSDP describes its shards by plain tuples.
    numbers = value if type(value) is tuple else _argument(value, _SIZE, tuple)
    if len(numbers) > _DIMENSIONS:
        raise PickleError(f"it has a shape of {len(numbers)} dimensions")
    return torch.Size([_natural(number) for number in numbers])


def _natural(value: Any) -> int:
    if type(value) is not int or not 0 <= value <= _LARGEST:
        raise PickleError("it has a size or an offset that is none")
    return value


def _typed(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise PickleError(f"it has a {type(value).__name__} where a {kind.__name__} belongs")
    return value


def _optional(value: Any, kind: type) -> Any:
    return None if value is None else _typed(value, kind)
