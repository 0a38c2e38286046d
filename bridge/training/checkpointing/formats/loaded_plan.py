"""Whether the plan of the checkpoint that was loaded holds for what the ranks have now. Pure.

The compact file is not trusted: somebody may have edited it, and what it says would go into every later checkpoint.
Each rank describes its own shards, with all that the file says of them, and the plan is used only if both say the
same: of what each rank writes, and, summed over all ranks, of what has to be written. What is said goes through
checksums, so that it costs a few bytes for each rank beside the positions of what it writes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from megatron.core.dist_checkpointing.mapping import is_main_replica

from bridge.training.checkpointing.errors import CheckpointSaveError
from bridge.training.checkpointing.formats.coverage import problem_of
from bridge.training.checkpointing.formats.plan_files import stored_table
from bridge.training.checkpointing.formats.shard_table import ShardTable, row_of
from bridge.training.checkpointing.io.table import Ints, Spec, StoredTable

_SUM = 1 << 128


@dataclass(frozen=True)
class Offer:
    """What rank 0 tells a rank of the plan of the loaded checkpoint."""

    packed: bytes
    """The positions in the rank's state of what it writes, in the order of the plan: 32 bits each."""
    content: str
    """Checksum of that."""
    total: int
    """The sum over all shards that the plan writes, as `sum_of_main` has it."""

    @property
    def places(self) -> list[int]:
        """The positions of what the rank writes."""
        places: list[int] = np.frombuffer(self.packed, np.uint32).tolist()
        return places


def offers_of(
    stored: StoredTable, size: int, writers: int, fingerprints: Sequence[str]
) -> tuple[StoredTable, list[Offer]]:
    """Make a plan of what a checkpoint says that it holds, as one is made of what ranks have.

    Args:
        stored: what the checkpoint says.
        size: ranks.
        writers: files of each rank.
        fingerprints: of the ranks' structures.

    Returns:
        The whole plan, and what each rank is told of it.

    Raises:
        CheckpointSaveError: it is of other ranks, or does not make up whole tensors.
    """
    if len(stored.fingerprints) != size or (np.diff(stored.rank) < 0).any():
        raise CheckpointSaveError("it is of other ranks")
    table, everything = ShardTable.of_stored(stored), np.ones(len(stored), np.bool_)
    problem = problem_of(table, everything)
    if problem is not None:
        raise CheckpointSaveError(problem)
    whole = stored_table(table, everything, writers, fingerprints)
    rows = [
        (whole.keys[key], whole.specs[spec], offset)
        for key, spec, offset in zip(whole.key.tolist(), whole.spec.tolist(), whole.offset.tolist(), strict=True)
    ]
    files, places = whole.file.tolist(), whole.place.tolist()
    total = _sum(rows)
    bounds: list[int] = np.searchsorted(whole.rank, np.arange(size + 1)).tolist()
    offers = []
    for rank in range(size):
        own = range(bounds[rank], bounds[rank + 1])
        content = content_of((whole.files[files[row]], places[row], rows[row]) for row in own)
        offers.append(Offer(_packed(whole.place[own.start : own.stop]), content, total))
    return whole, offers


def content_of(rows: Iterable[tuple[str, int, tuple[str, Spec, Sequence[int]]]]) -> str:
    """Checksum of what a rank writes: of each shard the file, the position in the state, and what it is."""
    return hashlib.sha256("\n".join(f"{file} {place} {_text(row)}" for file, place, row in rows).encode()).hexdigest()


def sum_of_main(state: Sequence[Any]) -> int:
    """The sum over the main replicas that a rank has. Over all ranks it is that of a plan that leaves none out."""
    return _sum(row_of(item) for item in state if is_main_replica(item.replica_id))


def add_up(sums: Sequence[tuple[int, int]]) -> bool:
    """Whether what all ranks have is what the plan writes, from each rank's own sum and the total it was told."""
    totals = {total for _, total in sums}
    return totals == {sum(own for own, _ in sums) % _SUM}


def _sum(rows: Iterable[tuple[str, Spec, Sequence[int]]]) -> int:
    total = 0
    for row in rows:
        if not _may_be_left_out(row[1]):
            total += int.from_bytes(hashlib.blake2b(_text(row).encode(), digest_size=16).digest(), "little")
    return total % _SUM


def _may_be_left_out(spec: Spec) -> bool:
    """A shard without elements outside of a grid: one that begins where another does is not written."""
    return not spec.is_object and spec.grid is None and 0 in spec.part and 0 not in spec.whole


def _text(row: tuple[str, Spec, Sequence[int]]) -> str:
    key, spec, offset = row
    return repr((key, tuple(spec), tuple(offset[: len(spec.whole)])))


def _packed(places: Ints) -> bytes:
    return places.astype(np.uint32).tobytes()
