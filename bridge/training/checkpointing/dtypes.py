"""Which types of values a stored tensor may be loaded as."""

from __future__ import annotations

import torch

from bridge.training.checkpointing.errors import CheckpointMismatchError


def require_same_kind(key: str, wanted: torch.dtype, stored: torch.dtype) -> None:
    """Make sure that values are only converted between types of one kind.

    Raises:
        CheckpointMismatchError: they are not.
    """
    if _kind(wanted) != _kind(stored):
        raise CheckpointMismatchError(f"{key} has the type {wanted} in this run, and {stored} in the checkpoint")


def _kind(dtype: torch.dtype) -> str:
    if dtype.is_complex:
        return "complex"
    if dtype.is_floating_point:
        return "floating point"
    return "bool" if dtype == torch.bool else "integer"
