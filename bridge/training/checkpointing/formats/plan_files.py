"""Which file holds what, and in which order: as megatron-core orders a rank's part of a plan. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heapreplace
from itertools import pairwise
from typing import TypeVar

import numpy as np
from torch.distributed.checkpoint.filesystem import DEFAULT_SUFFIX

from bridge.training.checkpointing.formats.shard_table import ShardTable
from bridge.training.checkpointing.io.table import Flags, Ints, StoredTable

T = TypeVar("T")


def in_plan_order(places: Sequence[T], keys: Sequence[str]) -> list[T]:
    """Places with those of one key together, keys in the order in which they come first."""
    by_key: dict[str, list[T]] = {}
    for place, key in zip(places, keys, strict=True):
        by_key.setdefault(key, []).append(place)
    return [place for group in by_key.values() for place in group]


def files_of_rank(
    rank: int, sizes: Sequence[int], objects: Sequence[bool], writers: int
) -> list[tuple[str, list[int]]]:
    """Divide what a rank writes into files of about the same size.

    Args:
        rank: that writes them.
        sizes: bytes of each tensor, in the order of the plan; objects do not count.
        objects: which are objects.
        writers: files, at the most.

    Returns:
        Each file's name, and the positions of what it holds.
    """
    files: list[list[int]] = [[] for _ in range(writers)]
    if writers == 1:
        files[0] = list(range(len(sizes)))
    else:
        for turn, number in enumerate(number for number, is_object in enumerate(objects) if is_object):
            files[turn % writers].append(number)
        tensors = [number for number, is_object in enumerate(objects) if not is_object]
        filled = [(0, file) for file in range(writers)]
        for number in sorted(tensors, key=lambda number: -sizes[number]):
            size, file = filled[0]
            files[file].append(number)
            heapreplace(filled, (size + sizes[number], file))
    named = [numbers for numbers in files if numbers]
    return [(f"__{rank}_{file}{DEFAULT_SUFFIX}", numbers) for file, numbers in enumerate(named)]


def stored_table(table: ShardTable, written: Flags, writers: int, fingerprints: Sequence[str]) -> StoredTable:
    """What all ranks write, in the order of ranks and of their plans, without the places that it will have."""
    rows = _in_plan_order(table, np.flatnonzero(written))
    rank = table.rank[rows]
    names: list[str] = []
    file_rank: list[int] = []
    file = np.zeros(len(rows), np.int64)
    bounds = np.searchsorted(rank, np.arange(table.ranks + 1)).tolist()
    sizes, objects = table.bytes[rows], table.is_object[rows]
    for number, (start, stop) in enumerate(pairwise(bounds)):
        if start == stop:
            continue
        if writers == 1:
            file[start:stop] = len(names)
            names.append(f"__{number}_0{DEFAULT_SUFFIX}")
            file_rank.append(number)
            continue
        own = files_of_rank(number, sizes[start:stop].tolist(), objects[start:stop].tolist(), writers)
        for name, numbers in own:
            file[start + np.array(numbers)] = len(names)
            names.append(name)
            file_rank.append(number)
    used = np.unique(table.key[rows])
    of_key = np.zeros(max(1, len(table.keys)), np.int64)
    of_key[used] = np.arange(len(used))
    kinds = np.unique(table.spec[rows])
    of_spec = np.zeros(max(1, len(table.specs)), np.int64)
    of_spec[kinds] = np.arange(len(kinds))
    empty = np.zeros(0, np.int64)
    return StoredTable(
        [table.keys[key] for key in used.tolist()],
        [table.specs[kind] for kind in kinds.tolist()],
        names,
        np.array(file_rank, np.int64),
        of_key[table.key[rows]],
        of_spec[table.spec[rows]],
        table.offset[rows],
        file,
        table.place[rows],
        list(fingerprints),
        empty,
        empty,
    )


def _in_plan_order(table: ShardTable, rows: Ints) -> Ints:
    """Rows by rank, those of one key together, keys in the order in which a rank has them first."""
    if not len(rows):
        return rows
    rank, key = table.rank[rows], table.key[rows]
    group = rank * max(1, len(table.keys)) + key
    by_group = np.argsort(group, kind="stable")
    starts = np.flatnonzero(np.diff(group[by_group], prepend=-1))
    if len(starts) == len(rows):
        return rows
    first = np.empty(len(rows), np.int64)
    first[by_group] = np.repeat(by_group[starts], np.diff(starts, append=len(rows)))
    return rows[np.lexsort((np.arange(len(rows)), first))]
