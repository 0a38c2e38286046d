"""One save on one rank, from its plan to its publication."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Protocol, TypeVar

import torch
from megatron.core import __version__ as megatron_version

import bridge
from bridge.training.callbacks import CheckpointKind
from bridge.training.checkpointing import commit
from bridge.training.checkpointing.agreement import Ranks
from bridge.training.checkpointing.background import BackgroundCall, FinishedCall
from bridge.training.checkpointing.checksums import DEFAULT
from bridge.training.checkpointing.errors import CheckpointSaveError
from bridge.training.checkpointing.failed_steps import step
from bridge.training.checkpointing.failures.policy import FailurePolicy
from bridge.training.checkpointing.failures.retrying import with_retries
from bridge.training.checkpointing.files import sync_directory, sync_file, write_file
from bridge.training.checkpointing.formats import PayloadWrite
from bridge.training.checkpointing.inheritance import bequest_of
from bridge.training.checkpointing.integrity import FileRecord, Manifest, merged_metrics
from bridge.training.checkpointing.io.background_writer import BackgroundWriter, Files, Patience, Writing
from bridge.training.checkpointing.layout import TRAIN_STATE, bequest_name
from bridge.training.checkpointing.parallel import Layout
from bridge.training.checkpointing.sidecar import Sidecar

if TYPE_CHECKING:
    from bridge.training.checkpointing.formats.direct import DirectWrite

T = TypeVar("T")
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SaveTarget:
    """Where a save goes."""

    save_dir: Path
    iteration: int
    kind: CheckpointKind = "persistent"
    checkpoint_format: str = "torch_dist"


@dataclass(frozen=True)
class Contents:
    """What a save writes, captured on this rank when it began."""

    state_dict: dict[str, Any]
    content_metadata: dict[str, Any]
    sidecars: tuple[Sidecar, ...]


@dataclass(frozen=True)
class RankReport:
    """What one rank wrote."""

    files: list[FileRecord]
    result: Any
    metrics: dict[str, float] = field(default_factory=dict)
    """What this rank had measured when the save began."""
    seconds: float = 0.0
    """That the writing took."""


@dataclass(frozen=True)
class Committed:
    """A published checkpoint."""

    path: Path
    iteration: int
    kind: CheckpointKind
    total_bytes: int
    seconds: float
    """From the start of the save to its publication."""
    write_seconds: float | None = None
    """That the slowest rank took to write its files; None if that was not measured."""
    metrics: dict[str, float] = field(default_factory=dict)
    """What the run had measured when the save began."""


class SaveTask(Protocol):
    """One planned save on this rank. `write` is local and may run in a forked process; the rest runs here."""

    @property
    def target(self) -> SaveTarget:
        """Where it goes."""

    @property
    def started(self) -> float:
        """When it began, by the monotonic clock."""

    @property
    def published(self) -> bool:
        """Whether the checkpoint is there, as far as this rank has published it itself."""

    @property
    def start_is_awaited(self) -> bool:
        """Whether ranks wait for one another behind `begin`, because one may take longer there than training waits for
        it. The same on all ranks."""

    def write(self) -> Any:
        """Write this rank's part and return a report of it; run again after a failure, it begins anew."""

    def begin(self, name: str, patience: Patience) -> BackgroundCall | None:
        """Have this rank's part written by a process that is there for it, from a copy; see `Save.begin`."""

    def finish(self, phase: str, write: Callable[[], Any], written: Callable[[], None]) -> None:
        """Agree that every rank has written, and make the save a checkpoint. Collective.

        Args:
            phase: what messages call the writing.
            write: ends in this rank's report: `write`, or what waits for it. Local.
            written: called when every rank has written, as soon as this one knows.

        Raises:
            CheckpointError: a rank could not write, or the checkpoint could not be published. Every rank raises.
        """

    def abandon(self) -> None:
        """Remove what a failed save has written; local, and harmless where there is nothing."""


