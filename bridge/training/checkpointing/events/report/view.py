"""What the report shows, as values: events and manifests in, rows and points out. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Literal

from bridge.training.checkpointing.events.kinds import (
    CheckpointDeleted,
    CheckpointLoaded,
    Event,
    FellBack,
    LoadResolved,
    RunStarted,
    SaveCommitted,
    SaveFailed,
    SaveSkipped,
    SaveStarted,
    UploadFailed,
)

Status = Literal["published", "failed", "unfinished"]

_MOST_POINTS = 1500
"""Points of a curve: a page shows no more of them."""


@dataclass(frozen=True)
class Found:
    """A checkpoint that is there now."""

    iteration: int
    path: str
    created: float | None
    """Unix time in seconds; None where no manifest says it."""
    total_bytes: int | None
    checkpoint_format: str | None
    loss: float | None


@dataclass(frozen=True)
class LossPoint:
    """The loss of an iteration."""

    iteration: int
    loss: float


@dataclass(frozen=True)
class SaveRow:
    """A save, whatever became of it."""

    time: float | None
    """When it was published, or failed, or began."""
    iteration: int
    tier: str
    status: Status
    path: str = ""
    checkpoint_format: str | None = None
    total_bytes: int | None = None
    blocking: float | None = None
    """Seconds, as the following ones."""
    background: float | None = None
    since: float | None = None
    gigabytes_per_second: float | None = None
    error: str = ""
    deleted: float | None = None
    """When retention deleted it."""
    is_there: bool = False

    @property
    def share(self) -> float | None:
        """The part of the time since the save before for which training stood still."""
        if self.blocking is None or not self.since:
            return None
        return min(1.0, self.blocking / self.since)


@dataclass(frozen=True)
class LoadRow:
    """What a run started from."""

    time: float
    iteration: int | None
    path: str | None
    """None: from scratch."""
    reason: str
    seconds: float | None = None
    """None: it was not loaded in the end."""
    phases: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class Trouble:
    """Something that went wrong."""

    time: float
    iteration: int | None
    what: str
    text: str


@dataclass(frozen=True)
class Totals:
    """The page's first look."""

    published: int
    failed: int
    unfinished: int
    there: int
    """Persistent checkpoints that are there now."""
    total_bytes: int
    """That were written."""
    stall_seconds: float
    median_stall: float | None
    stall_share: float | None
    """Of the time between saves, where that is known."""
    median_rate: float | None
    """GB/s."""
    newest: int | None
    """Iteration of the newest persistent checkpoint that is there."""


@dataclass(frozen=True)
class View:
    """Everything that the page shows."""

    directory: str
    made: float
    """Unix time in seconds."""
    saves: tuple[SaveRow, ...]
    """In order of time; what has no time comes first."""
    loads: tuple[LoadRow, ...]
    troubles: tuple[Trouble, ...]
    losses: tuple[tuple[LossPoint, ...], ...]
    """Pieces of the curve: each goes on from a point that the run went back to."""
    losses_are_of_saves: bool
    """Whether only the losses at saves are known."""
    resumes: tuple[int, ...]
    """Iterations from which a run went on, in order."""
    totals: Totals
    unreadable: int = 0
    """Lines of the file of events that could not be read."""


def build_view(
    directory: str,
    events: Sequence[Event],
    found: Iterable[Found] = (),
    losses: Sequence[LossPoint] = (),
    *,
    made: float,
    unreadable: int = 0,
) -> View:
    """Make of events and manifests what is shown.

    Args:
        directory: for the title.
        events: in the order in which they were written.
        found: the persistent checkpoints that are there now.
        losses: of the run's metrics, in their order; without any, those at saves are shown.
        made: when, as Unix time in seconds.
        unreadable: lines of the file of events that could not be read.
    """
    saves = _with_found(_saves(events), list(found))
    of_saves = not any(math.isfinite(point.loss) for point in losses)
    if of_saves:
        losses = [
            LossPoint(event.iteration, event.metrics["loss"])
            for event in events
            if isinstance(event, SaveCommitted) and event.iteration is not None and "loss" in event.metrics
        ] or [LossPoint(each.iteration, each.loss) for each in found if each.loss is not None]
    return View(
        directory=directory,
        made=made,
        saves=saves,
        loads=_loads(events),
        troubles=_troubles(events, saves),
        losses=tuple(_thinned(piece) for piece in _pieces(losses)),
        losses_are_of_saves=of_saves,
        resumes=tuple(e.iteration for e in events if isinstance(e, RunStarted) and e.iteration),
        totals=_totals(saves),
        unreadable=unreadable,
    )


