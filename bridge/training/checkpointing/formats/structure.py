"""What a save holds and where it belongs, without the values; and what the ranks make of it. Pure functions.

A plan says which rank writes which shard into which file. It depends on nothing but the structure of every
rank's state, so it may be used again as long as no rank's structure has changed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from operator import attrgetter
from typing import Any

from megatron.core.dist_checkpointing.mapping import ShardedBase, ShardedTensor

from bridge.training.checkpointing.errors import CheckpointSaveError

_NAMED = 3  # keys of a change that are named; the others are counted


@dataclass(frozen=True)
class Structure:
    """Everything about one rank's sharded state that its plan depends on."""

    items: tuple[tuple[Any, ...], ...]
    """A row for each shard and object, in the order of the state: the kind, the key, every other field."""
    writers_per_rank: int
    sharing: tuple[int, ...] | None
    """The ranks that share the writing of replicas; None: they do not."""

    @classmethod
    def of(
        cls, state: Iterable[ShardedBase], writers_per_rank: int = 1, sharing: Sequence[int] | None = None
    ) -> Structure:
        """The structure of a rank's sharded state, given as its shards and objects.

        Raises:
            CheckpointSaveError: a shard has no values.
        """
        readers = _Readers()
        try:
            rows = tuple([readers[type(item)](item) for item in state])
        except AttributeError as error:
            raise CheckpointSaveError(f"something that is to be saved is no shard with values: {error}") from error
        return cls(rows, writers_per_rank, None if sharing is None else tuple(sharing))

    @cached_property
    def fingerprint(self) -> str:
        """Equal for equal structures, and for no others. Costs more than to compare two of them."""
        return _digest(repr((self.items, self.writers_per_rank, self.sharing)))

    def change_from(self, earlier: Structure) -> str:
        """In words: what is different from `earlier`. Empty where nothing is."""
        new, old = self._by_key(), earlier._by_key()
        parts = [
            _keys("added", [key for key in new if key not in old]),
            _keys("removed", [key for key in old if key not in new]),
            _keys("changed", [key for key in new if key in old and new[key] != old[key]]),
        ]
        if not any(parts) and self.items != earlier.items:
            parts.append("another order of keys")
        if self.writers_per_rank != earlier.writers_per_rank:
            parts.append(f"{self.writers_per_rank} writers instead of {earlier.writers_per_rank}")
        if self.sharing != earlier.sharing:
            parts.append("other ranks to share the writing with")
        return ", ".join(part for part in parts if part)

    def _by_key(self) -> dict[str, list[tuple[Any, ...]]]:
        rows: dict[str, list[tuple[Any, ...]]] = {}
        for row in self.items:
            rows.setdefault(row[1], []).append(row)
        return rows


@dataclass(frozen=True)
class Vote:
    """What one rank tells the others before a save. The jobs' fingerprints are those of `Verdict.job`."""

    fingerprint: str
    """Of this rank's structure now."""
    validated: str | None = None
    """The job's fingerprint when the sharding was last validated; None before that."""
    planned: str | None = None
    """The job's fingerprint that this rank keeps a plan for; None: it keeps none."""
    change: str = ""
    """In words: how this rank's structure differs from that of the save before."""
    common: str = ""
    """Checksum of the state that all ranks share; empty where it need not be compared, or cannot."""
    stored: str | None = None
    """On rank 0, the job's fingerprint that the checkpoint it has loaded was planned for; None: it has none."""


@dataclass(frozen=True)
class Verdict:
    """What the ranks' votes mean. Every rank has the same votes and so comes to the same verdict."""

    job: str
    """The fingerprint of all ranks' structures together."""
    valid: bool
    """The sharding of this very structure was validated before."""
    planned: bool
    """Every rank keeps its part of one plan for this very structure."""
    changes: tuple[str, ...]
    """What has changed since the save before, by rank."""
    stored: bool = False
    """Rank 0 has a plan for this very structure from the checkpoint that was loaded."""
    alike: bool = False
    """The state that all ranks share is the same on all of them, as far as they have looked."""
    fingerprints: tuple[str, ...] = ()
    """By rank."""


def decide(votes: Sequence[Vote]) -> Verdict:
    """The verdict on all ranks' votes, in the order of ranks."""
    job = job_of([vote.fingerprint for vote in votes])
    return Verdict(
        job,
        valid=all(vote.validated == job for vote in votes),
        planned=all(vote.planned == job for vote in votes),
        changes=tuple(f"rank {rank}: {vote.change}" for rank, vote in enumerate(votes) if vote.change),
        stored=votes[0].stored == job,
        alike=bool(votes[0].common) and len({vote.common for vote in votes}) == 1,
        fingerprints=tuple(vote.fingerprint for vote in votes),
    )


def job_of(fingerprints: Sequence[str]) -> str:
    """The fingerprint of all ranks' structures together."""
    return _digest(" ".join(fingerprints))


class _Readers(dict[type, Callable[[Any], tuple[Any, ...]]]):
    """What reads a row of an object, by its class.

    It reads every field but the value, fields that later versions of megatron-core add included, and of a tensor
    how it is stored.
    """

    def __missing__(self, kind: type) -> Callable[[Any], tuple[Any, ...]]:
        names = [item.name for item in fields(kind) if item.name not in ("key", "data")]
        stored = ("data.dtype", "data.layout") if issubclass(kind, ShardedTensor) else ()
        reader = self[kind] = attrgetter("__class__.__name__", "key", *names, *stored)
        return reader


def _keys(verb: str, keys: list[str]) -> str:
    if not keys:
        return ""
    more = f" and {len(keys) - _NAMED} more" if len(keys) > _NAMED else ""
    return f"{verb} {', '.join(keys[:_NAMED])}{more}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
