"""Directory names for the keys of sharded state: one directory in the checkpoint for each key. Pure functions.

A key as Megatron-Core makes them is its own directory's name. Other characters than these have are percent-encoded,
and so is the first one of a key that is hidden or is the name of something else.
"""

from __future__ import annotations

from urllib.parse import quote, unquote

from bridge.training.checkpointing.errors import CheckpointSaveError
from bridge.training.checkpointing.layout import (
    COMMON,
    DATALOADER_DIRECTORY,
    MANIFEST,
    MCORE_METADATA,
    RUN_CONFIG,
    TOKENIZER_DIRECTORY,
    TRAIN_STATE,
)

_RESERVED = frozenset(
    {COMMON, DATALOADER_DIRECTORY, MANIFEST, MCORE_METADATA, RUN_CONFIG, TOKENIZER_DIRECTORY, TRAIN_STATE}
)
_PLAIN = " (),"
"""Beside letters, digits and `._-~`: in `dtype_(torch.float32, torch.float32)`."""
_LONGEST = 255
"""Bytes of a file name that common file systems take."""


def directory_name(key: str) -> str:
    """The name of the directory for a key: one plain name, whatever the key.

    Raises:
        CheckpointSaveError: the key is empty, or too long for a name.
    """
    name = quote(key, safe=_PLAIN)
    if name.startswith(".") or name in _RESERVED:
        name = f"%{ord(name[0]):02X}{name[1:]}"
    if not name or len(name) > _LONGEST:
        raise CheckpointSaveError(f"the key {key[:60]!r} cannot be a directory's name; it has {len(name)} bytes there")
    return name


def key_of(directory: str) -> str:
    """The key that a directory is named after."""
    return unquote(directory)
