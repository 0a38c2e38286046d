"""Adding small files to a checkpoint directory after the fact."""

from __future__ import annotations

from pathlib import Path

from bridge.training.checkpointing.errors import CheckpointSaveError
from bridge.training.checkpointing.files import replace_file
from bridge.training.checkpointing.integrity import read_manifest


def add_file(checkpoint: Path, name: str, data: bytes) -> None:
    """Write a file into a checkpoint directory, in one step and durably; directories are made as needed.

    A published checkpoint may gain files that it lacks. Those that its manifest lists stay as they are.

    Args:
        checkpoint: an `iter_N` directory.
        name: path inside it, with forward slashes.
        data: the contents.

    Raises:
        CheckpointSaveError: the checkpoint is published with another file of that name.
        CheckpointDamagedError: its manifest is unreadable.
        OSError: the file cannot be written.
    """
    path = checkpoint / name
    manifest = read_manifest(checkpoint)
    if manifest is not None and any(record.name == name for record in manifest.files):
        if path.is_file() and path.read_bytes() == data:
            return
        raise CheckpointSaveError(
            f"{checkpoint} is published and its manifest lists another {name}; save a new checkpoint instead"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, data)
