"""What a run remembers of its failed saves, the same on every rank."""

from __future__ import annotations

import logging

from bridge.training.checkpointing.agreement import Ranks
from bridge.training.checkpointing.errors import CheckpointError
from bridge.training.checkpointing.failures.policy import FailurePolicy

logger = logging.getLogger(__name__)


class SaveFailures:
    """Counts saves that failed in a row, those of persistent and of non-persistent checkpoints apart.

    Frequent non-persistent saves that succeed must not hide that no persistent one does.
    """

    def __init__(self) -> None:
        self._in_a_row = {True: 0, False: 0}
        self._passed_over: CheckpointError | None = None

    def in_a_row(self, persistent: bool) -> int:
        """Saves that have failed since the last success of one of this sort."""
        return self._in_a_row[persistent]

    def settle(self, persistent: bool, error: CheckpointError | None, policy: FailurePolicy) -> bool:
        """Take in how a save ended, and decide whether training goes on; call it on every rank.

        Args:
            persistent: whether it was a persistent one.
            error: why it failed; None if it did not.
            policy: decides.

        Returns:
            False if `error` is to be raised.
        """
        if persistent:
            self._passed_over = None
        if error is None:
            self._in_a_row[persistent] = 0
            return True
        self._in_a_row[persistent] += 1
        count = self._in_a_row[persistent]
        if not policy.goes_on(error, count):
            return False
        if persistent:
            self._passed_over = error
        if Ranks.current().is_first:
            logger.error(
                "A SAVE FAILED, training goes on without it (failure %d in a row; the run ends after more than "
                "checkpoint.max_save_failures, which is %d): %s",
                count,
                policy.max_failures,
                error,
            )
        return True

    def take_passed_over(self) -> CheckpointError | None:
        """Why the last persistent save failed, if it did and nobody was told by an exception; afterwards forgotten.

        At the end of a run there is no later save to make up for it.
        """
        error, self._passed_over = self._passed_over, None
        return error
