"""The events: small frozen records of what happened to checkpoints, and their form as JSON."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from types import NoneType, UnionType
from typing import Any, ClassVar, Literal, get_args, get_origin, get_type_hints

from bridge.training.callbacks import CheckpointKind

_SHORTEST = 1e-6
"""Seconds."""
LARGEST_COUNT = 2**63 - 1
"""Of bytes, iterations and ranks."""
_LARGEST_TIME = 1e11
"""Unix time in seconds, well within what dates can say."""
_LONGEST_SECONDS = 1e12
LARGEST_METRIC = 1e100
"""As an absolute value: from there on, differences and sums might not be numbers any more."""


@dataclass(frozen=True, kw_only=True)
class Event:
    """What all events have. A value is None where it is not known, or makes no sense."""

    kind: ClassVar[str]
    """The event's name in files."""

    time: float = field(default_factory=time.time)
    """Unix time in seconds, by rank 0's clock."""
    iteration: int | None = None
    """The checkpoint's."""
    tier: CheckpointKind | None = None
    checkpoint_format: str | None = None
    total_bytes: int | None = None
    """Of the checkpoint, all ranks together."""
    blocking_seconds: float | None = None
    """For which training stood still, or the start of the run was held up."""
    background_seconds: float | None = None
    """For which it went on while training did."""


@dataclass(frozen=True, kw_only=True)
class RunStarted(Event):
    """A run is about to train. `iteration` is the one that it goes on from."""

    kind: ClassVar[str] = "run_started"

    world_size: int = 1
    metrics_path: str | None = None
    """The absolute path of `logger.metrics_path`."""


@dataclass(frozen=True, kw_only=True)
class RunEnded(Event):
    """A run has ended in good order. `iteration` is its last."""

    kind: ClassVar[str] = "run_ended"

    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class SaveStarted(Event):
    """A save was asked for."""

    kind: ClassVar[str] = "save_started"

    path: str = ""
    """The directory of checkpoints that it goes to."""
    background: bool = False
    """Whether training goes on while it is written."""


@dataclass(frozen=True, kw_only=True)
class SnapshotTaken(Event):
    """The state was captured. `blocking_seconds` count from the start of the save."""

    kind: ClassVar[str] = "snapshot_taken"


@dataclass(frozen=True, kw_only=True)
class SaveWritten(Event):
    """Every rank has written its part, and nothing is published yet."""

    kind: ClassVar[str] = "save_written"


@dataclass(frozen=True, kw_only=True)
class SaveCommitted(Event):
    """The checkpoint is published, and the trackers name it."""

    kind: ClassVar[str] = "save_committed"

    path: str = ""
    write_seconds: float | None = None
    """That the slowest rank took to write its files."""
    since_seconds: float | None = None
    """Between the moments at which training went on after the publication of the save before, or after the load, and
    after that of this one."""
    metrics: dict[str, float] = field(default_factory=dict)
    """What the step before it measured."""

    @property
    def gigabytes_per_second(self) -> float | None:
        """How fast it was written, in 10^9 bytes a second. None for what no clock can have measured."""
        if self.total_bytes is None or not self.write_seconds or self.write_seconds < _SHORTEST:
            return None
        return self.total_bytes / 1e9 / self.write_seconds

    @property
    def stall_share(self) -> float | None:
        """The part of the time since the save before for which training stood still."""
        if self.blocking_seconds is None or not self.since_seconds:
            return None
        return min(1.0, self.blocking_seconds / self.since_seconds)


@dataclass(frozen=True, kw_only=True)
class SaveFailed(Event):
    """A save failed. It has published nothing, but for one in `published`."""

    kind: ClassVar[str] = "save_failed"

    error: str = ""
    """Type of the error."""
    message: str = ""
    published: bool = False
    """Whether the checkpoint is there all the same: what came after its publication failed, as the moving of the
    trackers, or a rank was lost."""


@dataclass(frozen=True, kw_only=True)
class SaveSkipped(Event):
    """A save that was due was left out, as `checkpoint.async_when_busy: skip` wants it."""

    kind: ClassVar[str] = "save_skipped"

    path: str = ""
    """The directory of checkpoints that it would have gone to."""


