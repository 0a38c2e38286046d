"""One save under the failure policy: what is raised, and when."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from bridge.training.checkpointing.errors import CheckpointError, RankLostError
from bridge.training.checkpointing.failures.policy import FailurePolicy
from bridge.training.checkpointing.queue import finish_saves

logger = logging.getLogger(__name__)


def attempt(
    save: Callable[[], None], state: Any, *, persistent: bool, background: bool, earlier: CheckpointError | None
) -> None:
    """Make a save, or begin it; then raise what the failure policy does not let pass.

    An earlier save's failure is raised when this one is made, not in its place: it concerns an older state, and
    raising it may end the run.

    Args:
        save: makes it on every rank, and raises the same error on every rank.
        state: GlobalState, with the configuration and what is known of failed saves.
        persistent: whether it is a persistent one.
        background: whether `save` only begins it, and the queue finishes it.
        earlier: an earlier save's failure that is to be raised.

    Raises:
        CheckpointError: `earlier`, or this save's failure.
    """
    cfg = state.cfg.checkpoint
    policy = FailurePolicy.of(cfg)
    failed: CheckpointError | None = None
    try:
        save()
    except RankLostError:
        raise
    except CheckpointError as error:
        if not state.save_failures.settle(persistent, error, policy):
            failed = error
    else:
        if not background:
            state.save_failures.settle(persistent, None, policy)
    if earlier is not None:
        if background and failed is None:
            failed = finish_saves(state, cfg, blocking=True)
        if failed is not None:
            logger.error("after an earlier save, the next one failed too: %s", failed)
        raise earlier
    if failed is not None:
        raise failed
