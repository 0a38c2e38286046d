"""Whether the shards that the ranks write make up whole tensors and objects, each once. Pure.

The cost grows with the number of shards and no faster, but for tensors of several axes whose shards lie in no grid.
"""

from __future__ import annotations

import math
from bisect import bisect_right, insort
from collections.abc import Iterator

import numpy as np

from bridge.training.checkpointing.formats.shard_table import ShardTable
from bridge.training.checkpointing.io.table import Flags, Ints, Spec

_NAMED = 4
"""Ranks or offsets that a message names."""


def problem_of(table: ShardTable, written: Flags) -> str | None:
    """What is wrong with the shards, in words that name the key and the ranks; None where nothing is.

    Args:
        table: the shards of all ranks.
        written: which of them are written.
    """
    for problem in _problems(table, written):
        return problem
    return None


def double_of(table: ShardTable, main: Flags) -> str | None:
    """Which shard has two main replicas, in words that name the key and the ranks; None where none has.

    Sharing the writing keeps one of several replicas, and cannot tell which of two main ones holds what is meant.
    """
    for problem in _doubles(table, _by_place(table, main)):
        return problem
    return None


def _by_place(table: ShardTable, chosen: Flags) -> Ints:
    rows = np.flatnonzero(chosen)
    order: Ints = rows[np.lexsort((table.position[rows], table.key[rows]))]
    return order


def _doubles(table: ShardTable, order: Ints) -> Iterator[str]:
    same = (np.diff(table.key[order]) == 0) & (np.diff(table.position[order]) == 0)
    for first in np.flatnonzero(same):
        yield _twice(table, order[first], order[first + 1])


def _problems(table: ShardTable, written: Flags) -> Iterator[str]:
    yield from _disagreements(table)
    order = _by_place(table, written)
    yield from _doubles(table, order)
    yield from _outside(table, order)
    yield from _off_grid(table, order)
    yield from _incomplete_objects(table, order)
    yield from _incomplete_tensors(table, order)
    yield from _overlaps(table, order)


def _disagreements(table: ShardTable) -> Iterator[str]:
    """Shards of one tensor that are not of one kind."""
    kinds: dict[tuple[object, ...], int] = {}
    for spec in table.specs:
        kinds.setdefault(_kind(spec), len(kinds))
    kind = table.of_spec([kinds[_kind(spec)] for spec in table.specs])[table.spec]
    of_key = np.zeros(max(1, len(table.keys)), np.int64)
    row_of_key = np.zeros_like(of_key)
    backwards = table.key[::-1]
    of_key[backwards], row_of_key[backwards] = kind[::-1], np.arange(len(table))[::-1]  # the first of each stays
    for row in np.flatnonzero(of_key[table.key] != kind):
        first = row_of_key[table.key[row]]
        one, other = table.specs[table.spec[first]], table.specs[table.spec[row]]
        names = ("key", "type", "whole shape", "grid", "shape of a shard")
        words = [
            f"its {name} is {_worded(a)} on rank {table.rank[first]} and {_worded(b)} on rank {table.rank[row]}"
            for name, a, b in zip(names, _kind(one), _kind(other), strict=True)
            if a != b
        ]
        if one.is_object != other.is_object:
            words = [
                f"it is an object on one of the ranks {table.rank[first]} and {table.rank[row]}, "
                "and a tensor on the other"
            ]
        yield f"{table.keys[table.key[row]]!r}: {', '.join(words)}"


def _kind(spec: Spec) -> tuple[object, ...]:
    return (spec.base, spec.dtype, spec.whole, spec.grid, None if spec.grid is None else spec.part)


def _worded(value: object) -> str:
    return str(list(value)) if isinstance(value, tuple) else str(value)


def _twice(table: ShardTable, one: int, other: int) -> str:
    ranks = sorted({int(table.rank[one]), int(table.rank[other])})
    who = f"rank {ranks[0]} twice" if len(ranks) == 1 else f"ranks {ranks[0]} and {ranks[1]}"
    return f"{_name(table, one)} is written by {who}: both say that they have the main replica"


def _name(table: ShardTable, row: int) -> str:
    spec = table.specs[table.spec[row]]
    what = f"{table.keys[table.key[row]]!r}"
    return what if spec.is_object else f"{what} at {_offset(table, row)}"


def _offset(table: ShardTable, row: int) -> list[int]:
    return [int(n) for n in table.offset[row, : len(table.specs[table.spec[row]].whole)]]


def _outside(table: ShardTable, order: Ints) -> Iterator[str]:
    """Shards that reach beyond their tensors, and parts of objects likewise."""
    depth = table.offset.shape[1]
    ends = np.zeros((max(1, len(table.specs)), depth), np.int64)
    for number, spec in enumerate(table.specs):
        parts = (1,) * len(spec.whole) if spec.is_object else spec.part
        ends[number, : len(spec.whole)] = [w - p for w, p in zip(spec.whole, parts, strict=True)]
    for axis in range(depth):
        beyond = table.offset[order, axis] > ends[table.spec[order], axis]
        for row in order[beyond | (table.offset[order, axis] < 0)]:
            spec = table.specs[table.spec[row]]
            if spec.is_object:
                yield (
                    f"rank {table.rank[row]} has the part {_offset(table, row)} of the object {spec.base!r}, "
                    f"which has {list(spec.whole)} parts"
                )
                continue
            yield (
                f"rank {table.rank[row]} has {list(spec.part)} of {table.keys[table.key[row]]!r} at "
                f"{_offset(table, row)}, outside of its shape {list(spec.whole)}"
            )


