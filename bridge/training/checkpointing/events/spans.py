"""Spans out of events: what began and ended, with what was inside. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field

from bridge.training.checkpointing.events.kinds import (
    CheckpointLoaded,
    Event,
    SaveCommitted,
    SaveFailed,
    SaveStarted,
    SaveWritten,
    SnapshotTaken,
    UploadFailed,
    UploadFinished,
)

Attribute = str | int | float | bool

_OPEN = 16
"""Saves that may be under way; more were abandoned by runs that died."""


@dataclass(frozen=True)
class Span:
    """Something that took time."""

    name: str
    start: float
    """Unix time in seconds."""
    end: float
    attributes: dict[str, Attribute] = field(default_factory=dict)
    error: str | None = None
    children: tuple[Span, ...] = ()


class Spans:
    """Remembers what has begun, and makes spans of what ends."""

    def __init__(self) -> None:
        self._saves: dict[tuple[int | None, str | None], list[Event]] = {}

    def after(self, event: Event) -> list[Span]:
        """The spans that end with an event."""
        key = (event.iteration, event.tier)
        match event:
            case SaveStarted():
                self._saves[key] = [event]
                while len(self._saves) > _OPEN:
                    del self._saves[next(iter(self._saves))]
            case SnapshotTaken() | SaveWritten():
                self._saves.setdefault(key, []).append(event)
            case SaveCommitted() | SaveFailed():
                return [_save(self._saves.pop(key, []), event)]
            case CheckpointLoaded():
                return [_load(event)]
            case UploadFinished() | UploadFailed():
                return [_upload(event)]
        return []


def _save(before: list[Event], last: SaveCommitted | SaveFailed) -> Span:
    total = (last.blocking_seconds or 0.0) + (last.background_seconds or 0.0)
    # A save has begun to prepare itself before the first event.
    start = min([last.time - total, *(event.time for event in before)])
    children = []
    begun = start
    for event in before:
        if isinstance(event, SnapshotTaken | SaveWritten):
            name = "checkpoint.snapshot" if isinstance(event, SnapshotTaken) else "checkpoint.write"
            children.append(Span(name, begun, event.time))
            begun = event.time
    if isinstance(last, SaveCommitted):
        children.append(Span("checkpoint.publish", begun, last.time))
    error = f"{last.error}: {last.message}" if isinstance(last, SaveFailed) else None
    return Span("checkpoint.save", start, last.time, _attributes(last), error, tuple(children))


def _load(event: CheckpointLoaded) -> Span:
    begun = start = event.time - (event.blocking_seconds or 0.0)
    children = []
    for name, seconds in event.phases.items():
        children.append(Span(f"checkpoint.{name}", begun, begun + seconds))
        begun += seconds
    return Span("checkpoint.load", start, event.time, _attributes(event), None, tuple(children))


def _upload(event: UploadFinished | UploadFailed) -> Span:
    error = event.message if isinstance(event, UploadFailed) else None
    start = event.time - (event.background_seconds or 0.0)
    return Span("checkpoint.upload", start, event.time, _attributes(event), error)


def _attributes(
    event: SaveCommitted | SaveFailed | CheckpointLoaded | UploadFinished | UploadFailed,
) -> dict[str, Attribute]:
    values: dict[str, Attribute | None] = {
        "checkpoint.iteration": event.iteration,
        "checkpoint.tier": event.tier,
        "checkpoint.format": event.checkpoint_format,
        "checkpoint.bytes": event.total_bytes,
        "checkpoint.blocking_seconds": event.blocking_seconds,
        "checkpoint.background_seconds": event.background_seconds,
        "checkpoint.path": None if isinstance(event, SaveFailed) else event.path,
    }
    return {name: value for name, value in values.items() if value is not None}
