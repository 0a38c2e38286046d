"""The data iterator's part: one file for each data-parallel rank."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch

from bridge.training.checkpointing.contents import Sidecar, torch_bytes
from bridge.training.checkpointing.errors import CheckpointDamagedError
from bridge.training.checkpointing.layout import DATALOADER_DIRECTORY, dataloader_state_name

_KEY = "dataloader_state_dict"


def dataloader_sidecar(train_iterator: Any | None, pg_collection: Any) -> Sidecar | None:
    """Capture the iterator's state on the one rank of each data-parallel rank that saves it.

    Args:
        train_iterator: the data iterator, or one for each model chunk; those with a `save_state` method are
            saved. The chunks of a rank see the same stream, so the first stands for all.
        pg_collection: the process groups, with `tp`, `pp`, `cp` and `dp`.

    Returns:
        The file, or None on ranks that do not save and for iterators that have no state.
    """
    groups = pg_collection
    if groups.tp.rank() != 0 or groups.pp.rank() != 0 or groups.cp.rank() != 0:
        return None
    candidates = train_iterator if isinstance(train_iterator, (list, tuple)) else [train_iterator]
    for candidate in candidates:
        save_state = getattr(candidate, "save_state", None)
        if save_state is not None:
            return Sidecar(dataloader_state_name(groups.dp.rank()), torch_bytes({_KEY: save_state()}))
    return None


def saved_data_parallel_size(checkpoint: Path) -> int:
    """How many data-parallel ranks saved their iterator state in a checkpoint; 0 if none did."""
    directory = checkpoint / DATALOADER_DIRECTORY
    return sum(1 for _ in directory.iterdir()) if directory.is_dir() else 0


def read_dataloader_state(checkpoint: Path, data_parallel_rank: int) -> dict[str, Any]:
    """Read the iterator state of a data-parallel rank.

    Raises:
        CheckpointDamagedError: the file is absent or unreadable.
    """
    path = checkpoint / dataloader_state_name(data_parallel_rank)
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)[_KEY]
    except (pickle.UnpicklingError, RuntimeError, KeyError, TypeError, EOFError, OSError) as error:
        raise CheckpointDamagedError(f"{path} is not a readable data iterator state: {error}") from error
    return state
