"""Shards that are not in the checkpoint's directory: how they are found and read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from bridge.training.checkpointing.io.reading import ReadOptions
from bridge.training.checkpointing.readable import ReadableFile


@dataclass(frozen=True)
class Shards:
    """The shards of a checkpoint whose other files are in a directory."""

    locate: Callable[[str], tuple[ReadableFile, int]]
    """A shard by its name, and its size in bytes. Raises CheckpointError if there is none."""
    fetch: Callable[[], None]
    """Puts all shards into the directory, for what cannot be read where they are. Local, called on every rank."""
    options: ReadOptions = field(default_factory=ReadOptions)
    """How they are read."""
