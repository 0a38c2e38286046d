"""The exceptions of the checkpoint layer. Each message says what was found and which setting changes it."""

from __future__ import annotations


class CheckpointError(RuntimeError):
    """Base of everything that the checkpoint layer raises for a checkpoint's sake."""


class CheckpointNotFoundError(CheckpointError, FileNotFoundError):
    """The checkpoint that was asked for does not exist."""

    def __str__(self) -> str:  # FileNotFoundError would format its arguments as errno and name
        return str(self.args[0]) if self.args else ""


class NotACheckpointError(CheckpointError):
    """The directory holds something, but no checkpoint."""


class CheckpointDamagedError(CheckpointError):
    """A checkpoint or tracker is there but incomplete, truncated or unreadable."""


class UnsafeCheckpointError(CheckpointError):
    """A file of the checkpoint holds an object that loading does not allow, because it could run code."""


class CheckpointMismatchError(CheckpointError):
    """The checkpoint is sound but does not fit the run: other layout, other format, other keys."""


class CheckpointSaveError(CheckpointError):
    """A save failed on at least one rank. Nothing was published, and older checkpoints are untouched."""


class DirectoryInUseError(CheckpointError):
    """Another process saves in the directory."""


class RankLostError(CheckpointError):
    """A rank did not arrive where the ranks meet: it died, or it is stuck."""


ERRORS_BY_NAME: dict[str, type[CheckpointError]] = {
    error.__name__: error
    for error in (
        CheckpointError,
        CheckpointNotFoundError,
        NotACheckpointError,
        CheckpointDamagedError,
        UnsafeCheckpointError,
        CheckpointMismatchError,
        CheckpointSaveError,
        DirectoryInUseError,
        RankLostError,
    )
}
"""By class name, so that an error of one rank can be raised with the same type on every rank."""
