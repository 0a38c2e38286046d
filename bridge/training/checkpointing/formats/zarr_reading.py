"""Loading from Zarr arrays: megatron-core's load strategy for the backend `zarr`."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_outplace, nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor
from megatron.core.dist_checkpointing.strategies.base import LoadShardedStrategy

from bridge.training.checkpointing.agreement import Ranks
from bridge.training.checkpointing.dtypes import require_same_kind
from bridge.training.checkpointing.errors import CheckpointDamagedError, CheckpointMismatchError
from bridge.training.checkpointing.files import replace_file
from bridge.training.checkpointing.formats.names import directory_name, key_of
from bridge.training.checkpointing.formats.objects import read_object, stored_objects
from bridge.training.checkpointing.formats.zarr_arrays import ArrayRead, open_stored, read_arrays
from bridge.training.checkpointing.formats.zarr_grid import Box
from bridge.training.checkpointing.formats.zarr_metadata import V2, V3, StoredArray, read_metadata
from bridge.training.checkpointing.integrity import read_manifest
from bridge.training.checkpointing.layout import MANIFEST
from bridge.training.checkpointing.safety.containment import contained_file

BACKEND = "zarr"
LEGACY_VERSION = 1
"""That of megatron-core up to 0.8: arrays of Zarr v2."""
VERSION = 2
"""Arrays of Zarr v3."""


class ZarrLoadShardedStrategy(LoadShardedStrategy):  # type: ignore[misc]
    """Loads tensors from Zarr arrays, and objects from files of their own."""

    @property
    def can_handle_sharded_objects(self) -> bool:
        """Objects lie beside the arrays."""
        return True

    def load(self, sharded_state_dict: Any, checkpoint_dir: Any) -> Any:
        """Load the shards, into their own tensors where they have some. Collective over all ranks.

        Returns:
            The structure of `sharded_state_dict` with values.

        Raises:
            CheckpointMismatchError: a key or a shape is another one. Every rank raises, before any tensor has changed.
            CheckpointDamagedError: an array, a chunk or an object is missing or unreadable. Every rank raises.
            UnsafeCheckpointError: an object is of a class that is not allowed, or a link leads out. Every rank raises.
        """
        if not dist.is_initialized():
            return self.prepare_alone(sharded_state_dict, checkpoint_dir)()
        ranks = Ranks.current()
        read = ranks.run("examining the arrays", lambda: self.prepare_alone(sharded_state_dict, checkpoint_dir))
        return ranks.run("reading the arrays", read)

    def prepare_alone(self, sharded_state_dict: Any, checkpoint_dir: Any) -> Callable[[], Any]:
        """Check everything that this rank is going to read, read its objects, and return what reads its tensors.

        Both are local. Raises as `load`.
        """
        directory = Path(checkpoint_dir)
        items = {id(item): item for item in nested_values(sharded_state_dict)}
        arrays: dict[str, StoredArray] = {}
        tensors = {n: _Wanted(item, directory, arrays) for n, item in items.items() if isinstance(item, ShardedTensor)}
        values = {n: read_object(directory, item) for n, item in items.items() if isinstance(item, ShardedObject)}

        def read() -> Any:
            reads = {n: wanted.begin() for n, wanted in tensors.items()}
            read_arrays([read for _, read in reads.values()])
            loaded = values | {n: value for n, (value, _) in reads.items()}
            return dict_list_map_outplace(lambda item: loaded[id(item)], sharded_state_dict)

        return read

    def load_tensors_metadata(self, checkpoint_dir: Any) -> dict[str, ShardedTensor]:
        """Every tensor of a checkpoint by its key, without data and sharding. Local."""
        return load_zarr_based_sharded_metadata(Path(checkpoint_dir))

    def load_sharded_metadata(self, checkpoint_dir: Any) -> dict[str, Any]:
        """Every tensor by its key and every object by its unique key, without data. Local."""
        directory = Path(checkpoint_dir)
        return stored_objects(directory) | self.load_tensors_metadata(directory)

    def remove_sharded_tensors(self, checkpoint_dir: str, key_prefix: str) -> None:
        """Delete all tensors whose key starts with `key_prefix`, and their files from the manifest. For one rank."""
        directory = Path(checkpoint_dir)
        names = [directory_name(key) for key in self.load_tensors_metadata(directory) if key.startswith(key_prefix)]
        manifest = read_manifest(directory)
        if manifest is not None:
            kept = tuple(record for record in manifest.files if record.name.split("/", 1)[0] not in names)
            # First: cut short, it leaves files that nobody asks for, and not a checkpoint that lacks some.
            replace_file(directory / MANIFEST, replace(manifest, files=kept).to_json().encode())
        for name in names:
            shutil.rmtree(directory / name)

    def check_backend_compatibility(self, loaded_backend: str) -> None:
        """Refuse a checkpoint of another backend.

        Raises:
            CheckpointMismatchError: it is another one.
        """
        if loaded_backend != BACKEND:
            raise CheckpointMismatchError(f"the checkpoint's backend is {loaded_backend!r}, and this reads {BACKEND!r}")

    def check_version_compatibility(self, loaded_version: int) -> None:
        """Refuse a checkpoint of an unknown version.

        Raises:
            CheckpointMismatchError: it is an unknown one.
        """
        if loaded_version not in (LEGACY_VERSION, VERSION):
            raise CheckpointMismatchError(
                f"the checkpoint's version of {BACKEND!r} is {loaded_version}, and this reads {LEGACY_VERSION} "
                f"and {VERSION}"
            )


class TensorStoreLoadShardedStrategy(ZarrLoadShardedStrategy):
    """The same by the name that megatron-core gave to its strategy that read Zarr arrays with TensorStore."""


class _Wanted:
    """A tensor to read, checked against what is stored."""

    def __init__(self, item: ShardedTensor, directory: Path, arrays: dict[str, StoredArray]) -> None:
        if item.key not in arrays:
            arrays[item.key] = _array(directory, item.key)
        self._item, self._array = item, arrays[item.key]
        _require_fit(item, self._array)
        self._box = _box(merge_global_slice_with_shape(item.global_slice(), self._array.shape, item.key))
        _require_chunks(directory, self._array, self._box)

    def begin(self) -> tuple[torch.Tensor, ArrayRead]:
        """The tensor that is going to have the values, and what has to be read for it."""
        item = self._item
        value = torch.empty(tuple(item.local_shape), dtype=item.dtype) if item.data is None else item.data
        target = value.detach()
        stored = self._box.shape[item.prepend_axis_num :]
        if stored != tuple(item.local_shape):
            target.zero_()  # what `pad_to_expected_shape` does, in place
            target = target[tuple(slice(0, size) for size in stored)]
        return value, ArrayRead(self._array, self._box, target[(None,) * item.prepend_axis_num])


def load_zarr_based_sharded_metadata(directory: Path) -> dict[str, ShardedTensor]:
    """Every array of a checkpoint, of Zarr v2 or v3, as a ShardedTensor without data and sharding. Local.

    Raises:
        CheckpointDamagedError: metadata is unreadable.
    """
    found = {}
    for entry in sorted(directory.iterdir()):
        if entry.is_dir() and (array := read_metadata(directory, entry.name)) is not None:
            key, shape = key_of(entry.name), array.shape
            found[key] = ShardedTensor(key, None, array.dtype, shape, shape, (0,) * len(shape), (1,) * len(shape))
    return found


def open_ts_array(arr_path: Path) -> Any:
    """Open an array of a checkpoint with TensorStore.

    Raises:
        CheckpointDamagedError: it is missing or cannot be opened.
    """
    array = read_metadata(arr_path.parent, arr_path.name)
    if array is None:
        raise CheckpointDamagedError(f"{arr_path} is not an array: it has neither {V3} nor {V2}")
    try:
        return open_stored(array).result()
    except ValueError as error:
        raise CheckpointDamagedError(f"{arr_path} cannot be opened: {error}") from error


def merge_global_slice_with_shape(
    global_slice: Sequence[int | slice], actual_shape: Sequence[int], key: str
) -> tuple[int | slice, ...]:
    """Intersect a shard's place in the expected tensor with the shape that is stored.

    Args:
        global_slice: as `ShardedTensor.global_slice` returns it.
        actual_shape: of the stored array.
        key: for messages.

    Raises:
        CheckpointMismatchError: the numbers of dimensions differ.
    """
    if len(global_slice) != len(actual_shape):
        raise CheckpointMismatchError(
            f"{key} has {len(global_slice)} dimensions in this run, and {len(actual_shape)} in the checkpoint"
        )
    return tuple(
        slice(min(part.start, size), min(part.stop, size), part.step) if isinstance(part, slice) else part
        for part, size in zip(global_slice, actual_shape, strict=True)
    )


def pad_to_expected_shape(x: torch.Tensor, expected_sharded_ten: ShardedTensor) -> torch.Tensor:
    """`x` with zeros after its end along each axis, in the local shape of the shard.

    Raises:
        CheckpointMismatchError: it is larger than that.
    """
    shape = tuple(expected_sharded_ten.local_shape)
    if x.dim() != len(shape) or any(size > wanted for size, wanted in zip(x.shape, shape, strict=True)):
        raise CheckpointMismatchError(
            f"{expected_sharded_ten.key} has the shape {tuple(x.shape)} here, and {shape} is the largest that fits"
        )
    padding = [n for size, wanted in zip(reversed(x.shape), reversed(shape), strict=True) for n in (0, wanted - size)]
    return torch.nn.functional.pad(x, padding)


def _array(directory: Path, key: str) -> StoredArray:
    array = read_metadata(directory, directory_name(key))
    if array is None:
        raise CheckpointMismatchError(f"{directory} has no tensor {key}, which this run asks for")
    return array


def _require_fit(item: ShardedTensor, array: StoredArray) -> None:
    if not item.allow_shape_mismatch and tuple(item.global_shape) != array.shape:
        raise CheckpointMismatchError(
            f"{item.key} has the shape {tuple(item.global_shape)} in this run, and {array.shape} in the checkpoint"
        )
    require_same_kind(item.key, item.dtype, array.dtype)


def _require_chunks(directory: Path, array: StoredArray, box: Box) -> None:
    """Check that the files of all chunks of a part of an array are there, inside the checkpoint, and whole."""
    for index in box.chunks(array.chunk_shape):
        name = f"{array.path.name}/{array.chunk_name(index)}"
        _, size = contained_file(directory, name)
        if array.chunk_bytes is not None and size != array.chunk_bytes:
            raise CheckpointDamagedError(f"{directory / name} has {size} bytes instead of {array.chunk_bytes}")


def _box(slices: Sequence[int | slice]) -> Box:
    spans = [(part.start, part.stop) if isinstance(part, slice) else (part, part + 1) for part in slices]
    return Box(tuple(start for start, _ in spans), tuple(stop - start for start, stop in spans))
