"""Which bytes are read: exactly those of a box, in runs and blocks, compared with numpy."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from math import prod

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bridge.training.checkpointing.io.plan import Batch, Runs, Want, batches, blocks_of, runs_of, split


@st.composite
def boxes(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """A shape, and the first indices and lengths of a box in it."""
    shape = tuple(draw(st.lists(st.integers(1, 6), max_size=4)))
    first = tuple(draw(st.integers(0, n - 1)) for n in shape)
    lengths = tuple(draw(st.integers(0, n - start)) for n, start in zip(shape, first, strict=True))
    return shape, first, lengths


def want(shape: tuple[int, ...], box: tuple[tuple[int, ...], tuple[int, ...]] | None = None, at: int = 0) -> Want:
    lengths = shape if box is None else box[1]
    return Want("key", "file", at, 100, torch.int32, shape, torch.zeros(lengths, dtype=torch.int32), box)


def bytes_of_runs(runs: Runs) -> Iterator[int]:
    """Every byte of some runs, in order."""
    for index in np.ndindex(*runs.counts):
        start = runs.first + sum(i * step for i, step in zip(index, runs.steps, strict=True))
        yield from range(start, start + runs.length)


def bytes_of_box(shape: tuple[int, ...], first: tuple[int, ...], lengths: tuple[int, ...], item: int) -> list[int]:
    places = np.arange(prod(shape) * item).reshape(*shape, item)
    return places[tuple(slice(a, a + n) for a, n in zip(first, lengths, strict=True))].ravel().tolist()


@given(boxes(), st.sampled_from([1, 2, 4, 8]))
def test_runs_are_the_bytes_of_the_box_in_its_order(
    box: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]], item: int
) -> None:
    assert list(bytes_of_runs(runs_of(*box, item))) == bytes_of_box(*box, item)


@given(boxes(), st.integers(0, 200))
def test_blocks_hold_the_runs_and_leave_out_every_longer_gap(
    box: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]], gap: int
) -> None:
    blocks = blocks_of(runs_of(*box, 4), gap)
    wanted = [start + place for start in blocks.starts for place in bytes_of_runs(blocks.runs)]
    assert wanted == bytes_of_box(*box, 4)
    read = sorted(place for start in blocks.starts for place in range(start, start + blocks.length))
    assert len(read) == len(set(read)), "no byte is read twice"
    needed = sorted(wanted)
    # Byte by byte: what is read and not needed lies in a gap of at most `gap` bytes.
    allowed = set(needed)
    for left, right in itertools.pairwise(needed):
        if right - left - 1 <= gap:
            allowed.update(range(left, right))
    assert set(read) <= allowed


def test_a_whole_tensor_is_one_run() -> None:
    assert runs_of((4, 5, 6), (0, 0, 0), (4, 5, 6), 2) == Runs(0, 240, (), ())
    assert runs_of((4, 5, 6), (1, 0, 0), (2, 5, 6), 2) == Runs(60, 120, (), ())
    assert runs_of((), (), (), 8) == Runs(0, 8, (), ())


def test_an_eighth_of_every_row_is_read_row_by_row_unless_rows_are_short() -> None:
    wide = blocks_of(runs_of((64, 8192), (0, 1024), (64, 1024), 4), gap=4096)
    assert (len(wide.starts), wide.length) == (64, 4096)
    narrow = blocks_of(runs_of((64, 80), (0, 10), (64, 10), 4), gap=4096)
    assert (len(narrow.starts), narrow.length) == (1, 63 * 320 + 40)


@given(boxes(), st.integers(1, 300))
def test_parts_of_a_part_are_all_of_it_and_within_the_limit(
    box: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]], limit: int
) -> None:
    shape, first, lengths = box
    source = torch.arange(prod(shape), dtype=torch.int32).reshape(shape)
    whole = want(shape, (first, lengths))
    whole.target.fill_(-1)
    for part in split(whole, limit):
        start, size = part.box or ((0,) * len(shape), shape)
        extent = runs_of(shape, start, size, 4).extent
        assert extent <= limit or max(size, default=1) <= 1, "only a single element may exceed the limit"
        part.target.copy_(source[tuple(slice(a, a + n) for a, n in zip(start, size, strict=True))])
    assert torch.equal(whole.target, source[tuple(slice(a, a + n) for a, n in zip(first, lengths, strict=True))])


@pytest.mark.parametrize(
    ("places", "gap", "limit", "expected"),
    [
        pytest.param([0, 100, 200], 0, 1000, [(0, 300, 3)], id="neighbours"),
        pytest.param([0, 100, 201], 0, 1000, [(0, 200, 2), (201, 100, 1)], id="a gap"),
        pytest.param([0, 150], 50, 1000, [(0, 250, 2)], id="a gap that is read"),
        pytest.param([0, 100, 200], 0, 200, [(0, 200, 2), (200, 100, 1)], id="the limit"),
        pytest.param([0, 0], 0, 1000, [(0, 100, 2)], id="one record twice"),
        pytest.param([0], 0, 10, [(0, 100, 1)], id="longer than the limit"),
        pytest.param([], 0, 10, [], id="nothing"),
    ],
)
def test_batches(places: list[int], gap: int, limit: int, expected: list[tuple[int, int, int]]) -> None:
    found: list[Batch] = list(batches((want((1,), at=at) for at in places), limit, gap))
    assert [(batch.at, batch.length, len(batch.wants)) for batch in found] == expected
