"""Leaving out of megatron-core's validation what needs none. Pure.

megatron-core checks that the ranks' main replicas cover every tensor exactly once. Where there is one rank, a whole
tensor that it asks for once is covered.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from operator import attrgetter
from typing import Any

from megatron.core.dist_checkpointing.mapping import ShardedTensor, is_main_replica


def left_to_validate(items: Iterable[Any]) -> list[Any]:
    """What of an only rank's request is not plainly valid: objects, parts of tensors, and what is there twice."""
    items = list(items)
    times = Counter(map(attrgetter("key"), items))
    if len(times) == len(items):
        return [item for item in items if not _is_whole(item)]
    return [item for item in items if times[item.key] > 1 or not _is_whole(item)]


def _is_whole(item: Any) -> bool:
    if type(item) is not ShardedTensor:
        return False
    grid, replica = item.axis_fragmentations, item.replica_id
    return (
        (replica == 0 or is_main_replica(replica))
        and item.flattened_range is None
        and grid is not None
        and grid.count(1) == len(grid)
        and not any(item.global_offset)
        and item.global_shape[item.prepend_axis_num :] == item.local_shape
    )
