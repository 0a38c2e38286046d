"""Planning a `torch_dist` save: who writes which shard into which file, found out once for a structure.

The plan is megatron-core's, made with its planner and its distribution. Its own way to reuse a plan is not used:
it compares nothing but the cached plan with itself, so keys that are new never reach the file. Here every save
compares fingerprints of all ranks' structures first. What is kept of a plan names shards and holds none; a repeated
save takes each from the new state and does nothing else.
"""

from __future__ import annotations

import copy
import io
import logging
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.exchange_utils import determine_main_replica_uniform_distribution
from megatron.core.dist_checkpointing.mapping import (
    CheckpointingException,
    ShardedObject,
    ShardedTensor,
    is_main_replica,
)
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    distribute_main_replicas_with_precomputed_distribution,
)
from megatron.core.dist_checkpointing.strategies.torch import MCoreSavePlanner, mcore_to_pyt_state_dict
from megatron.core.dist_checkpointing.validation import determine_global_metadata, validate_sharding_integrity

from bridge.training.checkpointing.agreement import Ranks
from bridge.training.checkpointing.errors import CheckpointSaveError
from bridge.training.checkpointing.formats.structure import Structure, Verdict, Vote, decide

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PlannedFile:
    """A file that this rank writes. Shards and objects are named by their position in the rank's state."""

    name: str
    objects: tuple[tuple[Any, tuple[int, ...]], ...]
    """torch's WriteItems, each with the objects that are saved together under one key."""
    tensors: tuple[tuple[Any, int], ...]


@dataclass(frozen=True)
class Plan:
    """This rank's part of a plan. Holds no values and no directory."""

    job: str
    """The fingerprint of the ranks' structures that it was made for."""
    files: tuple[PlannedFile, ...]
    metadata: Any
    """The global metadata on rank 0, without what a write adds to it; None elsewhere."""


class SavePlanning:
    """What is kept between the saves of a run: the structure of the last one, and its plan where it may be reused."""

    def __init__(self) -> None:
        self._structure: Structure | None = None
        self._validated: str | None = None
        self._plan: Any | None = None

    @property
    def plan(self) -> Any | None:
        """The plan to use again, as far as the verdict allows it: of the format's own kind, with its `job`."""
        return self._plan

    def compare(self, structure: Structure, ranks: Ranks, *, reuse: bool) -> Verdict:
        """Compare this save's structure with the last one's, on all ranks; what has changed is logged. Collective.

        With `reuse`, the verdict may be to use the kept plan again.
        """
        earlier = self._structure
        change = "" if earlier is None or structure == earlier else structure.change_from(earlier)
        planned = self._plan.job if reuse and self._plan is not None else None
        vote = Vote(structure.fingerprint(), self._validated, planned, change)
        verdict = decide(ranks.gather_all("comparing the structure with that of the save before", vote))
        if verdict.changes and ranks.is_first:
            logger.log(
                logging.WARNING if reuse else logging.INFO,
                "the structure of what is saved has changed since the save before; planning anew (%s)",
                "; ".join(verdict.changes),
            )
        return verdict

    def remember(self, structure: Structure, verdict: Verdict, plan: Any | None) -> None:
        """Keep what a successful planning has found; `plan` is None where the next save must not use it."""
        self._structure, self._validated, self._plan = structure, verdict.job, plan


def ranks_of(group: Any | None) -> tuple[int, ...] | None:
    """The global ranks of a process group; None without one."""
    return None if group is None else tuple(dist.get_process_group_ranks(group))


def make_plan(
    sharded: dict[str, Any],
    directory: Path,
    ranks: Ranks,
    *,
    job: str,
    writers_per_rank: int,
    group: Any | None,
    validate: bool,
) -> tuple[Plan, FileSystemWriterAsync]:
    """Plan a save and stage it: share out the writing, exchange all ranks' plans, make the metadata. Collective.

    Args:
        sharded: this rank's shards; their replica ids are changed to what this rank writes.
        directory: an existing directory that only this save uses.
        ranks: all ranks.
        job: the fingerprint of the ranks' structures.
        writers_per_rank: files of each rank.
        group: replicas within this group share the writing; None: the main replica writes.
        validate: check what the sharing out has made of the sharding.

    Returns:
        The plan, and the writer that holds this rank's buckets.

    Raises:
        CheckpointSaveError: the shards of the ranks do not make up whole tensors.
    """
    if group is not None:
        distribution = ranks.run(
            "sharing out the writing", lambda: determine_main_replica_uniform_distribution(sharded, group)
        )
        ranks.run(
            "taking a share of the writing",
            lambda: distribute_main_replicas_with_precomputed_distribution(sharded, group, distribution),
        )
        if validate:
            validate_sharding(sharded, None, ranks)
    planner, writer, local = ranks.run(
        "planning what this rank writes", lambda: _plan_locally(sharded, directory, writers_per_rank, ranks)
    )
    gathered = ranks.gather_first("collecting what every rank writes", local)
    metadata = ranks.run("joining the plans of all ranks", lambda: _join_plans(planner, gathered))

    def stage() -> Plan:
        items = writer.prepare_decentralized_global_plan(planner.create_decentralized_global_plan(local))
        # megatron-core would start a spawned server process here to carry results between processes; they
        # travel through our own pipes, so any object that is not None keeps it from doing that.
        filesystem_async._results_queue = filesystem_async._results_queue or object()
        writer.prepare_write_data(planner.finish_plan(items), planner)
        files = _files_of(writer.write_buckets or [], list(nested_values(sharded)))
        _to_host(writer)
        return Plan(job, files, metadata)

    return ranks.run("staging what this rank writes", stage), writer


