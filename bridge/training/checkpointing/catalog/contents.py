"""What is in one checkpoint: parts, tensors, objects, files, configuration, versions. No values are read."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from bridge.training.checkpointing.catalog.entries import CatalogEntry, read_entry
from bridge.training.checkpointing.contents.run_config import read_run_config
from bridge.training.checkpointing.detection import format_of
from bridge.training.checkpointing.errors import CheckpointMismatchError, CheckpointNotFoundError
from bridge.training.checkpointing.layout import PAYLOAD_METADATA
from bridge.training.checkpointing.safety.payload_metadata import read_payload_metadata
from bridge.training.checkpointing.source import find_source

_PARTS = (
    (re.compile(r"(chained_\d+\.)?optimizer\."), "optimizer"),
    (re.compile("rng_state"), "random states"),
    (re.compile("rerun_state"), "rerun state"),
)
"""How keys begin, by part. megatron-core numbers chained optimizers."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as it is stored."""

    key: str
    shape: tuple[int, ...]
    dtype: str
    """torch's name: `bfloat16`."""
    shards: int
    """Pieces that it is stored in."""
    total_bytes: int
    """Of its values."""
    part: str
    """`model`, `optimizer`, `random states` or `rerun state`."""


@dataclass(frozen=True)
class StoredObject:
    """Something that is no tensor."""

    key: str
    total_bytes: int
    part: str


@dataclass(frozen=True)
class Contents:
    """One checkpoint."""

    entry: CatalogEntry
    tensors: tuple[StoredTensor, ...]
    objects: tuple[StoredObject, ...]
    common: dict[str, str]
    """What is the same on all ranks, by key: what kind of value it is."""
    files: dict[str, int]
    """Every file with its bytes."""
    config: dict[str, Any] | None
    """`run_config.yaml`; None where there is none."""

    def parts(self) -> dict[str, tuple[int, int, int]]:
        """By part: tensors, objects, and bytes of both."""
        found: dict[str, tuple[int, int, int]] = {}
        for tensor in self.tensors:
            tensors, objects, size = found.get(tensor.part, (0, 0, 0))
            found[tensor.part] = (tensors + 1, objects, size + tensor.total_bytes)
        for other in self.objects:
            tensors, objects, size = found.get(other.part, (0, 0, 0))
            found[other.part] = (tensors, objects + 1, size + other.total_bytes)
        return found


def find_checkpoint(path: Path, step: int | None = None, name: str = "PATH") -> Path:
    """One checkpoint: the path itself, or the one in a directory that is tracked or has this iteration.

    Args:
        path: a checkpoint, or a directory of checkpoints.
        step: the iteration.
        name: what messages call the path.

    Raises:
        CheckpointError: there is none.
    """
    if not path.exists():
        raise CheckpointNotFoundError(f"{name}: {path} does not exist")
    source = find_source(path, step, setting=name)
    if source is None:
        raise CheckpointNotFoundError(f"{name}: there is no checkpoint in {path}")
    return source.path


def read_contents(path: Path, pattern: str = "*") -> Contents:
    """What is in a checkpoint, from its metadata alone.

    Args:
        path: one checkpoint.
        pattern: only tensors and objects whose keys match it, as in a shell.

    Raises:
        CheckpointError: it is damaged, or in a format that cannot be read here.
    """
    found = format_of(path)
    if (path / PAYLOAD_METADATA).is_file():
        tensors, objects = _of_dcp(path)
    elif found.name == "zarr":
        tensors, objects = _of_zarr(path)
    else:
        raise CheckpointMismatchError(f"{path} is in the format {found.name!r}, whose contents cannot be listed")
    common = found.read_common(path)
    return Contents(
        read_entry(path),
        tuple(tensor for tensor in tensors if fnmatchcase(tensor.key, pattern)),
        tuple(each for each in objects if fnmatchcase(each.key, pattern)),
        {str(key): _kind(value) for key, value in common.items()},
        dict(_files(path)),
        read_run_config(path),
    )


def part_of(key: str) -> str:
    """The part of a checkpoint that a key belongs to."""
    return next((part for prefix, part in _PARTS if prefix.match(key)), "model")


def _of_dcp(path: Path) -> tuple[list[StoredTensor], list[StoredObject]]:
    metadata = read_payload_metadata(path)
    sizes: dict[str, int] = {}
    for index, place in metadata.storage_data.items():
        sizes[index.fqn] = sizes.get(index.fqn, 0) + int(place.length)
    tensors, objects = [], []
    for key, entry in sorted(metadata.state_dict_metadata.items()):
        if isinstance(entry, TensorStorageMetadata):
            shape, dtype = tuple(entry.size), entry.properties.dtype
            size = math.prod(shape) * dtype.itemsize
            name = str(dtype).removeprefix("torch.")
            tensors.append(StoredTensor(key, shape, name, len(entry.chunks), size, part_of(key)))
        else:
            objects.append(StoredObject(key, sizes.get(key, 0), part_of(key)))
    return tensors, objects


def _of_zarr(path: Path) -> tuple[list[StoredTensor], list[StoredObject]]:
    from bridge.training.checkpointing.conversion.stores import ZarrStore

    store = ZarrStore(path)
    tensors = []
    for key, tensor in sorted(store.tensors.items()):
        chunks = math.prod(-(-size // chunk) for size, chunk in zip(tensor.shape, tensor.chunk, strict=True))
        tensors.append(StoredTensor(key, tensor.shape, tensor.dtype, chunks, tensor.nbytes, part_of(key)))
    return tensors, [StoredObject(key, size, part_of(key)) for key, size in sorted(store.objects.items())]


def _kind(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"mapping of {len(value)}"
    if isinstance(value, list | tuple):
        return f"{type(value).__name__} of {len(value)}"
    if value is None or isinstance(value, bool | int | float | str):
        text = repr(value)
        return text if len(text) <= 80 else f"{text[:77]}..."
    return type(value).__name__


def _files(path: Path) -> list[tuple[str, int]]:
    found = []
    for directory, _, names in os.walk(path):
        for name in names:
            file = Path(directory) / name
            found.append((file.relative_to(path).as_posix(), file.lstat().st_size))
    return sorted(found)
