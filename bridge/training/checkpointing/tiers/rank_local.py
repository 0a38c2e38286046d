"""Checkpoints that are bound to their ranks: one snapshot a rank, in a store of its own, with or without copies.

A save makes megatron-core's tensor-aware state dict of what this rank holds, gives copies to other ranks, and has
the store keep them; it counts once every rank's snapshot is there. The stores differ (a local directory, the
memory of the host); what is here is the same for all of them.
"""

from __future__ import annotations

import logging
import re
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import __version__ as megatron_version
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.tensor_aware_state_dict import MCoreTensorAwareStateDict

import bridge
from bridge import accelerator
from bridge.training.callbacks import CheckpointKind
from bridge.training.checkpointing.agreement import Ranks
from bridge.training.checkpointing.background import BackgroundCall
from bridge.training.checkpointing.contents.train_state import plain_train_state
from bridge.training.checkpointing.errors import CheckpointError, CheckpointNotFoundError, CheckpointSaveError
from bridge.training.checkpointing.io.background_writer import Patience
from bridge.training.checkpointing.layout import TRAIN_STATE
from bridge.training.checkpointing.parallel import Layout
from bridge.training.checkpointing.resolve import Offer, Source
from bridge.training.checkpointing.safety.safe_globals import load_torch_bytes
from bridge.training.checkpointing.tiers import snapshot
from bridge.training.checkpointing.tiers.availability import (
    RankLocalStore,
    SnapshotId,
    clique_of,
    complete_iterations,
    form_cliques,
)
from bridge.training.checkpointing.tiers.rank_local_load import RankLocalCheckpoint, open_rank_local
from bridge.training.checkpointing.tiers.record import CONTENT_METADATA, SnapshotRecord
from bridge.training.checkpointing.tiers.sharing import Structure, keep_share, structure_of
from bridge.training.checkpointing.transaction import Committed, Contents, SaveTarget

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RankLocalTier:
    """A store of rank-bound snapshots, seen by a run that loads."""

    store: RankLocalStore
    kind: CheckpointKind
    layout: Layout | None = None
    """Of this run: snapshots of another are refused when they are opened. None leaves that to the load."""
    group: Any | None = None
    """The ranks that share replicas: the data- and context-parallel group. None: all ranks, which is slower."""

    def offers(self, ranks: Ranks) -> list[Offer]:
        """The iterations of which every rank's snapshot exists, newest first."""
        iterations = complete_iterations(self.store, ranks)
        return [Offer(self.kind, iteration, self.store.snapshot_path(iteration)) for iteration in iterations]

    def open(self, source: Source, ranks: Ranks) -> RankLocalCheckpoint:
        """Read and check all snapshots of one; see `open_rank_local`."""
        iteration = _iteration_of(source)
        return open_rank_local(source, iteration, self.store, ranks, layout=self.layout, group=self.group)

    def forget_newer(self, iteration: int, ranks: Ranks) -> None:
        """Delete the snapshots of later iterations, on every rank."""
        ranks.run("removing snapshots that the run has left behind", lambda: self.store.forget_newer(iteration))


@dataclass
class RankLocalSave:
    """One save of a rank's snapshot: local, or into memory."""

    target: SaveTarget
    store: RankLocalStore
    states: dict[SnapshotId, Any]
    """What this rank keeps: its own snapshot, and copies of others'."""
    structure: Structure
    """For the next save: spares it the validation and the division of the state, as long as they stay the same."""
    announce: Callable[[Committed], None]
    started: float
    total_bytes: int
    """Of this rank's own tensors."""
    published: bool = field(default=False)
    start_is_awaited: bool = False

    def write(self) -> None:
        """Store the snapshots. Talks to no other rank, so it may run in a background process."""
        for identity, state in self.states.items():
            self.store._save(state, identity)

    def begin(self, name: str, patience: Patience) -> BackgroundCall | None:
        """Snapshots are written by a fork of this process."""
        return None

    def accept(self, report: None) -> None:
        """There is nothing to report. What was written is needed no more."""
        self.states = {}

    def finish(self, phase: str, write: Callable[[], None], written: Callable[[], None]) -> None:
        """Agree that every rank has written, and publish; see `SaveTask.finish`."""
        self.accept(Ranks.current().run(phase, write))
        written()
        self.publish()

    def publish(self) -> None:
        """Agree that all ranks' snapshots are there, then delete the older ones; collective.

        Raises:
            CheckpointSaveError: a snapshot is not there. Every rank raises; older ones are untouched.
        """
        ranks, iteration = Ranks.current(), self.target.iteration
        if iteration not in complete_iterations(self.store, ranks):
            raise CheckpointSaveError(
                f"the snapshots of iteration {iteration} were written, and now they are not all there; "
                "older ones are untouched"
            )
        self.published = True
        # Met again before anything older goes: a rank that was lost in the first meeting has not passed it.
        total_bytes = sum(ranks.gather_all("agreeing that the snapshots are complete", self.total_bytes))
        self.store._cleanup(iteration)
        path, seconds = self.store.snapshot_path(iteration), time.monotonic() - self.started
        self.announce(Committed(path, iteration, self.target.kind, total_bytes, seconds))

    def abandon(self) -> None:
        """Remove what a failed save has stored on this rank."""
        self.states = {}
        if not self.published:
            self.store._cleanup_failed_save(self.target.iteration)


