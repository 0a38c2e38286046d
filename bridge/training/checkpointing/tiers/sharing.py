"""Replicas of one shard: which rank keeps it in its snapshot, and how the others get it back.

Data-parallel ranks hold the same model. With `fully_parallel` each of them keeps a share of it, chosen by
megatron-core so that the shares are of about the same size. When the snapshots are loaded, whoever lacks a shard
gets it from the rank that has it, whatever part of the state is asked for.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.exchange_utils import determine_main_replica_uniform_distribution
from megatron.core.dist_checkpointing.mapping import CheckpointingException, ShardedTensor
from megatron.core.dist_checkpointing.utils import _sharded_tensor_shard_id
from megatron.core.dist_checkpointing.validation import determine_global_metadata, validate_sharding_integrity

from bridge import accelerator
from bridge.training.checkpointing.agreement import Ranks
from bridge.training.checkpointing.errors import CheckpointMismatchError, CheckpointSaveError
from bridge.training.checkpointing.tiers import snapshot

ShardId = tuple[Any, ...]
"""Key and place of a shard, the same for all its replicas."""


@dataclass(frozen=True)
class Structure:
    """The sharding of a state dict that has been found sound, and who keeps what of it."""

    fingerprint: str
    """Of this rank's shards and of how they are divided."""
    keeper: dict[ShardId, int] | None
    """By shard, the rank within the group that keeps it; None where every rank keeps all of its own."""


def structure_of(sharded: Any, known: Structure | None, algo: str, group: Any, ranks: Ranks) -> Structure:
    """Check that the shards of all ranks make up whole tensors, and divide them among the replicas. Collective.

    Args:
        sharded: the sharded part of this rank's state dict.
        known: what an earlier call returned; used again if it fits on every rank.
        algo: `fully_parallel` or `atomic`.
        group: the ranks that share replicas.
        ranks: all ranks.

    Raises:
        CheckpointSaveError: the shards do not make up whole tensors.
    """
    fingerprint = ranks.run("describing the state", lambda: _fingerprint(sharded, algo))
    if ranks.all_true("comparing the state's structure", known is not None and known.fingerprint == fingerprint):
        return known  # type: ignore[return-value]
    metadata = ranks.run("exchanging the state's structure", lambda: determine_global_metadata(sharded)[1])
    ranks.run("validating the sharding", lambda: _validate(metadata))
    if algo != "fully_parallel":
        return Structure(fingerprint, None)
    distribution = ranks.run(
        "dividing the state among replicas",
        lambda: determine_main_replica_uniform_distribution(sharded, group, ignore_groups=True),
    )
    return Structure(fingerprint, None if distribution is None else distribution.main_rank_for_shard)


def keep_share(sharded: Any, structure: Structure, group_rank: int) -> None:
    """Take the tensors out of the state dict that another rank of the group keeps. Local."""
    if structure.keeper is None:
        return
    for value in nested_values(sharded):
        if isinstance(value, ShardedTensor) and structure.keeper[_sharded_tensor_shard_id(value)] != group_rank:
            value.data = None


def tensors_by_shard(sharded: Any) -> dict[ShardId, torch.Tensor]:
    """The tensors that a state dict holds."""
    return {
        _sharded_tensor_shard_id(value): value.data
        for value in nested_values(sharded)
        if isinstance(value, ShardedTensor) and value.data is not None
    }


@dataclass(frozen=True)
class Held:
    """What a rank's snapshot holds, as it tells the others."""

    shards: list[tuple[ShardId, torch.dtype, tuple[int, ...]]]
    """Every tensor with its type and shape, in the snapshot's order. They travel with the names: who asks for another
    shape is told so, not sent the wrong bytes."""
    is_in_place: bool
    """Whether that is what lies in the rank's own store."""

    @classmethod
    def of(cls, sharded: Any, *, is_in_place: bool) -> Held:
        """Of a snapshot's sharded state dict."""
        values = (v for v in nested_values(sharded) if isinstance(v, ShardedTensor) and v.data is not None)
        return cls([(_sharded_tensor_shard_id(v), v.data.dtype, tuple(v.data.shape)) for v in values], is_in_place)

    @cached_property
    def by_shard(self) -> dict[ShardId, tuple[torch.dtype, tuple[int, ...]]]:
        """Type and shape."""
        return {shard: (dtype, shape) for shard, dtype, shape in self.shards}


