"""torch's own way to read a stored tensor, for records that the fast readers do not recognise."""

from __future__ import annotations

import io
from pathlib import Path

import torch
from torch.distributed._shard._utils import narrow_tensor_by_index

from bridge.training.checkpointing.errors import CheckpointDamagedError
from bridge.training.checkpointing.io.files import read_bytes
from bridge.training.checkpointing.io.plan import Want
from bridge.training.checkpointing.readable import ReadableFile
from bridge.training.checkpointing.safety.safe_globals import load_error


def read_with_torch(path: Path | ReadableFile, want: Want) -> None:
    """Read a part of a stored tensor with `torch.load`, which reads all of it.

    Raises:
        CheckpointDamagedError: the record is unreadable, or holds something else.
        UnsafeCheckpointError: it holds an object that is not allowed.
    """
    record = io.BytesIO(read_bytes(path, want.at, want.length))
    try:
        stored = torch.load(record, map_location="cpu", weights_only=True)
    except Exception as error:  # there is no error that unpickling garbled bytes may not raise
        raise load_error(error, f"{path} ({want.key})", "tensor") from error
    if not isinstance(stored, torch.Tensor) or tuple(stored.shape) != want.shape:
        found = list(stored.shape) if isinstance(stored, torch.Tensor) else type(stored).__name__
        raise CheckpointDamagedError(f"{path} ({want.key}) holds {found} where {list(want.shape)} belongs")
    if want.box is not None:
        stored = narrow_tensor_by_index(stored, want.box[0], want.box[1])
    want.target.detach().copy_(stored)
