"""The non-persistent checkpoints of a run, as far as they can be seen from this machine, without the run."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from bridge.training.callbacks import CheckpointKind
from bridge.training.checkpointing.agreement import Ranks
from bridge.training.checkpointing.catalog.manifests import read_head
from bridge.training.checkpointing.errors import CheckpointError
from bridge.training.checkpointing.layout import iteration_name, list_checkpoints
from bridge.training.checkpointing.resolve import Offer
from bridge.training.checkpointing.retention.trash import Trash
from bridge.training.checkpointing.tiers.global_directory import GlobalTier, directory_of
from bridge.training.checkpointing.tiers.session import SESSION, session_of
from bridge.training.config import CheckpointConfig

_LOCAL_NAME = re.compile(r"iter_(\d{7,})_(\d+)_local\.pt")
"""As `tiers.local` names the snapshot of an iteration and a rank."""


@dataclass(frozen=True)
class Snapshots:
    """The snapshots of one iteration that ranks hold, on local disks or in memory."""

    kind: CheckpointKind
    iteration: int
    owners: tuple[int, ...]
    """The ranks whose snapshot is on this machine."""
    total_bytes: int
    place: Path
    """Where they are: a directory, or a name for messages."""
    world_size: int | None
    """Of the run, as its newest persistent checkpoint says."""
    created: float | None = None
    """Unix time in seconds of the last change; None in memory."""

    @property
    def path(self) -> Path:
        """What it is called: there is no directory of an iteration."""
        return self.place / iteration_name(self.iteration)

    @property
    def is_complete(self) -> bool:
        """Whether every rank's snapshot is on this machine."""
        return self.world_size is not None and set(self.owners) >= set(range(self.world_size))


def global_directory(cfg: CheckpointConfig) -> Path | None:
    """Where a run has its global non-persistent checkpoints; None if that cannot be said."""
    return None if cfg.save is None and cfg.non_persistent_global_ckpt_dir is None else directory_of(cfg)


def snapshots_of(cfg: CheckpointConfig) -> list[Snapshots]:
    """Local and in-memory checkpoints of the run that saves in `checkpoint.save`, those of this machine.

    Raises:
        OSError: a directory cannot be read.
    """
    if cfg.save is None:
        return []
    save = Path(cfg.save).expanduser()
    file = save / SESSION
    if not file.is_file() or not file.stat().st_size:  # asked for its session, an empty one would be written anew
        return []
    session, world_size = session_of(save), _world_size(save)
    found = _in_memory(session, world_size)
    if cfg.non_persistent_local_ckpt_dir is not None:
        place = Path(cfg.non_persistent_local_ckpt_dir).expanduser() / session
        found += _local(place, world_size)
    return found


def offers_of(cfg: CheckpointConfig) -> list[Offer]:
    """The complete checkpoints that the configured non-persistent tier would offer to a run on this machine."""
    if cfg.save is None or cfg.load is None or cfg.finetune:
        return []
    if Path(cfg.load).expanduser().resolve() != Path(cfg.save).expanduser().resolve():
        return []
    kind = cfg.non_persistent_ckpt_type
    if kind == "global":
        return GlobalTier(directory_of(cfg), "", Trash()).offers(Ranks(None, 0, 1))
    if kind not in ("local", "in_memory"):
        return []
    found = [each for each in snapshots_of(cfg) if each.kind == kind and each.is_complete]
    return [Offer(each.kind, each.iteration, each.path) for each in found]


def _world_size(save: Path) -> int | None:
    for iteration in reversed(list_checkpoints(save).iterations):
        try:
            head = read_head(save / iteration_name(iteration))
        except CheckpointError:
            continue
        if head is not None:
            return head.world_size
    return None


def _local(place: Path, world_size: int | None) -> list[Snapshots]:
    owners: dict[int, set[int]] = {}
    sizes: dict[int, int] = {}
    changed: dict[int, float] = {}
    for path in sorted(place.glob("*/*_local.pt")):
        match = _LOCAL_NAME.fullmatch(path.name)
        if match is None:
            continue
        iteration, found = int(match[1]), path.stat()
        owners.setdefault(iteration, set()).add(int(match[2]))
        sizes[iteration] = sizes.get(iteration, 0) + found.st_size
        changed[iteration] = max(changed.get(iteration, 0.0), found.st_mtime)
    return [
        Snapshots("local", i, tuple(sorted(owners[i])), sizes[i], place, world_size, changed[i]) for i in sorted(owners)
    ]


def _in_memory(session: str, world_size: int | None) -> list[Snapshots]:
    from bridge.training.checkpointing.tiers.memory.keeper_readers import describe_keeper, running_keepers

    owners: dict[int, set[int]] = {}
    sizes: dict[int, int] = {}
    for name, rank in running_keepers():
        try:
            account = describe_keeper(name, rank) if name == session else None
        except CheckpointError:
            continue
        for kept in () if account is None else account.snapshots:
            owners.setdefault(kept.iteration, set()).add(kept.owner)
            sizes[kept.iteration] = sizes.get(kept.iteration, 0) + kept.payload + kept.header
    return [
        Snapshots("in_memory", i, tuple(sorted(owners[i])), sizes[i], Path("memory"), world_size)
        for i in sorted(owners)
    ]
