"""Reading torch DCP files into the tensors of one rank, without running anything that they hold.

Nothing here waits for another rank inside a step: torch's planners and readers are local, and only its own load puts
collectives around them.
"""

from __future__ import annotations

import logging
import pickle
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, ReadItem
from torch.distributed.tensor import DTensor

from bridge.training.checkpointing.agreement import Ranks
from bridge.training.checkpointing.errors import CheckpointDamagedError, CheckpointError, CheckpointMismatchError
from bridge.training.checkpointing.formats.failures import is_damage, unreadable
from bridge.training.checkpointing.io.strategy import IoBackend, direct_reading
from bridge.training.checkpointing.safety.safe_globals import describe, load_torch_bytes
from bridge.training.checkpointing.safety.safe_reading import _Reader

logger = logging.getLogger(__name__)

_NAMED = 5
"""Keys that a message names."""
_READ = "read"
"""The step in which what garbled bytes raise means damage; see `failures.is_damage`."""


@dataclass(frozen=True)
class Values:
    """What was read beside the tensors that were read into."""

    objects: dict[str, Any]
    missing: frozenset[str]
    """Keys of the checkpoint, in the sections that were asked for, that no rank requested."""
    unexpected: frozenset[str]
    """Keys that this rank requested and that are not in the checkpoint; left as they were."""


def read_values(
    tensors: Mapping[str, torch.Tensor],
    objects: Iterable[str],
    directory: Path,
    metadata: Metadata,
    ranks: Ranks,
    *,
    strictness: str,
    io_backend: IoBackend = "direct",
) -> Values:
    """Read into tensors, and read objects. Collective; no tensor changes before all ranks know that theirs fit.

    Args:
        tensors: what to read into, by key; a DTensor knows which part of the whole it holds.
        objects: keys of the checkpoint whose values are returned. Under one of a tensor, a whole tensor on the CPU is.
        directory: the checkpoint.
        metadata: its contents.
        ranks: all ranks.
        strictness: one of megatron-core's `StrictHandling` values.
        io_backend: who reads the files.

    Raises:
        CheckpointError: it is damaged, unsafe, or does not fit. Every rank raises.
    """
    entries = metadata.state_dict_metadata
    sections = {key.split(".")[0] for key in tensors}
    objects = list(objects)
    left = {key for key in entries.keys() - tensors.keys() - set(objects) if key.split(".")[0] in sections}
    everyone = ranks.gather_all("comparing with what the checkpoint holds", frozenset(left))
    missing = frozenset.intersection(*everyone)
    unexpected = frozenset(tensors.keys() - entries.keys())

    def compare() -> dict[str, torch.Tensor]:
        _compare_keys(directory, tensors, missing, unexpected, strictness)
        found = {key: tensor for key, tensor in tensors.items() if key in entries}
        for key, tensor in found.items():
            _require_same_form(key, tensor, entries[key])
        return found

    found = ranks.run("comparing with the checkpoint", compare)
    if ranks.is_first:
        _log_differences(missing, unexpected, strictness)
    whole = {key: _empty(entry) for key in objects if isinstance(entry := entries[key], TensorStorageMetadata)}
    plain = [key for key in objects if key not in whole]
    read = ranks.run(
        "planning what to read",
        _typed(directory, "plan", lambda: _plan({**found, **whole}, plain, directory, metadata, io_backend)),
    )
    values = ranks.run("reading the checkpoint", _typed(directory, _READ, read))
    return Values({**values, **whole}, missing, unexpected)


def read_objects(keys: Iterable[str], directory: Path, metadata: Metadata) -> dict[str, Any]:
    """The values of objects. Local.

    Raises:
        CheckpointError: one is damaged or not allowed.
    """
    plan = _typed(directory, _READ, lambda: _plan({}, list(keys), directory, metadata))
    values: dict[str, Any] = _typed(directory, _READ, plan())()
    return values


def _plan(
    tensors: Mapping[str, torch.Tensor],
    objects: list[str],
    directory: Path,
    metadata: Metadata,
    io_backend: IoBackend = "direct",
) -> Callable[[], dict[str, Any]]:
    """Check where everything lies and read the objects; what is returned reads the tensors. Local."""
    read_tensors = direct_reading(metadata, directory) if io_backend == "direct" else None
    planner, reader = _Planner(), _PlainReader(directory, metadata, {}, [], read_tensors)
    planner.set_up_planner({**tensors, **dict.fromkeys(objects)}, metadata, is_coordinator=True)
    reader.set_up_storage_reader(metadata, is_coordinator=True)
    plan = planner.create_local_plan()
    _require_complete(plan, tensors, directory)
    plan = planner.finish_plan(reader.prepare_local_plan(plan))

    def read() -> dict[str, Any]:
        reader.read_data(plan, planner).wait()
        return planner.objects

    return read


