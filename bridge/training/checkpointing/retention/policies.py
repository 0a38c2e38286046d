"""Which checkpoints are kept: policies over iteration, time and metrics, and nothing but decisions.

Every policy names what it keeps, and a checkpoint stays if any of them, or anything outside them, wants it.
They judge the checkpoints up to the one that the tracker names. Newer ones, which a rollback leaves behind, are
always kept, and take no place from those of the run that goes on. Once the run has passed them they are judged like
the others; but then the policies are asked twice, with them and without them, and what either answer keeps stays.
Where nobody knows whether a checkpoint was left behind, none of those takes a place from another one of them either.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    from bridge.training.config import CheckpointConfig

SECONDS_PER_HOUR = 3600.0


@dataclass(frozen=True)
class Entry:
    """A committed checkpoint, as the policies see it."""

    iteration: int
    created: float = 0.0
    """Unix time in seconds, by the clock of whichever machine committed it."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """What the run measured in the step before the save."""
    left_behind: bool | None = False
    """Whether the run has gone back to before it; None where that was noted, and the note is lost."""


class Policy(Protocol):
    """One reason to keep checkpoints."""

    def keeps(self, entries: Sequence[Entry]) -> set[int]:
        """The iterations to keep, of `entries` in ascending order.

        What a policy has kept it keeps when the entries that it let go are no longer there, unless newer ones
        take its place.
        """


@dataclass(frozen=True)
class MostRecent:
    """Keep the checkpoints with the highest iterations."""

    count: int

    def keeps(self, entries: Sequence[Entry]) -> set[int]:
        return {entry.iteration for entry in entries[-self.count :]}


@dataclass(frozen=True)
class EveryIterations:
    """Keep the multiples of an interval, for ever."""

    interval: int

    def keeps(self, entries: Sequence[Entry]) -> set[int]:
        return {entry.iteration for entry in entries if entry.iteration % self.interval == 0}


@dataclass(frozen=True)
class EveryHours:
    """Keep the first checkpoint of each span of time, for ever; a span begins with its first checkpoint.

    Only how far apart two checkpoints are counts. So a clock that is set back, or a move to a machine whose clock
    is behind, lengthens one span to less than twice its length or begins a new one, and nothing more.
    """

    hours: float

    def keeps(self, entries: Sequence[Entry]) -> set[int]:
        kept: set[int] = set()
        begun = -math.inf
        for entry in entries:
            if abs(entry.created - begun) >= self.hours * SECONDS_PER_HOUR:
                kept.add(entry.iteration)
                begun = entry.created
        return kept


@dataclass(frozen=True)
class Best:
    """Keep the checkpoints with the lowest ("min") or highest ("max") values of a metric; of equal ones the newest.

    A checkpoint without the metric is not among the best. While none has it, all are kept: a misspelt name, or a
    metric that is yet to come, is no reason to delete anything.
    """

    count: int
    metric: str
    mode: Literal["min", "max"] = "min"

    def keeps(self, entries: Sequence[Entry]) -> set[int]:
        measured = [entry for entry in entries if self.metric in entry.metrics]
        if not measured:
            return {entry.iteration for entry in entries}
        sign = 1.0 if self.mode == "max" else -1.0
        measured.sort(key=lambda entry: (sign * entry.metrics[self.metric], entry.iteration))
        return {entry.iteration for entry in measured[-self.count :]}


@dataclass(frozen=True)
class Listed:
    """Keep named iterations."""

    iterations: frozenset[int]

    def keeps(self, entries: Sequence[Entry]) -> set[int]:
        return {entry.iteration for entry in entries if entry.iteration in self.iterations}


def policies_of(checkpoint_config: CheckpointConfig) -> tuple[Policy, ...]:
    """The policies that a configuration asks for; none, which keeps everything, where no setting limits anything."""
    cfg = checkpoint_config
    policies: list[Policy] = []
    if cfg.most_recent_k != -1:
        policies.append(MostRecent(cfg.most_recent_k))
    if cfg.save_retain_interval is not None:
        policies.append(EveryIterations(cfg.save_retain_interval))
    if cfg.retain_every_hours is not None:
        policies.append(EveryHours(cfg.retain_every_hours))
    if cfg.retain_best_k is not None and cfg.retain_best_metric is not None:
        policies.append(Best(cfg.retain_best_k, cfg.retain_best_metric, cfg.retain_best_mode))
    if policies and cfg.retain_iterations is not None:
        # A list of exceptions limits nothing, so alone it is no reason to delete.
        policies.append(Listed(frozenset(cfg.retain_iterations)))
    return tuple(policies)


def removable(
    entries: Iterable[Entry], policies: Sequence[Policy], tracked: int, protected: Collection[int] = ()
) -> list[int]:
    """The iterations that nothing keeps, ascending.

    Args:
        entries: the committed checkpoints of a directory.
        policies: each keeps what it names; without any, everything is kept.
        tracked: the iteration that the tracker names. It is kept, and so is everything newer.
        protected: further iterations to keep. They take no place from those that a policy chooses.
    """
    if not policies:
        return []
    line = sorted((entry for entry in entries if entry.iteration <= tracked), key=lambda entry: entry.iteration)
    kept = {tracked, *protected}.union(*(kept_by(policy, line) for policy in policies))
    return [entry.iteration for entry in line if entry.iteration not in kept]


def kept_by(policy: Policy, line: Sequence[Entry]) -> set[int]:
    """The iterations that a policy keeps, whatever of that which nobody knows is true.

    Args:
        policy: is asked several times.
        line: the checkpoints up to the one that the tracker names, in ascending order.
    """
    kept = policy.keeps(line) | policy.keeps([entry for entry in line if not entry.left_behind])
    doubtful = [entry for entry in line if entry.left_behind is None]
    if doubtful:
        kept |= policy.keeps([entry for entry in line if entry.left_behind is False])
    for one in doubtful:
        # It may be the only one of them that the run went on from.
        kept |= policy.keeps([entry for entry in line if entry.left_behind is False or entry is one])
    return kept