def _off_grid(table: ShardTable, order: Ints) -> Iterator[str]:
    """Shards of a grid that begin between its lines."""
    steps = np.ones((max(1, len(table.specs)), table.offset.shape[1]), np.int64)
    for number, spec in enumerate(table.specs):
        if spec.grid is not None:
            steps[number, : len(spec.part)] = [max(1, n) for n in spec.part]
    for axis in range(table.offset.shape[1]):
        for row in order[table.offset[order, axis] % steps[table.spec[order], axis] != 0]:
            spec = table.specs[table.spec[row]]
            yield (
                f"rank {table.rank[row]} has {list(spec.part)} of {table.keys[table.key[row]]!r} at "
                f"{_offset(table, row)}, which is no place in a grid of such shards"
            )


def _incomplete_objects(table: ShardTable, order: Ints) -> Iterator[str]:
    wholes: dict[str, tuple[int, ...]] = {}
    for spec in table.specs:
        if spec.is_object and wholes.setdefault(spec.base, spec.whole) != spec.whole:
            both = f"{list(wholes[spec.base])} and {list(spec.whole)}"
            yield f"the object {spec.base!r} is said to have {both} parts"
    needed = {spec.base: math.prod(spec.whole) for spec in table.specs if spec.is_object}
    numbers = {base: number for number, base in enumerate(needed)}
    of_spec = table.of_spec([numbers.get(spec.base, -1) for spec in table.specs])
    found = np.bincount(of_spec[table.spec[order]][table.is_object[order]], minlength=len(numbers))
    for base, number in numbers.items():
        if found[number] != needed[base]:
            yield f"of the object {base!r} {found[number]} of {needed[base]} parts are written by some rank"


def _incomplete_tensors(table: ShardTable, order: Ints) -> Iterator[str]:
    """Tensors of which less is written than they have."""
    if not len(table):
        return
    sizes = table.of_spec([math.prod(spec.part) for spec in table.specs])[table.spec[order]]
    # Elements may be more than a float counts exactly, so they are summed as integers.
    found, shards = np.zeros(len(table.keys), np.int64), np.bincount(table.key[order], minlength=len(table.keys))
    np.add.at(found, table.key[order], sizes)
    row_of_key = np.zeros(len(table.keys), np.int64)
    row_of_key[table.key] = np.arange(len(table))
    spec = table.spec[row_of_key]
    needed = table.of_spec([math.prod(spec.whole) for spec in table.specs])[spec]
    in_grid = table.of_spec([1 if s.grid is None else math.prod(s.grid) for s in table.specs])[spec]
    is_grid = table.of_spec([s.grid is not None for s in table.specs], np.bool_)[spec]
    missing = (found != needed) | (is_grid & (shards != in_grid)) | (shards == 0)
    for key in np.flatnonzero(missing & ~table.is_object[row_of_key]):
        holders = sorted({int(rank) for rank in table.rank[order[table.key[order] == key]]})
        who = f"rank {', '.join(map(str, holders[:_NAMED]))}{' and others' if len(holders) > _NAMED else ''}"
        by = f"by {who}" if holders else "by nobody"
        parts = f" in {shards[key]} of {in_grid[key]} shards" if is_grid[key] else ""
        yield f"of {table.keys[key]!r} {found[key]} of {needed[key]} elements are written, {by}{parts}"


def _overlaps(table: ShardTable, order: Ints) -> Iterator[str]:
    """Shards outside of grids that have elements in common."""
    irregular = table.of_spec([s.grid is None and not s.is_object for s in table.specs], np.bool_)
    rows = order[irregular[table.spec[order]] & (table.bytes[order] > 0)]
    if not len(rows):
        return
    starts = np.flatnonzero(np.diff(table.key[rows], prepend=-1))
    for start, stop in zip(starts, [*starts[1:], len(rows)], strict=True):
        if stop - start > 1:
            yield from _overlaps_in(table, rows[start:stop])


def _overlaps_in(table: ShardTable, rows: Ints) -> Iterator[str]:
    axes = len(table.specs[table.spec[rows[0]]].whole)
    parts = table.of_spec([(*s.part, *(0,) * (table.offset.shape[1] - len(s.part))) for s in table.specs])
    first, last = table.offset[rows, :axes], table.offset[rows, :axes] + parts[table.spec[rows], :axes]
    differing = [axis for axis in range(axes) if (first[:, axis] != first[0, axis]).any()]
    if len(differing) == 1:
        (axis,) = differing
        by_start = np.argsort(first[:, axis], kind="stable")
        for index in np.flatnonzero(first[by_start[1:], axis] < last[by_start[:-1], axis]):
            yield _overlap(table, rows[by_start[index]], rows[by_start[index + 1]])
        return
    # Along the longest axis, with those shards at hand that have not ended.
    sweep = int(np.argmax(last.max(axis=0)))
    active: list[tuple[int, int]] = []
    for index in np.lexsort((first[:, 0], first[:, sweep])).tolist():
        del active[: bisect_right(active, (int(first[index, sweep]), 1 << 62))]
        for _, other in active:
            if (first[index] < last[other]).all() and (first[other] < last[index]).all():
                yield _overlap(table, rows[index], rows[other])
        insort(active, (int(last[index, sweep]), index))


def _overlap(table: ShardTable, one: int, other: int) -> str:
    first, second = sorted((int(one), int(other)))
    return (
        f"{_name(table, first)} of rank {table.rank[first]} overlaps with the shard of rank {table.rank[second]} at "
        f"{_offset(table, second)}"
    )
