"""Building on many ranks: what fails on one is raised on all, so that nobody waits for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from bridge.training.data.errors import DataExhaustedError, DatasetError, DataStateError

_BUILDING_FAILED = "megatron-core could not build the dataset"
_TYPES = {error.__name__: error for error in (DatasetError, DataExhaustedError, DataStateError)}


def _attempt(action: Callable[[], Any], failed: str) -> tuple[Any, str | None, Exception | None]:
    """The result of `action`, or what went wrong as a message and an exception."""
    try:
        return action(), None, None
    except DatasetError as error:
        return None, str(error), error
    except Exception as error:
        return None, f"{failed}: {type(error).__name__}: {error}", error


def on_first_rank(action: Callable[[], str]) -> str:
    """Run `action` on rank 0 and give every rank its result, or its failure as a DatasetError."""
    distributed = torch.distributed.is_initialized()
    outcome: list[str | None] = [None, None]
    cause: Exception | None = None
    if not distributed or torch.distributed.get_rank() == 0:
        *outcome, cause = _attempt(action, _BUILDING_FAILED)
    if distributed:
        torch.distributed.broadcast_object_list(outcome, src=0)
    result, failure = outcome
    if isinstance(cause, DatasetError):
        raise cause
    if result is None:
        raise DatasetError(failure) from cause
    return result


def on_every_rank(action: Callable[[], Any], failed: str = _BUILDING_FAILED) -> Any:
    """Run `action` on every rank; if it fails on one, raise that rank's failure on all of them.

    Args:
        action: what to run.
        failed: what to say of an exception that is none of ours.

    Raises:
        DatasetError: the failure, of the same type if it is one of ours.
    """
    result, message, cause = _attempt(action, failed)
    failure = None if message is None else (type(cause).__name__, message)
    failures = [failure]
    if torch.distributed.is_initialized():
        failures = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(failures, failure)
    for rank, found in enumerate(failures):
        if found is not None:
            kind, message = found
            error = _TYPES.get(kind, DatasetError)
            raise error(message if len(failures) == 1 else f"rank {rank}: {message}") from cause
    return result
