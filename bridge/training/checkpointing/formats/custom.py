"""Formats of the user's own: save strategies that are registered with megatron-core, or named by their dotted path."""

from __future__ import annotations

import importlib
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from megatron.core.dist_checkpointing.dict_utils import extract_matching_values, nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, is_main_replica
from megatron.core.dist_checkpointing.strategies.base import SaveShardedStrategy

from bridge.training.checkpointing.agreement import Ranks
from bridge.training.checkpointing.errors import CheckpointMismatchError, CheckpointSaveError
from bridge.training.checkpointing.formats import Format, PayloadWrite, PlanSave
from bridge.training.checkpointing.formats.apart import State
from bridge.training.checkpointing.formats.objects import object_sidecar
from bridge.training.checkpointing.formats.options import SaveOptions
from bridge.training.checkpointing.formats.planning import SavePlanning
from bridge.training.checkpointing.formats.prepared import prepare, share_out
from bridge.training.checkpointing.formats.strategies import Backend, has_load_strategy, save_strategy, write_backend
from bridge.training.checkpointing.formats.torch_dist import load, read_common
from bridge.training.checkpointing.integrity import FileRecord
from bridge.training.checkpointing.layout import COMMON, MCORE_METADATA, RUN_CONFIG, TRAIN_STATE
from bridge.training.checkpointing.sidecar import Sidecar


def format_to_save(name: str) -> Format | None:
    """The format whose save strategy `checkpoint.ckpt_format` names; None if there is none.

    Args:
        name: a backend that is registered with megatron-core, or a dotted path. The path's module is imported, so it
            may register a load strategy.

    Raises:
        CheckpointMismatchError: the path leads to nothing that can be imported, or to something else.
    """
    strategy = imported_strategy(name) if "." in name else save_strategy(name)
    return None if strategy is None else _format(strategy.backend, partial(_plan_save, of=strategy))


def format_to_read(backend: str) -> Format | None:
    """The format of checkpoints of a backend, if a load strategy is registered for it; it does not save."""

    def refuse(*arguments: Any, **options: Any) -> NoReturn:
        raise CheckpointSaveError(f"the format {backend!r} was asked for to read a checkpoint, and does not save")

    return _format(backend, refuse) if has_load_strategy(backend) else None


def _format(backend: str, plan_save: PlanSave) -> Format:
    return Format(
        backend,
        plan_save,
        load,
        read_common,
        files=(MCORE_METADATA, COMMON),
        is_shard=lambda file: file not in (MCORE_METADATA, COMMON, RUN_CONFIG, TRAIN_STATE),
        saves_while_planning=True,
    )


def imported_strategy(path: str) -> SaveShardedStrategy:
    """The save strategy at a dotted path: an instance, or a class that needs no arguments.

    Raises:
        CheckpointMismatchError: it cannot be imported, or is something else.
    """
    module, _, name = path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
        strategy = found() if isinstance(found, type) else found
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise CheckpointMismatchError(
            f"checkpoint.ckpt_format: {path!r} cannot be imported ({error}); write module.name of megatron-core's "
            "SaveShardedStrategy, or of a class of such that takes no arguments"
        ) from error
    if not isinstance(strategy, SaveShardedStrategy):
        raise CheckpointMismatchError(
            f"checkpoint.ckpt_format: {path!r} is a {type(strategy).__name__}, and no SaveShardedStrategy of "
            "megatron-core"
        )
    return strategy


def _plan_save(
    state_dict: State,
    directory: Path,
    content_metadata: dict[str, Any],
    ranks: Ranks,
    options: SaveOptions,
    *,
    of: SaveShardedStrategy,
) -> tuple[PayloadWrite, SavePlanning]:
    """Let a strategy save, as `formats.PlanSave` says. Collective.

    A strategy may talk to other ranks, so it does its work here, where all ranks are together.
    """
    planning: SavePlanning = options.strategy or SavePlanning()
    prepared = prepare(state_dict, content_metadata, ranks, planning, options)
    share_out(prepared, options.parallelization_group, ranks)
    planning.note(prepared.structure, prepared.verdict, None)
    sharded, objects = ranks.run("serializing the objects", lambda: _without_objects(prepared.sharded, of))
    begun = time.monotonic()
    ranks.run(f"saving with {of}", lambda: of.save(sharded, directory))
    seconds = time.monotonic() - begun
    files = ranks.first("listing what was saved", lambda: _files_in(directory))
    planned = _Saved(directory, files, Backend(of.backend, of.version))
    return PayloadWrite(planned.write, planned.finish, (*prepared.sidecars, *objects), seconds=seconds), planning


def _without_objects(sharded: dict[str, Any], strategy: Any) -> tuple[dict[str, Any], Sequence[Sidecar]]:
    """What the strategy saves, and the files of this rank's objects if it does not save them."""
    if strategy.can_handle_sharded_objects:
        return sharded, ()
    objects, tensors = extract_matching_values(sharded, lambda item: isinstance(item, ShardedObject))
    written = [item for item in nested_values(objects) if is_main_replica(item.replica_id)]
    return tensors, [object_sidecar(item) for item in written]


def _files_in(directory: Path) -> list[str]:
    return sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file())


@dataclass(frozen=True)
class _Saved:
    """What a strategy has saved."""

    directory: Path
    files: Sequence[str]
    backend: Backend

    def write(self, checksum: str) -> tuple[list[FileRecord | str], Any]:
        """Nothing is left to be written."""
        del checksum
        return [], None

    def finish(self, results: list[Any]) -> list[str]:
        """Force the files to storage and say which format it is; rank 0 only."""
        del results
        for name in self.files:
            descriptor = os.open(self.directory / name, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        write_backend(self.directory, self.backend)
        return [*self.files, MCORE_METADATA]
