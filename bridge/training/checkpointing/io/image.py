"""Where everything lies in a file of records, before any of it is written. Local.

A file's records follow one another, tensors first. Their lengths are known from types and shapes alone, so the places
of all tensors are too, and they stay the same while objects, whose lengths change, follow behind.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.storage import WriteResult
from torch.nn import Parameter

from bridge.training.checkpointing.io.framing import Frame, Frames

ALIGNMENT = 64
"""Records begin at multiples of so many bytes; so do then the bytes of tensors, in the file as in memory."""

_PIECE = 16 << 20
"""Bytes of a tensor that cannot be copied as it lies that are brought into order at once."""


@dataclass(frozen=True)
class FileContents:
    """What one file is to hold."""

    name: str
    """Of the file, in the checkpoint."""
    tensors: Sequence[tuple[Any, torch.Tensor]]
    """Each with torch's MetadataIndex."""
    objects: Sequence[tuple[Any, bytes | memoryview]]
    """Likewise, as they are stored."""


@dataclass(frozen=True, slots=True)
class TensorPart:
    """A tensor's record in a file."""

    at: int
    """Where it begins, in bytes."""
    frame: Frame
    tensor: torch.Tensor


@dataclass
class FileImage:
    """One file, laid out."""

    name: str
    size: int = 0
    """Bytes."""
    tensors: list[TensorPart] = field(default_factory=list)
    """In the order of the file; behind each, and between it and the next, there may be up to 63 bytes of nothing."""
    rest: list[tuple[int, bytes | memoryview]] = field(default_factory=list)
    """Records that are there already, with their places: behind the tensors."""
    indices: list[Any] = field(default_factory=list)
    """torch's MetadataIndex of every record."""

    def places(self) -> list[tuple[int, int]]:
        """Where every record begins, and how long it is, in bytes."""
        return [(part.at, part.frame.length) for part in self.tensors] + [(at, len(data)) for at, data in self.rest]

    def results(self) -> list[WriteResult]:
        """What torch DCP wants to know of a file that has been written."""
        return [
            WriteResult(index, length, _StorageInfo(self.name, at, length))
            for index, (at, length) in zip(self.indices, self.places(), strict=True)
        ]


def lay_out(contents: FileContents, frames: Frames) -> FileImage:
    """Give everything in a file its place. Tensors whose records are not known here are serialized by torch."""
    image = FileImage(contents.name)
    at = 0
    others: list[tuple[Any, bytes | memoryview]] = []
    tensors, indices, end = image.tensors, image.indices, 0
    for index, tensor in contents.tensors:
        frame = frames.of(tensor.dtype, tensor.shape) if is_usual(tensor) else None
        if frame is None:
            others.append((index, serialized(tensor)))
            continue
        tensors.append(TensorPart(at, frame, tensor))
        indices.append(index)
        end = at + frame.length
        at = -(-end // ALIGNMENT) * ALIGNMENT
    image.size = end
    for index, data in [*others, *contents.objects]:
        image.rest.append((at, data))
        image.indices.append(index)
        image.size = at + len(data)
        at = -(-image.size // ALIGNMENT) * ALIGNMENT
    return image


def is_usual(tensor: torch.Tensor) -> bool:
    """Whether torch saves a tensor as nothing but its type, its shape and its elements."""
    return (
        (type(tensor) is torch.Tensor or type(tensor) is Parameter)
        and tensor.layout is torch.strided
        and not tensor.is_meta
        and not tensor.is_quantized
        and not tensor.is_neg()
        and not tensor._is_zerotensor()
        and not (tensor.dtype.is_complex and tensor.is_conj())
    )


def serialized(tensor: torch.Tensor) -> memoryview:
    """A tensor's record as torch makes it."""
    stream = io.BytesIO()
    host = tensor.detach().to("cpu")
    # torch.save writes the whole storage that a view belongs to.
    torch.save(host.clone() if type(host) is torch.Tensor and not host.is_quantized else host, stream)
    return stream.getbuffer()


def in_order(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """A tensor's elements in host memory, one after the other: pieces that are contiguous there.

    What lies so already is not copied; of other tensors a piece is copied when it is asked for.
    """
    tensor = tensor.detach()
    size = prod(tensor.shape) * tensor.dtype.itemsize
    if tensor.is_cpu and tensor.is_contiguous():
        yield tensor
    elif size <= _PIECE:
        yield tensor.to("cpu").contiguous()
    else:
        rows = max(1, _PIECE * tensor.shape[0] // size)
        for piece in tensor.split(rows) if tensor.shape[0] > 1 else tensor.unbind(0):
            yield from in_order(piece)


def results_of(images: Iterable[FileImage]) -> list[WriteResult]:
    """What torch DCP wants to know of files that have been written."""
    return [result for image in images for result in image.results()]