def fetch(
    wanted: Sequence[ShardedTensor],
    sharded: Any,
    group: Any,
    ranks: Ranks,
    *,
    beside: Callable[[int], torch.Tensor | None] = lambda _: None,
    is_in_place: bool = True,
) -> dict[ShardId, torch.Tensor]:
    """The wanted tensors, on the CPU: those that this rank can reach, and the others from the ranks that hold them.

    Collective.

    Args:
        wanted: shards; their own data is not touched.
        sharded: the sharded state dict of this rank's snapshot.
        group: the ranks that share replicas; None for all.
        ranks: all ranks.
        beside: the bytes of the tensors in another rank's snapshot, if this rank can reach them.
        is_in_place: whether others may look for this rank's snapshot in that way.

    Raises:
        CheckpointMismatchError: no rank of the group holds a wanted shard.
    """
    at_hand: dict[ShardId, torch.Tensor] = {}
    ids: list[ShardId] = []

    def look_here() -> tuple[bool, Held]:
        at_hand.update(tensors_by_shard(sharded))
        ids.extend(_sharded_tensor_shard_id(value) for value in wanted)
        return all(i in at_hand for i in ids), Held.of(sharded, is_in_place=is_in_place)

    is_complete, own = ranks.run("describing the shards", look_here)
    if ranks.all_true("looking for shards", is_complete):
        return {i: at_hand[i] for i in ids}
    if not dist.is_initialized():
        _require({i: {0} for i in ids if i not in at_hand}, [set(at_hand)])
    group = group if group is not None else dist.group.WORLD
    held: list[Any] = [None] * dist.get_world_size(group)
    ranks.run("comparing what each rank holds", lambda: dist.all_gather_object(held, own, group=group))

    def look() -> bool:
        at_hand.update(_reach({i for i in ids if i not in at_hand}, held, group, beside))
        return all(i in at_hand for i in ids)

    if all(ranks.collect("looking for shards on this machine", look)):
        return {i: at_hand[i] for i in ids}
    missing: list[Any] = [None] * len(held)
    lacks = {i for i in ids if i not in at_hand}
    ranks.run("comparing what each rank lacks", lambda: dist.all_gather_object(missing, lacks, group=group))
    me = dist.get_rank(group)
    transfers, received = ranks.run("preparing to exchange shards", lambda: _prepare(held, missing, me))
    tensors = {**at_hand, **received}
    staging = ranks.run("making room to exchange shards", lambda: _staging(transfers, tensors, group))
    ranks.run("exchanging shards", lambda: _exchange(transfers, tensors, staging, group))
    return {i: tensors[i] for i in ids}


def _reach(
    missing: set[ShardId], held: Sequence[Held], group: Any, beside: Callable[[int], torch.Tensor | None]
) -> dict[ShardId, torch.Tensor]:
    """The missing shards that this rank can read from other ranks' snapshots by itself."""
    me, found = dist.get_rank(group), dict[ShardId, torch.Tensor]()
    for rank in [*range(me + 1, len(held)), *range(me)]:
        has = held[rank]
        if not has.is_in_place or missing.isdisjoint(has.by_shard):
            continue
        buffer = beside(dist.get_global_rank(group, rank))
        views = None if buffer is None else snapshot.views(buffer, [entry[1:] for entry in has.shards])
        if views is not None:
            found |= {shard: view for (shard, *_), view in zip(has.shards, views, strict=True) if shard in missing}
            missing = missing - found.keys()
    return found


