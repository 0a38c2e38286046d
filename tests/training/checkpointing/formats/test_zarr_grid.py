"""How arrays are divided into chunks: tables, and that no chunk has two writers whatever the parts are."""

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bridge.training.checkpointing.formats import zarr_grid
from bridge.training.checkpointing.formats.zarr_grid import Box, GridError, Part, choose_chunks


def line(*spans: tuple[int, int, int]) -> list[Part]:
    """Parts of a vector: (rank, start, stop)."""
    return [Part(rank, Box((start,), (stop - start,))) for rank, start, stop in spans]


def grid(rows: int, columns: int, counts: tuple[int, int], owner: list[int]) -> list[Part]:
    """Equal parts of a matrix, row by row, with the rank that writes each."""
    height, width = rows // counts[0], columns // counts[1]
    places = itertools.product(range(counts[0]), range(counts[1]))
    return [
        Part(rank, Box((i * height, j * width), (height, width))) for rank, (i, j) in zip(owner, places, strict=True)
    ]


TOUCHED: dict[str, tuple[Box, tuple[int, ...], int]] = {
    "a scalar": (Box((), ()), (), 1),
    "nothing": (Box((4, 0), (0, 8)), (2, 2), 0),
    "its own chunks": (Box((4, 0), (4, 8)), (2, 8), 2),
    "corners": (Box((1, 1), (2, 2)), (2, 2), 4),
    "a little of one": (Box((5, 5), (1, 1)), (4, 4), 1),
}


@pytest.mark.parametrize("name", TOUCHED)
def test_a_part_touches_so_many_chunks(name: str) -> None:
    box, chunks, count = TOUCHED[name]
    assert box.count_chunks(chunks) == count == len(list(box.chunks(chunks)))


CHOSEN: dict[str, tuple[tuple[int, ...], list[Part], tuple[int, ...]]] = {
    "a scalar": ((), [Part(0, Box((), ()))], ()),
    "one rank": ((6, 4), grid(6, 4, (1, 1), [0]), (6, 4)),
    "nothing in it": ((0, 3), [Part(0, Box((0, 0), (0, 3)))], (1, 3)),
    "rows": ((8, 4), grid(8, 4, (4, 1), [0, 1, 2, 3]), (2, 4)),
    "columns": ((8, 4), grid(8, 4, (1, 2), [0, 1]), (8, 2)),
    "rows and columns": ((8, 4), grid(8, 4, (2, 2), [0, 1, 2, 3]), (4, 2)),
    "layers of one rank side by side": ((8, 4), grid(8, 4, (4, 1), [0, 0, 1, 1]), (4, 4)),
    "layers that alternate": ((8, 4), grid(8, 4, (4, 1), [0, 1, 0, 1]), (2, 4)),
    "the same ranks in other places": ((8, 4), grid(8, 4, (2, 2), [0, 1, 1, 0]), (4, 2)),
    "pieces of a rank's range": ((100,), line((0, 0, 7), (0, 7, 50), (1, 50, 61), (1, 61, 100)), (50,)),
    "a short last range": ((90,), line((0, 0, 50), (1, 50, 90)), (50,)),
    "ranges of other lengths": ((100,), line((0, 0, 12), (1, 12, 30), (2, 30, 100)), (6,)),
    "parts of other sizes side by side": (
        (4, 4),
        [
            Part(0, Box((0, 0), (4, 2))),
            Part(1, Box((0, 2), (3, 2))),
            Part(0, Box((3, 2), (1, 2))),
        ],
        (3, 2),
    ),
    "two borders where one rank begins": ((100,), line((0, 0, 51), (1, 51, 100)), (51,)),
}


@pytest.mark.parametrize("case", CHOSEN)
def test_chunks_are_as_large_as_the_ranks_allow(case: str) -> None:
    shape, parts, expected = CHOSEN[case]
    assert choose_chunks(shape, 4, parts) == expected


