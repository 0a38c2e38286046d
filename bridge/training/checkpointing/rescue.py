"""From memory to disk without the run: what dead trainers left with their keepers becomes a persistent checkpoint.

One process does it, and needs no model: snapshots say which part of which tensor they hold. It reads the snapshots of
all ranks where they lie, takes each shard once, and saves the whole as a run of one rank would. So the checkpoint
loads like one that the run has saved itself, under other parallel sizes too.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, is_main_replica
from megatron.core.dist_checkpointing.utils import _sharded_object_id, _sharded_tensor_shard_id
from torch._C._distributed_c10d import HashStore

from bridge.training.checkpointing import commit, ownership, recovery
from bridge.training.checkpointing.agreement import Ranks
from bridge.training.checkpointing.disk import as_text, available_bytes, state_bytes
from bridge.training.checkpointing.errors import (
    CheckpointDamagedError,
    CheckpointError,
    CheckpointNotFoundError,
    CheckpointSaveError,
    DirectoryInUseError,
    NotEnoughSpaceError,
)
from bridge.training.checkpointing.events.kinds import CheckpointRescued
from bridge.training.checkpointing.events.recording import record_alone
from bridge.training.checkpointing.formats import torch_dist
from bridge.training.checkpointing.formats.options import SaveOptions
from bridge.training.checkpointing.layout import iteration_name, list_checkpoints
from bridge.training.checkpointing.marks import is_marked
from bridge.training.checkpointing.parallel import Layout
from bridge.training.checkpointing.safety.safe_globals import allow
from bridge.training.checkpointing.sidecar import Sidecar
from bridge.training.checkpointing.starts import Starts, lost_starts, numbers_of_starts, read_starts
from bridge.training.checkpointing.tiers import snapshot
from bridge.training.checkpointing.tiers.memory.keeper_readers import OpenSnapshot, release_session, stored_snapshots
from bridge.training.checkpointing.tiers.record import CONTENT_METADATA, KEY, SnapshotRecord
from bridge.training.checkpointing.tiers.session import SESSION, session_of
from bridge.training.checkpointing.trackers import read_tracker
from bridge.training.checkpointing.transaction import Committed, Save, SaveTarget

logger = logging.getLogger(__name__)

SETTING = "SAVE_DIR"
"""What messages call the directory: it is named on a command line."""


@dataclass(frozen=True)
class Rescued:
    """What came of a rescue."""

    iteration: int
    """The newest one of which every rank's snapshot is in memory."""
    tracked: int | None
    """The one that the tracker named before; None without a tracker that names one."""
    committed: Committed | None
    """The published checkpoint; None where it would have been no newer than the tracked one."""


@dataclass(frozen=True)
class Held:
    """A snapshot in memory, described."""

    iteration: int
    owner: int
    """The rank that it is of."""
    world_size: int
    """Ranks of the run that saved it."""
    save_id: str
    """The same in all snapshots of one save."""


def rescue(save_dir: Path, *, force: bool = False, safe_globals: Sequence[str] = ()) -> Rescued:
    """Publish the newest complete in-memory snapshot of a save directory's run as a persistent checkpoint there.

    Call it in a process of its own while the run's trainers are dead. The directory stays claimed until the process
    ends. Keepers and what they hold stay as they are.

    Args:
        save_dir: `checkpoint.save` of the run.
        force: do so even if the tracker names the same or a later iteration; it names the rescued one afterwards.
        safe_globals: further classes, as dotted paths, that snapshots may hold: `checkpoint.safe_globals` of the run.

    Raises:
        CheckpointNotFoundError: no iteration is complete in the memory of this machine; says which ranks' snapshots
            are missing.
        DirectoryInUseError: the run, or another one that saves in `save_dir`, is alive.
        NotEnoughSpaceError: the file system has too little room.
        CheckpointError: the checkpoint cannot be written. What was in `save_dir` is as before.
    """
    started = time.monotonic()
    allow(list(safe_globals))
    session = _session_in(save_dir)
    _take(save_dir)
    named, starts = _tracked(save_dir, force), _starts(save_dir, force)
    with _process_group_of_one() as ranks, stored_snapshots(session) as found:
        described = _described(found, starts)
        if not force:
            require_known({record.start for _, (record, _) in described}, starts, save_dir)
        states = newest_complete(described, str(save_dir))
        iteration = states[0][0].iteration
        if named is not None and iteration <= named and not force:
            return Rescued(iteration, named, None)
        committed = _publish(states, save_dir, ranks, started)
    event = CheckpointRescued(
        iteration=iteration,
        tier="persistent",
        checkpoint_format="torch_dist",
        total_bytes=committed.total_bytes,
        path=str(committed.path),
        seconds=time.monotonic() - started,
    )
    record_alone(event, committed.path)
    return Rescued(iteration, named, committed)