@dataclass(frozen=True)
class _Transfer:
    """One shard on its way from the rank that holds it to those that need it; ranks within the group."""

    shard: ShardId
    holder: int
    receivers: tuple[int, ...]


def _prepare(
    held: Sequence[Held], missing: Sequence[set[ShardId]], me: int
) -> tuple[list[_Transfer], dict[ShardId, torch.Tensor]]:
    """The transfers, in an order that is the same on all ranks, and room for what this rank receives."""
    needed: dict[ShardId, set[int]] = {}
    for rank, lacks in enumerate(missing):
        for shard in lacks:
            needed.setdefault(shard, set()).add(rank)
    _require(needed, [set(has.by_shard) for has in held])
    transfers, received = [], {}
    for shard in sorted(needed, key=repr):
        holder = next(rank for rank, has in enumerate(held) if shard in has.by_shard)
        dtype, shape = held[holder].by_shard[shard]
        if me in needed[shard]:
            received[shard] = torch.empty(shape, dtype=dtype)
        if math.prod(shape):
            transfers.append(_Transfer(shard, holder, tuple(sorted(needed[shard]))))
    return transfers, received


def _require(needed: dict[ShardId, set[int]], holds: list[set[ShardId]]) -> None:
    absent = sorted({str(shard[0]) for shard in needed if not any(shard in held for held in holds)})
    if absent:
        more = f" and {len(absent) - 3} more" if len(absent) > 3 else ""
        raise CheckpointMismatchError(
            f"the snapshots lack what this run asks for: {', '.join(absent[:3])}{more}; the model or the optimizer "
            "is not the one that was saved"
        )


def _staging(transfers: list[_Transfer], tensors: dict[ShardId, torch.Tensor], group: Any) -> torch.Tensor | None:
    """Memory where the group can exchange one tensor at a time; None if it can where they are, on the CPU.

    Made before the exchange: whoever has no room in the middle of it would keep the others waiting.
    """
    if dist.get_backend(group) != "nccl":
        return None
    largest = max((tensors[t.shard].nbytes for t in transfers if t.shard in tensors), default=0)
    return torch.empty(largest, dtype=torch.uint8, device=accelerator.device())


def _exchange(
    transfers: list[_Transfer], tensors: dict[ShardId, torch.Tensor], staging: torch.Tensor | None, group: Any
) -> None:
    """Carry out the transfers. All ranks go through them in the same order, so none waits for a later one."""
    me, everybody = dist.get_rank(group), set(range(dist.get_world_size(group)))
    for transfer in transfers:
        if me != transfer.holder and me not in transfer.receivers:
            continue
        holder = dist.get_global_rank(group, transfer.holder)
        tensor = tensors[transfer.shard]
        # As bytes: backends do not know every type.
        own = tensor.contiguous().reshape(-1).view(torch.uint8)
        staged = own if staging is None else staging[: own.numel()]
        if staging is not None and me == transfer.holder:
            staged.copy_(own)
        if {transfer.holder, *transfer.receivers} == everybody:
            dist.broadcast(staged, src=holder, group=group)
        elif me == transfer.holder:
            for receiver in transfer.receivers:
                dist.send(staged, dst=dist.get_global_rank(group, receiver), group=group)
        else:
            dist.recv(staged, src=holder, group=group)
        if staging is not None and me in transfer.receivers:
            own.copy_(staged)


def _fingerprint(sharded: Any, algo: str) -> str:
    shards = [
        # A sharded object's own description would include its value, which changes from save to save.
        repr(v) if isinstance(v, ShardedTensor) else repr((v.key, v.global_shape, v.global_offset, v.replica_id))
        for v in nested_values(sharded)
    ]
    return hashlib.sha256("\n".join([algo, *shards]).encode()).hexdigest()


def _validate(metadata: Any) -> None:
    try:
        validate_sharding_integrity(metadata)
    except (CheckpointingException, AssertionError) as error:
        raise CheckpointSaveError(f"the shards of the ranks do not make up whole tensors: {error}") from error
