"""Events of one save and of one load: what was timed, as what is emitted and logged."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bridge.training.callbacks import CheckpointKind
from bridge.training.checkpointing.contents.run_config import read_run_config, value_at
from bridge.training.checkpointing.events.describing import describe, error_text, loaded_line, saved_line, shortened
from bridge.training.checkpointing.events.file import EventFile
from bridge.training.checkpointing.events.kinds import (
    CheckpointDeleted,
    CheckpointLoaded,
    CheckpointsRetained,
    Event,
    FellBack,
    LoadResolved,
    SaveCommitted,
    SaveFailed,
    SaveSkipped,
    SaveStarted,
    SaveWritten,
    SnapshotTaken,
)
from bridge.training.checkpointing.events.stream import EventStream
from bridge.training.checkpointing.layout import iteration_name, parse_iteration_name
from bridge.training.checkpointing.resolve import Source

if TYPE_CHECKING:
    from bridge.training.checkpointing.retention.sweeper import Swept
    from bridge.training.checkpointing.transaction import Committed

logger = logging.getLogger(__name__)

_FILE = "the file of events in {}"


def record_in(events: EventStream, save_dir: Path) -> None:
    """Keep events in a file of a directory that this run may write, from now on; on rank 0. Trouble is only logged."""
    name = _FILE.format(save_dir)
    if events.has(name):
        return
    try:
        # The base model of adapters is loaded before there is a directory to save in.
        events.add(name, lambda: EventFile(save_dir), earlier=True)
    except Exception as error:
        logger.warning("events are not kept in %s: %s: %s", save_dir, type(error).__name__, error)


@dataclass
class Pace:
    """When training last went on, from which the cost of the next save is told.

    Saves into memory are counted by themselves: they come between the start of another save and its publication.
    """

    resumed: float | None = None
    """After the load, by the monotonic clock; None before training began."""
    skipped: int = field(default=0, init=False)
    """Saves that were left out since the last one began."""
    _published: dict[bool, float] = field(default_factory=dict, init=False)
    """By whether they went into memory, when training went on after the last save was published."""

    def published(self, tier: CheckpointKind, now: float) -> float | None:
        """Training goes on after a save; return for how long, from when it went on after the save before, or the load.

        The times of the saves do not overlap, and what a save has cost lies within its own.
        """
        in_memory = tier == "in_memory"
        moments = [moment for moment in (self.resumed, self._published.get(in_memory)) if moment is not None]
        self._published[in_memory] = now
        return now - max(moments) if moments else None


@dataclass
class SaveRecord:
    """One save of this rank, as it goes: each method is called when what it is named for has happened."""

    events: EventStream
    pace: Pace
    iteration: int
    tier: CheckpointKind
    checkpoint_format: str
    started: float
    """By the monotonic clock, as all times here. The waiting for an earlier save was that one's cost, and is over."""
    background: bool
    clock: Callable[[], float] = time.monotonic
    _captured: float | None = field(default=None, init=False)
    _halted: float | None = field(default=None, init=False)
    """When training stood still again, to publish what was written or to wait for that."""
    _is_committed: bool = field(default=False, init=False)

    def begun(self, directory: Path) -> None:
        """The save was asked for."""
        self.pace.skipped = 0
        self.events.emit(SaveStarted(**self._common(), path=str(directory), background=self.background))

    def captured(self, taken: bool = True) -> None:
        """The state was captured, unless that has failed; in the background, training goes on."""
        self._captured = self.clock()
        if taken:
            self.events.emit(SnapshotTaken(**self._common(), blocking_seconds=self._captured - self.started))

    def halted(self) -> None:
        """Training stands still from now on until the save is over. May be repeated."""
        if self._halted is None:
            self._halted = self.clock()

    def written(self) -> None:
        """Every rank has written."""
        self.halted()
        self.events.emit(SaveWritten(**self._common(), **self._durations(self.clock())))

    def committed(self, committed: Committed, speak: bool) -> None:
        """The checkpoint is published. With `speak`, say so in the log."""
        now = self.clock()
        event = SaveCommitted(
            **self._common(),
            **self._durations(now),
            path=str(committed.path),
            total_bytes=committed.total_bytes,
            write_seconds=committed.write_seconds,
            since_seconds=self.pace.published(self.tier, now),
            metrics=committed.metrics,
        )
        self._is_committed = True
        self.events.emit(event)
        if speak:
            logger.info("%s", saved_line(event))

    def failed(self, error: BaseException, published: bool = False) -> None:
        """The save failed; never raises. What fails when the checkpoint is announced does not count.

        Args:
            error: why.
            published: whether the checkpoint is there all the same.
        """
        if self._is_committed:
            return
        self.events.emit(
            SaveFailed(
                **self._common(),
                **self._durations(self.clock()),
                error=type(error).__name__,
                message=error_text(error),
                published=published,
            )
        )

    def _common(self) -> dict[str, Any]:
        return {"iteration": self.iteration, "tier": self.tier, "checkpoint_format": self.checkpoint_format}

    def _durations(self, now: float) -> dict[str, Any]:
        """How long training stood still so far, and for how long it went on meanwhile."""
        if not self.background or self._captured is None:
            return {"blocking_seconds": now - self.started, "background_seconds": 0.0}
        halted = now if self._halted is None else self._halted
        return {
            "blocking_seconds": self._captured - self.started + (now - halted),
            "background_seconds": halted - self._captured,
        }


