"""Global non-persistent checkpoints: the form of persistent ones, in a directory of their own, only the newest kept."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bridge.training.callbacks import CheckpointKind
from bridge.training.checkpointing.agreement import Ranks
from bridge.training.checkpointing.commit import move_trackers
from bridge.training.checkpointing.errors import CheckpointError
from bridge.training.checkpointing.files import make_directory, move_to_trash, sync_directory
from bridge.training.checkpointing.integrity import Level
from bridge.training.checkpointing.layout import (
    LEGACY_TRACKER,
    NON_PERSISTENT_DIRECTORY,
    TRACKER,
    TRAIN_STATE,
    iteration_name,
    list_checkpoints,
    parse_iteration_name,
)
from bridge.training.checkpointing.objects.places import save_directory
from bridge.training.checkpointing.resolve import Offer, Source
from bridge.training.checkpointing.retention.sweeper import committed_iterations
from bridge.training.checkpointing.retention.trash import Trash
from bridge.training.checkpointing.source import find_source, require_whole
from bridge.training.checkpointing.stored import DirectoryCheckpoint, StoredCheckpoint
from bridge.training.checkpointing.tiers import session as sessions

logger = logging.getLogger(__name__)

SETTING = "checkpoint.non_persistent_global_ckpt_dir"


@dataclass(frozen=True)
class GlobalTier:
    """The directory of one run's global non-persistent checkpoints."""

    directory: Path
    session: str
    """Of the run."""
    trash: Trash
    """Deletes what the run has left behind."""
    is_apart: bool = True
    """Whether it lies outside the save directory, so that another run may name it too."""
    kind: CheckpointKind = "non_persistent_global"
    integrity: Level = "sizes"
    """How much of a checkpoint is checked before it is loaded."""

    @classmethod
    def of(cls, checkpoint_config: Any, session: str, trash: Trash) -> GlobalTier:
        """The tier of a configuration that has `save`."""
        directory, save_dir = directory_of(checkpoint_config), save_directory(checkpoint_config)
        is_apart = save_dir.resolve() not in directory.resolve().parents
        return cls(directory, session, trash, is_apart, integrity=checkpoint_config.integrity)

    def take_over(self) -> None:
        """Make the directory, and make it this run's alone. For rank 0; there is nothing to do where that is done.

        Raises:
            DirectoryInUseError: it is another run's.
            OSError: it cannot be made or written.
        """
        make_directory(self.directory)
        if self.is_apart:
            sessions.take_over(self.directory, self.session, SETTING)

    def offers(self, ranks: Ranks) -> list[Offer]:
        """The checkpoint that its tracker names, and whole older ones."""
        return ranks.first("looking for non-persistent checkpoints", self._offers)

    def open(self, source: Source, ranks: Ranks) -> StoredCheckpoint:
        """Nothing needs to be read yet."""
        return DirectoryCheckpoint(source, self.integrity)

    def forget_newer(self, iteration: int, ranks: Ranks) -> None:
        """Move the tracker back first, so that at every instant it names a whole checkpoint or is absent."""
        ranks.first(
            "removing non-persistent checkpoints that the run has left behind", lambda: self._forget_newer(iteration)
        )

    def _offers(self) -> list[Offer]:
        try:
            tracked = find_source(self.directory, None, setting=SETTING)
        except CheckpointError as error:
            # Expendable by nature: the run goes on from what is persistent.
            logger.warning("passing over all non-persistent checkpoints: %s", error)
            return []
        newest = None if tracked is None else parse_iteration_name(tracked.path.name)
        if newest is None:
            return []
        iterations = [i for i in list_checkpoints(self.directory).iterations if i <= newest]
        return [Offer(self.kind, i, self.directory / iteration_name(i)) for i in reversed(iterations)]

    def _forget_newer(self, iteration: int) -> None:
        listing = list_checkpoints(self.directory)
        stale = [found for found in committed_iterations(listing) if found > iteration]
        if not stale:
            return
        logger.warning(
            "removing the non-persistent checkpoints %s in %s: this run has gone on from iteration %d and so has left "
            "them behind",
            ", ".join(map(str, stale)),
            self.directory,
            iteration,
        )
        self._move_trackers_back([found for found in listing.iterations if found <= iteration])
        moved = [move_to_trash(self.directory / iteration_name(found)) for found in stale]
        sync_directory(self.directory)
        self.trash.delete(moved)

    def _move_trackers_back(self, kept: list[int]) -> None:
        for iteration in reversed(kept):
            path = self.directory / iteration_name(iteration)
            try:
                require_whole(path)
            except CheckpointError:
                continue
            move_trackers(self.directory, iteration, (path / TRAIN_STATE).read_bytes())
            return
        for name in (TRACKER, LEGACY_TRACKER):
            (self.directory / name).unlink(missing_ok=True)
        sync_directory(self.directory)


def directory_of(checkpoint_config: Any) -> Path:
    """Where the global non-persistent checkpoints of a run are. The configuration has `save` or the setting itself."""
    named = checkpoint_config.non_persistent_global_ckpt_dir
    if named is not None:
        return Path(named).expanduser()
    return save_directory(checkpoint_config) / NON_PERSISTENT_DIRECTORY
