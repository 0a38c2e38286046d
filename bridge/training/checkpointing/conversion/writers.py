"""Writing a part of a converted checkpoint, and the metadata of the whole.

A part is written into files of its own, so that parts need not know of one another: into one of torch DCP's, or as
whole chunks of Zarr arrays.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from megatron.core.dist_checkpointing.mapping import ShardedObject
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.storage import WriteResult

from bridge.training.checkpointing.checksums import HashingStream
from bridge.training.checkpointing.conversion.plan import Piece, Tensor, chunk_of
from bridge.training.checkpointing.conversion.stores import TORCH_DIST, ZARR
from bridge.training.checkpointing.errors import CheckpointError, CheckpointSaveError, storage_error
from bridge.training.checkpointing.files import write_file
from bridge.training.checkpointing.formats import torch_dist
from bridge.training.checkpointing.formats.fsdp_dtensor import create_fsdp_dtensor_storage_writer
from bridge.training.checkpointing.formats.strategies import Backend, write_backend
from bridge.training.checkpointing.integrity import FileRecord
from bridge.training.checkpointing.layout import MCORE_METADATA, PAYLOAD_METADATA

_LARGEST_CHUNK = 64 << 20
"""Bytes of a Zarr chunk, as saves make them."""


@dataclass(frozen=True)
class Place:
    """Where a piece or an object lies in torch DCP's files."""

    key: str
    offset: tuple[int, ...] | None
    """Of a piece in its tensor; None for an object."""
    shape: tuple[int, ...]
    file: str
    at: int
    length: int

    @property
    def index(self) -> MetadataIndex:
        """As torch names it."""
        return MetadataIndex(self.key, None if self.offset is None else torch.Size(self.offset))


