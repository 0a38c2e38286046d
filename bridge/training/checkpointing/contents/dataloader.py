"""The data iterator's part: one file for each data-parallel rank.

An iterator takes part by its methods. One with `save_state()` is saved. To be restored it needs
`load_state(state)`, and to be restored under another data-parallel size `reshard_state(states, rank, size)`
as well, with the states of all ranks that saved, in order, and its own place. A state is made of what
`torch.load(weights_only=True)` reads: numbers, text, bytes, tensors, and lists, tuples and dictionaries of them.
"""

from __future__ import annotations

import io
import pickle
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bridge.training.checkpointing.additions import add_file
from bridge.training.checkpointing.agreement import Ranks
from bridge.training.checkpointing.errors import CheckpointDamagedError, CheckpointSaveError
from bridge.training.checkpointing.layout import DATALOADER_DIRECTORY, dataloader_state_name, iteration_name
from bridge.training.checkpointing.parallel import default_pg_collection
from bridge.training.checkpointing.safety.safe_globals import load_torch_bytes, load_torch_file
from bridge.training.checkpointing.sidecar import Sidecar, torch_bytes

_KEY = "dataloader_state_dict"
_FILE_NAME = re.compile(r"train_dataloader_dprank(\d{3,})\.pt")


@dataclass(frozen=True)
class DataloaderState:
    """What a checkpoint holds for the data iterator of one data-parallel rank of this run."""

    states: tuple[Any, ...]
    """This rank's own state; where the size has changed, those of all ranks that saved, in order."""
    saved_size: int
    """Data-parallel ranks that saved."""
    rank: int
    """This data-parallel rank."""
    size: int
    """Data-parallel ranks of this run."""

    @property
    def size_changed(self) -> bool:
        """Whether no state is this rank's own."""
        return self.saved_size != self.size


def maybe_save_dataloader_state(
    model: Any,
    train_iterator: Any,
    iteration: int,
    dataloader_save_path: str | None = None,
    *,
    pg_collection: Any | None = None,
) -> None:
    """Save the data iterators' state, if they have any, beside or without a checkpoint. Collective.

    `save_checkpoint` does this by itself; the function is for programs that write checkpoints of their own.
    The files are `<dataloader_save_path>/iter_N/dataloader_state/train_dataloader_dprankNNN.pt`, one for each
    data-parallel rank: with the directory of checkpoints as the path, they lie where a load looks for them.

    Args:
        model: accepted for compatibility; the ranks come from `pg_collection`.
        train_iterator: the data iterator, or one for each model chunk, or None; saved if it has `save_state`.
        iteration: N.
        dataloader_save_path: directory of checkpoints; None saves nothing.
        pg_collection: process groups; by default those of megatron-core's parallel_state.

    Raises:
        CheckpointError: a state cannot be collected or written, or the checkpoint is published with another.
            Every rank raises.
    """
    del model
    if dataloader_save_path is None:
        return
    directory = Path(dataloader_save_path) / iteration_name(iteration)
    groups = pg_collection or default_pg_collection()

    def save() -> None:
        sidecar = dataloader_sidecar(train_iterator, groups)
        if sidecar is not None:
            add_file(directory, sidecar.name, sidecar.data)

    Ranks.current().run("saving the state of the data iterators", save)


def dataloader_sidecar(train_iterator: Any | None, pg_collection: Any) -> Sidecar | None:
    """Capture the iterator's state on the one rank of each data-parallel rank that saves it.

    Args:
        train_iterator: the data iterator, or one for each model chunk; those with a `save_state` method are
            saved. The chunks of a rank see the same stream, so the first stands for all.
        pg_collection: the process groups, with `tp`, `pp`, `cp` and `dp`.

    Returns:
        The file, or None on ranks that do not save and for iterators that have no state.

    Raises:
        CheckpointSaveError: the state could not be loaded again.
    """
    groups = pg_collection
    if groups.tp.rank() != 0 or groups.pp.rank() != 0 or groups.cp.rank() != 0:
        return None
    for candidate in iterators_of(train_iterator):
        save_state = getattr(candidate, "save_state", None)
        if save_state is not None:
            data = torch_bytes({_KEY: save_state()})
            _require_loadable(data, candidate)
            return Sidecar(dataloader_state_name(groups.dp.rank()), data)
    return None


def iterators_of(train_iterator: Any | None) -> list[Any]:
    """The iterators of a rank, each once: none, one, or those of its model chunks."""
    given: Iterable[Any] = train_iterator if isinstance(train_iterator, (list, tuple)) else [train_iterator]
    return list({id(iterator): iterator for iterator in given if iterator is not None}.values())


def saved_data_parallel_size(checkpoint: Path) -> int:
    """How many data-parallel ranks saved their iterator state in a checkpoint; 0 if none did."""
    directory = checkpoint / DATALOADER_DIRECTORY
    if not directory.is_dir():
        return 0
    matches = (_FILE_NAME.fullmatch(entry.name) for entry in directory.iterdir())
    return max((int(match[1]) + 1 for match in matches if match), default=0)


def read_dataloader_state(checkpoint: Path, data_parallel_rank: int, data_parallel_size: int) -> DataloaderState:
    """Read what the data iterator of a data-parallel rank needs to go on.

    Args:
        checkpoint: an `iter_N` directory that holds the state of at least one rank.
        data_parallel_rank: this rank.
        data_parallel_size: ranks of this run.

    Raises:
        CheckpointDamagedError: a file is absent or unreadable.
    """
    saved_size = saved_data_parallel_size(checkpoint)
    needed = [data_parallel_rank] if saved_size == data_parallel_size else range(saved_size)
    states = tuple(_read(checkpoint / dataloader_state_name(rank)) for rank in needed)
    return DataloaderState(states, saved_size, data_parallel_rank, data_parallel_size)


def parse_dataloader_state(data: bytes, place: str) -> Any:
    """One rank's state from the bytes of its file; `place` says where they come from, for messages.

    Raises:
        CheckpointDamagedError: they are unreadable.
    """
    try:
        return load_torch_bytes(data, place, "data iterator state")[_KEY]
    except (KeyError, TypeError) as error:
        raise CheckpointDamagedError(f"{place} is not a readable data iterator state: {error!r}") from error


def _read(path: Path) -> Any:
    try:
        return load_torch_file(path, "data iterator state")[_KEY]
    except (KeyError, TypeError, FileNotFoundError) as error:
        raise CheckpointDamagedError(f"{path} is not a readable data iterator state: {error!r}") from error


def _require_loadable(data: bytes, iterator: Any) -> None:
    """Find out now, not at the resume, that a state holds what loading refuses."""
    try:
        torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError) as error:
        raise CheckpointSaveError(
            f"save_state() of the data iterator {type(iterator).__name__} gave what a load would refuse: use numbers, "
            "text, tensors, lists, tuples and dictionaries, or allow its classes with "
            f"torch.serialization.add_safe_globals: {str(error).splitlines()[0]}"
        ) from error
