"""Several checkpoints of a model as one whose tensors are their mean."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bridge.training.checkpointing.catalog.contents import part_of
from bridge.training.checkpointing.conversion.plan import Piece, Tensor
from bridge.training.checkpointing.conversion.stores import Store
from bridge.training.checkpointing.errors import CheckpointMismatchError, CheckpointNotFoundError
from bridge.training.checkpointing.export.exporting import Limits, limits_of
from bridge.training.checkpointing.export.sources import FROM, MODEL, Opened, open_checkpoint
from bridge.training.checkpointing.layout import is_iteration_directory, list_checkpoints
from bridge.training.checkpointing.safety.safe_globals import allow
from bridge.training.checkpointing.trackers import read_tracker

_COPIES = 12
"""Of a piece that are held at once, as it is stored: the sum in fp32, what is read, the mean, what it becomes."""


class AveragedStore:
    """Several checkpoints of a model as one: its tensors are their mean. A `Store` without objects."""

    def __init__(self, stores: Sequence[Store], tensors: dict[str, Tensor]) -> None:
        """
        Args:
            stores: all with these tensors.
            tensors: by key.
        """
        self._stores = tuple(stores)
        self.tensors = tensors
        self.objects: dict[str, int] = {}

    def read(self, pieces: Sequence[Piece]) -> list[torch.Tensor]:
        """As `Store`: sums are taken in fp32, or in the stored type if it is wider, in the order of the stores.

        Raises:
            CheckpointMismatchError: values that have no mean differ.
        """
        sums = [_summand(value) for value in self._stores[0].read(pieces)]
        for store in self._stores[1:]:
            values = store.read(pieces)
            for position, piece in enumerate(pieces):
                _add(sums[position], values[position], piece.tensor.key)
            values.clear()
        count = len(self._stores)
        return [
            (value.div_(count) if value.is_floating_point() else value).to(piece.tensor.torch_dtype)
            for value, piece in zip(sums, pieces, strict=True)
        ]

    def read_objects(self, keys: Sequence[str]) -> dict[str, Any]:
        """As `Store`; there are none."""
        raise KeyError(*keys)


def _summand(value: torch.Tensor) -> torch.Tensor:
    return value.to(torch.float32) if value.is_floating_point() and value.dtype != torch.float64 else value


def _add(total: torch.Tensor, value: torch.Tensor, key: str) -> None:
    if total.is_floating_point():
        total.add_(value.to(total.dtype) if value.itemsize == 1 else value)
    elif not torch.equal(total, value):
        raise CheckpointMismatchError(
            f"{FROM}: {key} is of the type {str(value.dtype).removeprefix('torch.')}, which has no mean, and differs "
            "between the iterations"
        )


def iterations_of(source: Path, steps: Sequence[int], last: int | None) -> list[int]:
    """The iterations to take the mean of, in ascending order.

    Args:
        source: a directory of checkpoints.
        steps: those that are named.
        last: or this many of the newest; none beyond the tracked one.

    Raises:
        CheckpointNotFoundError: there are not that many.
        CheckpointMismatchError: it is not clear which, or there are less than two.
    """
    if is_iteration_directory(source):
        raise CheckpointMismatchError(f"{FROM}: {source} is one checkpoint; name the directory of checkpoints")
    if not source.exists():
        raise CheckpointNotFoundError(f"{FROM}: {source} does not exist")
    if bool(steps) == (last is not None):
        raise CheckpointMismatchError("name the iterations with --step, or say with --last how many; one of them")
    if last is None:
        chosen = sorted(set(steps))
    else:
        listing = list_checkpoints(source)
        tracked = read_tracker(listing)
        newest = tracked.iteration if tracked is not None and not tracked.release else None
        there = sorted(each for each in listing.iterations if newest is None or each <= newest)
        if last > len(there):
            raise CheckpointNotFoundError(f"--last is {last}, and {source} has {len(there)} checkpoints")
        chosen = there[len(there) - max(0, last) :]
    if len(chosen) < 2:
        raise CheckpointMismatchError("a mean is taken of two iterations or more; name others, or more of them")
    return chosen


@dataclass(frozen=True)
class Mean:
    """Checkpoints that hold the same tensors, open."""

    sources: tuple[Opened, ...]
    """In the order of their iterations."""
    store: AveragedStore
    limits: Limits

    @property
    def newest(self) -> Opened:
        """That whose iteration the mean has."""
        return self.sources[-1]

    @classmethod
    def open(
        cls, source: Path, steps: Sequence[int], last: int | None, memory: int, safe_globals: Sequence[str]
    ) -> Mean:
        """Open the checkpoints of some iterations.

        Args:
            source: a directory of checkpoints.
            steps: as for `iterations_of`.
            last: likewise.
            memory: bytes of values and buffers that are held at most.
            safe_globals: further classes, as dotted paths, that the checkpoints may hold.

        Raises:
            CheckpointError: there are no such checkpoints, they cannot be trusted, or hold other tensors.
        """
        allow(list(safe_globals))
        iterations = iterations_of(source, steps, last)
        limits = limits_of(memory, len(iterations), _COPIES)
        sources = tuple(open_checkpoint(source, step, limits.reader) for step in iterations)
        tensors = [_of_model(each) for each in sources]
        for each, found in zip(sources[:-1], tensors[:-1], strict=True):
            _require_same(each, found, sources[-1], tensors[-1])
        return cls(sources, AveragedStore([each.store for each in sources], tensors[-1]), limits)


def _of_model(opened: Opened) -> dict[str, Tensor]:
    found = {key: tensor for key, tensor in opened.store.tensors.items() if part_of(key) == MODEL}
    if not found:
        raise CheckpointMismatchError(f"{FROM}: {opened.path} holds no tensors of a model")
    return found


def _require_same(first: Opened, found: dict[str, Tensor], second: Opened, wanted: dict[str, Tensor]) -> None:
    """Check that two checkpoints hold the same tensors, however they are stored."""
    problems = [f"only {first.path.name} has {key}" for key in sorted(found.keys() - wanted.keys())]
    problems += [f"only {second.path.name} has {key}" for key in sorted(wanted.keys() - found.keys())]
    for key in sorted(found.keys() & wanted.keys()):
        one, other = found[key], wanted[key]
        if (one.shape, one.dtype) != (other.shape, other.dtype):
            problems.append(
                f"{key} is {one.dtype} {list(one.shape)} in {first.path.name} and {other.dtype} {list(other.shape)} in "
                f"{second.path.name}"
            )
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise CheckpointMismatchError(f"{FROM}: a mean needs the same tensors: {'; '.join(problems[:5])}{more}")