def test_large_chunks_are_divided_and_keep_their_borders(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zarr_grid, "LARGEST_CHUNK", 100)
    parts = grid(24, 10, (2, 1), [0, 1])
    assert choose_chunks((24, 10), 4, parts) == (2, 10)  # 80 bytes, and 12 is a multiple of 2
    assert choose_chunks((1, 240), 4, grid(1, 240, (1, 2), [0, 1])) == (1, 24)


def test_too_many_chunks_are_an_error() -> None:
    with pytest.raises(GridError, match=r"its 3 parts begin and end so irregularly that it takes 100000 chunks"):
        choose_chunks((100_000,), 4, line((0, 0, 49_999), (1, 49_999, 60_001), (2, 60_001, 100_000)))


NO_ARRAY = {
    "a part is missing": (line((0, 0, 4), (1, 6, 10)), "its parts have 8 elements, and it has 10"),
    "a part is there twice": (line((0, 0, 5), (1, 0, 5), (1, 5, 10)), "its parts have 15 elements, and it has 10"),
    "one instead of another": (line((0, 0, 5), (1, 0, 5)), "its parts overlap"),
}


@pytest.mark.parametrize("case", NO_ARRAY)
def test_parts_that_make_up_no_array_are_an_error(case: str) -> None:
    parts, message = NO_ARRAY[case]
    with pytest.raises(GridError, match=message):
        choose_chunks((10,), 4, parts)


@st.composite
def vectors(draw: st.DrawFn) -> tuple[int, list[Part]]:
    """A vector in pieces."""
    ends = list(itertools.accumulate(draw(st.lists(st.integers(1, 40), min_size=1, max_size=12))))
    owners = draw(st.lists(st.integers(0, 3), min_size=len(ends), max_size=len(ends)))
    return ends[-1], line(*zip(owners, [0, *ends[:-1]], ends, strict=True))


@st.composite
def matrices(draw: st.DrawFn) -> tuple[tuple[int, int], list[Part]]:
    """A matrix in rows of pieces, each row cut in other places."""
    columns = draw(st.integers(1, 12))
    parts, top = [], 0
    for _ in range(draw(st.integers(1, 4))):
        height = draw(st.integers(1, 6))
        cuts = sorted({0, columns, *draw(st.lists(st.integers(0, columns), max_size=3))})
        for left, right in itertools.pairwise(cuts):
            parts.append(Part(draw(st.integers(0, 3)), Box((top, left), (height, right - left))))
        top += height
    return (top, columns), parts


def require_one_writer_of_each_chunk(shape: tuple[int, ...], parts: list[Part]) -> None:
    chunks = choose_chunks(shape, 4, parts)
    owners: dict[tuple[int, ...], set[int]] = {}
    for part in parts:
        for index in part.box.chunks(chunks):
            owners.setdefault(index, set()).add(part.rank)
    assert all(len(ranks) == 1 for ranks in owners.values())
    elements = sum(math.prod(part.box.shape) for part in parts)
    assert elements <= len(owners) * math.prod(chunks)


@settings(max_examples=200, deadline=None)
@given(vectors())
def test_no_chunk_of_a_vector_has_two_writers(case: tuple[int, list[Part]]) -> None:
    length, parts = case
    require_one_writer_of_each_chunk((length,), parts)


@settings(max_examples=200, deadline=None)
@given(matrices())
def test_no_chunk_of_a_matrix_has_two_writers(case: tuple[tuple[int, int], list[Part]]) -> None:
    shape, parts = case
    require_one_writer_of_each_chunk(shape, parts)


@pytest.mark.parametrize(
    ("shape", "parts", "most"),
    [
        ((1009,), line((0, 0, 1009)), 50),
        ((1511, 20), grid(1511, 20, (1, 1), [0]), 1600),
        ((2 * 1009,), line((0, 0, 1009), (1, 1009, 2018)), 2),
    ],
)
def test_lengths_without_divisors_do_not_make_a_chunk_of_every_element(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], parts: list[Part], most: int
) -> None:
    monkeypatch.setattr(zarr_grid, "LARGEST_CHUNK", 100)
    chunks = choose_chunks(shape, 4, parts)
    assert math.prod(-(-size // chunk) for size, chunk in zip(shape, chunks, strict=True)) <= most
