"""The `zarr` format: each tensor a Zarr array in a directory of its own, under the name of its key.

    iter_0000010/
      decoder.layers.mlp.linear_fc1.weight/zarr.json   shape, type, chunks: Zarr v3
      decoder.layers.mlp.linear_fc1.weight/c/0/0/0     a chunk: values in C order, little-endian, not compressed
      rng_state/shard_0.0_1.2.pt                       an object
      common.pt  metadata.json                         as in `torch_dist`

It registers itself with megatron-core as the backend `zarr`, so megatron-core's own `save` and `load` have it too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, is_main_replica
from megatron.core.dist_checkpointing.strategies.base import (
    SaveShardedStrategy,
    StrategyAction,
    default_strategies,
    register_default_strategy,
)

from bridge.training.checkpointing.agreement import Ranks
from bridge.training.checkpointing.files import sync_directory, write_file
from bridge.training.checkpointing.formats import Format, PayloadWrite
from bridge.training.checkpointing.formats.apart import State
from bridge.training.checkpointing.formats.objects import is_object_file, object_sidecar
from bridge.training.checkpointing.formats.options import SaveOptions
from bridge.training.checkpointing.formats.planning import SavePlanning
from bridge.training.checkpointing.formats.prepared import prepare, share_out
from bridge.training.checkpointing.formats.strategies import Backend, write_backend
from bridge.training.checkpointing.formats.torch_dist import load, read_common
from bridge.training.checkpointing.formats.zarr_arrays import ArrayWrite, write_arrays
from bridge.training.checkpointing.formats.zarr_metadata import V2, V3
from bridge.training.checkpointing.formats.zarr_planning import make_plan
from bridge.training.checkpointing.formats.zarr_reading import (
    BACKEND,
    LEGACY_VERSION,
    VERSION,
    TensorStoreLoadShardedStrategy,
    ZarrLoadShardedStrategy,
)
from bridge.training.checkpointing.integrity import FileRecord
from bridge.training.checkpointing.layout import COMMON, DATALOADER_DIRECTORY, MCORE_METADATA, TOKENIZER_DIRECTORY
from bridge.training.checkpointing.sidecar import Sidecar

__all__ = [
    "FORMAT",
    "TensorStoreLoadShardedStrategy",
    "ZarrLoadShardedStrategy",
    "ZarrSaveShardedStrategy",
    "plan_save",
    "register_default_zarr_strategies",
]


def plan_save(
    state_dict: State,
    directory: Path,
    content_metadata: dict[str, Any],
    ranks: Ranks,
    options: SaveOptions,
) -> tuple[PayloadWrite, SavePlanning]:
    """Plan a save, as `formats.PlanSave` says. Collective.

    The values are not copied: nothing may change them before the write has ended, which has to run in this process.
    """
    planning: SavePlanning = options.strategy or SavePlanning()
    prepared = prepare(state_dict, content_metadata, ranks, planning, options)
    verdict, plan = prepared.verdict, planning.plan
    if plan is None or not verdict.planned:
        share_out(prepared, options.parallelization_group, ranks)
        plan = make_plan(prepared.state, ranks, job=verdict.job)
    planning.note(prepared.structure, verdict, plan)
    state = prepared.state
    objects = ranks.run("serializing the objects", lambda: _objects(state))
    planned = _Planned(directory, plan.writes(state), options.writers_per_rank)
    return PayloadWrite(planned.write, planned.finish, (*prepared.sidecars, *objects)), planning


def _objects(state: Sequence[Any]) -> tuple[Sidecar, ...]:
    """The files of the objects that this rank writes."""
    return tuple(
        object_sidecar(item) for item in state if isinstance(item, ShardedObject) and is_main_replica(item.replica_id)
    )


@dataclass(frozen=True)
class _Planned:
    """One rank's part of a save."""

    directory: Path
    writes: Sequence[ArrayWrite]
    writers: int

    def write(self, checksum: str) -> tuple[list[FileRecord | str], Any]:
        """Write and sync this rank's chunks; return their names, as the library writes them itself."""
        del checksum
        return list(write_arrays(self.directory, self.writes, self.writers)), None

    def finish(self, results: list[Any]) -> list[str]:
        """Say which format it is; rank 0 only."""
        del results
        write_backend(self.directory, Backend(BACKEND, VERSION))
        return [MCORE_METADATA]


class ZarrSaveShardedStrategy(SaveShardedStrategy):  # type: ignore[misc]
    """megatron-core's save strategy for the backend `zarr`."""

    def __init__(self, backend: str = BACKEND, version: int = VERSION) -> None:
        super().__init__(backend, version)

    @property
    def can_handle_sharded_objects(self) -> bool:
        """Objects lie beside the arrays."""
        return True

    def save(self, sharded_state_dict: Any, checkpoint_dir: Any) -> None:
        """Save the shards. Collective over all ranks.

        Raises:
            CheckpointSaveError: a rank cannot write. Every rank raises.
        """
        ranks, directory = Ranks.current(), Path(checkpoint_dir)
        state = list(nested_values(sharded_state_dict))
        plan = make_plan(state, ranks, job="")

        def write() -> None:
            written = list(write_arrays(directory, plan.writes(state), writers=1))
            for sidecar in _objects(state):
                path = directory / sidecar.name
                path.parent.mkdir(exist_ok=True)
                write_file(path, sidecar.data)
                written.append(sidecar.name)
            # Nobody else does it where megatron-core, and not this program, makes the checkpoint.
            for parent in {parent for name in written for parent in PurePath(name).parents}:
                sync_directory(directory / parent)

        ranks.run("writing the arrays", write)


def _is_shard(name: str) -> bool:
    """Whether a file is a chunk of an array."""
    directory, _, file = name.partition("/")
    is_beside = directory in (TOKENIZER_DIRECTORY, DATALOADER_DIRECTORY)
    return bool(file) and not is_beside and file not in (V3, V2) and not is_object_file(name)


def register_default_zarr_strategies() -> None:
    """Register the strategies with megatron-core, where a program has not registered others for the backend."""
    load_strategy, save_strategy = ZarrLoadShardedStrategy(), ZarrSaveShardedStrategy()
    for action, version, ours in (
        (StrategyAction.LOAD_SHARDED, LEGACY_VERSION, load_strategy),
        (StrategyAction.LOAD_SHARDED, VERSION, load_strategy),
        (StrategyAction.SAVE_SHARDED, VERSION, save_strategy),
    ):
        if (BACKEND, version) not in default_strategies[action.value]:
            register_default_strategy(action, BACKEND, version, ours)


register_default_zarr_strategies()

FORMAT = Format(
    BACKEND,
    plan_save,
    load,
    read_common,
    files=(MCORE_METADATA, COMMON),
    is_shard=_is_shard,
)
