"""Whether replicas read everything themselves or each shard once: a decision from what was measured. Pure.

Reading once divides the reading among the replicas and adds an exchange. That does not pay off where the ranks read
from a cache of their own node faster than they can send; it pays off where they share the bandwidth of one store.
The group's size alone does not tell: what others have measured goes from 0.79 times as fast with 2 replicas to 4.9
times with 32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

SMALL_BYTES = 256 << 20
"""A rank that loads no more than this reads it itself: of so little, measuring would read a good part twice."""
LEAST_GAIN = 1.1
"""How many times as fast reading once must be expected to be. Measurements are not more exact than that."""
OVERLAP_LOSS = 0.5
"""What part of the shorter one of reading and exchanging is not hidden behind the longer one."""
READ_ONCE_FROM = 8
"""The number of replicas from which each shard is read once where nothing could be measured."""


@dataclass(frozen=True)
class Measured:
    """A group of replicas that measures before it decides. Stands where a process group is expected for a load."""

    group: Any
    small_bytes: int = SMALL_BYTES
    """What no rank must load more than for everything to be read on every rank without measuring."""


def sharing_group(setting: bool | Literal["auto"], group: Any) -> Any | None:
    """What to give to a load as its `parallelization_group`.

    Args:
        setting: the value of `checkpoint.fully_parallel_load`.
        group: the data-parallel ranks.
    """
    if setting == "auto" and group is not None:
        return Measured(group)
    return group if setting else None


def process_group(parallelization_group: Any | None) -> Any | None:
    """The process group of a load's `parallelization_group`, for those who share whatever it says."""
    return parallelization_group.group if isinstance(parallelization_group, Measured) else parallelization_group


@dataclass(frozen=True)
class Speeds:
    """Bytes per second of one rank while all ranks do the same."""

    same: float
    """Reading what the other replicas read too."""
    apart: float
    """Reading what no other replica reads."""
    exchange: float
    """Receiving from another replica."""


@dataclass(frozen=True)
class Work:
    """What one rank would have to do, in bytes."""

    replicas: int
    """Ranks in its group."""
    wanted: int
    """What it loads: what it reads where everybody reads."""
    share: int
    """What it reads where each shard is read once."""
    received: int
    """What it then gets from others."""
    speeds: Speeds | None = None
    """None where no shard is of a size that lends itself to measuring."""

    def seconds(self) -> tuple[float, float]:
        """How long reading everything and reading once are expected to take; (0, 0) where nothing was measured."""
        if self.speeds is None:
            return 0.0, 0.0
        read, exchange = self.share / self.speeds.apart, self.received / self.speeds.exchange
        return self.wanted / self.speeds.same, max(read, exchange) + OVERLAP_LOSS * min(read, exchange)


@dataclass(frozen=True)
class Choice:
    """How to read."""

    once: bool
    reason: str


def worth_measuring(works: Sequence[Work], small_bytes: int = SMALL_BYTES) -> Choice | None:
    """The choice if it does not depend on any speed; else None. `works`: all ranks' of the job."""
    if all(work.received == 0 for work in works):
        return Choice(False, "no two ranks load the same")
    if max(work.wanted for work in works) <= small_bytes:
        return Choice(False, f"no rank loads more than {small_bytes >> 20} MiB")
    return None


def choose(works: Sequence[Work]) -> Choice:
    """Decide for the whole job from all ranks' work and speeds; the slowest rank counts."""
    replicas = max(work.replicas for work in works)
    if any(work.speeds is None for work in works):
        rule = f"nothing could be measured; with {replicas} replicas"
        return Choice(replicas >= READ_ONCE_FROM, f"{rule}, and from {READ_ONCE_FROM} on each shard is read once")
    everywhere, once = (max(seconds) for seconds in zip(*(work.seconds() for work in works), strict=True))
    return Choice(
        once * LEAST_GAIN < everywhere,
        f"with {replicas} replicas, {everywhere:.2f} s are expected for reading everything on every rank and "
        f"{once:.2f} s for reading each shard once",
    )
