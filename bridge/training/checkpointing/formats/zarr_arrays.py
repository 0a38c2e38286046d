"""Zarr arrays on disk, written and read with TensorStore."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bridge.training.checkpointing.errors import (
    CheckpointDamagedError,
    CheckpointError,
    CheckpointMismatchError,
    CheckpointSaveError,
)
from bridge.training.checkpointing.formats.zarr_grid import Box
from bridge.training.checkpointing.formats.zarr_metadata import TORCH_DTYPE, V3, StoredArray, bits_of, stored_type

try:
    import tensorstore
except ImportError as error:
    raise CheckpointMismatchError(
        f"checkpoint.ckpt_format 'zarr' needs the package tensorstore ({error}); install it with pip install "
        "'bridge[zarr]'"
    ) from error

_AT_A_TIME = 8
"""Files that one writer of `checkpoint.storage_writers_per_rank` has open: most of the time they wait for storage."""
_PENDING_BYTES = 256 << 20
"""Of values that are on their way to or from storage, if no single one is larger."""
_OS_ERROR = re.compile(r"os_error_code='(\d+)'|\[OS error (\d+)")
"""In the messages of TensorStore's versions."""


@dataclass(frozen=True)
class ArraySpec:
    """An array that a save writes."""

    name: str
    """Of its directory in the checkpoint."""
    shape: tuple[int, ...]
    dtype: torch.dtype
    chunk_shape: tuple[int, ...]

    def files(self, boxes: Iterable[Box]) -> list[str]:
        """Paths, inside the checkpoint, of the chunks that these parts of the array touch; each once."""
        chunks = dict.fromkeys(index for box in boxes for index in box.chunks(self.chunk_shape))
        return ["/".join((self.name, "c", *map(str, index))) for index in chunks]


@dataclass(frozen=True)
class ArrayWrite:
    """What one rank writes of an array."""

    spec: ArraySpec
    makes_metadata: bool
    """Whether this rank writes `zarr.json`: one of those that write the array does."""
    parts: Sequence[tuple[Box, torch.Tensor]]

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(tensor.nbytes for _, tensor in self.parts)

    def files(self) -> list[str]:
        """Paths, inside the checkpoint, of the files that it makes."""
        chunks = self.spec.files(box for box, _ in self.parts)
        return [*([f"{self.spec.name}/{V3}"] if self.makes_metadata else []), *chunks]


def write_arrays(directory: Path, writes: Sequence[ArrayWrite], writers: int) -> list[str]:
    """Write and sync what this rank writes of each array. Local; may be run again after it has failed.

    Args:
        directory: the checkpoint in the making.
        writes: no other rank writes the same chunks.
        writers: a multiple of this many files are written at the same time.

    Returns:
        The paths of the files, inside the checkpoint.

    Raises:
        CheckpointSaveError: one could not be written; the cause is the operating system's error, if there is one.
    """
    context = tensorstore.Context(
        {
            "file_io_sync": True,
            "file_io_concurrency": {"limit": _AT_A_TIME * writers},
            "cache_pool": {"total_bytes_limit": 0},
        }
    )
    names = [name for write in writes for name in write.files()]
    with _typed_errors(directory):
        for name in names:
            _remove(directory / name)  # of an earlier try
        for batch in _batches(writes):
            opened = [_open_to_write(directory, write, context) for write in batch]
            with _waiting_for_all() as pending:
                for store, write in zip(opened, batch, strict=True):
                    pending.append(_begin(store.result(), write))
                for one in pending:
                    one.result()
    return names


@contextmanager
def _waiting_for_all() -> Iterator[list[Any]]:
    """A list of futures; none of them goes on when it is left, by an error either: it would touch tensors and files."""
    pending: list[Any] = []
    try:
        yield pending
    except BaseException:
        for one in pending:
            with suppress(Exception):
                one.result()
        raise


