"""What follows a failed save: another try, training without it, or the end of the run. Decisions, and no I/O."""

from __future__ import annotations

import errno
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from bridge.training.checkpointing.errors import (
    CheckpointError,
    CheckpointSaveError,
    DirectoryInUseError,
    RankLostError,
    is_storage_failure,
    storage_error,
)
from bridge.training.config.checkpoint_rules import retry_wait

if TYPE_CHECKING:
    from bridge.training.config import CheckpointConfig

LASTING = frozenset(
    {
        *(errno.EROFS, errno.EACCES, errno.EPERM),
        *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ELOOP, errno.ENAMETOOLONG),
        *(errno.EFBIG, errno.EINVAL, errno.EBADF, errno.EXDEV, errno.ENOSYS, errno.ENOTSUP),
    }
)
"""Errors that are the same at the next try. All others may pass: a full disk too, where old checkpoints are being
deleted, or another user of it cleans up."""

_FATAL = (RankLostError, DirectoryInUseError)


@dataclass(frozen=True)
class FailurePolicy:
    """What the settings say about saves that fail."""

    on_failure: Literal["raise", "warn"] = "raise"
    max_failures: int = 3
    """Failed saves in a row after which training goes on."""
    retries: int = 0
    """Further tries of a step that failed in storage."""
    retry_seconds: float = 0.0
    """Before the first of them; see `retry_wait`."""

    @classmethod
    def of(cls, checkpoint_config: CheckpointConfig) -> FailurePolicy:
        """What a configuration asks for."""
        cfg = checkpoint_config
        return cls(cfg.on_save_failure, cfg.max_save_failures, cfg.save_retries, cfg.save_retry_seconds)

    @property
    def waits(self) -> tuple[float, ...]:
        """Seconds to wait before each further try."""
        return tuple(retry_wait(self.retry_seconds, retry) for retry in range(1, self.retries + 1))

    def goes_on(self, error: CheckpointError, failures: int) -> bool:
        """Whether training goes on after a failed save.

        Args:
            error: what the ranks agreed on, so that they agree on this too.
            failures: saves that have failed in a row, with this one.
        """
        return self.on_failure == "warn" and failures <= self.max_failures and may_pass(error)

    def wait_before(self, retry: int, error: Exception) -> float | None:
        """Seconds to wait before a failed step is tried again; None if it is not.

        Args:
            retry: the number of the next try after the first, from 1.
            error: of the try before it.
        """
        cause = storage_error(error)
        if retry > self.retries or cause is None or cause.errno in LASTING:
            return None
        return retry_wait(self.retry_seconds, retry)


def may_pass(error: CheckpointError) -> bool:
    """Whether the failure of a save leaves the run able to go on, and to save again.

    A lost rank ends the run in any case, a second run in the same directory would destroy this one's saves, and
    what is neither a failed save nor storage is a mistake in a program or a setting, the same at every save.
    """
    return not isinstance(error, _FATAL) and (isinstance(error, CheckpointSaveError) or is_storage_failure(error))
