"""The exceptions of the checkpoint layer. Each message says what was found and which setting changes it."""

from __future__ import annotations

import errno


class CheckpointError(RuntimeError):
    """Base of everything that the checkpoint layer raises for a checkpoint's sake."""

    in_storage: bool | None = None
    """Of an error that the ranks have agreed on: whether it was storage that failed, on every rank that failed."""


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
    """A save failed on at least one rank. Older checkpoints are untouched, and the trackers do not name this one."""


class NotEnoughSpaceError(CheckpointSaveError):
    """There is less free space than a save needs; it was not begun."""


class MemoryLimitError(CheckpointSaveError):
    """An in-memory checkpoint does not fit into the memory that it may take."""


class KeeperLostError(CheckpointSaveError):
    """The process that holds in-memory checkpoints died or does not answer."""


class DirectoryInUseError(CheckpointError):
    """Another process saves in the directory."""


class ObjectStoreError(CheckpointError):
    """Object storage refused a request, or did not answer it in any of several tries."""

    missing = False
    """Whether that was because there is no such object."""


class EventSinkError(CheckpointError):
    """What happens to checkpoints cannot be brought to a program that the logger section asks for."""


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
        NotEnoughSpaceError,
        MemoryLimitError,
        KeeperLostError,
        DirectoryInUseError,
        EventSinkError,
        ObjectStoreError,
        RankLostError,
    )
}
"""By class name, so that an error of one rank can be raised with the same type on every rank."""


DAMAGE: tuple[type[CheckpointError], ...] = (
    CheckpointDamagedError,
    NotACheckpointError,
    CheckpointNotFoundError,
)
"""What is wrong with a checkpoint itself, so that another one may be better."""


def storage_error(error: BaseException | None) -> OSError | None:
    """The operating system's error that `error` is or goes back to; None if it does not."""
    while error is not None:
        if isinstance(error, OSError) and not isinstance(error, CheckpointError):
            return error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return None


def is_storage_failure(error: BaseException) -> bool:
    """Whether storage failed, as opposed to a mistake in a program. The same on all ranks that agreed on `error`."""
    agreed = error.in_storage if isinstance(error, CheckpointError) else None
    return storage_error(error) is not None if agreed is None else agreed


_OF_THE_PROCESS = frozenset(
    {
        *(errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN, errno.EINTR, errno.EACCES, errno.EPERM),
        *(errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.EHOSTDOWN, errno.EHOSTUNREACH),
    }
)


def tells_of_damage(error: OSError) -> bool:
    """Whether an error of reading a file can be the file's fault, and not only the process's or the connection's."""
    return error.errno not in _OF_THE_PROCESS