def _remove(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.with_name(f"{path.name}.__lock").unlink(missing_ok=True)  # TensorStore's name for a file in the making


def _batches(writes: Sequence[ArrayWrite]) -> Iterator[list[ArrayWrite]]:
    batch: list[ArrayWrite] = []
    size = 0
    for write in writes:
        if batch and size + write.size > _PENDING_BYTES:
            yield batch
            batch, size = [], 0
        batch.append(write)
        size += write.size
    if batch:
        yield batch


def _open_to_write(directory: Path, write: ArrayWrite, context: Any) -> Any:
    spec = write.spec
    stored, meant = stored_type(spec.dtype)
    # Only one rank makes the metadata. The others know what they are going to say.
    how = {"create": True} if write.makes_metadata else {"open": True, "assume_metadata": True}
    return tensorstore.open(
        {
            "driver": "zarr3",
            "kvstore": _place(directory / spec.name),
            "metadata": {
                "shape": list(spec.shape),
                "data_type": stored,
                "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(spec.chunk_shape)}},
                "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}],
                "fill_value": False if stored == "bool" else 0,
                "attributes": {TORCH_DTYPE: meant},
            },
            # A chunk that is missing has been lost, so that one of zeros has to be there.
            "store_data_equal_to_fill_value": True,
            **how,
        },
        context=context,
    )


def _begin(store: Any, write: ArrayWrite) -> Any:
    """Start writing; what is returned ends when it is on storage."""
    # Several parts may share a chunk: in a transaction each chunk is written once.
    transaction = tensorstore.Transaction()
    view = store.with_transaction(transaction)
    # The values stay as they are until the end of the save, so that it takes no copy of them.
    copies = [
        view[box.slices()].write(_host_values(tensor, box), can_reference_source_data_indefinitely=True).copy
        for box, tensor in write.parts
        if not box.is_empty
    ]
    for copy in copies:
        copy.result()
    return transaction.commit_async()


def _host_values(tensor: torch.Tensor, box: Box) -> Any:
    return bits_of(tensor.detach().cpu().contiguous().view(box.shape))


@contextmanager
def _typed_errors(directory: Path) -> Iterator[None]:
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:  # TensorStore raises a ValueError for most of what can go wrong
        code = _OS_ERROR.search(str(error))
        reason = _brief(error)
        if code is None:
            raise CheckpointSaveError(f"writing arrays in {directory} failed: {reason}") from error
        number = int(code[1] or code[2])
        raise CheckpointSaveError(f"writing arrays in {directory} failed: {reason}") from OSError(
            number, os.strerror(number)
        )


def _brief(error: Exception) -> str:
    """TensorStore's message without the specification that it appends."""
    return str(error).split(" [", 1)[0].replace("\0", "/")


def _place(path: Path) -> dict[str, str]:
    return {"driver": "file", "path": str(path.absolute())}


@dataclass(frozen=True)
class ArrayRead:
    """A part of a stored array, and where it goes."""

    array: StoredArray
    box: Box
    target: torch.Tensor
    """On any device, of any type that the values can be converted to, in the box's shape."""

    @property
    def size(self) -> int:
        """Bytes of the chunks that have to be read for it, however little of them it takes."""
        chunk = math.prod(self.array.chunk_shape) * self.array.dtype.itemsize
        return self.box.count_chunks(self.array.chunk_shape) * chunk


def read_arrays(reads: Sequence[ArrayRead]) -> None:
    """Read each part into its target. Local.

    Raises:
        CheckpointDamagedError: a chunk is missing or cannot be decoded.
    """
    context = tensorstore.Context({"cache_pool": {"total_bytes_limit": 0}})
    opened: dict[Path, Any] = {}
    for batch in read_batches(reads):
        begun: list[tuple[ArrayRead, Any, Any]] = []
        with _waiting_for_all() as pending:
            for read in batch:
                if read.array.path not in opened:
                    opened[read.array.path] = open_stored(read.array, context)
                copying, values = _begin_read(read, opened[read.array.path])
                pending.append(copying)
                begun.append((read, copying, values))
            _finish_reads(begun)


def read_batches(reads: Sequence[ArrayRead], limit: int = _PENDING_BYTES) -> Iterator[list[ArrayRead]]:
    """What is read at the same time, without what is empty: a limited number of bytes, if no single read takes more."""
    batch: list[ArrayRead] = []
    size = 0
    for read in (read for read in reads if not read.box.is_empty):
        if batch and size + read.size > limit:
            yield batch
            batch, size = [], 0
        batch.append(read)
        size += read.size
    if batch:
        yield batch


def open_stored(array: StoredArray, context: Any | None = None) -> Any:
    """TensorStore's future of an array, open for reading. A missing chunk is an error, and no run of fill values."""
    driver = {3: "zarr3", 2: "zarr"}[array.version]
    spec = {"driver": driver, "kvstore": _place(array.path), "fill_missing_data_reads": False}
    return tensorstore.open(spec, open=True, read=True, context=context or tensorstore.Context())


def _begin_read(read: ArrayRead, future: Any) -> tuple[Any, torch.Tensor]:
    """Start reading, into the target's own memory if its values are stored in the same form."""
    direct = read.target.device.type == "cpu" and read.target.is_contiguous() and read.target.dtype == read.array.dtype
    values = read.target.detach() if direct else torch.empty(read.box.shape, dtype=read.array.dtype)
    try:
        store = future.result()
        if store.domain.shape != read.array.shape:
            raise CheckpointDamagedError(f"{read.array.path} has changed while it was read")
        memory = bits_of(values)
        if store.dtype.numpy_dtype.itemsize == memory.dtype.itemsize:
            memory = memory.view(store.dtype.numpy_dtype)
        return tensorstore.array(memory).write(store[read.box.slices()].translate_to[(0,) * memory.ndim]), values
    except CheckpointError:
        raise
    except Exception as error:
        raise _unreadable(read, error) from error


def _finish_reads(pending: Sequence[tuple[ArrayRead, Any, torch.Tensor]]) -> None:
    for read, copying, values in pending:
        try:
            copying.result()
        except Exception as error:
            raise _unreadable(read, error) from error
        if values.data_ptr() != read.target.data_ptr():
            with torch.no_grad():
                read.target.copy_(values)


def _unreadable(read: ArrayRead, error: Exception) -> CheckpointDamagedError:
    return CheckpointDamagedError(f"the array {read.array.path} cannot be read: {_brief(error)}")
