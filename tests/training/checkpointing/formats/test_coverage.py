"""Which replicas are written, and what is said of shards that do not make up whole tensors: pure decisions."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from megatron.core.dist_checkpointing.exchange_utils import distribute_shards_to_ranks
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor

from bridge.training.checkpointing.formats.coverage import double_of, problem_of
from bridge.training.checkpointing.formats.plan_files import files_of_rank, in_plan_order
from bridge.training.checkpointing.formats.shard_table import Packed, ShardTable
from bridge.training.checkpointing.formats.shares import main_replicas, written_by
from bridge.training.checkpointing.io.table import Spec

Row = tuple[str, Spec, tuple[int, ...], bool]


def tensor(
    key: str,
    whole: tuple[int, ...],
    part: tuple[int, ...],
    offset: tuple[int, ...],
    *,
    main: bool = True,
    grid: bool = True,
    dtype: str = "torch.float32",
) -> Row:
    counts = tuple(w // p if p else 1 for w, p in zip(whole, part, strict=True)) if grid else None
    return key, Spec("", dtype, "torch.strided", False, whole, part, counts), offset, main


def thing(base: str, of: int, number: int, *, main: bool = True) -> Row:
    return f"{base}/shard_{number}_{of}", Spec(base, "", "", False, (of,), (), None), (number,), main


def table_of(*ranks: list[Row]) -> ShardTable:
    packed = [Packed.of_rows([row[:3] for row in rows], [row[3] for row in rows]) for rows in ranks]
    return ShardTable.of(packed)


def problem(*ranks: list[Row]) -> str | None:
    table = table_of(*ranks)
    return problem_of(table, written_by(table, [None] * len(ranks)))


WHOLE: dict[str, list[list[Row]]] = {
    "nothing": [[], []],
    "one tensor": [[tensor("w", (4, 6), (4, 6), (0, 0))]],
    "halves": [[tensor("w", (4, 6), (2, 6), (0, 0))], [tensor("w", (4, 6), (2, 6), (2, 0))]],
    "a scalar": [[tensor("w", (), (), ())]],
    "a tensor without elements": [[tensor("w", (0, 3), (0, 3), (0, 0))]],
    "replicas": [[tensor("w", (4,), (4,), (0,))], [tensor("w", (4,), (4,), (0,), main=False)]],
    "objects": [[thing("o", 2, 0)], [thing("o", 2, 1)]],
    "one of several axes beside one of few": [
        [tensor("w", (4, 6, 2), (4, 6, 2), (0, 0, 0)), tensor("v", (3,), (3,), (0,)), thing("o", 1, 0)]
    ],
    "uneven parts": [
        [tensor("u", (10,), (3,), (0,), grid=False), tensor("u", (10,), (1,), (3,), grid=False)],
        [tensor("u", (10,), (6,), (4,), grid=False)],
    ],
    "uneven parts, one without elements where another begins": [
        [tensor("u", (10,), (0,), (4,), grid=False), tensor("u", (10,), (4,), (0,), grid=False)],
        [tensor("u", (10,), (6,), (4,), grid=False)],
    ],
    "uneven boxes": [
        [tensor("u", (4, 4), (4, 1), (0, 0), grid=False), tensor("u", (4, 4), (1, 3), (0, 1), grid=False)],
        [tensor("u", (4, 4), (3, 2), (1, 1), grid=False), tensor("u", (4, 4), (3, 1), (1, 3), grid=False)],
    ],
}


@pytest.mark.parametrize("case", WHOLE)
def test_what_is_whole_is_no_problem(case: str) -> None:
    assert problem(*WHOLE[case]) is None


HALF = tensor("w", (4, 6), (2, 6), (0, 0))
BROKEN: dict[str, tuple[list[list[Row]], str]] = {
    "a half is missing": (
        [[HALF], []],
        "of 'w' 12 of 24 elements are written, by rank 0 in 1 of 2 shards",
    ),
    "nobody has the main replica": (
        [[tensor("w", (4,), (4,), (0,), main=False)]] * 2,
        "of 'w' 0 of 4 elements are written, by nobody in 0 of 1 shards",
    ),
    "two ranks have the same half": (
        [[HALF], [HALF, tensor("w", (4, 6), (2, 6), (2, 0))]],
        "'w' at [0, 0] is written by ranks 0 and 1: both say that they have the main replica",
    ),
    "one rank has it twice": (
        [[], [tensor("w", (4,), (4,), (0,))] * 2],
        "'w' at [0] is written by rank 1 twice: both say that they have the main replica",
    ),
    "types": (
        [[HALF], [tensor("w", (4, 6), (2, 6), (2, 0), dtype="torch.bfloat16")]],
        "'w': its type is torch.float32 on rank 0 and torch.bfloat16 on rank 1",
    ),
    "shapes": (
        [[tensor("w", (4, 6), (4, 6), (0, 0))], [tensor("w", (4, 8), (4, 8), (0, 0), main=False)]],
        "'w': its whole shape is [4, 6] on rank 0 and [4, 8] on rank 1, "
        "its shape of a shard is [4, 6] on rank 0 and [4, 8] on rank 1",
    ),
    "a tensor and an object": (
        [[tensor("o/shard_0_1", (4,), (4,), (0,))], [thing("o", 1, 0)]],
        "'o/shard_0_1': it is an object on one of the ranks 0 and 1, and a tensor on the other",
    ),
    "beyond the end": (
        [[tensor("u", (10,), (6,), (0,), grid=False), tensor("u", (10,), (4,), (8,), grid=False)]],
        "rank 0 has [4] of 'u' at [8], outside of its shape [10]",
    ),
    "uneven parts with a gap": (
        [[tensor("u", (10,), (3,), (0,), grid=False)], [tensor("u", (10,), (6,), (4,), grid=False)]],
        "of 'u' 9 of 10 elements are written, by rank 0, 1",
    ),
    "uneven parts that overlap": (
        [[tensor("u", (10,), (5,), (0,), grid=False)], [tensor("u", (10,), (5,), (4,), grid=False)]],
        "'u' at [0] of rank 0 overlaps with the shard of rank 1 at [4]",
    ),
    "boxes that overlap": (
        [
            [tensor("u", (4, 4), (2, 4), (0, 0), grid=False), tensor("u", (4, 4), (2, 2), (2, 0), grid=False)],
            [tensor("u", (4, 4), (2, 2), (1, 2), grid=False)],
        ],
        "'u' at [0, 0] of rank 0 overlaps with the shard of rank 1 at [1, 2]",
    ),
    "a part of an object is missing": (
        [[thing("o", 2, 0)], [thing("o", 2, 0, main=False)]],
        "of the object 'o' 1 of 2 parts are written by some rank",
    ),
    "parts of an object that do not agree how many there are": (
        [[thing("o", 2, 0)], [thing("o", 3, 1), thing("o", 3, 2)]],
        "the object 'o' is said to have [2] and [3] parts",
    ),
    "a part of an object that it does not have": (
        [[thing("o", 2, 0), thing("o", 2, 7)], []],
        "rank 0 has the part [7] of the object 'o', which has [2] parts",
    ),
    "a shard between the lines of its grid": (
        [[tensor("w", (8,), (4,), (0,))], [tensor("w", (8,), (4,), (2,))]],
        "rank 1 has [4] of 'w' at [2], which is no place in a grid of such shards",
    ),
    "an object twice": (
        [[thing("o", 1, 0)], [thing("o", 1, 0)]],
        "'o/shard_0_1' is written by ranks 0 and 1: both say that they have the main replica",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_not_whole_is_named_with_its_ranks(case: str) -> None:
    ranks, words = BROKEN[case]
    assert problem(*ranks) == words


@pytest.mark.parametrize("seed", range(20))
def test_writing_is_shared_out_as_megatron_core_shares_it_out(seed: int) -> None:
    chance = random.Random(seed)
    size = chance.choice([2, 3, 8])
    states: list[list[Row]] = [[] for _ in range(size)]
    holders: dict[str, list[int]] = {}
    sizes: dict[str, int] = {}
    for number in range(chance.choice([1, 30])):
        key, length = f"w{number}", chance.choice([0, 1, 5, 5, 400])
        everybody = chance.random() < 0.6
        having = list(range(size)) if everybody else sorted(chance.sample(range(size), chance.randint(1, size)))
        main = chance.choice(having)
        holders[key], sizes[key] = having, 4 * length
        for rank in having:
            states[rank].append(tensor(key, (length,), (length,), (0,), main=rank == main))
    table = table_of(*states)
    written = written_by(table, [tuple(range(size))] * size)
    found = {table.keys[table.key[row]]: int(table.rank[row]) for row in np.flatnonzero(written)}
    ids = {key: (key, (0,), None) for key in holders}
    expected = distribute_shards_to_ranks(
        {ids[key]: ranks for key, ranks in holders.items()}, {ids[key]: n for key, n in sizes.items()}, size, set()
    )
    assert found == {key: expected[ids[key]] for key in holders}
    assert problem_of(table, written) is None


def test_two_main_replicas_are_seen_before_the_writing_is_shared() -> None:
    shard = tensor("w", (4,), (4,), (0,))
    for ranks, who in (([[shard], [shard]], "ranks 0 and 1"), ([[shard, shard], []], "rank 0 twice")):
        table = table_of(*ranks)
        words = f"'w' at [0] is written by {who}: both say that they have the main replica"
        assert problem_of(table, written_by(table, [(0, 1)] * 2)) is None  # too late
        assert double_of(table, main_replicas(table)) == words
    empty = [tensor("u", (4,), (0,), (0,), grid=False)]
    table = table_of(empty, empty, [tensor("u", (4,), (4,), (0,), grid=False)])
    assert double_of(table, main_replicas(table)) is None


def test_lengths_may_be_numpys() -> None:
    item = ShardedTensor.from_rank_offsets("w", torch.zeros(4), (0, np.int64(0), np.int64(1)))
    thing = ShardedObject("o", 1, (np.int64(1),), (np.int64(0),))
    table = ShardTable.of([Packed.of([item, thing])])
    assert problem_of(table, table.main) is None
    assert [spec.whole for spec in table.specs] == [(4,), (1,)]


def test_what_lies_in_no_grid_may_stay_where_it_is() -> None:
    ranks = [[tensor("u", (10,), (10,), (0,), grid=False)], [tensor("u", (10,), (10,), (0,), grid=False, main=False)]]
    ranks[0].append(tensor("w", (100,), (100,), (0,)))
    ranks[1].append(tensor("w", (100,), (100,), (0,), main=False))
    table = table_of(*ranks)
    assert written_by(table, [(0, 1)] * 2).tolist() == [False, True, True, False]
    assert written_by(table, [(0, 1)] * 2, only_in_grids=True).tolist() == [True, True, False, False]


def test_a_group_shares_only_what_one_of_it_has_the_main_replica_of() -> None:
    shard = (4,), (4,), (0,)
    ranks = [[tensor("w", *shard, main=rank == 2)] for rank in range(4)]
    table = table_of(*ranks)
    assert written_by(table, [(0, 1), (0, 1), (2, 3), (2, 3)]).tolist() == [False, False, True, False]


def test_files_are_divided_as_megatron_core_divides_them() -> None:
    assert files_of_rank(3, [], [], 2) == []
    assert files_of_rank(3, [5, 0, 7], [False, True, False], 1) == [("__3_0.distcp", [0, 1, 2])]
    sizes, objects = [5, 0, 7, 0, 6, 1], [False, True, False, True, False, False]
    assert files_of_rank(0, sizes, objects, 2) == [("__0_0.distcp", [1, 2, 5]), ("__0_1.distcp", [3, 4, 0])]
    assert files_of_rank(0, [9], [False], 4) == [("__0_0.distcp", [0])]
    assert in_plan_order([4, 7, 8, 9], ["a", "b", "a", "c"]) == [4, 8, 7, 9]