def _tracked(save_dir: Path, force: bool) -> int | None:
    """The iteration of the sound checkpoint that the tracker names, if any. With `force` it need not be readable."""
    try:
        tracked = read_tracker(list_checkpoints(save_dir))
    except CheckpointError as error:
        if not force:
            raise
        logger.warning("going on without the tracker: %s", error)
        return None
    if tracked is None or tracked.release or is_marked(save_dir / iteration_name(tracked.iteration)):
        return None
    return tracked.iteration


def _starts(save_dir: Path, force: bool) -> Starts:
    """What the run has left behind. With `force` it need not be known."""
    try:
        return read_starts(save_dir)
    except (CheckpointDamagedError, OSError) as error:
        if not force:
            raise _unknown(save_dir, str(error)) from error
        logger.warning("going on without what the run has noted of its starts: %s", error)
        return Starts()


def require_known(snapshots: set[int], starts: Starts, save_dir: Path) -> None:
    """Refuse to choose among the snapshots of a run whose notes of its starts are lost.

    Args:
        snapshots: the numbers of the starts that they are of. If all that the run has left is of one start, that does
            not matter.
        starts: what is noted in `save_dir`.

    Raises:
        CheckpointDamagedError: it matters.
    """
    if not starts.entries and len((snapshots | numbers_of_starts(save_dir)) - {0}) > 1:
        raise _unknown(save_dir, lost_starts(save_dir))


def _unknown(save_dir: Path, problem: str) -> CheckpointDamagedError:
    return CheckpointDamagedError(
        f"it is not known which snapshots the run of {save_dir} has left behind by going back; with --force the "
        f"newest is taken: {problem}"
    )


def end_keepers(save_dir: Path) -> list[int]:
    """End the keepers of a save directory's run on this machine and free their memory. Return their ranks.

    Raises:
        CheckpointError: one does not answer.
    """
    return release_session(_session_in(save_dir))


def newest_complete(found: Sequence[tuple[Held, Any]], save_dir: str) -> list[Any]:
    """The snapshots of the newest iteration of which every rank's is there, by rank; of copies the first.

    Args:
        found: each snapshot's description, and what is to be returned for it.
        save_dir: for messages.

    Raises:
        CheckpointNotFoundError: no iteration is complete.
    """
    by_save: dict[tuple[int, str], dict[int, tuple[Held, Any]]] = {}
    for held, value in found:
        by_save.setdefault((held.iteration, held.save_id), {}).setdefault(held.owner, (held, value))
    lacking = []
    for iteration, save_id in sorted(by_save, reverse=True):
        owners = by_save[iteration, save_id]
        size = next(iter(owners.values()))[0].world_size
        missing = [str(rank) for rank in range(size) if rank not in owners]
        if not missing:
            return [owners[rank][1] for rank in range(size)]
        lacking.append(f"iteration {iteration} lacks that of rank {', '.join(missing)} (of {size} ranks)")
    if not lacking:
        raise CheckpointNotFoundError(
            f"{SETTING}: no keeper on this machine holds a snapshot of the run that saved in {save_dir}; keepers end "
            "with the machine, with a run's planned end, and checkpoint.in_memory_release_minutes after a crash"
        )
    raise CheckpointNotFoundError(
        f"{SETTING}: the memory of this machine holds no complete set of snapshots of the run that saved in "
        f"{save_dir}: {'; '.join(lacking)}. If the other ranks' keepers are on other machines, start the run again "
        "there: it goes on from memory and then saves a persistent checkpoint"
    )


def _session_in(save_dir: Path) -> str:
    """The session; looking for one makes none."""
    if not (save_dir / SESSION).is_file():
        raise CheckpointNotFoundError(
            f"{SETTING}: {save_dir} is not the checkpoint.save of a run with in-memory checkpoints: it has no {SESSION}"
        )
    return session_of(save_dir)


def _take(save_dir: Path) -> None:
    """Claim the directory and clean up what a crash has left there, as a restart of the run would."""
    try:
        # A run that is alive goes on saving: there is nothing to wait for.
        recovery.recover_once(save_dir, None, SETTING, wait_seconds=0.0)
    except DirectoryInUseError as error:
        raise DirectoryInUseError(
            f"{SETTING}: the run that saves in {save_dir} is alive ({ownership.owner_of(save_dir)}); nothing was "
            "rescued. End it first, or let it go on: a run that is restarted goes on from memory by itself"
        ) from error


