"""How sharded state reaches disk, one module a format."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from bridge.training.checkpointing.sidecar import Sidecar


@dataclass(frozen=True)
class PayloadWrite:
    """A planned write of this rank's shards. Planning is collective; what follows is not.

    `write` runs on every rank, perhaps in a background process: it writes and syncs this rank's
    files and returns their names and a small result. When all ranks have written, `finish` runs on rank 0
    with their results, by rank, and returns the names of the files that it added. Both may be run again after
    they have failed half-way: they begin their files anew.
    """

    write: Callable[[], tuple[list[str], Any]]
    finish: Callable[[list[Any]], list[str]]
    sidecars: tuple[Sidecar, ...] = ()
    """Small files that belong to the format; this rank writes them with its others."""
