"""Which saved random states still apply when the parallel layout has changed. Pure functions.

Megatron seeds a rank's generators by what they are for:

- `stage` states (Python, numpy, torch, the device's, and the tracker's data-parallel one) are the same on all
  tensor-parallel ranks of a pipeline stage, and on all data-parallel ranks unless those are initialised apart;
- the `tensor` state of the tracker differs between tensor-parallel ranks;
- the `expert` state of the tracker differs between expert- and expert-tensor-parallel ranks.

A state applies where the rank it belonged to still has its counterpart. What does not apply is seeded anew.
"""

from __future__ import annotations

from dataclasses import dataclass

from bridge.training.checkpointing.parallel import Layout


@dataclass(frozen=True)
class RngLayout:
    """What decides who has a random state of its own."""

    layout: Layout
    data_parallel_random_init: bool = False

    @property
    def replicas(self) -> int:
        """Ranks of the data- and context-parallel group."""
        return self.layout.data * self.layout.context

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the saved sharded object: (pipeline, tensor), with expert parallelism also (replicas)."""
        grid = (self.layout.pipeline, self.layout.tensor)
        return (*grid, self.replicas) if self.layout.expert > 1 else grid


@dataclass(frozen=True)
class Place:
    """A rank's position: its ranks in the pipeline, the tensor, and the data- and context-parallel group."""

    pipeline: int
    tensor: int
    replica: int


@dataclass(frozen=True)
class RngRequest:
    """The saved state that one rank takes over."""

    shape: tuple[int, ...]
    offset: tuple[int, ...]
    """Position of its shard in the saved object."""
    replica_id: int
    """Distinguishes ranks that ask for the same shard."""
    entry: int
    """Position in the shard's list of states, where it holds one for each replica."""
    tensor: bool
    """Whether the tensor-parallel state applies."""
    expert: bool
    """Whether the expert state applies."""


def request_rng(saved: RngLayout, now: RngLayout, place: Place) -> RngRequest | None:
    """The saved state for the rank at `place`, or None if none applies and all its generators are seeded anew."""
    before, after = saved.layout, now.layout
    if before.pipeline != after.pipeline:
        return None
    replica = place.replica
    if now.data_parallel_random_init and replica >= (saved.replicas if saved.data_parallel_random_init else 1):
        return None  # another replica's state would give two ranks the same stream
    same_experts = (before.expert, before.expert_tensor) == (after.expert, after.expert_tensor)
    same_tensor = before.tensor == after.tensor
    if now.data_parallel_random_init:
        source, reader = replica, 0
    elif same_experts:
        source, reader = replica % saved.replicas, replica // saved.replicas
    else:
        source, reader = 0, replica
    offset: tuple[int, ...] = (place.pipeline, place.tensor if same_tensor else 0)
    if before.expert > 1:
        offset = (*offset, source)
    else:
        reader = replica
    return RngRequest(
        shape=saved.shape,
        offset=offset,
        replica_id=reader,
        entry=source if now.data_parallel_random_init else 0,
        tensor=same_tensor,
        expert=same_experts and same_tensor,
    )


def keeps_every_state(saved: RngLayout, now: RngLayout) -> bool:
    """Whether every rank continues exactly its own random streams."""
    return (
        saved.shape == now.shape
        and saved.data_parallel_random_init == now.data_parallel_random_init
        and (saved.layout.expert, saved.layout.expert_tensor) == (now.layout.expert, now.layout.expert_tensor)
        and (saved.replicas == now.replicas or not now.data_parallel_random_init)
    )


def describe_changes(saved: RngLayout, now: RngLayout) -> str:
    """One clause for the log: what is taken over and what is seeded anew, and why."""
    before, after = saved.layout, now.layout
    if before.pipeline != after.pipeline:
        return f"the pipeline size was {before.pipeline} and is {after.pipeline}; all generators are seeded anew"
    changes = []
    if before.tensor != after.tensor:
        changes.append(
            f"the tensor size was {before.tensor} and is {after.tensor}: tensor-parallel generators are seeded anew"
        )
    if (before.expert, before.expert_tensor) != (after.expert, after.expert_tensor):
        changes.append(
            f"the expert size was {before.expert} and is {after.expert}: expert generators are seeded anew"
            if before.expert != after.expert
            else f"the expert-tensor size was {before.expert_tensor} and is {after.expert_tensor}: "
            "expert generators are seeded anew"
        )
    if now.data_parallel_random_init and (saved.replicas < now.replicas or not saved.data_parallel_random_init):
        first = saved.replicas if saved.data_parallel_random_init else 1
        changes.append(f"data-parallel ranks from {first} on have no saved state and are seeded anew")
    return "; ".join(changes) or "every state that is needed was saved"