def reuse_plan(plan: Plan, sharded: dict[str, Any], directory: Path, ranks: Ranks) -> FileSystemWriterAsync:
    """Stage the values that `sharded` has now by a plan that was made for its structure. Collective."""

    def stage() -> FileSystemWriterAsync:
        writer = FileSystemWriterAsync(directory)
        writer.set_up_storage_writer(ranks.is_first)
        state = list(nested_values(sharded))
        writer.write_buckets = [
            (
                str(directory / file.name),
                file.name,
                (
                    [(item, _serialized([state[place] for place in places])) for item, places in file.objects],
                    [(item, _stored(state[place])) for item, place in file.tensors],
                ),
            )
            for file in plan.files
        ]
        _to_host(writer)
        return writer

    return ranks.run("staging what this rank writes", stage)


def metadata_of(plan: Plan) -> Any:
    """The metadata for one save. A copy: the writer adds to it, and the plan may serve again."""
    return copy.copy(plan.metadata)


def validate_sharding(sharded: dict[str, Any], common: dict[str, Any] | None, ranks: Ranks) -> None:
    """Check that the main replicas of all ranks make up whole tensors, once each. Collective.

    Args:
        sharded: this rank's shards.
        common: the state that is the same on all ranks, compared too (differences are logged); None: not compared.
        ranks: all ranks.

    Raises:
        CheckpointSaveError: they do not.
    """

    def validate() -> None:
        metadata = determine_global_metadata(sharded)[1]
        try:
            validate_sharding_integrity(metadata, common_state_dict=common)
        except (CheckpointingException, AssertionError) as error:
            raise CheckpointSaveError(f"the shards of the ranks do not make up whole tensors: {error}") from error

    ranks.run("validating the sharding", validate)


def _plan_locally(
    sharded: dict[str, Any], directory: Path, writers_per_rank: int, ranks: Ranks
) -> tuple[MCoreSavePlanner, FileSystemWriterAsync, Any]:
    """The planner, which knows this save's values, the writer, which knows its directory, and this rank's plan."""
    written = defaultdict(list)
    for item in nested_values(sharded):
        if is_main_replica(item.replica_id):
            written[_key(item)].append(item)
    planner = MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False)
    planner.set_up_planner(mcore_to_pyt_state_dict(written), is_coordinator=ranks.is_first)
    writer = FileSystemWriterAsync(directory, thread_count=writers_per_rank)
    writer.set_up_storage_writer(ranks.is_first)
    return planner, writer, writer.prepare_local_plan(planner.create_local_plan())


def _key(item: Any) -> str:
    return str(item.unique_key if isinstance(item, ShardedObject) else item.key)


def _join_plans(planner: MCoreSavePlanner, plans: list[Any] | None) -> Any:
    """The metadata of the whole checkpoint from all ranks' plans; None where there are none, beyond rank 0."""
    if plans is None:
        return None
    try:
        _, metadata = planner.create_global_plan(plans)
    except ValueError as error:
        raise CheckpointSaveError(f"the plans of the ranks do not make up whole tensors: {error}") from error
    metadata.all_local_plans = plans  # as megatron-core writes it
    return metadata


def _files_of(buckets: list[Any], state: list[Any]) -> tuple[PlannedFile, ...]:
    """The buckets with places in the rank's state where they have values."""
    objects: dict[str, list[int]] = defaultdict(list)
    tensors: dict[tuple[str, tuple[int, ...]], int] = {}
    for place, item in enumerate(state):
        if not is_main_replica(item.replica_id):
            continue
        if isinstance(item, ShardedObject):
            objects[_key(item)].append(place)
        else:
            tensors[_key(item), tuple(item.global_offset)] = place
    return tuple(
        PlannedFile(
            name,
            tuple((item, tuple(objects[item.index.fqn])) for item, _ in of_objects),
            tuple((item, tensors[item.index.fqn, tuple(item.index.offset)]) for item, _ in of_tensors),
        )
        for _, name, (of_objects, of_tensors) in buckets
    )


def _serialized(objects: list[ShardedObject]) -> io.BytesIO:
    """Objects of one key as megatron-core writes them."""
    data = io.BytesIO()
    torch.save([item.data for item in objects], data)
    return data


def _stored(shard: ShardedTensor) -> torch.Tensor:
    """A shard's values in the shape and layout in which megatron-core writes them."""
    values: torch.Tensor = shard.data.detach()
    if (shard.prepend_axis_num or shard.flattened_range is not None) and shard.has_regular_grid:
        values = values.contiguous().view((1,) * shard.prepend_axis_num + tuple(shard.local_shape))
    # torch.save writes the whole storage that a view belongs to.
    is_part = values.untyped_storage().size() != values.numel() * values.itemsize
    return values.clone() if is_part and values.device.type == "cpu" else values


def _to_host(writer: FileSystemWriterAsync) -> None:
    """Copy what the writer's buckets hold on a device to host memory."""
    buckets = writer.write_buckets or []
    if any(tensor.device.type != "cpu" for bucket in buckets for _, tensor in bucket[2][1]):
        writer.write_buckets = FileSystemWriterAsync.preload_tensors(buckets, non_blocking=True)
