"""A checkpoint to load, wherever it is stored: what it says about itself, and how its parts are read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from bridge.training.checkpointing.agreement import Ranks
from bridge.training.checkpointing.contents.dataloader import DataloaderState, read_dataloader_state
from bridge.training.checkpointing.contents.train_state import read_train_state
from bridge.training.checkpointing.detection import format_on_all_ranks
from bridge.training.checkpointing.formats import Loaded
from bridge.training.checkpointing.formats.options import LoadOptions
from bridge.training.checkpointing.integrity import Level
from bridge.training.checkpointing.layout import TRAIN_STATE
from bridge.training.checkpointing.plans.load_plan import Saved
from bridge.training.checkpointing.resolve import Source
from bridge.training.checkpointing.source import describe
from bridge.training.checkpointing.verification import verify


class StoredCheckpoint(Protocol):
    """What `restoring` needs of a checkpoint. Nothing of a run changes before all of it has been read."""

    @property
    def source(self) -> Source:
        """Where it is, and why it was chosen."""

    def describe(self, ranks: Ranks) -> Saved:
        """Check it as far as that is cheap, and read what it says about itself. Collective.

        Raises:
            CheckpointError: it is damaged, or this run cannot read it. Every rank raises.
        """

    def load(self, template: dict[str, Any], ranks: Ranks, options: LoadOptions) -> Loaded:
        """Read the parts that `template` asks for. Collective; the arguments are those of `formats.Load`."""

    def train_state(self) -> Mapping[str, Any]:
        """The counters, by field name of TrainState. Local."""

    def data_iterator_state(self, data_parallel_rank: int, data_parallel_size: int) -> DataloaderState:
        """What the data iterator of a data-parallel rank of this run needs to go on. Local."""

    def close(self) -> None:
        """Nothing more is read. Local; no rank reads any more, and what was fetched for that can go."""


@dataclass(frozen=True)
class DirectoryCheckpoint:
    """A published `iter_N` directory, or one that another program wrote."""

    source: Source
    integrity: Level = "sizes"
    """How much of it is checked."""

    def describe(self, ranks: Ranks) -> Saved:
        """Rank 0 looks, for all; what is large is verified by all."""
        saved, unverified = ranks.first("examining the checkpoint", lambda: describe(self.source, self.integrity))
        verify(self.source.path, unverified, ranks)
        return saved

    def load(self, template: dict[str, Any], ranks: Ranks, options: LoadOptions) -> Loaded:
        """Read shards by the checkpoint's format."""
        return format_on_all_ranks(self.source.path, ranks).load(template, self.source.path, ranks, options)

    def train_state(self) -> Mapping[str, Any]:
        """From `train_state.pt`."""
        return read_train_state(self.source.path / TRAIN_STATE)

    def data_iterator_state(self, data_parallel_rank: int, data_parallel_size: int) -> DataloaderState:
        """From the files in `dataloader_state/`."""
        return read_dataloader_state(self.source.path, data_parallel_rank, data_parallel_size)

    def close(self) -> None:
        """Nothing was fetched."""