class _Planner(DefaultLoadPlanner):
    """torch's planner for a flat state dict, with objects that the reader has read."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.objects: dict[str, Any] = {}

    def place_object(self, item: ReadItem, value: Any) -> None:
        """Take over an object."""
        self.objects[item.dest_index.fqn] = value


class _PlainReader(_Reader):
    """The safe reader, for objects that are stored one by one."""

    def _read_objects(self, items: list[ReadItem], path: Path) -> None:
        if not items:
            return
        with path.open("rb") as file:
            for item in items:
                place, key = self._place_of(item), item.storage_index.fqn
                file.seek(place.offset)
                data = file.read(place.length)
                self._objects[item.storage_index] = load_torch_bytes(data, f"{path} ({key})", "object")


def _typed(directory: Path, step: str, action: Callable[[], Any]) -> Callable[[], Any]:
    """`action`, with what torch raises for a damaged checkpoint or one that does not fit as one of our errors."""

    def run() -> Any:
        try:
            return action()
        except CheckpointError:
            raise
        except (pickle.UnpicklingError, RuntimeError, ValueError, OSError, KeyError, TypeError, EOFError) as error:
            if is_damage(error, step):
                raise unreadable(directory, describe(error)) from error
            raise CheckpointMismatchError(
                f"the checkpoint in {directory} does not fit this run: {describe(error)}"
            ) from error

    return run


def _compare_keys(
    directory: Path,
    tensors: Mapping[str, torch.Tensor],
    missing: frozenset[str],
    unexpected: frozenset[str],
    strictness: str,
) -> None:
    drops = strictness.startswith(("log_", "return_", "ignore_"))
    problems = []
    sections = {key.split(".")[0] for key in tensors}
    if unexpected and not drops:
        problems.append(f"it has no {_listed(unexpected)}")
    else:
        # What begins with nothing of a section is not a section that was loaded in part.
        absent = [section for section in sections if all(key in unexpected for key in tensors if _in(key, section))]
        problems += [f"it has nothing of the section {section!r} that this run asks for" for section in absent]
    if missing and strictness == "raise_all":
        problems.append(f"this run has no {_listed(missing)}")
    if problems:
        raise CheckpointMismatchError(f"the checkpoint in {directory} does not fit this run: {'; '.join(problems)}")


def _in(key: str, section: str) -> bool:
    return key.split(".")[0] == section


def _log_differences(missing: frozenset[str], unexpected: frozenset[str], strictness: str) -> None:
    if strictness.startswith("ignore_"):
        return
    if unexpected:
        logger.warning("LOADED IN PART: the checkpoint has no %s; they stay as they are", _listed(unexpected))
    if missing:
        logger.warning("in the checkpoint but not in this run: %s", _listed(missing))


def _listed(keys: frozenset[str]) -> str:
    more = f" and {len(keys) - _NAMED} more" if len(keys) > _NAMED else ""
    return ", ".join(sorted(keys)[:_NAMED]) + more


def _require_same_form(key: str, tensor: torch.Tensor, entry: Any) -> None:
    if isinstance(entry, BytesStorageMetadata):
        raise CheckpointMismatchError(f"{key!r} is a tensor in this run, and in the checkpoint it is none")
    if tuple(entry.size) != tuple(tensor.shape):
        raise CheckpointMismatchError(
            f"{key!r} has the shape {list(entry.size)} in the checkpoint and {list(tensor.shape)} in this run"
        )
    if entry.properties.dtype != tensor.dtype:
        raise CheckpointMismatchError(
            f"{key!r} has the type {entry.properties.dtype} in the checkpoint and {tensor.dtype} in this run"
        )


def _empty(entry: TensorStorageMetadata) -> torch.Tensor:
    return torch.empty(entry.size, dtype=entry.properties.dtype)


def _require_complete(plan: LoadPlan, tensors: Mapping[str, torch.Tensor], directory: Path) -> None:
    """torch leaves alone what no chunk of the checkpoint covers."""
    planned = dict.fromkeys(tensors, 0)
    for item in plan.items:
        if item.type is not LoadItemType.BYTE_IO:
            planned[item.dest_index.fqn] += prod(item.lengths)
    for key, tensor in tensors.items():
        wanted = (tensor.to_local() if isinstance(tensor, DTensor) else tensor).numel()
        if planned[key] != wanted:
            raise CheckpointDamagedError(
                f"the checkpoint in {directory} is damaged: it holds {planned[key]} of the {wanted} elements of "
                f"{key!r} that this rank needs"
            )
