"""Is there room for a save? Asked before it begins, because a full disk half-way costs the time and helps nobody.

The sizes of earlier checkpoints come from their manifests, so that a check costs one look at the file system and one
small file. Only where there is not enough room is it worth finding out what could make some.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import (
    ShardedObject,
    ShardedTensor,
    ShardedTensorFactory,
    is_main_replica,
)

from bridge.training.checkpointing.agreement import Ranks
from bridge.training.checkpointing.errors import CheckpointDamagedError, NotEnoughSpaceError
from bridge.training.checkpointing.integrity import Manifest, read_manifest
from bridge.training.checkpointing.layout import TRASH_PREFIX, iteration_name, list_checkpoints
from bridge.training.checkpointing.retention.policies import Entry, Policy, removable
from bridge.training.checkpointing.retention.sweeper import committed_entries
from bridge.training.checkpointing.retention.trash import Trash

logger = logging.getLogger(__name__)

_BYTES_PER_SHARD = 2048
"""What a shard takes on disk beside its values: 1.6 KB of torch's file format, and its entry in `.metadata`."""

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True)
class Estimate:
    """How large a checkpoint is going to be."""

    size: int
    """Bytes."""
    basis: str
    """What says so, for messages."""


@dataclass(frozen=True)
class Space:
    """Bytes of a directory's file system, as a save finds them."""

    available: int
    retention: int = 0
    """Of checkpoints that retention would delete after the save."""
    trash: int = 0
    """Of deleted checkpoints whose files are still there."""

    def shortage(self, needed: Estimate) -> str | None:
        """What is missing, in words; None if there is room. What is yet to be deleted is not room."""
        if needed.size <= self.available:
            return None
        return (
            f"{as_text(needed.size)} are needed ({needed.basis}) and {as_text(self.available)} are available; "
            f"reclaimable are {as_text(self.retention)} in checkpoints that retention would delete after this save, "
            f"and {as_text(self.trash)} in deleted ones whose files are still there"
        )


_REMEDY = "to save without this check, set checkpoint.check_free_space to false"


@dataclass(frozen=True)
class SharedDirectory:
    """A directory that all ranks save in. Its methods are for rank 0."""

    path: Path
    setting: str
    """The one that names it, for messages."""
    policies: Sequence[Policy]
    """What retention keeps there."""
    trash: Trash
    """Deletes what retention lets go."""
    in_use: Sequence[Path] = ()
    """Checkpoints that retention does not touch."""
    starts_in: Path | None = None
    """The directory that the run notes its starts in; None for this one."""

    def recent_size(self) -> Estimate | None:
        """The size of the newest checkpoint there; None if there is none that says."""
        for iteration in reversed(list_checkpoints(self.path).iterations):
            manifest = _manifest(self.path / iteration_name(iteration))
            if manifest is not None:
                return Estimate(manifest.total_bytes, f"as much as the checkpoint of iteration {iteration} there")
        return None

    def has(self, needed: Estimate) -> bool:
        """Whether there is room, as far as the system can say."""
        available = available_bytes(self.path)
        return available is None or needed.size <= available

    def require(self, needed: Estimate, iteration: int) -> None:
        """Make sure that a checkpoint has room beside all that are there, one of the same iteration included.

        If the room is still taken by deleted checkpoints, wait for the end of their deletion.

        Raises:
            NotEnoughSpaceError: there is less than `needed`.
        """
        if self.has(needed):
            return
        if not self.trash.is_empty:
            logger.warning(
                "%s: there is no room for the next checkpoint while deleted ones are still there; waiting until they "
                "are gone",
                self.path,
            )
            self.trash.finish()
        available = available_bytes(self.path) or 0
        space = Space(available, self._retention_bytes(iteration), self._trash_bytes())
        shortage = space.shortage(needed)
        if shortage is not None:
            raise NotEnoughSpaceError(
                f"{self.setting}: not enough space in {self.path} for the checkpoint of iteration {iteration}: "
                f"{shortage}. Free space there, name another directory, or keep fewer checkpoints "
                f"(checkpoint.most_recent_k); {_REMEDY}"
            )

    def _retention_bytes(self, iteration: int) -> int:
        """What a sweep after the save of `iteration` would let go, and the checkpoint that the save replaces."""
        listing = list_checkpoints(self.path)
        try:
            others = [entry for entry in committed_entries(listing, self.starts_in) if entry.iteration != iteration]
        except (CheckpointDamagedError, OSError):
            others = []  # retention deletes nothing then
        places = {path.expanduser().resolve() for path in self.in_use}
        used = [i for i in listing.iterations if (self.path / iteration_name(i)).resolve() in places]
        gone = {*removable([*others, Entry(iteration, time.time())], self.policies, iteration, used), iteration}
        manifests = (_manifest(self.path / iteration_name(i)) for i in gone.intersection(listing.iterations))
        return sum(manifest.total_bytes for manifest in manifests if manifest is not None)

    def _trash_bytes(self) -> int:
        names = [name for name in list_checkpoints(self.path).leftovers if name.startswith(TRASH_PREFIX)]
        return sum(_tree_bytes(self.path / name) for name in names)


