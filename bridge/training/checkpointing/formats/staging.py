"""Handing what a plan says to megatron-core's writer, for `checkpoint.io_backend: stock`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

from bridge.training.checkpointing.agreement import Ranks
from bridge.training.checkpointing.formats.planning import Plan
from bridge.training.checkpointing.formats.values import stored_objects, stored_tensor


def stage(plan: Plan, state: Sequence[Any], directory: Path, ranks: Ranks) -> FileSystemWriterAsync:
    """The writer with the values that `state` has now, by a plan that was made for its structure. Collective."""

    def hand_over() -> FileSystemWriterAsync:
        writer = FileSystemWriterAsync(directory)
        writer.set_up_storage_writer(ranks.is_first)
        writer.write_buckets = [
            (
                str(directory / file.name),
                file.name,
                (
                    [(item, stored_objects(state[place] for place in places)) for item, places in file.objects],
                    [(item, _apart(state[place])) for item, place in file.tensors],
                ),
            )
            for file in plan.files
        ]
        _to_host(writer)
        return writer

    return ranks.run("staging what this rank writes", hand_over)


def _apart(shard: ShardedTensor) -> torch.Tensor:
    """A shard's values in a storage of their own: torch.save writes the whole storage that a view belongs to."""
    values = stored_tensor(shard)
    is_part = values.untyped_storage().size() != values.numel() * values.itemsize
    return values.clone() if is_part and values.device.type == "cpu" else values


def _to_host(writer: FileSystemWriterAsync) -> None:
    """Copy what the writer's buckets hold on a device to host memory."""
    buckets = writer.write_buckets or []
    if any(tensor.device.type != "cpu" for bucket in buckets for _, tensor in bucket[2][1]):
        writer.write_buckets = FileSystemWriterAsync.preload_tensors(buckets, non_blocking=True)