@dataclass(frozen=True, kw_only=True)
class CheckpointRescued(Event):
    """What dead trainers had left in memory was published as a checkpoint, without the run."""

    kind: ClassVar[str] = "checkpoint_rescued"

    path: str = ""
    seconds: float | None = None
    """That it took."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConverted(Event):
    """A checkpoint was published in another format, `checkpoint_format`, without a run."""

    kind: ClassVar[str] = "checkpoint_converted"

    path: str = ""
    source: str = ""
    """The checkpoint that it was made of."""
    source_format: str = ""
    seconds: float | None = None
    """That it took."""


@dataclass(frozen=True, kw_only=True)
class CheckpointsRetained(Event):
    """Retention has run, after the checkpoint of `iteration` was published."""

    kind: ClassVar[str] = "checkpoints_retained"

    path: str = ""
    """The directory of checkpoints."""
    kept: int = 0
    """Checkpoints that are there now."""
    deleted: int = 0


@dataclass(frozen=True, kw_only=True)
class CheckpointDeleted(Event):
    """A checkpoint was moved out of sight; its files are deleted in the background."""

    kind: ClassVar[str] = "checkpoint_deleted"

    path: str = ""


@dataclass(frozen=True, kw_only=True)
class LoadResolved(Event):
    """It is decided what a run starts from."""

    kind: ClassVar[str] = "load_resolved"

    path: str | None = None
    """The checkpoint; None: there is none, and training starts afresh."""
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class CheckpointLoaded(Event):
    """A checkpoint was loaded, in `blocking_seconds`."""

    kind: ClassVar[str] = "checkpoint_loaded"

    path: str = ""
    phases: dict[str, float] = field(default_factory=dict)
    """Seconds by phase, in order."""
    bytes_read: int | None = None
    """By rank 0, with all that it looked at."""


@dataclass(frozen=True, kw_only=True)
class FellBack(Event):
    """A checkpoint could not be loaded, and another one is tried in its place."""

    kind: ClassVar[str] = "fell_back"

    path: str = ""
    """The one that could not be loaded."""
    to: str = ""
    message: str = ""


@dataclass(frozen=True, kw_only=True)
class UploadStarted(Event):
    """The upload of a published checkpoint to object storage has begun, or goes on after a failure."""

    kind: ClassVar[str] = "upload_started"

    path: str = ""
    """Its URL."""


@dataclass(frozen=True, kw_only=True)
class UploadFinished(Event):
    """A checkpoint is in object storage, after `background_seconds`."""

    kind: ClassVar[str] = "upload_finished"

    path: str = ""
    """Its URL."""
    sent_bytes: int | None = None
    """Without what an earlier try had sent."""

    @property
    def gigabytes_per_second(self) -> float | None:
        """How fast it was sent, in 10^9 bytes a second. None for what no clock can have measured."""
        if self.sent_bytes is None or not self.background_seconds or self.background_seconds < _SHORTEST:
            return None
        return self.sent_bytes / 1e9 / self.background_seconds


@dataclass(frozen=True, kw_only=True)
class UploadFailed(Event):
    """An upload failed, after `background_seconds`. Where it may succeed later, it is tried again."""

    kind: ClassVar[str] = "upload_failed"

    path: str = ""
    """The URL of the checkpoint; of the place, where the failure is no single checkpoint's."""
    message: str = ""


KINDS: dict[str, type[Event]] = {
    event.kind: event
    for event in (
        RunStarted,
        SaveStarted,
        SnapshotTaken,
        SaveWritten,
        SaveCommitted,
        SaveFailed,
        SaveSkipped,
        CheckpointRescued,
        CheckpointConverted,
        CheckpointsRetained,
        CheckpointDeleted,
        LoadResolved,
        CheckpointLoaded,
        FellBack,
        UploadStarted,
        UploadFinished,
        UploadFailed,
        RunEnded,
    )
}
"""Every event by its name in files."""


def to_plain(event: Event) -> dict[str, Any]:
    """An event as JSON has it: its kind under `event`, and every value that is known."""
    values = {name: value for name, value in dataclasses.asdict(event).items() if value is not None}
    return {"event": event.kind, **values}


def to_json(event: Event) -> str:
    """An event as one line of JSON, without the line's end."""
    return json.dumps(_finite(to_plain(event)), separators=(",", ":"), allow_nan=False)


def from_plain(values: Any) -> Event | None:
    """The reverse of `to_plain`. Fields that this version does not know are left out.

    Returns:
        None if it is no event that this version knows.
    """
    if not isinstance(values, Mapping) or not isinstance(values.get("event"), str):
        return None
    event = KINDS.get(values["event"])
    if event is None or "time" not in values:
        return None
    declared = _declared(values["event"])
    known = {name: value for name, value in values.items() if name in declared}
    if not all(_fits(value, declared[name]) and _is_possible(name, value) for name, value in known.items()):
        return None
    return event(**known)


def from_json(line: str | bytes) -> Event | None:
    """The event of a line; None if it is not one, as where a crash has cut it short."""
    try:
        return from_plain(json.loads(line))
    except (ValueError, RecursionError):
        return None


@cache
def _declared(kind: str) -> dict[str, Any]:
    event = KINDS[kind]
    hints = get_type_hints(event)
    return {item.name: hints[item.name] for item in dataclasses.fields(event)}


def _fits(value: Any, declared: Any) -> bool:
    """Whether a value from JSON is of a declared type. An integer is a float too; only finite numbers are numbers."""
    origin = get_origin(declared)
    if origin is Literal:
        return value in get_args(declared)
    if origin is dict:
        return isinstance(value, dict) and all(_fits(entry, get_args(declared)[1]) for entry in value.values())
    if origin is UnionType or not isinstance(declared, type):
        return any(_fits(value, member) for member in get_args(declared))
    if declared is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and _is_finite(value)
    if declared is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, NoneType if declared is None else declared)


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def _is_possible(name: str, value: Any) -> bool:
    """Whether the value of a field, of its type, can have been measured or counted; what reads it need not ask."""
    if name == "metrics":
        return all(is_metric(entry) for entry in value.values())
    if name == "phases":
        return all(0 <= entry < _LONGEST_SECONDS for entry in value.values())
    if name == "time":
        return is_time(value)
    if isinstance(value, float) or name.endswith("_seconds"):
        return value is None or bool(0 <= value < _LONGEST_SECONDS)
    return not isinstance(value, int) or 0 <= value <= LARGEST_COUNT


def is_time(value: float) -> bool:
    """Whether a number is a moment, in Unix time, that dates can say."""
    return bool(0 <= value < _LARGEST_TIME)


def is_metric(value: float) -> bool:
    """Whether a number is one that can be drawn and reckoned with."""
    return _is_finite(value) and abs(value) < LARGEST_METRIC


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    """The values of an event, so that it can be read again: other numbers are not known, or no metrics."""
    found: dict[str, Any] = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in values.items()
    }
    if "metrics" in found:
        found["metrics"] = {name: value for name, value in found["metrics"].items() if is_metric(value)}
    return found
