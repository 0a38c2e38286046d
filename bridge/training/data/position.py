"""Putting data iterators back where a checkpoint says they were."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from bridge.training.data.errors import DataStateError

if TYPE_CHECKING:
    from bridge.training.checkpointing.contents.dataloader import DataloaderState

logger = logging.getLogger(__name__)

_REMEDY = "to start it without a saved position set checkpoint.load_dataloader_state: ignore"


def restore_position(train_iterator: Any | None, saved: DataloaderState | None) -> None:
    """Give data iterators the state that a load has found (`GlobalState.dataloader_state`).

    Args:
        train_iterator: this rank's iterator, or one for each model chunk, each of which gets the state; None on
            ranks that read no data.
        saved: the state; None leaves the iterators where they are.

    Raises:
        DataStateError: an iterator cannot take the state, or not with another data-parallel size.
    """
    # Imported late: the data package is used without the checkpoint layer too.
    from bridge.training.checkpointing.contents.dataloader import iterators_of

    if saved is None:
        return
    for iterator in iterators_of(train_iterator):
        _restore(iterator, saved)


def _restore(iterator: Any, saved: DataloaderState) -> None:
    name = type(iterator).__name__
    load_state = getattr(iterator, "load_state", None)
    reshard_state = getattr(iterator, "reshard_state", None)
    try:
        if not saved.size_changed:
            if load_state is None:
                raise DataStateError(
                    f"the checkpoint holds the state of a data iterator, and {name} has no load_state() to take it; "
                    f"{_REMEDY}"
                )
            load_state(saved.states[0])
            return
        if reshard_state is None:
            raise DataStateError(
                f"the checkpoint holds the states of {saved.saved_size} data iterators, this run has {saved.size} "
                f"data-parallel ranks, and {name} has no reshard_state() to divide the data anew; keep the "
                f"data-parallel size, or {_REMEDY}"
            )
        reshard_state(list(saved.states), saved.rank, saved.size)
    except DataStateError:
        raise
    except Exception as error:  # whatever the iterator of somebody else raises
        raise DataStateError(
            f"{name} could not take the state that the checkpoint holds: {type(error).__name__}: {error}; {_REMEDY}"
        ) from error
    if saved.rank == 0:
        logger.info("the data saved by %d data-parallel ranks goes on with %d: %s", saved.saved_size, saved.size, name)