def plan_rank_local_save(
    contents: Contents,
    target: SaveTarget,
    store: RankLocalStore,
    ranks: Ranks,
    *,
    algo: str,
    group: Any | None,
    layout: Layout,
    announce: Callable[[Committed], None],
    started: float,
    start: int = 0,
    structure: Structure | None = None,
) -> RankLocalSave:
    """Capture what this rank's snapshot holds, copies for other ranks included, and write nothing yet. Collective.

    Tensors on the CPU stay where they are: write them before training goes on, or in a process forked before that,
    which sees them as they were.

    Args:
        contents: what to save; its state dict is consumed.
        target: the iteration and the kind.
        store: of this rank.
        ranks: all ranks.
        algo: `fully_parallel`, where every rank of `group` keeps a share of what they all hold, or `atomic`.
        group: the ranks that share replicas: the data- and context-parallel group; None for all ranks.
        layout: of this run.
        announce: called on every rank when the save is complete.
        started: when the save began, by the monotonic clock.
        start: number of the run's start.
        structure: the earlier save's.

    Raises:
        CheckpointSaveError: the shards of the ranks do not make up whole tensors. Every rank raises.
    """
    state_dict = {**contents.state_dict, CONTENT_METADATA: contents.content_metadata}
    sharded, common = ranks.run(
        "preparing the sharded state", lambda: save_preprocess(state_dict, validate_access_integrity=False)
    )
    known, structure = structure, structure_of(sharded, structure, algo, group, ranks)
    train_state, save_id = ranks.first(
        "reading the train state", lambda: (_train_state(contents), secrets.token_hex(8))
    )
    record = SnapshotRecord(
        iteration=target.iteration,
        rank=ranks.rank,
        world_size=ranks.size,
        parallel_sizes=layout.sizes(),
        save_id=save_id,
        train_state_metadata=train_state,
        sidecars={sidecar.name: sidecar.data for sidecar in contents.sidecars},
        versions={"bridge": bridge.__version__, "torch": str(torch.__version__), "megatron-core": megatron_version},
        start=start,
    )

    def capture() -> MCoreTensorAwareStateDict:
        keep_share(sharded, structure, _rank_within(group))
        _settle(sharded)
        return MCoreTensorAwareStateDict(common=record.embedded_in(_on_host(common)), sharded_state_dict=sharded)

    state = ranks.run("taking the snapshot", capture)
    if structure is not known:
        ranks.run("checking that the snapshot can be loaded", lambda: _require_loadable(state))
    total_bytes = sum(tensor.nbytes for tensor in state.tensors)
    states = _replicated(state, target.iteration, store, ranks)
    ranks.run("copying the snapshot to the host", lambda: _to_host(states))
    return RankLocalSave(target, store, states, structure, announce, started, total_bytes)


def _replicated(
    state: MCoreTensorAwareStateDict, iteration: int, store: RankLocalStore, ranks: Ranks
) -> dict[SnapshotId, Any]:
    """This rank's snapshot, and copies of those that it keeps for others. Collective."""
    identity = store._ckpt_id(iteration)
    strategy = store.repl_strategy
    if strategy is None:
        return {identity: state}
    form_cliques(store, ranks)
    ranks.run("preparing to replicate", lambda: _to_device_of(clique_of(store), state))
    states, identities = ranks.run("replicating the snapshots", lambda: strategy.replicate(state, identity))
    return dict(zip(identities, states, strict=True))


def _to_device_of(clique: Any, state: MCoreTensorAwareStateDict) -> None:
    """Where the tensors must be for the group to exchange them, in one piece each."""
    device = accelerator.device() if clique.backend == "nccl" else torch.device("cpu")
    for value in _tensors_of(state.sharded_state_dict):
        value.data = value.data.to(device).contiguous()


def _to_host(states: dict[SnapshotId, Any]) -> None:
    for state in states.values():
        for value in _tensors_of(state.sharded_state_dict):
            if value.data.device.type != "cpu":
                value.orig_device = value.data.device.type
                value.data = value.data.cpu()
    # Copies that the replication has begun without waiting for them.
    accelerator.synchronize()


def _settle(sharded: Any) -> None:
    """Leave graphs behind, and in what is not sharded by megatron-core the device too."""
    for value in nested_values(sharded):
        if isinstance(value, ShardedObject):
            value.data = _on_host(value.data)
        elif value.data is not None:
            value.data = value.data.detach()


def _tensors_of(sharded: Any) -> list[ShardedTensor]:
    return [v for v in nested_values(sharded) if isinstance(v, ShardedTensor) and v.data is not None]


def _on_host(value: Any) -> Any:
    """A copy of nested values with every tensor in host memory, where a forked process can read it."""
    if isinstance(value, torch.Tensor):
        return value.detach().cpu()
    if isinstance(value, dict):
        return {key: _on_host(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_on_host(item) for item in value)
    return value


def _train_state(contents: Contents) -> dict[str, Any]:
    """The counters in rank 0's file of them."""
    for sidecar in contents.sidecars:
        if sidecar.name == TRAIN_STATE:
            return plain_train_state(load_torch_bytes(sidecar.data, TRAIN_STATE, "train state"))
    raise CheckpointSaveError(f"there is no {TRAIN_STATE} among what is saved")


def _require_loadable(state: MCoreTensorAwareStateDict) -> None:
    """Find out now, not at the restart, that the state holds what loading refuses."""
    packed = snapshot.pack(state)
    try:
        snapshot.unpack(packed.header, packed.tensors, "the snapshot")
    except CheckpointError as error:
        raise CheckpointSaveError(f"what is to be saved could not be loaded again: {error}") from error


def _rank_within(group: Any | None) -> int:
    return dist.get_rank(group) if dist.is_initialized() else 0


_NAME = re.compile(r"iter_(\d{7,})(?:_\d+_local\.pt)?")


def _iteration_of(source: Source) -> int:
    """The iteration that a source's path names."""
    match = _NAME.fullmatch(source.path.name)
    if match is None:
        raise CheckpointNotFoundError(f"{source.path} names no iteration")
    return int(match[1])
