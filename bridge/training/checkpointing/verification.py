"""Holding a checkpoint's large files against its manifest: every rank reads a share, and all agree on the result."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bridge.training.checkpointing.agreement import Ranks
from bridge.training.checkpointing.errors import CheckpointDamagedError
from bridge.training.checkpointing.integrity import FileRecord, find_damage

logger = logging.getLogger(__name__)

_NAMED = 20
"""Damaged files that a message names."""


@dataclass(frozen=True)
class Unverified:
    """The files of a checkpoint that rank 0 has not read to the last bit."""

    records: tuple[FileRecord, ...] = ()
    every_byte: bool = False
    """Whether they are to be read whole; otherwise samples of them are."""


def shares(records: Sequence[FileRecord], size: int, every_byte: bool) -> list[list[FileRecord]]:
    """Divide files among `size` ranks so that all have about as much to read. The same on every rank.

    Args:
        records: the files.
        size: ranks.
        every_byte: whether they are read whole; a sample costs the same of every file.
    """
    divided: list[list[FileRecord]] = [[] for _ in range(size)]
    loads = [0] * size
    for record in sorted(records, key=lambda record: (-record.size, record.name)):
        rank = loads.index(min(loads))
        divided[rank].append(record)
        loads[rank] += record.size if every_byte else 1
    return divided


def verify(directory: Path, unverified: Unverified, ranks: Ranks) -> None:
    """Read files of a checkpoint and compare them with its manifest. Collective.

    Raises:
        CheckpointDamagedError: a file differs. Every rank raises; the message names each file, what its manifest says
            and what was found.
    """
    if not unverified.records:
        return
    own = shares(unverified.records, ranks.size, unverified.every_byte)[ranks.rank]
    found = ranks.run(
        "verifying the checkpoint",
        lambda: find_damage(directory, own, checksums=unverified.every_byte, samples=not unverified.every_byte),
    )
    require_undamaged(directory, sorted(p for part in ranks.gather_all("verifying", found[:_NAMED]) for p in part))


def require_undamaged(path: Path, problems: Sequence[str]) -> None:
    """Raise what was found, if anything was.

    Raises:
        CheckpointDamagedError: there are problems.
    """
    if problems:
        more = f"; and {len(problems) - _NAMED} more" if len(problems) > _NAMED else ""
        raise CheckpointDamagedError(f"{path} is damaged: {'; '.join(problems[:_NAMED])}{more}")