@dataclass(frozen=True)
class Written:
    """A part that is on storage."""

    files: tuple[FileRecord, ...]
    places: tuple[Place, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {"files": [asdict(record) for record in self.files], "places": [asdict(place) for place in self.places]}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Written:
        """What `to_json` was made of.

        Raises:
            KeyError, TypeError: it is something else.
        """

        def place(entry: Mapping[str, Any]) -> Place:
            offset = entry["offset"]
            sizes = {"offset": None if offset is None else tuple(offset), "shape": tuple(entry["shape"])}
            return Place(**{**entry, **sizes})

        return cls(
            tuple(FileRecord(**entry) for entry in content["files"]), tuple(place(entry) for entry in content["places"])
        )


Values = Iterable[tuple[Piece, torch.Tensor]]
"""Pieces with their values; what has been taken is let go of when the next is asked for."""


class Writer(Protocol):
    """Writes a checkpoint of one format."""

    def write(self, number: int, batches: Iterable[Values], objects: Iterable[tuple[str, Any]]) -> Written:
        """Write and sync a part. What an earlier try of it has left is overwritten. Local.

        Args:
            number: of the part; no other has it.
            batches: its pieces.
            objects: their unique keys and values.

        Raises:
            CheckpointSaveError: it cannot be written.
        """

    def finish(self, tensors: Iterable[Tensor], parts: Sequence[Written]) -> list[str]:
        """Write what describes all parts; return the names of these files."""


def writer_of(directory: Path, name: str, limit: int) -> Writer:
    """What writes a format.

    Args:
        directory: the checkpoint in the making.
        name: one of `stores.FORMATS`.
        limit: bytes that a piece may weigh.
    """
    if name == ZARR:
        return ZarrWriter(directory, limit)
    return DcpWriter(directory, has_sharded_objects=name == TORCH_DIST)


def target_chunk(name: str, tensor: Tensor, limit: int) -> tuple[int, ...]:
    """The shape of what is written as a whole of a tensor."""
    if name != ZARR:
        return (1,) * len(tensor.shape)
    return chunk_of(tensor.shape, tensor.itemsize, min(limit, _LARGEST_CHUNK))


class DcpWriter:
    """torch DCP files: `torch_dist` and `fsdp_dtensor`."""

    def __init__(self, directory: Path, *, has_sharded_objects: bool) -> None:
        self._directory, self._is_sharded = directory, has_sharded_objects

    def write(self, number: int, batches: Iterable[Values], objects: Iterable[tuple[str, Any]]) -> Written:
        """As `Writer`."""
        name = f"__0_{number}.distcp"
        path = self._directory / name
        places: list[Place] = []

        def add(key: str, offset: tuple[int, ...] | None, shape: tuple[int, ...], value: Any) -> None:
            begin = stream.tell()
            if isinstance(value, bytes):
                stream.write(value)
            else:
                torch.save(value, stream)
            places.append(Place(key, offset, shape, name, begin, stream.tell() - begin))

        def add_all(values: Values) -> None:
            for piece, tensor in values:
                add(piece.tensor.key, piece.offset, piece.shape, tensor)

        with _typed_errors(path), path.open("wb") as raw:
            stream: Any = HashingStream(raw)
            for key, value in objects:
                add(key, None, (), self._bytes_of(value))
            for values in batches:
                add_all(values)
            raw.flush()
            os.fsync(raw.fileno())
        record = FileRecord(name, stream.size, stream.checksum()).sampled(self._directory)
        return Written((record,), tuple(places))

    def _bytes_of(self, value: Any) -> bytes:
        data = io.BytesIO()
        # megatron-core stores all objects that share a key as one list.
        torch.save([value] if self._is_sharded else value, data)
        return data.getvalue()

    def finish(self, tensors: Iterable[Tensor], parts: Sequence[Written]) -> list[str]:
        """As `Writer`."""
        described = {tensor.key: tensor for tensor in tensors}
        entries: dict[str, Any] = {}
        for place in (place for part in parts for place in part.places):
            if place.offset is None:
                entries[place.key] = BytesStorageMetadata()
                continue
            if place.key not in entries:
                tensor = described[place.key]
                properties = TensorProperties(dtype=tensor.torch_dtype)
                entries[place.key] = TensorStorageMetadata(properties, torch.Size(tensor.shape), [])
            chunk = ChunkStorageMetadata(torch.Size(place.offset), torch.Size(place.shape))
            entries[place.key].chunks.append(chunk)
        results = [
            [
                WriteResult(place.index, place.length, _StorageInfo(place.file, place.at, place.length))
                for place in part.places
            ]
            for part in parts
        ]
        with _typed_errors(self._directory / PAYLOAD_METADATA):
            writer = create_fsdp_dtensor_storage_writer(str(self._directory))
            writer.finish(Metadata(entries), results)
        if not self._is_sharded:
            return [PAYLOAD_METADATA]
        write_backend(self._directory, Backend(torch_dist.BACKEND, torch_dist.VERSION))
        return [PAYLOAD_METADATA, MCORE_METADATA]


class ZarrWriter:
    """Zarr arrays, and objects in files of their own."""

    def __init__(self, directory: Path, limit: int) -> None:
        self._directory, self._limit = directory, limit

    def write(self, number: int, batches: Iterable[Values], objects: Iterable[tuple[str, Any]]) -> Written:
        """As `Writer`."""
        from bridge.training.checkpointing.formats.objects import object_sidecar
        from bridge.training.checkpointing.formats.zarr_arrays import write_arrays

        del number
        records = []
        for key, value in objects:
            item = ShardedObject.empty_from_unique_key(key)
            item.data = value
            sidecar = object_sidecar(item)
            path = self._directory / sidecar.name
            with _typed_errors(path):
                path.parent.mkdir(exist_ok=True)
                path.unlink(missing_ok=True)
                write_file(path, sidecar.data)
            records.append(FileRecord.of_bytes(sidecar.name, sidecar.data).sampled(self._directory))
        for values in batches:
            names = write_arrays(self._directory, [self._write_of(*each) for each in values], writers=1)
            records += [FileRecord.of(self._directory, name) for name in names]
        return Written(tuple(records))

    def _write_of(self, piece: Piece, data: torch.Tensor) -> Any:
        from bridge.training.checkpointing.formats.names import directory_name
        from bridge.training.checkpointing.formats.zarr_arrays import ArraySpec, ArrayWrite
        from bridge.training.checkpointing.formats.zarr_grid import Box

        tensor = piece.tensor
        chunk = target_chunk(ZARR, tensor, self._limit)
        spec = ArraySpec(directory_name(tensor.key), tensor.shape, tensor.torch_dtype, chunk)
        return ArrayWrite(spec, not any(piece.offset), [(Box(piece.offset, piece.shape), data)])

    def finish(self, tensors: Iterable[Tensor], parts: Sequence[Written]) -> list[str]:
        """As `Writer`."""
        from bridge.training.checkpointing.formats.zarr_reading import VERSION

        del tensors, parts
        write_backend(self._directory, Backend(ZARR, VERSION))
        return [MCORE_METADATA]


def require_writable(name: str, tensors: Iterable[Tensor], objects: Iterable[str]) -> None:
    """Check that a format can hold them.

    Raises:
        CheckpointSaveError: a type has no form in Zarr, or a key cannot be a directory's name.
        CheckpointMismatchError: the package for Zarr is missing.
    """
    if name == ZARR:
        from bridge.training.checkpointing.formats.names import directory_name
        from bridge.training.checkpointing.formats.zarr_metadata import stored_type

        for tensor in tensors:
            stored_type(tensor.torch_dtype)
            directory_name(tensor.key)
        for key in objects:
            directory_name(ShardedObject.empty_from_unique_key(key).key)


@contextmanager
def _typed_errors(path: Path) -> Iterator[None]:
    """What storage raises for a file that is written, as an error of ours. What is read meanwhile has its own."""
    try:
        yield
    except CheckpointError:
        raise
    except (OSError, RuntimeError) as error:  # torch has an error of its own where the file system has refused to write
        reason = storage_error(error) or error
        raise CheckpointSaveError(f"writing {path} failed: {type(reason).__name__}: {reason}") from error
