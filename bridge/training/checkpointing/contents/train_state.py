"""The train state's part: `train_state.pt`, which is also the tracker's contents."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch

from bridge.training.checkpointing.errors import CheckpointDamagedError, CheckpointError
from bridge.training.checkpointing.layout import TRAIN_STATE
from bridge.training.checkpointing.safety.safe_globals import describe, load_torch_file
from bridge.training.checkpointing.sidecar import Sidecar, torch_bytes

_LARGEST = 1 << 20


def train_state_sidecar(train_state: Any, num_floating_point_operations_so_far: int) -> Sidecar:
    """Capture the train state as it is now, with the given FLOPs count."""
    captured = copy.copy(train_state)
    captured.floating_point_operations_so_far = num_floating_point_operations_so_far
    return Sidecar(TRAIN_STATE, torch_bytes(captured.state_dict()))


def read_train_state(path: Path) -> dict[str, Any]:
    """Read `train_state.pt` or the tracker of the same form.

    Returns:
        Plain numbers and flags by field name; `step` is always among them.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointDamagedError: it is not a readable train state.
    """
    try:
        if path.stat().st_size > _LARGEST:
            raise ValueError(f"it has {path.stat().st_size} bytes")
        return plain_train_state(load_torch_file(path, "train state"))
    except (RuntimeError, ValueError, KeyError, AttributeError, TypeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointDamagedError(f"{path} is not a readable train state: {describe(error)}") from error


def plain_train_state(saved: Any) -> dict[str, Any]:
    """Plain numbers and flags, by field name, of what `train_state.pt` holds.

    Raises:
        ValueError: its step is none. KeyError, AttributeError, TypeError: it is something else.
    """
    state = {name: value.item() if isinstance(value, torch.Tensor) else value for name, value in saved.items()}
    if not isinstance(state["step"], int) or state["step"] < 0:
        raise ValueError(f"its step is {state['step']!r}")
    return state
