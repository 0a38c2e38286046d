"""One save on one rank, from its plan to its publication."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from megatron.core import __version__ as megatron_version

import bridge
from bridge.training.callbacks import CheckpointKind
from bridge.training.checkpointing import commit
from bridge.training.checkpointing.agreement import Ranks
from bridge.training.checkpointing.files import sync_directory, write_file
from bridge.training.checkpointing.formats import PayloadWrite
from bridge.training.checkpointing.integrity import FileRecord, Manifest
from bridge.training.checkpointing.layout import TRAIN_STATE
from bridge.training.checkpointing.parallel import Layout
from bridge.training.checkpointing.sidecar import Sidecar


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


@dataclass(frozen=True)
class Committed:
    """A published checkpoint."""

    path: Path
    iteration: int
    kind: CheckpointKind
    total_bytes: int
    seconds: float
    """From the start of the save to its publication."""


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
    report: RankReport | None = field(default=None)

    def write(self) -> RankReport:
        """Write and sync this rank's files. Talks to no other rank, so it may run in a background process."""
        names, result = self.payload.write()
        for sidecar in (*self.payload.sidecars, *self.sidecars):
            path = self.staging / sidecar.name
            path.parent.mkdir(parents=True, exist_ok=True)
            write_file(path, sidecar.data)
            names = [*names, sidecar.name]
        sync_directory(self.staging)
        return RankReport(commit.describe_files(self.staging, names), result)

    def accept(self, report: RankReport) -> None:
        """Take the report of this rank's write."""
        self.report = report

    def publish(self) -> None:
        """Commit the save and tell the world; collective, called when every rank has written."""
        ranks = Ranks.current()
        reports = ranks.gather_first("collecting what every rank wrote", self.report)
        committed = ranks.first("publishing the checkpoint", lambda: self._commit(reports or []))
        self.announce(committed)

    def abandon(self) -> None:
        """Remove what a failed save has written."""
        if Ranks.current().is_first:
            commit.abandon(self.staging)

    def _commit(self, reports: list[RankReport | None]) -> Committed:
        written = [report for report in reports if report is not None]
        added = self.payload.finish([report.result for report in written])
        records = [record for report in written for record in report.files]
        records += commit.describe_files(self.staging, added)
        manifest = Manifest(
            iteration=self.target.iteration,
            checkpoint_format=self.target.checkpoint_format,
            world_size=len(reports),
            parallel_sizes=self.layout.sizes(),
            versions={"bridge": bridge.__version__, "torch": torch.__version__, "megatron-core": megatron_version},
            files=tuple(sorted(records, key=lambda record: record.name)),
        )
        train_state = (self.staging / TRAIN_STATE).read_bytes()
        commit.seal(self.staging, manifest)
        path = commit.publish(self.staging, self.target.iteration)
        commit.move_trackers(self.target.save_dir, self.target.iteration, train_state)
        seconds = time.monotonic() - self.started
        return Committed(path, self.target.iteration, self.target.kind, manifest.total_bytes, seconds)