def _manifest(path: Path) -> Manifest | None:
    """A checkpoint's manifest; None where there is none that can be read: retention and loading speak of that."""
    try:
        return None if path.is_symlink() else read_manifest(path)
    except (CheckpointDamagedError, OSError):
        return None


def _tree_bytes(path: Path) -> int:
    """Bytes of the files in a directory that is being deleted."""
    total = 0
    for directory, _, names in os.walk(path):
        for name in names:
            try:
                total += os.lstat(Path(directory, name)).st_size
            except FileNotFoundError:
                continue
    return total


def available_bytes(directory: Path) -> int | None:
    """What this process may still write in a directory, or where it is going to be; None if the system cannot say.

    Quotas are not known here: a file system that has room may still refuse.
    """
    for place in (directory, *directory.absolute().parents):
        try:
            found = os.statvfs(place)
        except FileNotFoundError:
            continue
        except OSError:
            return None
        # File systems over a network service that has no limit say that they have no blocks at all.
        return found.f_bavail * found.f_frsize if found.f_blocks else None
    return None


def state_bytes(state_dict: dict[str, Any], ranks: Ranks) -> int:
    """Bytes that this rank's part of a sharded state dict adds to a checkpoint: replicas count on one rank only."""
    total = 0
    for value in nested_values(state_dict):
        if isinstance(value, ShardedTensor | ShardedTensorFactory | ShardedObject):
            total += _size_of(value.data) + _BYTES_PER_SHARD if is_main_replica(value.replica_id) else 0
        elif ranks.is_first:
            total += _size_of(value)
    return total


def _size_of(data: Any) -> int:
    """Of what is large enough to matter."""
    if isinstance(data, torch.Tensor):
        return data.nbytes
    return data.getbuffer().nbytes if isinstance(data, BytesIO) else 0


@dataclass(frozen=True)
class Claim:
    """What one rank is going to write on its own node."""

    rank: int
    filesystem: tuple[str, int]
    """Machine and device: ranks with the same share the space."""
    directory: str
    needed: int
    """Bytes."""
    available: int | None
    """Bytes; None if the system cannot say."""


def shortages(claims: Iterable[Claim]) -> list[str]:
    """The file systems on which all ranks together claim more than there is, in words."""
    by_filesystem: dict[tuple[str, int], list[Claim]] = defaultdict(list)
    for claim in claims:
        by_filesystem[claim.filesystem].append(claim)
    found = []
    for sharing in by_filesystem.values():
        needed = sum(claim.needed for claim in sharing)
        available = min((claim.available for claim in sharing if claim.available is not None), default=None)
        if available is not None and needed > available:
            ranks = ", ".join(str(claim.rank) for claim in sharing)
            found.append(
                f"rank {ranks} in {sharing[0].directory}: {as_text(needed)} are needed and {as_text(available)} "
                "are available"
            )
    return found


def require_local(directory: Path, needed: int, iteration: int, setting: str, ranks: Ranks) -> None:
    """Make sure that every rank has room for what it writes on its own node, beside what is there. Collective.

    Args:
        directory: of this rank.
        needed: bytes that this rank is going to write.
        iteration: what is saved, for messages.
        setting: names the directory, for messages.
        ranks: all ranks.

    Raises:
        NotEnoughSpaceError: a file system has less than its ranks need together. Every rank raises.
    """
    claim = Claim(ranks.rank, _filesystem(directory), str(directory), needed, available_bytes(directory))
    short = shortages(ranks.gather_all("comparing free space", claim))
    if short:
        raise NotEnoughSpaceError(
            f"{setting}: not enough space for the checkpoint of iteration {iteration}: {'; '.join(short)}. "
            f"Free space there, or name another directory; {_REMEDY}"
        )


def _filesystem(directory: Path) -> tuple[str, int]:
    try:
        machine = _BOOT_ID.read_text().strip()
    except OSError:
        machine = socket.gethostname()
    for place in (directory, *directory.absolute().parents):
        try:
            return machine, place.stat().st_dev
        except OSError:
            continue
    return machine, 0


def as_text(size: int) -> str:
    """A number of bytes for people: `1.5 GiB`."""
    value, unit = float(size), "bytes"
    for unit in ("bytes", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{size} bytes" if unit == "bytes" else f"{value:.1f} {unit}"
