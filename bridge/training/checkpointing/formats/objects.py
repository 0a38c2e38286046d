"""ShardedObjects in files of their own, where the format of the tensors has no place for them.

`<key>/shard_<offset>_<shape>.pt`, as megatron-core's common strategy writes them.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing.mapping import ShardedObject

from bridge.training.checkpointing.errors import CheckpointDamagedError, CheckpointMismatchError
from bridge.training.checkpointing.formats.names import directory_name, key_of
from bridge.training.checkpointing.safety.containment import contained_file
from bridge.training.checkpointing.safety.safe_globals import load_torch_file
from bridge.training.checkpointing.sidecar import Sidecar, torch_bytes

_FILE = re.compile(r"shard_(\d+(?:\.\d+)*)_(\d+(?:\.\d+)*)\.pt")


def object_sidecar(item: ShardedObject) -> Sidecar:
    """The file of an object.

    Raises:
        CheckpointSaveError: its key cannot be the name of a directory.
    """
    return Sidecar(object_name(item), torch_bytes(item.data))


def is_object_file(name: str) -> bool:
    """Whether a path inside a checkpoint is that of an object's file."""
    return _FILE.fullmatch(name.rpartition("/")[2]) is not None


def read_object(directory: Path, item: ShardedObject) -> Any:
    """The value of an object of a checkpoint. Local.

    Raises:
        CheckpointMismatchError: the checkpoint has no such object.
        CheckpointDamagedError: it cannot be read.
        UnsafeCheckpointError: it holds an object of a class that is not allowed, or leads out of the checkpoint.
    """
    name = object_name(item)
    if not (directory / name).exists() and not (directory / name).is_symlink():
        raise CheckpointMismatchError(f"{directory} has no object {item.unique_key}, which this run asks for")
    path, _ = contained_file(directory, name)
    try:
        return load_torch_file(path, "object")
    except FileNotFoundError as error:
        raise CheckpointDamagedError(f"{path} does not exist") from error


def stored_objects(directory: Path) -> dict[str, ShardedObject]:
    """Every object of a checkpoint without its value, by its unique key. Local."""
    found = {}
    for entry in sorted(each for each in directory.iterdir() if each.is_dir()):
        for path in sorted(entry.glob("shard_*.pt")):
            if (match := _FILE.fullmatch(path.name)) is not None:
                offset, shape = (tuple(map(int, numbers.split("."))) for numbers in match.groups())
                if len(offset) == len(shape):
                    item = ShardedObject(key_of(entry.name), None, shape, offset)
                    found[item.unique_key] = item
    return found


def object_name(item: ShardedObject) -> str:
    """Path of an object's file inside a checkpoint."""
    return f"{directory_name(item.key)}/{item.unique_key[len(item.key) + 1 :]}.pt"
