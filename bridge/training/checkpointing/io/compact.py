"""`.metadata` and the compact file beside it: both are written at once, and either is read."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from bridge.training.checkpointing.errors import CheckpointError, CheckpointSaveError
from bridge.training.checkpointing.files import write_file
from bridge.training.checkpointing.io.metadata_file import metadata_bytes
from bridge.training.checkpointing.io.table import Ints, StoredTable
from bridge.training.checkpointing.layout import COMPACT_METADATA, PAYLOAD_METADATA
from bridge.training.checkpointing.safety.containment import contained_file

logger = logging.getLogger(__name__)

_LARGEST = 1 << 31
"""Bytes."""


def placed(planned: StoredTable, columns: Sequence[tuple[Ints, Ints]]) -> StoredTable:
    """What has been written, with the places of the records: by rank, where each begins and how long it is.

    Raises:
        CheckpointSaveError: they are not as many as were planned.
    """
    at, length = (np.concatenate(parts) for parts in zip(*columns, strict=True))
    if len(at) != len(planned):
        raise CheckpointSaveError(f"{len(at)} records were written where {len(planned)} were planned")
    return replace(planned, at=at, length=length)


def write_both(table: StoredTable, directory: Path) -> list[str]:
    """Write `.metadata` and `.metadata.bridge`, anew if they are there.

    Args:
        table: what all ranks have written.
        directory: the checkpoint.

    Returns:
        The names of the files.
    """
    metadata = metadata_bytes(table, directory)
    for name, data in ((PAYLOAD_METADATA, metadata), (COMPACT_METADATA, table.to_bytes(metadata))):
        (directory / name).unlink(missing_ok=True)
        write_file(directory / name, data)
    return [PAYLOAD_METADATA, COMPACT_METADATA]


def read_compact(directory: Path, metadata: bytes | None = None) -> StoredTable | None:
    """What a checkpoint holds, from the compact file; None where that is absent or does not serve. Local.

    A file that is damaged or belongs to another `.metadata` is passed over with a warning: `.metadata` says it all.

    Args:
        directory: the checkpoint.
        metadata: the contents of its `.metadata`, where they have been read.

    Raises:
        OSError: `.metadata` cannot be read.
    """
    if not (directory / COMPACT_METADATA).exists():
        return None
    try:
        path, size = contained_file(directory, COMPACT_METADATA)
        if size > _LARGEST:
            raise ValueError(f"it has {size} bytes")
        if metadata is None:
            metadata = contained_file(directory, PAYLOAD_METADATA)[0].read_bytes()
        return StoredTable.from_bytes(path.read_bytes(), metadata)
    except (ValueError, OSError, CheckpointError) as error:
        logger.warning("%s is passed over, and .metadata read: %s", directory / COMPACT_METADATA, error)
        return None