def record_skipped(
    events: EventStream, pace: Pace, iteration: int, tier: CheckpointKind, checkpoint_format: str, directory: Path
) -> bool:
    """A save that was due is left out; return whether it is the first since one began: only that one is told of.

    With a rule of time a save is due at every step until one is made.
    """
    pace.skipped += 1
    if pace.skipped > 1:
        return False
    events.emit(SaveSkipped(iteration=iteration, tier=tier, checkpoint_format=checkpoint_format, path=str(directory)))
    return True


def record_alone(event: Event, checkpoint: Path) -> None:
    """Tell of something that no run has done: in the log, and in the directory's file of events. Never raises.

    Args:
        event: what has happened.
        checkpoint: the one that it is about. Where the run that it is of keeps no events, none are kept.
    """
    logger.info("%s", describe(event))
    try:
        if value_at(read_run_config(checkpoint), "logger", "checkpoint_events", True) is not True:
            return
        with contextlib.closing(EventFile(checkpoint.parent)) as file:
            file.take(event)
    except Exception as error:
        logger.warning("%s is not kept in %s: %s", event.kind, checkpoint.parent, error_text(error))


def record_retention(events: EventStream, save_dir: Path, iteration: int, tier: CheckpointKind, swept: Swept) -> None:
    """What retention did after the checkpoint of `iteration` was published."""
    for deleted in swept.deleted:
        path = str(save_dir / iteration_name(deleted))
        events.emit(CheckpointDeleted(iteration=deleted, tier=tier, path=path))
    events.emit(
        CheckpointsRetained(
            iteration=iteration, tier=tier, path=str(save_dir), kept=swept.kept, deleted=len(swept.deleted)
        )
    )


def resolved(source: Source | None, reason: str = "") -> LoadResolved:
    """What a run starts from; None and a reason: there is nothing."""
    if source is None:
        return LoadResolved(reason=shortened(reason))
    iteration = 0 if source.release else _iteration_of(source)
    return LoadResolved(iteration=iteration, tier=source.kind, path=source.place, reason=shortened(source.reason))


def fell_back(source: Source, to: Source, error: BaseException) -> FellBack:
    """A checkpoint could not be loaded, and the next one is tried."""
    return FellBack(
        iteration=_iteration_of(source),
        tier=source.kind,
        path=source.place,
        to=to.place,
        message=error_text(error),
    )


def _iteration_of(source: Source) -> int | None:
    return parse_iteration_name(source.path.name) if source.iteration is None else source.iteration


@dataclass
class Phases:
    """A stopwatch for the phases of a load, one after the other."""

    clock: Callable[[], float] = time.monotonic
    seconds: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._last = self.clock()

    def end(self, name: str) -> None:
        """The phase that has been running since the last one is over."""
        now = self.clock()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._last
        self._last = now


def record_load(
    events: EventStream,
    place: str,
    iteration: int,
    tier: CheckpointKind,
    phases: Phases,
    *,
    checkpoint_format: str | None,
    total_bytes: int | None,
    bytes_read: int | None,
) -> str:
    """A checkpoint was loaded; return that as a line for the log."""
    event = CheckpointLoaded(
        iteration=iteration,
        tier=tier,
        path=place,
        checkpoint_format=checkpoint_format,
        total_bytes=total_bytes,
        bytes_read=bytes_read,
        blocking_seconds=sum(phases.seconds.values()),
        phases=dict(phases.seconds),
    )
    events.emit(event)
    return loaded_line(event)