def _saves(events: Sequence[Event]) -> list[SaveRow]:
    rows: list[SaveRow] = []
    begun: dict[tuple[int | None, str | None], SaveStarted] = {}
    there: dict[str, list[int]] = {}
    """By path, where in `rows` the checkpoints are that are not deleted yet, the newest last."""
    for event in events:
        key = (event.iteration, event.tier)
        if isinstance(event, SaveStarted):
            if key in begun:
                rows.append(_unfinished(begun[key]))
            begun[key] = event
        elif isinstance(event, SaveCommitted):
            begun.pop(key, None)
            there.setdefault(event.path, []).append(len(rows))
            rows.append(_published(event))
        elif isinstance(event, SaveFailed):
            begun.pop(key, None)
            rows.append(
                SaveRow(
                    event.time,
                    event.iteration or 0,
                    event.tier or "persistent",
                    "failed",
                    checkpoint_format=event.checkpoint_format,
                    blocking=event.blocking_seconds,
                    background=event.background_seconds,
                    error=f"{event.error}: {event.message}",
                )
            )
        elif isinstance(event, RunStarted):
            rows += [_unfinished(started) for started in begun.values()]
            begun.clear()
        elif isinstance(event, CheckpointDeleted) and there.get(event.path):
            index = there[event.path].pop()
            rows[index] = replace(rows[index], deleted=event.time)
    rows += [_unfinished(started) for started in begun.values()]
    return rows


def _published(event: SaveCommitted) -> SaveRow:
    return SaveRow(
        event.time,
        event.iteration or 0,
        event.tier or "persistent",
        "published",
        path=event.path,
        checkpoint_format=event.checkpoint_format,
        total_bytes=event.total_bytes,
        blocking=event.blocking_seconds,
        background=event.background_seconds,
        since=event.since_seconds,
        gigabytes_per_second=event.gigabytes_per_second,
    )


def _unfinished(event: SaveStarted) -> SaveRow:
    tier = event.tier or "persistent"
    return SaveRow(event.time, event.iteration or 0, tier, "unfinished", checkpoint_format=event.checkpoint_format)


def _with_found(rows: list[SaveRow], found: list[Found]) -> tuple[SaveRow, ...]:
    """The rows with what is there now; what no event tells of has a row of its own."""
    left = {each.iteration: each for each in found}
    for index in range(len(rows) - 1, -1, -1):
        row = rows[index]
        if row.status == "published" and row.tier == "persistent" and row.deleted is None and row.iteration in left:
            del left[row.iteration]
            rows[index] = replace(row, is_there=True)
    untold = [
        SaveRow(
            each.created,
            each.iteration,
            "persistent",
            "published",
            path=each.path,
            checkpoint_format=each.checkpoint_format,
            total_bytes=each.total_bytes,
            is_there=True,
        )
        for each in left.values()
    ]
    return tuple(sorted([*untold, *rows], key=lambda row: -math.inf if row.time is None else row.time))


def _loads(events: Sequence[Event]) -> tuple[LoadRow, ...]:
    rows: list[LoadRow] = []
    for event in events:
        if isinstance(event, LoadResolved):
            rows.append(LoadRow(event.time, event.iteration, event.path, event.reason))
        elif isinstance(event, FellBack):
            reason = f"{event.path} could not be loaded"
            rows.append(LoadRow(event.time, None, event.to, reason))
        elif isinstance(event, CheckpointLoaded):
            phases = tuple(event.phases.items())
            if rows and rows[-1].path == event.path and rows[-1].seconds is None:
                rows[-1] = replace(rows[-1], iteration=event.iteration, seconds=event.blocking_seconds, phases=phases)
            else:
                rows.append(LoadRow(event.time, event.iteration, event.path, "", event.blocking_seconds, phases))
    return tuple(rows)


