"""Further tries of a step of a save that failed in storage."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TypeVar

from bridge.training.checkpointing.errors import CheckpointError, CheckpointSaveError, storage_error
from bridge.training.checkpointing.failures.policy import FailurePolicy

T = TypeVar("T")
logger = logging.getLogger(__name__)


def with_retries(step: str, action: Callable[[], T], policy: FailurePolicy, rank: int) -> T:
    """Run a local step, again after a wait if storage failed in a way that may pass.

    Args:
        step: what messages call it, as in "writing".
        action: talks to no other rank; running it again after it failed half-way does no harm.
        policy: says how often and after which wait.
        rank: this one, for messages.

    Raises:
        CheckpointSaveError: storage failed in every try, or in a way that does not pass.
        Exception: whatever else `action` raised.
    """
    retry = 0
    while True:
        try:
            return action()
        except Exception as error:
            wait = policy.wait_before(retry + 1, error)
            if wait is None:
                if isinstance(error, CheckpointError) or storage_error(error) is None:
                    raise
                tries = f", in each of {retry + 1} tries" if retry else ""
                raise CheckpointSaveError(f"{type(error).__name__}: {error}{tries}") from error
            retry += 1
            logger.warning(
                "rank %d: %s failed, retry %d of %d in %.1f s (checkpoint.save_retries, save_retry_seconds): %s: %s",
                rank,
                step,
                retry,
                policy.retries,
                wait,
                type(error).__name__,
                error,
            )
        time.sleep(wait)
