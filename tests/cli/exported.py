"""What the tests of exports and of means have in common: work in another process, and tensors read by others' means."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file

from bridge.training.checkpointing.catalog.contents import part_of
from bridge.training.checkpointing.errors import CheckpointError
from tests.distributed.launch import run_ranks


def elsewhere(function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Call something in another process: one in which TensorStore has been at work cannot start ranks any more."""

    def attempt() -> Any:
        try:
            return function(*arguments, **options)
        except CheckpointError as error:
            return error

    (outcome,) = run_ranks(attempt, 1)
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


def stock_tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """What torch itself reads of a checkpoint."""
    entries = dcp.FileSystemReader(str(checkpoint)).read_metadata().state_dict_metadata
    described = {key: entry for key, entry in sorted(entries.items()) if hasattr(entry, "size")}
    tensors = {key: torch.empty(entry.size, dtype=entry.properties.dtype) for key, entry in described.items()}
    dcp.load(tensors, checkpoint_id=str(checkpoint), no_dist=True)
    return tensors


def of_model(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The same, of the model alone."""
    return {key: value for key, value in stock_tensors(checkpoint).items() if part_of(key) == "model"}


def tensors_in(directory: Path) -> dict[str, torch.Tensor]:
    """All tensors of an export, by the safetensors library."""
    found: dict[str, torch.Tensor] = {}
    for path in sorted(directory.glob("*.safetensors")):
        part = load_file(path)
        assert not found.keys() & part.keys()
        found |= part
    return found
