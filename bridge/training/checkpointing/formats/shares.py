"""Sharing out the writing among replicas, so that all ranks of a group write about as many bytes. Pure.

The order in which shards are given away is megatron-core's: what few ranks have comes first, then what is large. So
is the choice, the rank that has the least to write so far, and with it the result.
"""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heapify, heapreplace

import numpy as np

from bridge.training.checkpointing.formats.shard_table import ShardTable
from bridge.training.checkpointing.io.table import Flags, Ints


def written_by(table: ShardTable, groups: Sequence[Sequence[int] | None], *, only_in_grids: bool = False) -> Flags:
    """Which of the shards are written: one replica of each.

    Args:
        table: the shards of all ranks.
        groups: by rank, the ranks that it shares the writing of tensors with; None: its main replicas are written.
        only_in_grids: leave tensors whose shards lie in no grid to the ranks that have their main replicas. A share
            of them lies in one piece on its rank, and would be torn apart.
    """
    written: Flags = table.main.copy()
    shareable = ~table.is_object
    if only_in_grids:
        shareable &= table.of_spec([spec.grid is not None for spec in table.specs], np.bool_)[table.spec]
    for group in sorted({tuple(group) for group in groups if group is not None and len(group) > 1}):
        member = np.full(table.ranks, -1, np.int64)
        member[list(group)] = np.arange(len(group))
        rows = np.flatnonzero(shareable & (member[table.rank] >= 0))
        _share_out(table, rows, member, len(group), written)
    written[_empty_twins(table, np.flatnonzero(written))] = False
    return written


def main_replicas(table: ShardTable) -> Flags:
    """The shards of which ranks say that they have the main replica: what is written if nobody shares the writing."""
    return written_by(table, [None] * table.ranks)


def _empty_twins(table: ShardTable, rows: Ints) -> Ints:
    """Shards without elements that begin where another one does: a place in a tensor can name only one record."""
    rows = rows[np.lexsort((table.bytes[rows], table.position[rows], table.key[rows]))]
    same = (np.diff(table.key[rows]) == 0) & (np.diff(table.position[rows]) == 0)
    irregular = table.of_spec([spec.grid is None for spec in table.specs], np.bool_)[table.spec[rows]]
    empty = (table.bytes[rows] == 0) & irregular & ~table.is_object[rows]
    return rows[:-1][same & empty[:-1]] if len(rows) else rows


def _share_out(table: ShardTable, rows: Ints, member: Ints, size: int, written: Flags) -> None:
    """Decide for the shards in `rows`, which are all that a group has."""
    if not len(rows):
        return
    rows = rows[np.lexsort((member[table.rank[rows]], table.spec[rows], table.position[rows], table.key[rows]))]
    columns = (table.key[rows], table.position[rows], table.spec[rows])
    is_first = np.ones(len(rows), np.bool_)
    is_first[1:] = np.any([column[1:] != column[:-1] for column in columns], axis=0)
    starts = np.flatnonzero(is_first)
    counts = np.diff(starts, append=len(rows))
    has_main = np.logical_or.reduceat(table.main[rows], starts)
    written[rows] = False
    sizes, holders = table.bytes[rows[starts]], member[table.rank[rows]]
    by_name = np.empty(len(table.keys), np.int64)
    by_name[np.argsort(np.array(table.keys, object), kind="stable")] = np.arange(len(table.keys))
    axes = [table.offset[rows[starts], axis] for axis in reversed(range(table.offset.shape[1]))]
    order = np.lexsort((*axes, by_name[table.key[rows[starts]]], -sizes, counts))
    loads = [0] * size
    everybody: list[tuple[int, int]] | None = None
    chosen = []
    order = order[has_main[order]]
    for first, count, weight in zip(starts[order].tolist(), counts[order].tolist(), sizes[order].tolist(), strict=True):
        if count == size and len(set(holders[first : first + count].tolist())) == size:
            if everybody is None:
                # From here on every rank has every shard, so the least loaded one is always at hand.
                everybody = [(load, rank) for rank, load in enumerate(loads)]
                heapify(everybody)
            load, rank = everybody[0]
            heapreplace(everybody, (load + weight, rank))
            chosen.append(first + rank)
            continue
        own = holders[first : first + count].tolist()
        load, index = min((loads[rank], index) for index, rank in enumerate(own))
        loads[own[index]] = load + weight
        chosen.append(first + index)
    written[rows[chosen]] = True
