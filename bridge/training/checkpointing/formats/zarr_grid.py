"""How an array is divided into chunks so that no two ranks write one chunk. Pure functions.

Zarr's chunks are all of one shape, and a chunk is a file that one process has to write as a whole. So the shape is
chosen such that every border between the parts of different ranks is a border between chunks too.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

LARGEST_CHUNK = 64 << 20
"""Bytes. A reader of a part of a chunk reads all of it, so that a chunk much larger would cost after resharding."""
MOST_CHUNKS = 1 << 16
"""Of one array. Each is a file."""


@dataclass(frozen=True)
class Box:
    """A part of an array, as one rank holds it."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def is_empty(self) -> bool:
        """Whether it holds no element."""
        return 0 in self.shape

    def count_chunks(self, chunk_shape: Sequence[int]) -> int:
        """How many chunks it touches."""
        return math.prod(map(len, self._chunks_along(chunk_shape)))

    def slices(self) -> tuple[slice, ...]:
        """As an index into the array."""
        return tuple(slice(start, start + size) for start, size in zip(self.offset, self.shape, strict=True))

    def chunks(self, chunk_shape: Sequence[int]) -> Iterator[tuple[int, ...]]:
        """The indices of all chunks that it touches."""
        return itertools.product(*self._chunks_along(chunk_shape))

    def _chunks_along(self, chunk_shape: Sequence[int]) -> list[range]:
        axes = zip(self.offset, self.shape, chunk_shape, strict=True)
        return [range(start // c, -(-(start + size) // c)) if size else range(0) for start, size, c in axes]


@dataclass(frozen=True)
class Part:
    """What one rank writes of an array."""

    rank: int
    box: Box


class GridError(ValueError):
    """The parts are not those of an array, or lie so that the chunks would be too many. The message says how."""


def choose_chunks(shape: Sequence[int], itemsize: int, parts: Sequence[Part]) -> tuple[int, ...]:
    """The shape of an array's chunks: as large as the parts of different ranks and `LARGEST_CHUNK` allow.

    Args:
        shape: of the array.
        itemsize: bytes of one element.
        parts: of all ranks.

    Raises:
        GridError: they do not make up the array, or there would be more than `MOST_CHUNKS`.
    """
    written = [part for part in parts if not part.box.is_empty]
    covered = sum(math.prod(part.box.shape) for part in written)
    if covered != math.prod(shape):
        raise GridError(f"its parts have {covered} elements, and it has {math.prod(shape)}")
    chunks = [_along(axis, size, written, merge=True) for axis, size in enumerate(shape)]
    if not _is_exclusive(chunks, written):
        # Along each axis alone a rank's parts lie side by side, and together they do not.
        chunks = [_along(axis, size, written, merge=False) for axis, size in enumerate(shape)]
    counts = [-(-size // chunk) for size, chunk in zip(shape, chunks, strict=True)]
    if math.prod(counts) > MOST_CHUNKS:
        raise GridError(
            f"its {len(written)} parts begin and end so irregularly that it takes {math.prod(counts)} chunks of the "
            f"shape {tuple(chunks)} to keep the ranks apart, and {MOST_CHUNKS} is the most"
        )
    if not _is_exclusive(chunks, written):
        raise GridError("its parts overlap")
    limited = _limited(chunks, shape, itemsize)
    counts = [-(-size // chunk) for size, chunk in zip(shape, limited, strict=True)]
    return tuple(limited if math.prod(counts) <= MOST_CHUNKS else chunks)


def _along(axis: int, size: int, parts: Sequence[Part], *, merge: bool) -> int:
    """The largest step along an axis whose multiples separate the parts; with `merge`, only those of other ranks."""
    owners: dict[tuple[int, int], set[int]] = {}
    for part in parts:
        start = part.box.offset[axis]
        owners.setdefault((start, start + part.box.shape[axis]), set()).add(part.rank)
    cuts = set()
    for first, second in itertools.pairwise(sorted(owners)):
        if first[1] != second[0]:  # Parts of other sizes lie beside one another: keep to all their edges.
            cuts = {edge for span in owners for edge in span}
            break
        if not (merge and owners[first] == owners[second] and len(owners[first]) == 1):
            cuts.add(second[0])
    return math.gcd(*(cut for cut in cuts if cut < size)) or max(size, 1)


def _is_exclusive(chunks: Sequence[int], parts: Sequence[Part]) -> bool:
    """Whether no chunk belongs to two ranks. Gives up, as if it were not so, where there are too many to look at."""
    owners: dict[tuple[int, ...], int] = {}
    for part in parts:
        for index in part.box.chunks(chunks):
            if owners.setdefault(index, part.rank) != part.rank or len(owners) > MOST_CHUNKS:
                return False
    return True


def _limited(chunks: Sequence[int], shape: Sequence[int], itemsize: int) -> list[int]:
    """Divide the first axes until a chunk is about as large as it may be; the borders that there were remain.

    An axis that is one chunk has no borders, so it can be divided anywhere. Elsewhere only a divisor keeps them, and
    where there is none near what is needed, large chunks are better than a great many of them.
    """
    limited = list(chunks)
    for axis, chunk in enumerate(chunks):
        excess = -(-math.prod(limited) * itemsize // LARGEST_CHUNK)
        if excess <= 1:
            break
        if chunk >= shape[axis]:
            limited[axis] = -(-chunk // min(excess, chunk))
        else:
            limited[axis] = next(
                (chunk // n for n in range(excess, min(chunk, 4 * excess) + 1) if chunk % n == 0), chunk
            )
    return limited
