"""What megatron-core stores of a shard and of objects, whoever writes it."""

from __future__ import annotations

import io
from collections.abc import Iterable

import torch
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor


def stored_tensor(shard: ShardedTensor) -> torch.Tensor:
    """A shard's values in the shape in which megatron-core stores them; a view of them where that is possible."""
    values: torch.Tensor = shard.data.detach()
    if (shard.prepend_axis_num or shard.flattened_range is not None) and shard.has_regular_grid:
        values = values.contiguous().view((1,) * shard.prepend_axis_num + tuple(shard.local_shape))
    return values


def stored_objects(objects: Iterable[ShardedObject]) -> io.BytesIO:
    """Objects of one key as one record."""
    data = io.BytesIO()
    torch.save([item.data for item in objects], data)
    return data
