"""Leaving out of megatron-core's validation what needs none. Pure.

megatron-core checks that the ranks' main replicas cover every tensor exactly once. Where there is one rank, a whole
tensor that it asks for once is covered.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from megatron.core.dist_checkpointing.mapping import ShardedTensor, is_main_replica


def left_to_validate(items: Iterable[Any]) -> list[Any]:
    """What of an only rank's request is not plainly valid: objects, parts of tensors, and what is there twice."""
    items = list(items)
    times = Counter(item.key for item in items)
    return [item for item in items if times[item.key] > 1 or not _is_whole(item)]


def _is_whole(item: Any) -> bool:
    return (
        type(item) is ShardedTensor
        and is_main_replica(item.replica_id)
        and item.flattened_range is None
        and item.axis_fragmentations is not None
        and all(count == 1 for count in item.axis_fragmentations)
        and not any(item.global_offset)
        and tuple(item.global_shape[item.prepend_axis_num :]) == tuple(item.local_shape)
    )
