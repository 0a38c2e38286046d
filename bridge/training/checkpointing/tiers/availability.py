"""What there is of rank-bound snapshots: a store on each rank, what all stores hold together, who gives whom a copy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from bridge.training.checkpointing.agreement import Ranks
from bridge.training.checkpointing.errors import CheckpointDamagedError

SnapshotId = tuple[int, int, Any]
"""Iteration, rank that it is of, session."""


class RankLocalStore(Protocol):
    """One rank's store of snapshots: nvidia-resiliency-ext's `BaseCheckpointManager`, and three methods more.

    The methods with an underscore are the ones that a manager of that kind implements. All of them are local.
    """

    repl_strategy: Any | None
    """Gives copies to other ranks; None keeps only what is this rank's own."""

    @property
    def rank(self) -> int:
        """This rank."""

    def snapshot_path(self, iteration: int) -> Path:
        """Where this rank's own snapshot of an iteration is, or would be."""

    def forget_newer(self, iteration: int) -> None:
        """Delete what this rank holds of later iterations than `iteration`."""

    def _ckpt_id(self, iteration: int) -> SnapshotId:
        """The identity of this rank's own snapshot of an iteration."""

    def _my_ckpt_ids(self) -> list[SnapshotId]:
        """All that this rank holds, copies of other ranks' snapshots included."""

    def _load(self, ckpt_id: SnapshotId) -> Any:
        """Read one and check it: a tensor-aware state dict on the CPU, or a CheckpointError."""

    def beside(self, iteration: int, owner: int, save_id: str) -> torch.Tensor | None:
        """The bytes of the tensors in another rank's snapshot of a save, where they lie in memory of this machine.

        None where they do not, or cannot be had, or are of another save; no error. They stay as they are for as long
        as they are used.
        """

    def _save(self, state_dict: Any, ckpt_id: SnapshotId) -> None:
        """Store one; complete or not at all, in place of one with the same identity."""

    def _cleanup(self, iteration: int) -> None:
        """Delete what is older than an iteration that is complete on all ranks; trouble is only logged."""

    def _cleanup_failed_save(self, iteration: int) -> None:
        """Delete what a failed save of an iteration has stored; trouble is only logged."""


def form_cliques(store: RankLocalStore, ranks: Ranks) -> list[list[int]]:
    """The groups of ranks that hold copies of one another's snapshots; each rank alone without replication.

    Collective. The first call of a process makes the process groups.
    """
    if store.repl_strategy is None:
        return [[rank] for rank in range(ranks.size)]
    own = ranks.run("forming the groups that replicate", lambda: list(clique_of(store).ranks))
    return sorted({tuple(clique): clique for clique in ranks.gather_all("comparing the groups", own)}.values())


def clique_of(store: RankLocalStore) -> Any:
    """nvidia-resiliency-ext's wrapper of the group that this rank replicates in. The first call is collective."""
    strategy: Any = store.repl_strategy
    return getattr(strategy, "replication_strategy", strategy).local_group


def complete_iterations(store: RankLocalStore, ranks: Ranks) -> list[int]:
    """The iterations of which every rank's snapshot exists, here or with a rank that can give a copy; newest first.

    Collective; the same answer on every rank. Nothing has been read: that a snapshot is sound shows when it is.
    """
    cliques = form_cliques(store, ranks)
    held = ranks.collect("looking for snapshots", lambda: [(i, owner) for i, owner, _ in store._my_ckpt_ids()])
    return complete_among(held, cliques)


def complete_among(held: Sequence[Sequence[tuple[int, int]]], cliques: Sequence[Sequence[int]]) -> list[int]:
    """The complete iterations, newest first.

    Args:
        held: by rank, the (iteration, owner) of what it holds.
        cliques: the groups that exchange copies; every rank is in one.
    """
    candidates = {iteration for snapshots in held for iteration, _ in snapshots}

    def is_complete(iteration: int) -> bool:
        owners = [{owner for found, owner in snapshots if found == iteration} for snapshots in held]
        return not unavailable(owners, cliques)

    return [iteration for iteration in sorted(candidates, reverse=True) if is_complete(iteration)]


def unavailable(owners: Sequence[set[int]], cliques: Sequence[Sequence[int]]) -> list[int]:
    """The ranks whose snapshot nobody has that could give it to them.

    Args:
        owners: by rank, whose snapshots of one iteration it holds.
        cliques: as for `complete_among`.
    """
    return sorted(rank for clique in cliques for rank in clique if not any(rank in owners[member] for member in clique))


def givers(owners: Sequence[set[int]], cliques: Sequence[Sequence[int]], problems: Mapping[int, str]) -> dict[int, int]:
    """For every rank, the rank that reads its snapshot: itself if it can, else one that holds a copy.

    Args:
        owners: as for `unavailable`.
        cliques: as for `complete_among`.
        problems: by rank, why it cannot read something that it holds.

    Raises:
        CheckpointDamagedError: a rank's snapshot is nowhere.
    """
    if missing := unavailable(owners, cliques):
        named = ", ".join(map(str, missing))
        reasons = "; ".join(f"rank {rank}: {problem}" for rank, problem in sorted(problems.items()))
        raise CheckpointDamagedError(
            f"there is no readable snapshot of rank {named}, nor a copy that could replace it"
            + (f" ({reasons})" if reasons else "")
        )
    chosen = {}
    for clique in cliques:
        for position, rank in enumerate(clique):
            # Beginning with itself, then with the next in the group, so that the work is spread.
            order = [*clique[position:], *clique[:position]]
            chosen[rank] = next(member for member in order if rank in owners[member])
    return chosen
