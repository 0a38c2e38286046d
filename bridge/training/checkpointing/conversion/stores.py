"""Checkpoints as a conversion sees them: tensors by key, read piece by piece, and objects. Each is read by the load
strategy that a run would load it with.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from bridge.training.checkpointing.conversion.plan import Piece, Tensor
from bridge.training.checkpointing.errors import CheckpointDamagedError, CheckpointMismatchError
from bridge.training.checkpointing.formats.fsdp_dtensor_reading import read_objects
from bridge.training.checkpointing.io.reading import ReadOptions
from bridge.training.checkpointing.io.strategy import DirectLoadStrategy
from bridge.training.checkpointing.safety.payload_metadata import read_payload_metadata

TORCH_DIST, ZARR, FSDP_DTENSOR = "torch_dist", "zarr", "fsdp_dtensor"
FORMATS = (TORCH_DIST, ZARR, FSDP_DTENSOR)
"""That are converted into one another."""


class Store(Protocol):
    """A checkpoint that is open for reading."""

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All tensors, by key."""

    @property
    def objects(self) -> dict[str, int]:
        """The bytes that each object has where it is stored, by unique key."""

    def read(self, pieces: Sequence[Piece]) -> list[torch.Tensor]:
        """The values of pieces, each in memory of its own.

        Raises:
            CheckpointError: something is missing or cannot be read.
        """

    def read_objects(self, keys: Sequence[str]) -> dict[str, Any]:
        """The values of objects, by key.

        Raises:
            CheckpointError: one cannot be read, or is of a class that is not allowed.
        """


def open_store(directory: Path, name: str, reader_bytes: int) -> Store:
    """Open a checkpoint of one of `FORMATS`. Local.

    Args:
        directory: the checkpoint.
        name: its format.
        reader_bytes: of the reader's buffers.

    Raises:
        CheckpointError: what says what it holds is damaged or not allowed.
    """
    if name == ZARR:
        return ZarrStore(directory)
    return DcpStore(directory, reader_bytes, has_sharded_objects=name == TORCH_DIST)


class _Strategy:
    """Reads through a load strategy that needs no other rank."""

    def __init__(self, strategy: Any, directory: Path, keys: Sequence[str]) -> None:
        self._strategy, self._directory = strategy, directory
        self._objects = {key: _object(key, directory) for key in keys}

    def read(self, pieces: Sequence[Piece]) -> list[torch.Tensor]:
        wanted = {str(number): _sharded(piece) for number, piece in enumerate(pieces)}
        loaded = self._strategy.prepare_alone(wanted, self._directory)()
        return [loaded[str(number)] for number in range(len(pieces))]

    def read_objects(self, keys: Sequence[str]) -> dict[str, Any]:
        wanted = {str(number): self._objects[key] for number, key in enumerate(keys)}
        loaded = self._strategy.prepare_alone(wanted, self._directory)()
        return {key: loaded[str(number)] for number, key in enumerate(keys)}


class DcpStore(_Strategy):
    """torch DCP files: `torch_dist` and `fsdp_dtensor`."""

    def __init__(self, directory: Path, reader_bytes: int, *, has_sharded_objects: bool) -> None:
        metadata = read_payload_metadata(directory)
        entries = metadata.state_dict_metadata
        self.tensors = {
            key: _described(key, entry, directory)
            for key, entry in entries.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        sizes = {index.fqn: place.length for index, place in metadata.storage_data.items()}
        self.objects = {key: sizes.get(key, 0) for key in entries if key not in self.tensors}
        self._metadata, self._is_sharded = metadata, has_sharded_objects
        strategy = DirectLoadStrategy(directory, metadata, ReadOptions(memory=reader_bytes))
        super().__init__(strategy, directory, list(self.objects) if has_sharded_objects else [])

    def read_objects(self, keys: Sequence[str]) -> dict[str, Any]:
        """As `Store`."""
        if self._is_sharded:
            return super().read_objects(keys)
        return read_objects(keys, self._directory, self._metadata)


class ZarrStore(_Strategy):
    """Zarr arrays, and objects in files of their own."""

    def __init__(self, directory: Path) -> None:
        # The package that they need need not be there for the other formats.
        from bridge.training.checkpointing.formats.names import directory_name
        from bridge.training.checkpointing.formats.objects import object_name, stored_objects
        from bridge.training.checkpointing.formats.zarr import ZarrLoadShardedStrategy
        from bridge.training.checkpointing.formats.zarr_metadata import read_metadata

        strategy = ZarrLoadShardedStrategy()
        self.tensors = {}
        for key in strategy.load_tensors_metadata(directory):
            array = read_metadata(directory, directory_name(key))
            if array is None:
                raise CheckpointDamagedError(f"{directory} has an array for {key} under a name that is not that of it")
            self.tensors[key] = Tensor(key, array.shape, _name(array.dtype), array.chunk_shape)
        self.objects = {
            key: (directory / object_name(item)).stat().st_size for key, item in stored_objects(directory).items()
        }
        super().__init__(strategy, directory, list(self.objects))


def _described(key: str, entry: TensorStorageMetadata, directory: Path) -> Tensor:
    held = sum(math.prod(chunk.sizes) for chunk in entry.chunks)
    size = math.prod(entry.size)
    if held != size:
        raise CheckpointDamagedError(
            f"the checkpoint in {directory} is damaged: it holds {held} of the {size} elements of {key}"
        )
    return Tensor(key, tuple(entry.size), _name(entry.properties.dtype), (1,) * len(entry.size))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _sharded(piece: Piece) -> ShardedTensor:
    tensor = piece.tensor
    is_whole = piece.shape == tensor.shape
    return ShardedTensor(
        tensor.key,
        None,
        tensor.torch_dtype,
        piece.shape,
        tensor.shape,
        piece.offset,
        (1,) * len(tensor.shape) if is_whole else None,
    )


def _object(key: str, directory: Path) -> ShardedObject:
    try:
        item = ShardedObject.empty_from_unique_key(key)
        if item.unique_key == key:
            return item
    except (ValueError, IndexError, AssertionError):
        pass
    raise CheckpointMismatchError(f"{directory} holds {key!r}, which is no object as megatron-core stores it")
