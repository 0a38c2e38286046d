"""Whether two values are the same: tensors bit by bit, not-a-number and the sign of zero included. Pure functions."""

from __future__ import annotations

import io
import pickle
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch


def same_tensor(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether two tensors on the CPU have the same type, shape and bits. Takes no copy of contiguous ones."""
    if first.dtype != second.dtype or first.shape != second.shape:
        return False
    return torch.equal(_bytes(first), _bytes(second))


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def same(first: Any, second: Any) -> bool:
    """Whether two objects of a checkpoint are the same, with all that they hold."""
    if type(first) is not type(second):
        return False
    if isinstance(first, torch.Tensor):
        return same_tensor(first, second)
    if isinstance(first, np.ndarray | np.generic):
        return bool(first.dtype == second.dtype and first.shape == second.shape and first.tobytes() == second.tobytes())
    if isinstance(first, Mapping):
        return list(first) == list(second) and all(same(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(same(a, b) for a, b in zip(first, second, strict=True))
    if isinstance(first, io.BytesIO):
        return bool(first.getvalue() == second.getvalue())
    if isinstance(first, float | complex):
        return repr(first) == repr(second)
    if isinstance(first, bool | int | str | bytes | bytearray | type(None)):
        return bool(first == second)
    # Of a class that the user allows: nothing else is known of it than how it is stored.
    return pickle.dumps(first) == pickle.dumps(second)
