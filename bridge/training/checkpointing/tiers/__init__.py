"""WHERE checkpoints go beside the save directory: the non-persistent tiers, one module each."""

from __future__ import annotations

from typing import Protocol

from bridge.training.callbacks import CheckpointKind
from bridge.training.checkpointing.agreement import Ranks
from bridge.training.checkpointing.resolve import Offer, Source
from bridge.training.checkpointing.stored import StoredCheckpoint


class NonPersistentTier(Protocol):
    """A place of non-persistent checkpoints, seen by a run that loads. Every method is collective."""

    @property
    def kind(self) -> CheckpointKind:
        """What its checkpoints are called."""

    def offers(self, ranks: Ranks) -> list[Offer]:
        """The complete checkpoints of this run's session, on every rank."""

    def open(self, source: Source, ranks: Ranks) -> StoredCheckpoint:
        """One of the offered checkpoints, read as far as its soundness can only be told by reading.

        Raises:
            CheckpointError: it is damaged or does not fit this run. Every rank raises; nothing has changed.
        """

    def forget_newer(self, iteration: int, ranks: Ranks) -> None:
        """Delete what is of a later iteration than `iteration`: a run that goes on from there leaves it behind.

        Raises:
            CheckpointError: some of it cannot be deleted. Every rank raises.
        """