_Described = tuple[SnapshotRecord, Any]
"""A snapshot's record and its state dict."""


def _described(found: Iterable[OpenSnapshot], starts: Starts) -> list[tuple[Held, _Described]]:
    """Every snapshot that can be read and that the run has not left behind. Tensors stay where they are in memory."""
    described = []
    for opened in found:
        try:
            record, state = _read(opened)
        except CheckpointError as error:
            logger.warning("passing over a snapshot: %s", error)
            continue
        if starts.have_left_behind(record.iteration, record.start):
            logger.warning("passing over %s: the run has gone back since", opened.place)
            continue
        held = Held(record.iteration, record.rank, record.world_size, record.save_id)
        described.append((held, (record, state)))
    return described


def _read(opened: OpenSnapshot) -> _Described:
    memory = opened.map_payload()
    buffer = torch.empty(0, dtype=torch.uint8) if memory is None else torch.frombuffer(memory, dtype=torch.uint8)
    state = snapshot.unpack_buffer(opened.read_header(), buffer, opened.place)
    record = SnapshotRecord.of(state.common, opened.place)
    record.require_for(opened.kept.iteration, opened.kept.owner, record.world_size, None, opened.place)
    return record, state


@contextmanager
def _process_group_of_one() -> Iterator[Ranks]:
    """What megatron-core's planning asks for even where there is nobody to talk to."""
    if dist.is_initialized():
        raise CheckpointSaveError("a rescue is the work of one process without torch.distributed; start one for it")
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        yield Ranks.current()
    finally:
        dist.destroy_process_group()


def _publish(states: Sequence[_Described], save_dir: Path, ranks: Ranks, started: float) -> Committed:
    """Save the snapshots of all ranks as one checkpoint."""
    record, first = states[0]
    common = {key: value for key, value in first.common.items() if key not in (KEY, CONTENT_METADATA)}
    shards = {str(number): shard for number, shard in enumerate(_merged(state for _, state in states))}
    _require_room(save_dir, shards, ranks)
    sidecars = {name: data for each, _ in states for name, data in each.sidecars.items()}
    published: list[Committed] = []
    staging = ranks.run("making the staging directory", lambda: commit.begin_staging(save_dir, record.iteration))
    try:
        payload, _ = torch_dist.plan_save(
            # The name is of no account: what is sharded is found by its keys.
            {**common, KEY: shards},
            staging,
            first.common.get(CONTENT_METADATA) or {},
            ranks,
            # As many files and writers as the run would have had here.
            SaveOptions(writers_per_rank=min(record.world_size, os.cpu_count() or 1)),
        )
        save = Save(
            SaveTarget(save_dir, record.iteration),
            staging,
            payload,
            tuple(Sidecar(name, data) for name, data in sorted(sidecars.items())),
            Layout.from_sizes(record.parallel_sizes),
            published.append,
            started,
            world_size=record.world_size,
            start=record.start,
        )
        save.finish("writing what was rescued", save.write, lambda: None)
    except BaseException:
        commit.abandon(staging)
        raise
    return published[0]


def _merged(states: Iterable[Any]) -> list[Any]:
    """Every shard and object of all ranks once, as something that one rank is to write.

    Which rank keeps a replica was decided by the save; where several do, the main one is taken.
    """
    chosen: dict[Any, Any] = {}
    for state in states:
        for value in nested_values(state.sharded_state_dict):
            if isinstance(value, ShardedTensor):
                if value.data is None:  # another rank keeps it
                    continue
                identity = _sharded_tensor_shard_id(value)
            elif isinstance(value, ShardedObject):
                identity = _sharded_object_id(value)
            else:
                raise CheckpointSaveError(f"a snapshot holds a {type(value).__name__}, which cannot be saved")
            if identity not in chosen or is_main_replica(value.replica_id):
                chosen[identity] = value
    for value in chosen.values():
        value.replica_id = 0
    return list(chosen.values())


def _require_room(save_dir: Path, shards: dict[str, Any], ranks: Ranks) -> None:
    needed, available = state_bytes(shards, ranks), available_bytes(save_dir)
    if available is not None and needed > available:
        raise NotEnoughSpaceError(
            f"{SETTING}: {as_text(needed)} are needed in {save_dir} and {as_text(available)} are available; free space "
            "there and try again. The snapshots stay in memory meanwhile"
        )
