"""Which bytes to read for a part of a stored tensor, and in which order. Pure functions.

A part is a box in the tensor. In the file it is runs of neighbouring bytes at regular distances. Runs that nearly touch
are read as one block, with the bytes between them; others are read one by one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from math import prod

import torch

PAGE = 4096
"""Bytes. To skip less than that saves nothing: storage delivers whole pages."""


@dataclass(eq=False, slots=True)
class Want:
    """A part of one stored tensor, and where its values go."""

    key: str
    """The tensor's, for messages."""
    file: str
    """Name of the file that holds the record, in the checkpoint."""
    at: int
    """Where the record begins in it, in bytes."""
    length: int
    """Bytes of the record."""
    dtype: torch.dtype
    """Of the stored tensor."""
    shape: tuple[int, ...]
    """Of the stored tensor."""
    target: torch.Tensor
    """What receives the values, as large as the part. It may be of another type, and need not be contiguous."""
    box: tuple[tuple[int, ...], tuple[int, ...]] | None = None
    """The part: its first indices and its lengths. None is the whole tensor."""

    @property
    def needed(self) -> int:
        """Bytes of the part."""
        return prod(self.shape if self.box is None else self.box[1]) * self.dtype.itemsize

    @property
    def payload(self) -> int:
        """Bytes of the whole tensor."""
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Runs:
    """Equal runs of bytes at regular distances: what a box is in the bytes of a contiguous tensor."""

    first: int
    """Where the first run begins."""
    length: int
    """Bytes of each run; 0 where the box is empty."""
    counts: tuple[int, ...]
    """How many runs there are along each dimension, the outermost first."""
    steps: tuple[int, ...]
    """Bytes from one run to the next along each."""

    @property
    def extent(self) -> int:
        """Bytes from the beginning of the first run to the end of the last."""
        return _extent(self.length, self.counts, self.steps)


@dataclass(frozen=True)
class Blocks:
    """Equal reads that cover some runs. Each holds the same runs in the same places."""

    starts: list[int]
    """Where the reads begin, ascending."""
    runs: Runs
    """Those in each read; `first` is 0."""

    @property
    def length(self) -> int:
        """Bytes of each read."""
        return self.runs.extent


def runs_of(shape: tuple[int, ...], first: tuple[int, ...], lengths: tuple[int, ...], item: int) -> Runs:
    """The runs of a box.

    Args:
        shape: of the tensor.
        first: the box's first indices.
        lengths: the box's lengths.
        item: bytes of an element.
    """
    if 0 in lengths:
        return Runs(0, 0, (), ())
    strides = [item] * len(shape)
    for dim in range(len(shape) - 2, -1, -1):
        strides[dim] = strides[dim + 1] * shape[dim + 1]
    start = sum(index * stride for index, stride in zip(first, strides, strict=True))
    length, dim = item, len(shape)
    # A dimension continues the run of the inner ones where it has but one index, or where those are whole.
    while dim > 0 and (length == strides[dim - 1] or lengths[dim - 1] == 1):
        dim -= 1
        if lengths[dim] != 1:
            length *= lengths[dim]
    outer = [(n, step) for n, step in zip(lengths[:dim], strides[:dim], strict=True) if n != 1]
    return Runs(start, length, tuple(n for n, _ in outer), tuple(step for _, step in outer))


def blocks_of(runs: Runs, gap: int) -> Blocks:
    """The reads for some runs: those with gaps of up to `gap` bytes between them become one read."""
    merged = len(runs.counts)
    extent = runs.length
    while merged > 0 and runs.steps[merged - 1] - extent <= gap:
        merged -= 1
        extent += (runs.counts[merged] - 1) * runs.steps[merged]
    starts = [runs.first] if runs.length else []
    for count, step in zip(runs.counts[:merged], runs.steps[:merged], strict=True):
        starts = [start + at for start in starts for at in range(0, count * step, step)]
    return Blocks(starts, Runs(0, runs.length, runs.counts[merged:], runs.steps[merged:]))


def _extent(length: int, counts: tuple[int, ...], steps: tuple[int, ...]) -> int:
    return length + sum((count - 1) * step for count, step in zip(counts, steps, strict=True))


def split(want: Want, limit: int) -> Iterator[Want]:
    """Parts of a part, one after the other, each within `limit` bytes of the file if that can be."""
    first, lengths = want.box or ((0,) * len(want.shape), want.shape)
    runs = runs_of(want.shape, first, lengths, want.dtype.itemsize)
    dim = next((dim for dim, n in enumerate(lengths) if n > 1), None)
    if runs.extent <= limit or dim is None:
        yield want
        return
    row = prod(want.shape[dim + 1 :]) * want.dtype.itemsize
    rows = max(1, limit // row)
    for begin in range(0, lengths[dim], rows):
        count = min(rows, lengths[dim] - begin)
        box = (_replaced(first, dim, first[dim] + begin), _replaced(lengths, dim, count))
        part = replace(want, target=want.target.narrow(dim, begin, count), box=box)
        yield from split(part, limit) if row > limit and count == 1 else (part,)


def _replaced(values: tuple[int, ...], index: int, value: int) -> tuple[int, ...]:
    return (*values[:index], value, *values[index + 1 :])


@dataclass(frozen=True)
class Batch:
    """Neighbouring small records, to be read at once."""

    at: int
    """Where the read begins in the file."""
    length: int
    """Bytes of the read."""
    wants: list[Want]


def batches(wants: Iterable[Want], limit: int, gap: int) -> Iterator[Batch]:
    """Group records of one file, given in the order of the file.

    Args:
        wants: the parts to read; records may occur more than once.
        limit: bytes of a read, if no record is longer.
        gap: bytes between records that may be read with them.
    """
    group: list[Want] = []
    begin = end = 0
    for want in wants:
        stop = want.at + want.length
        if group and (want.at - end > gap or stop - begin > limit):
            yield Batch(begin, end - begin, group)
            group = []
        if not group:
            begin, end = want.at, stop
        elif stop > end:
            end = stop
        group.append(want)
    if group:
        yield Batch(begin, end - begin, group)