@dataclass
class Save:
    """One save on this rank, from the plan to the publication."""

    target: SaveTarget
    staging: Path
    payload: PayloadWrite
    sidecars: tuple[Sidecar, ...]
    layout: Layout
    announce: Callable[[Committed], None]
    started: float
    metrics: dict[str, float] = field(default_factory=dict)
    """What this rank knows of the run's metrics; ranks that know nothing leave it empty."""
    policy: FailurePolicy = field(default_factory=FailurePolicy)
    """How often rank 0 tries a step of the commit again."""
    world_size: int | None = field(default=None)
    """Of the run that is saved; None: it is the one that saves."""
    start: int = 0
    """Number of the run's start that saves."""
    checksum: str = field(default=DEFAULT)
    """The kind of checksum that the manifest gets."""
    writer: BackgroundWriter | None = None
    """Writes in the background, if that is wanted."""
    start_is_awaited: bool = False
    """See `SaveTask.start_is_awaited`."""
    published: bool = field(default=False)
    """On rank 0, which publishes it."""
    _writing: Writing[RankReport] | None = None
    """What the writer process does of it."""

    def write(self) -> RankReport:
        """Write and sync this rank's files. Talks to no other rank, so it may run in a background process."""
        begun = time.monotonic()
        written, result = self.payload.write(self.checksum)
        records = commit.describe_files(self.staging, written, self.checksum)
        for sidecar in (*self.payload.sidecars, *self.sidecars):
            path = self.staging / sidecar.name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)  # of an earlier try
            write_file(path, sidecar.data)
            records.append(FileRecord.of_bytes(sidecar.name, sidecar.data, self.checksum).sampled(self.staging))
        sync_directory(self.staging)
        return RankReport(records, result, self.metrics, self.payload.seconds + time.monotonic() - begun)

    def begin(self, name: str, patience: Patience) -> BackgroundCall | None:
        """Copy this rank's files and have them written by the writer process. Local.

        Args:
            name: what messages call the process.
            patience: what is borne before the save has failed.

        Where there can be no such process, and a fork could not read the tensors since they are on a device, the files
        are written before this returns; but not if the other ranks do not wait for that, because their training would
        give this rank up.

        Returns:
            What ends in this rank's report; None where a fork is to write, and nothing has happened.

        Raises:
            CheckpointSaveError: files that are written at once could not be, or a process that was counted on is lost.
        """
        direct = self.payload.direct
        if direct is None:
            return None
        call = None if self.writer is None else self._hand_over(direct, self.writer, name, patience)
        if call is None and not direct.is_on_host:
            if not self.start_is_awaited:
                raise CheckpointSaveError(f"{name} was lost; the next save has another, or does without")
            logger.warning("%s cannot be had: training waits until the files are written", name)
            report = self._written_at_once(name)
            call = FinishedCall(lambda: report)
        if call is not None:
            # The copy is what is written: nothing here needs the run's tensors any more.
            self.payload = replace(self.payload, write=_written_elsewhere, direct=None)
        return call

    def _written_at_once(self, name: str) -> RankReport:
        return with_retries(f"writing in the place of {name}", self.write, self.policy, Ranks.current().rank)

    def _hand_over(
        self, direct: DirectWrite, writer: BackgroundWriter, name: str, patience: Patience
    ) -> BackgroundCall | None:
        small = [(sidecar.name, sidecar.data) for sidecar in (*self.payload.sidecars, *self.sidecars)]
        result, metrics = direct.result(), self.metrics
        try:
            bequest = self._bequest(result)
        except Exception:  # the save can do without
            logger.warning("%s is lost if the trainers die before it is published", name, exc_info=True)
            bequest = None
        self._writing = writer.write(
            Files(direct.images, small, self.staging, self.checksum, bequest),
            name,
            patience,
            lambda records, seconds: RankReport(records, result, metrics, seconds),
        )
        return self._writing

    def _bequest(self, result: Any) -> tuple[str, bytes] | None:
        payload = None if self.payload.bequest is None else self.payload.bequest(result)
        if payload is None:
            return None
        ranks = Ranks.current()
        world_size = ranks.size if self.world_size is None else self.world_size
        manifest = self._manifest([], world_size, self.metrics)
        trackers = commit.digest_of_trackers(self.target.save_dir) if ranks.is_first else ""
        return bequest_name(ranks.rank), bequest_of(ranks.rank, manifest, trackers, payload)

    def finish(self, phase: str, write: Callable[[], RankReport], written: Callable[[], None]) -> None:
        """Collect what every rank wrote, commit the save and tell the world; see `SaveTask.finish`."""
        ranks = Ranks.current()

        def conclude(reports: list[RankReport]) -> Committed:
            written()
            with step("publishing the checkpoint"):
                return self._commit(reports)

        committed = ranks.conclude(phase, write, conclude)
        if not ranks.is_first:
            written()
        self._settle()
        self.announce(committed)

    def _settle(self) -> None:
        if self._writing is not None:
            self._writing.settle()

    def abandon(self) -> None:
        """Remove what a failed save has written, unless it is left to the next start."""
        if self._writing is not None and self._writing.is_left:
            return
        self._settle()
        if Ranks.current().is_first:
            commit.abandon(self.staging)

    def _commit(self, reports: list[RankReport]) -> Committed:
        results = [report.result for report in reports]
        records = [record for report in reports for record in report.files]
        records += self._retrying("completing the files", lambda: self._complete(results))
        world_size = len(reports) if self.world_size is None else self.world_size
        manifest = self._manifest(records, world_size, merged_metrics([report.metrics for report in reports]))
        train_state = (self.staging / TRAIN_STATE).read_bytes()
        self._retrying("sealing the files", lambda: commit.seal(self.staging, manifest))
        path = commit.publish(self.staging, self.target.iteration)
        self.published = True
        self._retrying(
            "moving the trackers",
            lambda: commit.move_trackers(self.target.save_dir, self.target.iteration, train_state),
        )
        seconds = time.monotonic() - self.started
        slowest = max((report.seconds for report in reports), default=None)
        return Committed(
            path, self.target.iteration, self.target.kind, manifest.total_bytes, seconds, slowest, manifest.metrics
        )

    def _manifest(self, records: list[FileRecord], world_size: int, metrics: dict[str, float]) -> Manifest:
        return Manifest(
            iteration=self.target.iteration,
            checkpoint_format=self.target.checkpoint_format,
            world_size=world_size,
            parallel_sizes=self.layout.sizes(),
            versions={"bridge": bridge.__version__, "torch": torch.__version__, "megatron-core": megatron_version},
            files=tuple(sorted(records, key=lambda record: record.name)),
            created=time.time(),
            start=self.start,
            metrics=metrics,
        )

    def _complete(self, results: list[Any]) -> list[FileRecord]:
        """Write the files that need the results of all ranks."""
        names = self.payload.finish(results)
        for name in names:
            sync_file(self.staging / name)  # megatron-core leaves some of them to the kernel
        return commit.describe_files(self.staging, names, self.checksum)

    def _retrying(self, step: str, action: Callable[[], T]) -> T:
        return with_retries(step, action, self.policy, rank=0)


def _written_elsewhere(checksum: str) -> NoReturn:
    raise CheckpointSaveError("the files of this save have been handed over to another process")


def numbers_among(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The metrics that are finite real numbers: callbacks may have put anything among them."""
    numbers = {}
    for name, value in metrics.items():
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError, RuntimeError):
            continue
        if math.isfinite(number):
            numbers[str(name)] = number
    return numbers
