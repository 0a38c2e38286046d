"""Which checkpoints of a directory are to be uploaded, in which order, and what the trackers then name. Decisions only.

What this start of the run has saved counts, whatever is in the bucket. What an earlier start has left in the directory
may be old: another machine may have gone on since. So it never takes the place of anything that may be later.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from bridge.training.checkpointing.integrity import Manifest
from bridge.training.checkpointing.objects.listing import entries_of
from bridge.training.checkpointing.retention.policies import Policy, removable
from bridge.training.checkpointing.starts import Starts


@dataclass(frozen=True)
class Sides:
    """What is in the directory, and what is in the bucket."""

    local: Mapping[int, Manifest]
    """The checkpoints of the directory."""
    tracked: int | None = None
    """What the directory's tracker names."""
    published: Collection[int] = ()
    """The checkpoints of the directory that this start of the run has saved."""
    remote: Mapping[int, Manifest] = field(default_factory=dict)
    """The checkpoints of the bucket."""
    remote_tracked: int | None = None
    """The whole checkpoint that the bucket's trackers lead to."""
    has_tracker: bool = False
    """Whether there is one in the bucket at all."""

    def is_there(self, iteration: int | None) -> bool:
        """Whether a checkpoint is in the bucket as it is in the directory."""
        return iteration is not None and iteration in self.local and self.remote.get(iteration) == self.local[iteration]


def is_later(one: Manifest, other: Manifest) -> bool:
    """Whether nothing speaks against that one checkpoint was saved after the other: neither clock nor count."""
    return one.start >= other.start and (one.created or 0.0) > (other.created or 0.0)


def may_replace(sides: Sides, iteration: int) -> bool:
    """Whether a checkpoint of the directory may go where the bucket has none, or another one, of its iteration."""
    other = sides.remote.get(iteration)
    return other is None or iteration in sides.published or is_later(sides.local[iteration], other)


def tracker_target(sides: Sides) -> int | None:
    """What the bucket's trackers are to name; None if they stay as they are.

    That is what the directory's tracker names, if this start of the run has saved it, or if it is later than what the
    bucket's name now. They never go to anything else.
    """
    tracked = sides.tracked
    if tracked is None or tracked not in sides.local:
        return None
    if tracked in sides.published or tracked == sides.remote_tracked:
        return tracked
    if sides.remote_tracked is None:
        return None if sides.has_tracker else tracked
    return tracked if is_later(sides.local[tracked], sides.remote[sides.remote_tracked]) else None


def unneeded(sides: Sides, policies: Sequence[Policy], starts: Starts | None = None) -> set[int]:
    """The checkpoints of the directory that the bucket's retention would delete as soon as they were there."""
    target = tracker_target(sides)
    tracked = sides.remote_tracked if target is None else target
    if tracked is None:
        return set()
    entries = entries_of({**sides.remote, **sides.local}, starts)
    return {n for n in removable(entries, policies, tracked) if n in sides.local and n not in sides.remote}


def to_upload(sides: Sides, policies: Sequence[Policy], starts: Starts | None = None) -> list[int]:
    """The iterations that are in the directory and not, as they are there, in the bucket; the most urgent first.

    That is the one that the directory's tracker names, and then the others, those of the latest start first. Left out
    is what may be older than what the bucket has, and what retention would delete from it at once.
    """
    wanted = [n for n in sides.local if not sides.is_there(n) and may_replace(sides, n)]
    gone = unneeded(sides, policies, starts)
    return sorted((n for n in wanted if n not in gone), key=lambda n: (n != sides.tracked, -sides.local[n].start, -n))


def wait_after(failures: int) -> float:
    """Seconds until the next try, after so many failed ones in a row."""
    return float(min(600.0, 10.0 * 2 ** min(failures - 1, 10)))
