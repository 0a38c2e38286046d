"""What one process of a conversion does: check files, convert a part, compare a part."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch

from bridge.training.checkpointing.conversion.comparing import same, same_tensor
from bridge.training.checkpointing.conversion.plan import Part, Piece, Shares, batches_of
from bridge.training.checkpointing.conversion.stores import Store, open_store
from bridge.training.checkpointing.conversion.writers import Writer, Written, writer_of
from bridge.training.checkpointing.errors import CheckpointDamagedError, CheckpointSaveError
from bridge.training.checkpointing.integrity import FileRecord, find_damage

_COPIES_OF_OBJECT = 4
"""Its bytes as they are stored, and its value, of both checkpoints."""


@dataclass(frozen=True)
class Job:
    """What the processes of a conversion have to know. Paths are absolute."""

    source: Path
    source_format: str
    staging: Path
    target_format: str
    shares: Shares
    limit: int
    """Bytes that a piece weighs at most; no more than its share."""
    safe_globals: tuple[str, ...]


@dataclass(frozen=True)
class Task:
    """Something that one process does."""

    kind: Literal["check", "convert", "compare"]
    size: int
    """Bytes that it handles."""
    part: Part | None = None
    files: tuple[FileRecord, ...] = ()
    """To check: those of the source. To convert: what an earlier try has finished, if it did."""
    earlier: Written | None = None


@dataclass(frozen=True)
class Outcome:
    """What came of a task."""

    written: Written | None
    reused: bool
    peak: int
    """Bytes of values, objects and buffers that the process has held at once so far."""
    process: int
    """Its id."""


class Memory:
    """Counts what is held, and does not let it become more than it may."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self.held = 0
        self.peak = 0

    @contextmanager
    def hold(self, size: int, what: str) -> Iterator[None]:
        """Account for `size` bytes while the context lasts.

        Raises:
            CheckpointSaveError: they are too many.
        """
        if self.held + size > self._limit:
            raise CheckpointSaveError(
                f"--memory-gib: {what} takes {size} bytes, and this process may hold {self._limit} bytes at once, of "
                f"which {self.held} are in use; give more memory, or use fewer --processes"
            )
        self.held += size
        self.peak = max(self.peak, self.held)
        try:
            yield
        finally:
            self.held -= size


class Work:
    """One process's work. Both checkpoints stay open."""

    def __init__(self, job: Job, report: Callable[[int], None]) -> None:
        """
        Args:
            job: the conversion.
            report: told the bytes that have been handled since it was last told.
        """
        self._job, self._report = job, report
        self._memory = Memory(job.shares.total)

    @cached_property
    def _source(self) -> Store:
        return open_store(self._job.source, self._job.source_format, self._job.shares.reader)

    @cached_property
    def _target(self) -> Store:
        return open_store(self._job.staging, self._job.target_format, self._job.shares.reader)

    @cached_property
    def _writer(self) -> Writer:
        return writer_of(self._job.staging, self._job.target_format, self._job.limit)

    def do(self, task: Task) -> Outcome:
        """Carry out a task.

        Raises:
            CheckpointError: it failed.
        """
        with self._memory.hold(self._job.shares.reader, "the reader"):
            if task.kind == "check":
                self._check(task.files)
                return self._outcome(None)
            if task.part is None:
                raise TypeError(f"a task to {task.kind} is without a part")
            if task.kind == "compare":
                self._compare(task.part)
                return self._outcome(None)
            if task.earlier is not None and not find_damage(self._job.staging, task.earlier.files, checksums=True):
                self._report(task.size)
                return self._outcome(task.earlier, reused=True)
            return self._outcome(self._convert(task.part))

    def _outcome(self, written: Written | None, *, reused: bool = False) -> Outcome:
        return Outcome(written, reused, self._memory.peak, os.getpid())

    def _check(self, files: Sequence[FileRecord]) -> None:
        for record in files:
            problems = find_damage(self._job.source, [record], checksums=True)
            if problems:
                raise CheckpointDamagedError(f"{self._job.source} is damaged: {problems[0]}")
            self._report(record.size)

    def _convert(self, part: Part) -> Written:
        return self._writer.write(part.number, self._read(part), self._objects(part))

    def _read(self, part: Part) -> Iterator[list[tuple[Piece, torch.Tensor]]]:
        for batch in batches_of(part, self._job.limit):
            # Twice: a library of Zarr arrays holds the chunks beside their values, while it reads and while it writes.
            with self._memory.hold(2 * _weight(batch), f"a piece of {batch[0].tensor.key}"):
                values = list(zip(batch, self._source.read(batch), strict=True))
                yield values
                values.clear()
            self._report(_size(batch))

    def _objects(self, part: Part) -> Iterator[tuple[str, Any]]:
        for key, size in part.objects:
            with self._memory.hold(_COPIES_OF_OBJECT * size, f"the object {key}"):
                yield key, self._source.read_objects([key])[key]
            self._report(size)

    def _compare(self, part: Part) -> None:
        for key, size in part.objects:
            with self._memory.hold(_COPIES_OF_OBJECT * size, f"the object {key}"):
                if not same(self._source.read_objects([key]), self._target.read_objects([key])):
                    raise self._difference(f"the object {key}")
            self._report(size)
        for batch in batches_of(part, self._job.limit):
            with self._memory.hold(3 * _weight(batch), f"a piece of {batch[0].tensor.key}"):
                self._compare_pieces(batch)
            self._report(_size(batch))

    def _compare_pieces(self, batch: Sequence[Piece]) -> None:
        for piece, first, second in zip(batch, self._source.read(batch), self._target.read(batch), strict=True):
            if not same_tensor(first, second):
                raise self._difference(f"{piece.tensor.key} at {list(piece.offset)}")

    def _difference(self, what: str) -> CheckpointSaveError:
        return CheckpointSaveError(
            f"{what} is not what it is in {self._job.source} after it was written to {self._job.staging}: storage or "
            "memory is failing, or the checkpoint was changed meanwhile. Nothing was published"
        )


def _weight(batch: Sequence[Piece]) -> int:
    return sum(piece.weight for piece in batch)


def _size(batch: Sequence[Piece]) -> int:
    return sum(piece.nbytes for piece in batch)
