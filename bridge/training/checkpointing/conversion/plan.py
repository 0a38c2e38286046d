"""How a conversion is divided: tensors into pieces that fit into memory, and pieces into parts. Pure functions.

A part is what one process does at a time, and what is not done again when a conversion is continued. What is stored in
chunks that are read or written as a whole is divided along their borders.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

LARGEST_PART = 1 << 30
SMALLEST_PART = 1 << 20
"""Bytes."""
_PARTS = 32
"""That a checkpoint is divided into, where this makes them neither too large nor too small."""
SMALLEST_SHARE = 1 << 20
"""Bytes of memory that a process can work in."""
_LARGEST_READER = 64 << 20
_SMALLEST_READER = 320 << 10
"""Bytes of buffers: what reads small records reads up to 256 KiB of each at once."""
_COPIES = 3
"""Of a piece that are held at once: where the two checkpoints are compared, both, and the copy of a Zarr library."""


@dataclass(frozen=True)
class Tensor:
    """A stored tensor."""

    key: str
    shape: tuple[int, ...]
    dtype: str
    """torch's name: `bfloat16`."""
    chunk: tuple[int, ...]
    """The shape of what is read or written as a whole; ones where any part can be."""

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        return self.torch_dtype.itemsize

    @property
    def torch_dtype(self) -> torch.dtype:
        """The type of its values."""
        found: torch.dtype = getattr(torch, self.dtype)
        return found

    @property
    def nbytes(self) -> int:
        """Of its values."""
        return math.prod(self.shape) * self.itemsize


@dataclass(frozen=True)
class Piece:
    """A box in a tensor, small enough to be held in memory."""

    tensor: Tensor
    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Of its values."""
        return math.prod(self.shape) * self.tensor.itemsize

    @property
    def weight(self) -> int:
        """Bytes of all chunks that it touches."""
        return _padded_bytes(self.shape, self.tensor)


@dataclass(frozen=True)
class Part:
    """What one process does at a time."""

    number: int
    pieces: tuple[Piece, ...]
    objects: tuple[tuple[str, int], ...]
    """Unique keys of objects, with the bytes that each has where it is stored."""

    @property
    def nbytes(self) -> int:
        """Of its values and objects."""
        return sum(piece.nbytes for piece in self.pieces) + sum(size for _, size in self.objects)


@dataclass(frozen=True)
class Shares:
    """How the memory of one process is used."""

    total: int
    reader: int
    """Bytes of a reader's buffers."""
    piece: int
    """The largest weight of the pieces that are handled at once."""


class PlanError(ValueError):
    """Something does not fit into memory, and cannot be divided. The message says what and how large it is."""


def shares_of(memory: int, processes: int) -> Shares:
    """Divide a memory budget, in bytes, among processes and what each does.

    Raises:
        PlanError: it is too small.
    """
    share = memory // processes
    if share < SMALLEST_SHARE:
        raise PlanError(
            f"a process needs {SMALLEST_SHARE >> 20} MiB, and {processes} processes share {memory / 2**20:.1f} MiB"
        )
    reader = min(_LARGEST_READER, max(_SMALLEST_READER, share // 4))
    return Shares(share, reader, (share - reader) // _COPIES)


def steps_of(tensor: Tensor, limit: int) -> tuple[int, ...]:
    """The shape of a tensor's pieces: whole chunks, up to `limit` bytes, as much as possible along its last axes.

    Raises:
        PlanError: a single chunk is larger.
    """
    steps = _padded(tensor.shape, tensor.chunk)
    for axis, unit in enumerate(tensor.chunk):
        if math.prod(steps) * tensor.itemsize <= limit:
            break
        row = math.prod(steps) // steps[axis] * tensor.itemsize
        steps[axis] = max(unit, limit // row // unit * unit)
    needed = math.prod(steps) * tensor.itemsize
    if needed > limit:
        raise PlanError(f"{tensor.key} has chunks of {needed} bytes, and {limit} is the most that can be held")
    return tuple(steps)


def chunk_of(shape: tuple[int, ...], itemsize: int, limit: int) -> tuple[int, ...]:
    """The shape of the chunks of an array that is to be written: up to `limit` bytes, and of about equal sizes."""
    chunk = [max(1, size) for size in shape]
    for axis, size in enumerate(chunk):
        if math.prod(chunk) * itemsize <= limit:
            break
        row = math.prod(chunk) // size * itemsize
        count = -(-size // max(1, limit // row))
        chunk[axis] = -(-size // count)
    return tuple(chunk)


def pieces_of(tensor: Tensor, limit: int) -> Iterator[Piece]:
    """The pieces of a tensor, in their order. One that is empty has one piece.

    Raises:
        PlanError: as `steps_of`.
    """
    if 0 in tensor.shape:
        yield Piece(tensor, (0,) * len(tensor.shape), tensor.shape)
        return
    steps = steps_of(tensor, limit)
    for offset in itertools.product(*(range(0, size, step) for size, step in zip(tensor.shape, steps, strict=True))):
        sizes = zip(offset, tensor.shape, steps, strict=True)
        yield Piece(tensor, offset, tuple(min(step, size - start) for start, size, step in sizes))


def divide(tensors: Iterable[Tensor], objects: Sequence[tuple[str, int]], limit: int) -> list[Part]:
    """All parts of a conversion.

    Args:
        tensors: all of the checkpoint.
        objects: unique key and stored bytes of each.
        limit: bytes that a piece may weigh.

    Raises:
        PlanError: as `steps_of`.
    """
    pieces = [piece for tensor in sorted(tensors, key=lambda each: each.key) for piece in pieces_of(tensor, limit)]
    total = sum(piece.nbytes for piece in pieces)
    largest = min(LARGEST_PART, max(SMALLEST_PART, total // _PARTS))
    items: list[tuple[Any, int]] = [(entry, entry[1]) for entry in sorted(objects)]
    items += [(piece, piece.nbytes) for piece in pieces]
    return [
        Part(
            number,
            tuple(item for item in group if isinstance(item, Piece)),
            tuple(item for item in group if not isinstance(item, Piece)),
        )
        for number, group in enumerate(_grouped(items, largest))
    ]


def batches_of(part: Part, limit: int) -> Iterator[list[Piece]]:
    """The pieces of a part in groups that can be held at once."""
    return _grouped([(piece, piece.weight) for piece in part.pieces], limit)


def _grouped(items: Iterable[tuple[Any, int]], limit: int) -> Iterator[list[Any]]:
    """Neighbouring items together while their sizes add up to no more than `limit`."""
    group: list[Any] = []
    size = 0
    for item, nbytes in items:
        if group and size + nbytes > limit:
            yield group
            group, size = [], 0
        group.append(item)
        size += nbytes
    if group:
        yield group


def _padded(shape: Sequence[int], chunk: Sequence[int]) -> list[int]:
    return [-(-size // unit) * unit for size, unit in zip(shape, chunk, strict=True)]


def _padded_bytes(shape: Sequence[int], tensor: Tensor) -> int:
    return math.prod(_padded(shape, tensor.chunk)) * tensor.itemsize
