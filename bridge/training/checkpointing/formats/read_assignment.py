"""Who reads what when the replicas of a group read once, in which rounds, and what is sent to whom.

Pure functions of what the ranks of a group want. Every rank computes the same from the same gathered values, so
nothing has to be sent out. Ranks are numbered within the group.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

UnitId = tuple[Any, ...]
"""What tells one shard from another: equal on the ranks that hold replicas of it, and sortable."""

PACKED_BELOW = 1 << 20
"""Bytes of a shard below which it travels together with others: a message has a cost of its own."""
MESSAGE_BYTES = 16 << 20
"""The most bytes of one message. Larger shards travel in pieces, so that buffers stay small."""


@dataclass(frozen=True)
class Assignment:
    """Who reads each shard of a group, and who wants it."""

    size_of: Mapping[UnitId, int]
    """Bytes, by shard."""
    wanted_by: Mapping[UnitId, tuple[int, ...]]
    """Ranks in rising order, by shard."""
    reader_of: Mapping[UnitId, int]
    """One of the ranks that want it, by shard."""

    def read_by(self, rank: int) -> list[UnitId]:
        """What a rank reads, in the order in which it does."""
        return sorted(unit for unit, reader in self.reader_of.items() if reader == rank)

    def bytes_read_by(self, rank: int) -> int:
        """The size of a rank's share."""
        return sum(self.size_of[unit] for unit, reader in self.reader_of.items() if reader == rank)

    @property
    def shares(self) -> bool:
        """Whether any shard is wanted by more than one rank."""
        return any(len(ranks) > 1 for ranks in self.wanted_by.values())


def assign(wants: Sequence[Mapping[UnitId, int]]) -> Assignment:
    """Choose one reader for each shard, so that the ranks read about equally many bytes.

    Args:
        wants: by rank, the shards that it wants and their sizes in bytes.

    Returns:
        The assignment. Shards that few ranks want are given away first, the largest first among equals, each to the
        rank that has the least to read so far, and of such ranks to the first.

    Raises:
        ValueError: ranks disagree about a shard's size.
    """
    size_of: dict[UnitId, int] = {}
    wanted_by: dict[UnitId, list[int]] = {}
    for rank, units in enumerate(wants):
        for unit, size in units.items():
            if size_of.setdefault(unit, size) != size:
                raise ValueError(f"{unit} has {size_of[unit]} bytes on one rank and {size} on rank {rank} of the group")
            wanted_by.setdefault(unit, []).append(rank)
    loads = [0] * len(wants)
    reader_of: dict[UnitId, int] = {}
    everywhere: list[UnitId] = []
    for unit in sorted(size_of, key=lambda unit: (len(wanted_by[unit]), -size_of[unit], unit)):
        if len(wanted_by[unit]) == len(wants):
            everywhere.append(unit)
            continue
        reader_of[unit] = min(wanted_by[unit], key=lambda rank: (loads[rank], rank))
        loads[reader_of[unit]] += size_of[unit]
    # These are most of a large group's, and the last: a heap spares the search through all ranks for each of them.
    least = [(load, rank) for rank, load in enumerate(loads)]
    heapq.heapify(least)
    for unit in everywhere:
        load, rank = least[0]
        reader_of[unit] = rank
        heapq.heapreplace(least, (load + size_of[unit], rank))
    return Assignment(size_of, {unit: tuple(ranks) for unit, ranks in wanted_by.items()}, reader_of)


def rounds_of(units: Sequence[UnitId], size_of: Mapping[UnitId, int], limit: int) -> list[list[UnitId]]:
    """Divide what a rank reads, in order, into rounds of at most `limit` bytes; a larger shard has one of its own."""
    rounds: list[list[UnitId]] = []
    filled = 0
    for unit in units:
        if not rounds or filled + size_of[unit] > limit:
            rounds.append([])
            filled = 0
        rounds[-1].append(unit)
        filled += size_of[unit]
    return rounds


@dataclass(frozen=True)
class Segment:
    """Bytes `start` to `stop` of a shard."""

    unit: UnitId
    start: int
    stop: int


@dataclass(frozen=True)
class Message:
    """What one rank sends to others at once."""

    reader: int
    receivers: tuple[int, ...]
    segments: tuple[Segment, ...]

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(segment.stop - segment.start for segment in self.segments)


def messages_of(
    read: Sequence[Sequence[UnitId]],
    assignment: Assignment,
    *,
    limit: int = MESSAGE_BYTES,
    packed_below: int = PACKED_BELOW,
) -> list[Message]:
    """The messages of one round, in the order in which all ranks go through them.

    Args:
        read: by rank, what it has read in this round.
        assignment: who wants what.
        limit: the most bytes of a message.
        packed_below: bytes of a shard below which it shares a message with others for the same ranks.

    Returns:
        The messages; the readers take turns, so that all of them send at the same time.
    """
    by_reader = [
        _messages_from(reader, units, assignment, limit, min(packed_below, limit)) for reader, units in enumerate(read)
    ]
    return [message for turn in zip_longest(*by_reader) for message in turn if message is not None]


def _messages_from(
    reader: int, units: Sequence[UnitId], assignment: Assignment, limit: int, packed_below: int
) -> list[Message]:
    messages: list[Message] = []
    small: dict[tuple[int, ...], list[Segment]] = {}
    for unit in units:
        receivers = tuple(rank for rank in assignment.wanted_by[unit] if rank != reader)
        size = assignment.size_of[unit]
        if not receivers or not size:
            continue
        if size < packed_below:
            small.setdefault(receivers, []).append(Segment(unit, 0, size))
            continue
        starts = range(0, size, limit)
        messages += [Message(reader, receivers, (Segment(unit, at, min(at + limit, size)),)) for at in starts]
    for receivers, segments in small.items():
        messages += [Message(reader, receivers, pack) for pack in _packs(segments, limit)]
    return messages


def _packs(segments: Sequence[Segment], limit: int) -> list[tuple[Segment, ...]]:
    packs: list[list[Segment]] = []
    filled = 0
    for segment in segments:
        if not packs or filled + segment.stop > limit:
            packs.append([])
            filled = 0
        packs[-1].append(segment)
        filled += segment.stop
    return [tuple(pack) for pack in packs]
