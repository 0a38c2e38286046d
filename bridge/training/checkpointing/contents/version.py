"""The checkpoint version that this process works with: the one value that the documented API keeps globally."""

from __future__ import annotations

from bridge.training.checkpointing.errors import CheckpointMismatchError

_version: float | None = None


def set_checkpoint_version(value: float) -> None:
    """Note the version of the checkpoint that is being loaded (3.0 for every one that this package writes).

    Raises:
        CheckpointMismatchError: a checkpoint of another version was loaded by this process before.
    """
    global _version
    if _version is not None and _version != value:
        raise CheckpointMismatchError(
            f"the checkpoint is of version {value}, and this process has loaded one of version {_version}; "
            "load checkpoints of different versions in processes of their own"
        )
    _version = value


def get_checkpoint_version() -> float | None:
    """The version of the checkpoints that this process has loaded; None before the first."""
    return _version