def _troubles(events: Sequence[Event], saves: Iterable[SaveRow]) -> tuple[Trouble, ...]:
    found = []
    for event in events:
        if isinstance(event, SaveFailed):
            found.append(Trouble(event.time, event.iteration, "save failed", f"{event.error}: {event.message}"))
        elif isinstance(event, FellBack):
            text = f"{event.message} (went back to {event.to})"
            found.append(Trouble(event.time, event.iteration, "fell back", text))
        elif isinstance(event, UploadFailed):
            found.append(Trouble(event.time, event.iteration, "upload failed", f"{event.message} ({event.path})"))
    found += _skipped(events)
    for save in saves:
        if save.status == "unfinished" and save.time is not None:
            text = "it began, and neither its end nor its failure is known: the run was killed, or is at it"
            found.append(Trouble(save.time, save.iteration, "save unfinished", text))
    return tuple(sorted(found, key=lambda trouble: trouble.time))


def _skipped(events: Iterable[Event]) -> list[Trouble]:
    """One line for the saves that were left out between two that began: there may be one at every step."""
    stretches: list[list[SaveSkipped]] = [[]]
    for event in events:
        if isinstance(event, SaveSkipped):
            stretches[-1].append(event)
        elif isinstance(event, SaveStarted) and stretches[-1]:
            stretches.append([])
    return [
        Trouble(
            stretch[0].time,
            stretch[0].iteration,
            "saves skipped" if len(stretch) > 1 else "save skipped",
            f"the one before was still being written; {len(stretch)} in a row, up to iteration {stretch[-1].iteration}",
        )
        for stretch in stretches
        if stretch
    ]


def _pieces(losses: Iterable[LossPoint]) -> list[list[LossPoint]]:
    """Divide a curve where a run went back."""
    pieces: list[list[LossPoint]] = []
    for point in losses:
        if not math.isfinite(point.loss):
            continue
        if not pieces or point.iteration <= pieces[-1][-1].iteration:
            pieces.append([])
        pieces[-1].append(point)
    return pieces


def _thinned(points: list[LossPoint]) -> tuple[LossPoint, ...]:
    """As many points as a page shows: of each stretch the lowest and the highest, so that no spike is lost."""
    if len(points) <= _MOST_POINTS:
        return tuple(points)
    length = math.ceil(2 * len(points) / _MOST_POINTS)
    kept = {0, len(points) - 1}
    for start in range(0, len(points), length):
        stretch = range(start, min(start + length, len(points)))
        kept.add(min(stretch, key=lambda index: points[index].loss))
        kept.add(max(stretch, key=lambda index: points[index].loss))
    return tuple(points[index] for index in sorted(kept))


def _totals(saves: Sequence[SaveRow]) -> Totals:
    published = [save for save in saves if save.status == "published"]
    stalls = [save.blocking for save in published if save.blocking is not None]
    rates = [save.gigabytes_per_second for save in published if save.gigabytes_per_second is not None]
    timed = [save for save in published if save.blocking is not None and save.since]
    between = sum(save.since or 0.0 for save in timed)
    there = [save.iteration for save in published if save.is_there]
    return Totals(
        published=len(published),
        failed=sum(save.status == "failed" for save in saves),
        unfinished=sum(save.status == "unfinished" for save in saves),
        there=len(there),
        total_bytes=sum(save.total_bytes or 0 for save in published),
        stall_seconds=sum(stalls),
        median_stall=median(stalls) if stalls else None,
        stall_share=min(1.0, sum(save.blocking or 0.0 for save in timed) / between) if between else None,
        median_rate=median(rates) if rates else None,
        newest=max(there, default=None),
    )
