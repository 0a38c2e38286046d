"""What a rank-bound snapshot holds beside the state itself: what a restart needs to know, in the common part."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from bridge.training.checkpointing.contents.dataloader import DataloaderState, parse_dataloader_state
from bridge.training.checkpointing.errors import CheckpointDamagedError, CheckpointMismatchError
from bridge.training.checkpointing.layout import DATALOADER_DIRECTORY, dataloader_state_name
from bridge.training.checkpointing.parallel import Layout

KEY = "rank_local"
"""Key of the common part under which the record lies."""
CONTENT_METADATA = "content_metadata"
"""Key of the common part, as in `common.pt`."""
FORMAT_VERSION = 1


@dataclass(frozen=True)
class SnapshotRecord:
    """One rank's record of the save that its snapshot belongs to."""

    iteration: int
    rank: int
    world_size: int
    parallel_sizes: dict[str, int]
    """As in a manifest."""
    save_id: str
    """The same in all ranks' snapshots of one save, and in those of no other."""
    train_state_metadata: dict[str, Any]
    """The fields of the train state, on every rank."""
    sidecars: dict[str, bytes]
    """The files that this rank would have written beside a payload in a directory, by name."""
    versions: dict[str, str]
    """As in a manifest."""
    start: int = 0
    """Likewise."""
    format_version: int = FORMAT_VERSION

    def embedded_in(self, common: Mapping[str, Any]) -> dict[str, Any]:
        """The common part with this record."""
        return {**common, KEY: asdict(self)}

    @classmethod
    def of(cls, common: Mapping[str, Any], place: str) -> SnapshotRecord:
        """The record in a snapshot's common part.

        Raises:
            CheckpointMismatchError: it is of a version that this program does not read.
            CheckpointDamagedError: there is none, or it is not one.
        """
        try:
            version = common[KEY]["format_version"]
            if version != FORMAT_VERSION:
                raise CheckpointMismatchError(
                    f"{place} is of format version {version!r}, and this version of bridge reads {FORMAT_VERSION}"
                )
            record = cls(**common[KEY])
            Layout.from_sizes(record.parallel_sizes)
            if not all(isinstance(data, bytes) for data in record.sidecars.values()):
                raise TypeError("a file in it is not bytes")
        except (KeyError, TypeError, AttributeError) as error:
            raise CheckpointDamagedError(f"{place} does not say what it is: {error!r}") from error
        return record

    def require_for(self, iteration: int, rank: int, world_size: int, layout: Layout | None, place: str) -> None:
        """Check that the snapshot is what its name says, and bound to the ranks of this run.

        Args:
            iteration: the name's.
            rank: this rank.
            world_size: of this run.
            layout: of this run; None leaves it out.
            place: for messages.

        Raises:
            CheckpointDamagedError: it is another iteration's or another rank's.
            CheckpointMismatchError: it was saved by another number of ranks, or under other parallel sizes.
        """
        if (self.iteration, self.rank) != (iteration, rank):
            raise CheckpointDamagedError(
                f"{place} should be of rank {rank}, and is of iteration {self.iteration} and rank {self.rank}"
            )
        if self.train_state_metadata.get("step") != iteration:
            found = self.train_state_metadata.get("step")
            raise CheckpointDamagedError(f"{place} is mixed up: its train state is of iteration {found}")
        saved = Layout.from_sizes(self.parallel_sizes)
        advice = "start with as many ranks and the same parallel sizes, or from a persistent checkpoint"
        if self.world_size != world_size:
            raise CheckpointMismatchError(
                f"{place} was saved by {self.world_size} ranks and this run has {world_size}; what is kept rank by "
                f"rank cannot be divided anew: {advice}"
            )
        if layout is not None and saved != layout:
            raise CheckpointMismatchError(
                f"{place} was saved under {saved} and this run has {layout}; what is kept rank by rank cannot be "
                f"divided anew: {advice}"
            )

    def dataloader_files(self) -> dict[str, bytes]:
        """The data iterators' states in this snapshot, by file name."""
        return {name: data for name, data in self.sidecars.items() if name.startswith(f"{DATALOADER_DIRECTORY}/")}


def save_id_of(common: Mapping[str, Any]) -> str | None:
    """Which save a snapshot is of, from its common part; None if that does not say."""
    record = common.get(KEY)
    found = record.get("save_id") if isinstance(record, Mapping) else None
    return found if isinstance(found, str) else None


def dataloader_state(files: Mapping[str, bytes], rank: int, size: int, place: str) -> DataloaderState:
    """What the data iterator of a data-parallel rank needs to go on.

    Args:
        files: all ranks' states, by file name.
        rank: this data-parallel rank.
        size: data-parallel ranks of this run.
        place: for messages.

    Raises:
        CheckpointDamagedError: a state is absent or unreadable.
    """
    needed = [rank] if len(files) == size else range(len(files))
    states = []
    for number in needed:
        name = dataloader_state_name(number)
        if name not in files:
            raise CheckpointDamagedError(f"{place} lacks {name}")
        states.append(parse_dataloader_state(files[name], f"{name} in {place}"))
    return DataloaderState(tuple(states), len(files), rank, size)
