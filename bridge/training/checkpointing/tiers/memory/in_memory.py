"""In-memory checkpoints: each rank's newest snapshot in host memory that outlives the trainer, owned by a keeper.

A save copies the tensors once, from wherever they are, straight into that memory, and is complete when it returns;
there is nothing to write in the background. A restart on the same machine reads it back without touching storage.
With a replication strategy each rank's keeper also holds the snapshots of the other ranks of its clique.
"""

from __future__ import annotations

import errno
import logging
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from bridge.training.checkpointing.errors import CheckpointDamagedError, CheckpointError
from bridge.training.checkpointing.layout import iteration_name
from bridge.training.checkpointing.tiers import snapshot
from bridge.training.checkpointing.tiers.availability import SnapshotId
from bridge.training.checkpointing.tiers.memory.keeper import Keeper, KeeperSettings
from bridge.training.checkpointing.tiers.memory.keeper_channel import GIB
from bridge.training.checkpointing.tiers.memory.keeper_readers import OpenSnapshot, open_apart
from bridge.training.checkpointing.tiers.record import save_id_of

try:
    from nvidia_resiliency_ext.checkpointing.local.ckpt_managers.base_manager import BaseCheckpointManager
    from nvidia_resiliency_ext.checkpointing.local.replication.strategies import LazyCliqueReplicationStrategy
except ImportError as error:
    raise CheckpointError(
        "checkpoint.non_persistent_ckpt_type 'in_memory' needs the package nvidia-resiliency-ext, which cannot be "
        f"imported ({error}); install it, or set the type to 'global' or null"
    ) from error

logger = logging.getLogger(__name__)

PLACE = "in-memory"
"""What the names of in-memory checkpoints begin with."""


class InMemoryCheckpointManager(BaseCheckpointManager):  # type: ignore[misc]
    """nvidia-resiliency-ext's manager over host memory.

    What it does beyond the interface: an iteration that is complete makes all others obsolete, later ones too, so a
    run may go back; and nothing that was found is remembered, since a keeper may die at any time.
    """

    def __init__(
        self,
        session_id: str,
        *,
        limit: int | None = None,
        idle_seconds: float = 3600.0,
        repl_strategy: Any | None = None,
    ) -> None:
        """Nothing is started before the first save.

        Args:
            session_id: keeps apart the runs of a machine; see `KeeperSettings.session`.
            limit: bytes of host memory that this rank's keeper may use. A save needs room for two snapshots of
                each rank that it holds: the complete one and the one being written. None is a part of what is
                available.
            idle_seconds: the keeper ends by itself when it has had no trainer for so long.
            repl_strategy: nvidia-resiliency-ext's; None keeps this rank's own snapshots only.
        """
        super().__init__(session_id, repl_strategy)
        self._limit = limit
        self._idle_seconds = idle_seconds
        self._keeper: Keeper | None = None

    @property
    def keeper(self) -> Keeper:
        """This rank's keeper, whether it runs or not."""
        if self._keeper is None:
            settings = KeeperSettings(self.session_id, self.rank, self._limit, self._idle_seconds)
            self._keeper = Keeper(settings)
        return self._keeper

    def snapshot_path(self, iteration: int) -> Path:
        """What messages and records call this rank's snapshot of an iteration; there is no such file."""
        return Path(PLACE, self.session_id, str(self.rank), iteration_name(iteration))

    def find_latest(self) -> int:
        """The newest iteration of which every rank's snapshot is kept somewhere; -1 if there is none. Collective."""
        # The inherited method would answer from the last call, whatever has been saved or lost since.
        self.latest_iteration = -1
        return int(super().find_latest())

    def forget_newer(self, iteration: int) -> None:
        """Forget what this rank keeps of later iterations than `iteration`. Local.

        Raises:
            KeeperLostError: the keeper does not answer. One that died has nothing to forget.
        """
        self.latest_iteration = -1
        self.keeper.drop(above=iteration)

    def release(self) -> None:
        """End this rank's keeper and free its memory: for the clean end of a run. Local."""
        self.latest_iteration = -1
        self.keeper.release()

    def close(self) -> None:
        """Leave this rank's keeper to itself: for the end of a run that will be restarted. Local."""
        self.keeper.close()

    def _my_ckpt_ids(self) -> list[SnapshotId]:
        # Never raises for the keeper's sake: the caller goes on to a collective.
        try:
            kept = self.keeper.snapshots()
        except CheckpointError as error:
            logger.warning("passing over in-memory checkpoints of rank %d: %s", self.rank, error)
            return []
        return sorted((found.iteration, found.owner, self.session_id) for found in kept)

    def _save(self, state_dict: Any, ckpt_id: SnapshotId) -> None:
        iteration, owner, _ = ckpt_id
        packed = snapshot.pack(state_dict)
        _, payload = snapshot.layout(packed.tensors)
        end = payload + len(packed.header)
        with self.keeper.begin(owner, iteration, end) as slot:
            if payload:
                snapshot.fill(torch.frombuffer(slot.memory, dtype=torch.uint8, count=payload), packed.tensors)
            slot.memory[payload:end] = packed.header
            slot.commit(payload, len(packed.header))

    def _load(self, ckpt_id: SnapshotId) -> Any:
        iteration, owner, _ = ckpt_id
        return read_state(self.keeper.open(owner, iteration))

    def beside(self, iteration: int, owner: int, save_id: str) -> torch.Tensor | None:
        """The bytes of the tensors that the keeper of another rank of this machine holds, where they lie in memory.

        A keeper may be left from a time when its rank ran here, and hold the same iteration of another save.
        """
        try:
            found = open_apart(self.session_id, owner, owner, iteration)
            if found is None:
                return None
            with _closing_on_failure(found):
                of = save_id_of(snapshot.common_of(found.read_header(), found.place))
                if of == save_id:
                    return _payload(found)
            found.close()
            logger.warning("passing over %s: it is of another save", found.place)
        except (CheckpointError, OSError) as error:
            logger.debug("passing over what the keeper of rank %d has: %s", owner, error)
        return None

    def _cleanup(self, iteration: int) -> None:
        """Forget all but an iteration that is complete everywhere: later ones are of a past that was taken back."""
        self._drop(below=iteration, above=iteration)

    def _cleanup_failed_save(self, iteration: int) -> None:
        """Forget what a failed save of an iteration has kept."""
        self._drop(equal=iteration)

    def _drop(self, **which: int) -> None:
        try:
            self.keeper.drop(**which)
        except CheckpointError as error:
            logger.warning("could not forget in-memory checkpoints: %s", error)


