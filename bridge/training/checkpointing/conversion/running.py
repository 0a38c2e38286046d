"""One conversion, from its plan to the published checkpoint."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from bridge.training.checkpointing import commit
from bridge.training.checkpointing.conversion.contents import (
    Contents,
    contents_of,
    require_same_contents,
    write_contents,
)
from bridge.training.checkpointing.conversion.destination import TO, manifest_of, move_trackers, tracking
from bridge.training.checkpointing.conversion.plan import Part, PlanError, Shares, Tensor, divide
from bridge.training.checkpointing.conversion.processes import Pool, pool_of
from bridge.training.checkpointing.conversion.progress import Progress, fingerprint_of
from bridge.training.checkpointing.conversion.source import Read
from bridge.training.checkpointing.conversion.stores import ZARR, Store, open_store
from bridge.training.checkpointing.conversion.work import Job, Outcome, Task
from bridge.training.checkpointing.conversion.writers import Written, require_writable, target_chunk, writer_of
from bridge.training.checkpointing.disk import as_text, available_bytes
from bridge.training.checkpointing.errors import (
    CheckpointDamagedError,
    CheckpointMismatchError,
    CheckpointSaveError,
    NotEnoughSpaceError,
)
from bridge.training.checkpointing.events.kinds import CheckpointConverted
from bridge.training.checkpointing.events.recording import record_alone
from bridge.training.checkpointing.files import sync_file, sync_tree
from bridge.training.checkpointing.formats.registry import format_named
from bridge.training.checkpointing.integrity import FileRecord, Manifest
from bridge.training.checkpointing.layout import Listing, iteration_name

_CHECKED = "source-checked"

Step = Literal["checking", "converting", "comparing"]
Report = Callable[[Step, int, int], None]
"""Told how many bytes of how many a step has handled."""


@dataclass(frozen=True)
class Converted:
    """What came of a conversion."""

    source: Path
    path: Path
    """The published checkpoint."""
    iteration: int
    source_format: str
    target_format: str
    tensors: int
    objects: int
    parts: int
    parts_reused: int
    """Those that an earlier try had finished."""
    total_bytes: int
    """Of all files of the published checkpoint; 0 where an earlier try had published it."""
    verified: bool
    """Whether every tensor, object and file was compared with the source."""
    trackers_moved: bool
    trackers: str
    """What became of the trackers, in words."""
    processes: int
    peak_bytes: int
    """The most values, objects and buffers that all processes together can have held at once."""
    seconds: float


@dataclass(frozen=True)
class Request:
    """What was asked for, checked."""

    read: Read
    destination: Path
    target_format: str
    processes: int
    shares: Shares
    verify: bool
    force: bool
    safe_globals: tuple[str, ...]


def _event_of(converted: Converted) -> CheckpointConverted:
    return CheckpointConverted(
        iteration=converted.iteration,
        tier="persistent",
        checkpoint_format=converted.target_format,
        total_bytes=converted.total_bytes or None,
        path=str(converted.path),
        source=str(converted.source),
        source_format=converted.source_format,
        seconds=converted.seconds,
    )


@dataclass
class Conversion:
    """One conversion, in a destination that this process has claimed."""

    request: Request
    listing: Listing
    report: Report
    started: float
    reused: int = 0
    comparing: bool = False
    peaks: dict[int, int] = field(default_factory=dict)

    def run(self) -> Converted:
        """Carry it out, or what an earlier try has left of it.

        Raises:
            CheckpointError, OSError: as `convert.convert`; what was finished is kept.
        """
        request, read = self.request, self.request.read
        fingerprint = fingerprint_of(read.path, read.manifest, request.target_format)
        progress = Progress(request.destination, read.iteration, fingerprint)
        published = progress.has_published()
        if read.iteration in self.listing.iterations and not request.force and not published:
            raise CheckpointSaveError(
                f"{TO}: {request.destination} has a checkpoint of iteration {read.iteration}; give --force to replace "
                "it, or name another directory"
            )
        moves, trackers = tracking(self.listing, read.iteration)
        if published:
            path = request.destination / iteration_name(read.iteration)
            store = open_store(path, request.target_format, request.shares.reader)
            objects, parts, total = len(store.objects), 0, 0
        else:
            store = open_store(read.path, read.name, request.shares.reader)
            source_format = format_named(read.name)
            contents = contents_of(read.path, source_format, request.target_format, store, read.manifest)
            require_writable(request.target_format, store.tensors.values(), contents.in_parts)
            path, parts, total = self._publish(progress, store, contents)
            objects = len(contents.objects) + len(contents.in_parts)
        if moves:
            trackers = move_trackers(request.destination, read.iteration, path, self.listing)
        converted = Converted(
            read.path,
            path,
            read.iteration,
            read.name,
            request.target_format,
            len(store.tensors),
            objects,
            parts,
            self.reused,
            total,
            request.verify and not published,
            moves,
            trackers,
            request.processes,
            sum(self.peaks.values()),
            time.monotonic() - self.started,
        )
        # Whoever is killed in between tells of it again, and nobody of a conversion that is not there.
        record_alone(_event_of(converted), converted.path)
        progress.forget()
        return converted

    def _publish(self, progress: Progress, store: Store, contents: Contents) -> tuple[Path, int, int]:
        """Do everything up to the rename; return the path, the number of parts and the bytes of all files."""
        request, read = self.request, self.request.read
        parts, limit = self._divide(progress, store, contents)
        job = Job(
            read.path,
            read.name,
            progress.staging.absolute(),
            request.target_format,
            request.shares,
            limit,
            request.safe_globals,
        )
        try:
            with pool_of(job, max(1, min(request.processes, len(parts)))) as pool:
                files = self._fill(pool, progress, parts, limit, store, contents)
        except (CheckpointSaveError, CheckpointDamagedError, CheckpointMismatchError):
            if self.comparing:  # what was written is wrong, whatever the reason
                progress.forget()
            raise
        files.sort(key=lambda record: record.name)
        return self._commit(progress, files), len(parts), sum(record.size for record in files)

    def _fill(
        self, pool: Pool, progress: Progress, parts: list[Part], limit: int, store: Store, contents: Contents
    ) -> list[FileRecord]:
        """Write all files of the checkpoint and compare it with the source; return their records."""
        request, read, staging = self.request, self.request.read, progress.staging
        if request.verify and read.manifest is not None and not progress.is_done(_CHECKED):
            self._check(pool, read.manifest)
            progress.done(_CHECKED)
        written = self._convert(pool, progress, parts)
        beside = write_contents(read.path, staging, contents, read.manifest, len(parts))
        files = [record for part in (*written, beside) for record in part.files]
        writer = writer_of(staging, request.target_format, limit)
        for name in writer.finish(store.tensors.values(), [*written, beside]):
            sync_file(staging / name)
            files.append(FileRecord.of(staging, name))
        if request.verify:
            self.comparing = True
            self._compare(pool, parts, store, contents, beside, staging)
        return files

    def _divide(self, progress: Progress, store: Store, contents: Contents) -> tuple[list[Part], int]:
        """The parts, and the limit that they were made with."""
        request = self.request
        in_parts = list(contents.in_parts.items())
        try:
            # Found out before anything is made or taken up.
            self._parts(store, in_parts, request.shares.piece)
            self._require_room(progress, store)
            limit = progress.begin(request.shares.piece)
            return self._parts(store, in_parts, limit), limit
        except PlanError as error:
            raise CheckpointSaveError(f"--memory-gib: {error}; give more memory, or use fewer --processes") from error

    def _parts(self, store: Store, objects: list[tuple[str, int]], limit: int) -> list[Part]:
        target = self.request.target_format

        def divided(tensor: Tensor) -> Tensor:
            if target != ZARR:  # then it is the source that may have chunks
                return tensor
            chunk = target_chunk(target, tensor, limit)
            return Tensor(tensor.key, tensor.shape, tensor.dtype, chunk)

        return divide(map(divided, store.tensors.values()), objects, limit)

    def _require_room(self, progress: Progress, store: Store) -> None:
        available = available_bytes(self.request.destination)
        there = sum(each.stat().st_size for each in progress.staging.rglob("*") if each.is_file())
        needed = sum(tensor.nbytes for tensor in store.tensors.values()) - there
        if available is not None and needed > available:
            raise NotEnoughSpaceError(
                f"{TO}: {as_text(needed)} are needed in {self.request.destination} and {as_text(available)} are "
                "available; free space there and start again, and what is finished is kept"
            )

    def _check(self, pool: Pool, manifest: Manifest) -> None:
        self._carry_out(pool, "checking", [Task("check", record.size, files=(record,)) for record in manifest.files])

    def _convert(self, pool: Pool, progress: Progress, parts: list[Part]) -> list[Written]:
        written: dict[int, Written] = {}

        def finished(task: Task, outcome: Outcome) -> None:
            if task.part is None or outcome.written is None:
                raise TypeError("a conversion of a part has no outcome")
            written[task.part.number] = outcome.written
            if outcome.reused:
                self.reused += 1
            else:
                progress.remember(task.part.number, outcome.written)

        tasks = [Task("convert", part.nbytes, part, earlier=progress.written(part.number)) for part in parts]
        self._carry_out(pool, "converting", tasks, finished)
        return [written[part.number] for part in parts]

    def _compare(
        self, pool: Pool, parts: list[Part], store: Store, contents: Contents, beside: Written, staging: Path
    ) -> None:
        target = open_store(staging, self.request.target_format, self.request.shares.reader)
        require_same_contents(store, target, staging, contents, format_named(self.request.target_format), beside)
        self._carry_out(pool, "comparing", [Task("compare", part.nbytes, part) for part in parts])

    def _carry_out(
        self, pool: Pool, step: Step, tasks: list[Task], finished: Callable[[Task, Outcome], None] | None = None
    ) -> None:
        total, done = sum(task.size for task in tasks), 0

        def handled(size: int) -> None:
            nonlocal done
            done += size
            self.report(step, done, total)

        def ended(task: Task, outcome: Outcome) -> None:
            self.peaks[outcome.process] = max(outcome.peak, self.peaks.get(outcome.process, 0))
            if finished is not None:
                finished(task, outcome)

        self.report(step, 0, total)
        pool.run(tasks, ended, handled)

    def _commit(self, progress: Progress, files: list[FileRecord]) -> Path:
        read, staging = self.request.read, progress.staging
        manifest = None
        if read.manifest is not None:
            manifest = manifest_of(read.manifest, self.request.target_format, files, staging.parent)
        progress.set_aside(manifest)
        if manifest is not None:
            commit.seal(staging, manifest)
        else:
            # Nobody knows the run that saved it, which a manifest would have to describe.
            sync_tree(staging)
        return commit.publish(staging, read.iteration)
