"""Writing one file of shards, and taking its checksum as it is written."""

from __future__ import annotations

import inspect
import os
from functools import partial
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint import filesystem

from bridge.training.checkpointing.background import ForkedCall, kill_all
from bridge.training.checkpointing.checksums import HashingStream
from bridge.training.checkpointing.errors import CheckpointSaveError, storage_error
from bridge.training.checkpointing.integrity import FileRecord


def write_buckets(transforms: list[Any], buckets: list[Any], kind: str) -> list[tuple[FileRecord, list[Any]]]:
    """Write several files at the same time, each in a process of its own; see `write_bucket`."""
    if len(buckets) <= 1:
        return [write_bucket(transforms, bucket, kind) for bucket in buckets]
    calls: list[ForkedCall[Any]] = []
    try:
        for bucket in buckets:
            write = partial(write_bucket, transforms, bucket, kind)
            calls.append(ForkedCall(write, f"the writer of {bucket[1]}"))
        return [call.result() for call in calls]
    except BaseException as error:
        # What goes on writing would write into another try's files.
        kill_all(calls)
        if isinstance(error, OSError):
            raise CheckpointSaveError(f"a process to write with could not be started: {error}") from error
        raise


def write_bucket(transforms: list[Any], bucket: Any, kind: str) -> tuple[FileRecord, list[Any]]:
    """Write and sync one of the files that megatron-core's writer has prepared, as torch DCP writes it.

    Args:
        transforms: torch's transforms of what is written, where this version of torch has them.
        bucket: megatron-core's write bucket: the file's path, its name in the metadata, and its items.
        kind: of the checksum.

    Returns:
        The record of the file, with the checksum of what was meant to be written, and torch's write results.

    Raises:
        CheckpointSaveError: it could not be written; the cause is the operating system's error, if there is one.
    """
    path, name, (objects, tensors) = Path(bucket[0]), bucket[1], bucket[2]
    try:
        with path.open("wb") as raw:
            stream = HashingStream(raw, kind)
            items = [(item, data) for item, data in [*objects, *tensors]]
            results = [_write_item(transforms, stream, data, item, name) for item, data in items]
            raw.flush()
            os.fsync(raw.fileno())
        return FileRecord(path.name, stream.size, stream.checksum(), kind).sampled(path.parent), results
    except Exception as error:
        # torch has an error of its own, about positions in the file, where the file system has refused to write.
        reason = storage_error(error) or error
        raise CheckpointSaveError(f"writing {path} failed: {type(reason).__name__}: {reason}") from error


def _write_item(transforms: list[Any], stream: HashingStream, data: Any, item: Any, name: str) -> Any:
    write: Any = filesystem._write_item
    keywords: dict[str, Any] = {}
    if "serialization_format" in inspect.signature(write).parameters:  # the parameters differ between torch's versions
        keywords["serialization_format"] = filesystem.SerializationFormat.TORCH_SAVE
    return write(*transforms, stream, data, item, name, **keywords)
