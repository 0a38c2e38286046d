"""Measuring how fast ranks read and exchange, with shards of the checkpoint that is about to be loaded.

What is read here goes to scratch memory. Reading through the format's own strategy counts what the format costs, and
reading on all ranks at once what they cost one another.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from bridge import accelerator
from bridge.training.checkpointing.agreement import Ranks
from bridge.training.checkpointing.formats.exchange import exchange_device
from bridge.training.checkpointing.formats.read_assignment import Assignment, UnitId
from bridge.training.checkpointing.formats.read_choice import Speeds
from bridge.training.checkpointing.formats.read_rounds import PLANNING, READING, Prepare, on_all_ranks

BEST_BYTES = 8 << 20
"""The size of shard to measure with: a few milliseconds of a fast store."""
LEAST_BYTES, MOST_BYTES = 1 << 20, 64 << 20
"""Smaller shards measure the latency only; larger ones take too long."""
BROADCAST_BYTES = 4 << 20
_SHORTEST = 1e-6  # seconds; a clock may not see less


def probe_units(assignment: Assignment, replicas: int) -> list[UnitId]:
    """The shards to measure with, the best first: wanted by every rank of the group, and of a fitting size. Pure."""
    fitting = [
        unit
        for unit, size in assignment.size_of.items()
        if LEAST_BYTES <= size <= MOST_BYTES and len(assignment.wanted_by[unit]) == replicas
    ]
    return sorted(fitting, key=lambda unit: (abs(assignment.size_of[unit] - BEST_BYTES), unit))


def probe(
    prepare: Prepare, tensors: Mapping[UnitId, ShardedTensor], assignment: Assignment, group: Any, ranks: Ranks
) -> Speeds | None:
    """Measure this rank's speeds while the others measure theirs. Collective over all ranks.

    Args:
        prepare: the format's reading.
        tensors: what this rank loads; not touched.
        assignment: the group's.
        group: the ranks that would share the reading.
        ranks: all ranks.

    Returns:
        The speeds; None if some rank has no shard of a fitting size.

    Raises:
        CheckpointException: a shard cannot be read. Every rank raises.
    """
    units = probe_units(assignment, dist.get_world_size(group))
    if not ranks.all_true("looking for a shard to measure with", bool(units)):
        return None
    # Those who read apart begin at the second: the first one is in the caches by then.
    others = units[1:] or units
    own = others[dist.get_rank(group) % len(others)]
    same = _time_reading(prepare, tensors[units[0]], ranks)
    apart = _time_reading(prepare, tensors[own], ranks)
    return Speeds(
        same=assignment.size_of[units[0]] / same,
        apart=assignment.size_of[own] / apart,
        exchange=BROADCAST_BYTES / _time_broadcast(group, ranks),
    )


def _time_reading(prepare: Prepare, tensor: ShardedTensor, ranks: Ranks) -> float:
    def scratch() -> Callable[[], dict[str, Any]]:
        device = "cpu" if tensor.data is None else tensor.data.device
        data = torch.empty(tensor.local_shape, dtype=tensor.dtype, device=device)
        data.zero_()  # the first touch of memory takes longer than reading into it
        return prepare({"probe": replace(tensor, data=data)})

    read = on_all_ranks(ranks, PLANNING, scratch)

    def timed() -> float:
        begun = time.monotonic()
        read()
        accelerator.synchronize()
        return time.monotonic() - begun

    return max(on_all_ranks(ranks, READING, timed), _SHORTEST)


def _time_broadcast(group: Any, ranks: Ranks) -> float:
    data = ranks.run(
        "preparing to measure the network",
        lambda: torch.zeros(BROADCAST_BYTES, dtype=torch.uint8, device=exchange_device(group)),
    )
    source = dist.get_global_rank(group, 0)

    def timed() -> float:
        begun = time.monotonic()
        dist.broadcast(data, src=source, group=group)
        accelerator.synchronize()
        return time.monotonic() - begun

    # The first one makes the connections.
    seconds = [ranks.run("measuring the network", timed) for _ in range(2)]
    return max(seconds[1], _SHORTEST)
