"""What an export writes: tensors, each made of boxes of stored ones, and their order in files. Pure functions.

The elements of a box follow one another in the order in which they are written, last axis first, and so do the boxes of
a tensor. So whatever is written is read piece by piece, and nothing has to be held as a whole.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from bridge.training.checkpointing.conversion.plan import Piece, PlanError, Tensor

SINGLE_FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"
CONFIG = "config.json"


@dataclass(frozen=True)
class Target:
    """A tensor that is written."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    """torch's name: `bfloat16`."""
    boxes: tuple[Piece, ...]
    """Of stored tensors: its elements, one box after the other."""

    @property
    def torch_dtype(self) -> torch.dtype:
        """The type of its values."""
        found: torch.dtype = getattr(torch, self.dtype)
        return found

    @property
    def nbytes(self) -> int:
        """Of its values."""
        return math.prod(self.shape) * self.torch_dtype.itemsize


def box(tensor: Tensor, offset: Sequence[int], shape: Sequence[int]) -> Piece:
    """Part of a stored tensor."""
    return Piece(tensor, tuple(offset), tuple(shape))


def whole(tensor: Tensor) -> Piece:
    """All of a stored tensor."""
    return Piece(tensor, (0,) * len(tensor.shape), tensor.shape)


def as_stored(tensors: Iterable[Tensor]) -> list[Target]:
    """Tensors under their own keys, in the order of these."""
    return [
        Target(tensor.key, tensor.shape, tensor.dtype, (whole(tensor),))
        for tensor in sorted(tensors, key=lambda each: each.key)
    ]


def with_dtype(targets: Iterable[Target], dtype: str | None) -> list[Target]:
    """The same with floating-point values of another type; None leaves them."""
    return [
        Target(each.name, each.shape, dtype, each.boxes) if dtype and each.torch_dtype.is_floating_point else each
        for each in targets
    ]


def files_of(targets: Iterable[Target], limit: int) -> dict[str, list[Target]]:
    """Divide tensors into files, in their order.

    Args:
        targets: all of them.
        limit: bytes of values in a file; a larger tensor has one of its own.

    Returns:
        By file name what is in it, wider types first, as the format's own library orders it: so all are aligned.
    """
    groups: list[list[Target]] = []
    size = 0
    for each in targets:
        if not groups or size + each.nbytes > limit:
            groups.append([])
            size = 0
        groups[-1].append(each)
        size += each.nbytes
    if len(groups) == 1:
        return {SINGLE_FILE: _aligned(groups[0])}
    stem, suffix = SINGLE_FILE.split(".")
    return {
        f"{stem}-{number:05d}-of-{len(groups):05d}.{suffix}": _aligned(group)
        for number, group in enumerate(groups, start=1)
    }


def _aligned(targets: Sequence[Target]) -> list[Target]:
    return sorted(targets, key=lambda each: -each.torch_dtype.itemsize)


def pieces_of(target: Target, limit: int) -> Iterator[Piece]:
    """The boxes of a tensor in pieces that can be held, in the order in which they are written.

    Args:
        target: the tensor.
        limit: bytes that a piece may weigh, with the whole of the chunks that it touches.

    Raises:
        PlanError: a single chunk is larger.
    """
    for each in target.boxes:
        for piece in _divided(each, limit):
            if piece.weight > limit:
                raise PlanError(
                    f"{piece.tensor.key} has chunks of {piece.weight} bytes, and {limit} is the most that can be held"
                )
            yield piece


def _divided(piece: Piece, limit: int) -> Iterator[Piece]:
    """Pieces of up to `limit` bytes of values; one element at least."""
    if piece.nbytes == 0:
        return
    if piece.nbytes <= limit:
        yield piece
        return
    # Everything above the axis that is cut goes in single steps: otherwise pieces would not follow one another.
    axis = next(axis for axis, size in enumerate(piece.shape) if size > 1)
    row = piece.nbytes // piece.shape[axis]
    step = max(1, limit // row)
    for start in range(0, piece.shape[axis], step):
        size = min(step, piece.shape[axis] - start)
        offset, shape = list(piece.offset), list(piece.shape)
        offset[axis] += start
        shape[axis] = size
        part = Piece(piece.tensor, tuple(offset), tuple(shape))
        if size > 1 or piece.nbytes // piece.shape[axis] <= limit:
            yield part
        else:
            yield from _divided(part, limit)