def make_in_memory_manager(checkpoint_config: Any, session_id: str) -> InMemoryCheckpointManager:
    """The manager of a run's in-memory checkpoints.

    With replication its process groups are made at the first save or load, which all ranks do together.

    Args:
        checkpoint_config: checkpoint configuration.
        session_id: keeps apart the runs of a machine.
    """
    cfg = checkpoint_config
    limit = None if cfg.in_memory_limit_gib is None else int(cfg.in_memory_limit_gib * GIB)
    cliques = None
    if cfg.replication:
        cliques = LazyCliqueReplicationStrategy(cfg.replication_jump, cfg.replication_factor)
    seconds = 60.0 * cfg.in_memory_release_minutes
    return InMemoryCheckpointManager(session_id, limit=limit, idle_seconds=seconds, repl_strategy=cliques)


def read_state(found: OpenSnapshot) -> Any:
    """The state dict of an open snapshot. Its tensors lie where they are in memory, and keep it open.

    Raises:
        UnsafeCheckpointError: the header holds an object of a class that is not allowed.
        CheckpointDamagedError: the snapshot is not what was committed.
        CheckpointError: there is not enough memory to look at it.
    """
    with _closing_on_failure(found):
        try:
            header = found.read_header()
            buffer = _payload(found)
        except OSError as error:
            if error.errno == errno.ENOMEM:
                raise CheckpointError(
                    f"{found.place} is there, and the system lends no memory to look at it ({error}); end what else "
                    "uses memory on this machine, or set vm.overcommit_memory to 0, and start again"
                ) from error
            raise CheckpointDamagedError(f"{found.place} cannot be read: {error}") from error
    return snapshot.unpack_buffer(header, buffer, found.place)


@contextmanager
def _closing_on_failure(found: OpenSnapshot) -> Iterator[None]:
    """Whatever goes wrong, let the keeper use the memory again."""
    try:
        yield
    except BaseException:
        found.close()
        raise


def _payload(found: OpenSnapshot) -> torch.Tensor:
    """The bytes of an open snapshot's tensors where they lie; it is closed when the last tensor on them is gone."""
    memory = found.map_payload()
    if memory is None:
        found.close()
        return torch.empty(0, dtype=torch.uint8)
    # The end of the process closes everything anyway.
    weakref.finalize(memory, found.close).atexit = False
    return torch.frombuffer(memory, dtype=torch.uint8)
