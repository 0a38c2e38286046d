"""Local checkpoints: each rank's snapshot in a directory of its own node, and copies of other ranks' if replicated.

    <checkpoint.non_persistent_local_ckpt_dir>/<session>/<rank>/
      iter_0000010_0_local.pt          rank 0's snapshot of iteration 10
      iter_0000010_4_local.pt          a copy of rank 4's, with checkpoint.replication
      iter_0000020_0_local.dirty.pt    being written, or the remains of a crash

The directories and names are those of nvidia-resiliency-ext's manager, which this one is. Its files are not: they
are no pickles, and every byte is checked when they are read.
"""

from __future__ import annotations

import logging
import os
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch.distributed as dist
from zlib_ng.zlib_ng import crc32

from bridge.training.checkpointing.errors import CheckpointDamagedError, CheckpointError, UnsafeCheckpointError
from bridge.training.checkpointing.files import sync_directory
from bridge.training.checkpointing.tiers import snapshot
from bridge.training.checkpointing.tiers.availability import SnapshotId
from bridge.training.config.checkpoint_rules import replication_world_rules
from bridge.training.config.errors import ConfigError

try:
    from nvidia_resiliency_ext.checkpointing.local.ckpt_managers.local_manager import LocalCheckpointManager
    from nvidia_resiliency_ext.checkpointing.local.replication.strategies import LazyCliqueReplicationStrategy
except ImportError as error:
    raise CheckpointError(
        "checkpoint.non_persistent_ckpt_type 'local' needs the package nvidia-resiliency-ext, which cannot be "
        f"imported ({error}); install it, or set the type to 'global' or null"
    ) from error

logger = logging.getLogger(__name__)

_MAGIC = b"\x89BRSNAP\n"
_PREAMBLE = struct.Struct("<8sIQQ")
"""What a file begins with: magic, version, bytes of the header, bytes of the tensors. All little-endian."""
_TRAILER = struct.Struct("<I")
"""What a file ends with: the CRC-32 of all before it."""
_VERSION = 1
_ZIP = b"PK\x03\x04"
"""How the files begin that torch.save writes, and with it nvidia-resiliency-ext."""
_PIECE = 8 << 20  # bytes written, or read, and checksummed while they are in the cache
_NAME = re.compile(r"iter_(\d{7,})_(\d+)_local\.pt")
_DIRTY_NAME = re.compile(r"iter_(\d{7,})_(\d+)_local\.dirty\.pt")


class SafeLocalCheckpointManager(LocalCheckpointManager):  # type: ignore[misc]
    """nvidia-resiliency-ext's manager of local checkpoints, with files that are checked and cannot run code.

    What it does beyond that: a directory that was deleted is made again, the remains of a killed save are written
    over, iterations may have more than seven digits, and `forget_newer` lets a run go back.
    """

    def _ensure_dir(self) -> None:
        # Each time: it may have been deleted since.
        self.local_ckpt_dir.mkdir(mode=0o700, parents=True, exist_ok=True)

    def snapshot_path(self, iteration: int) -> Path:
        """Where this rank's own snapshot of an iteration is, or would be."""
        path: Path = self._local_ckpt_path_from_id((iteration, self.rank, self.session_id))
        return path

    def forget_newer(self, iteration: int) -> None:
        """Delete this rank's files of later iterations than `iteration`. Local.

        Raises:
            OSError: one cannot be deleted.
        """
        self.latest_iteration = -1
        for path, (found, _, _) in self._snapshots():
            if found > iteration:
                logger.warning("removing %s: the run has gone back to iteration %d or before", path, iteration)
                path.unlink(missing_ok=True)

    def find_latest(self) -> int:
        """The newest iteration of which every rank's snapshot exists; -1 if there is none. Collective."""
        # The inherited method would answer from the last call, whatever has been saved or deleted since.
        self.latest_iteration = -1
        return int(super().find_latest())

    def _my_ckpt_ids(self) -> list[SnapshotId]:
        return [identity for _, identity in self._snapshots()]

    def _snapshots(self) -> Iterator[tuple[Path, SnapshotId]]:
        try:
            entries = sorted(self.local_ckpt_dir.iterdir())
        except FileNotFoundError:
            return
        except OSError as error:
            # Expendable by nature: what cannot be listed is not there.
            logger.warning("there are no local checkpoints to be found: %s", error)
            return
        for entry in entries:
            match = _NAME.fullmatch(entry.name)
            if match is not None and entry.is_file():
                yield entry, (int(match[1]), int(match[2]), self.session_id)

    def _local_ckpt_path_from_id(self, ckpt_id: SnapshotId, is_dirty: bool = False) -> Path:
        iteration, rank, _ = ckpt_id
        directory: Path = self.local_ckpt_dir
        return directory / f"iter_{iteration:07d}_{rank}_local{'.dirty' if is_dirty else ''}.pt"

    def _save(self, state_dict: Any, ckpt_id: SnapshotId) -> None:
        self._ensure_dir()
        dirty = self._local_ckpt_path_from_id(ckpt_id, is_dirty=True)
        # Written over if it exists: only a save of this very rank that was killed can have left it.
        with dirty.open("wb", buffering=0) as stream:
            write_snapshot(stream, state_dict)
            os.fsync(stream.fileno())
        dirty.rename(self._local_ckpt_path_from_id(ckpt_id))
        sync_directory(self.local_ckpt_dir)

    def _load(self, ckpt_id: SnapshotId) -> Any:
        return read_snapshot(self._local_ckpt_path_from_id(ckpt_id))

    def beside(self, iteration: int, owner: int, save_id: str) -> torch.Tensor | None:
        """None: it would have to be read from storage."""
        del iteration, owner, save_id
        return None

    def _cleanup(self, iteration: int) -> None:
        """Delete all but an iteration that has just been saved and is complete everywhere.

        What is newer goes too: the run has come to this iteration, so it is of a time before it went back.
        """
        others = [path for path, (found, _, _) in self._snapshots() if found != iteration]
        self._remove([*others, *self._dirty(None)])

    def _cleanup_failed_save(self, iteration: int) -> None:
        """Delete what a failed save of an iteration has written."""
        failed = [path for path, (found, _, _) in self._snapshots() if found == iteration]
        self._remove([*failed, *self._dirty(iteration)])

    def _dirty(self, iteration: int | None) -> list[Path]:
        try:
            matches = {entry: _DIRTY_NAME.fullmatch(entry.name) for entry in self.local_ckpt_dir.iterdir()}
        except OSError:
            return []
        return [path for path, match in matches.items() if match and iteration in (None, int(match[1]))]

    @staticmethod
    def _remove(paths: list[Path]) -> None:
        for path in paths:
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                logger.warning("could not remove %s: %s", path, error)


def make_local_manager(checkpoint_config: Any, session_id: str) -> SafeLocalCheckpointManager:
    """The manager of a run's local checkpoints.

    With replication its process groups are made at the first save or load, which all ranks do together.

    Args:
        checkpoint_config: checkpoint configuration, with `non_persistent_local_ckpt_dir`.
        session_id: keeps apart the runs that share the directory.

    Raises:
        ConfigError: the ranks of this job cannot replicate as configured.
    """
    cfg = checkpoint_config
    if dist.is_initialized() and (broken := list(replication_world_rules(cfg, dist.get_world_size()))):
        raise ConfigError([str(violation) for violation in broken])
    cliques = None
    if cfg.replication:
        cliques = LazyCliqueReplicationStrategy(cfg.replication_jump, cfg.replication_factor)
    directory = Path(cfg.non_persistent_local_ckpt_dir).expanduser()
    return SafeLocalCheckpointManager(directory, session_id=session_id, repl_strategy=cliques)


def write_snapshot(stream: BinaryIO, state: Any) -> None:
    """Write a tensor-aware state dict to an unbuffered stream.

    Raises:
        OSError: the stream does not take it.
    """
    packed = snapshot.pack(state)
    tensors = [tensor.cpu() for tensor in packed.tensors]
    _, size = snapshot.layout(tensors)
    checksum = 0

    def write(data: bytes | memoryview) -> None:
        nonlocal checksum
        view = memoryview(data)
        for begin in range(0, len(view), _PIECE):
            piece = view[begin : begin + _PIECE]
            checksum = crc32(piece, checksum)
            while len(piece):
                piece = piece[stream.write(piece) :]

    write(_PREAMBLE.pack(_MAGIC, _VERSION, len(packed.header), size))
    write(packed.header)
    for piece in snapshot.chunks(tensors):
        write(piece)
    stream.write(_TRAILER.pack(checksum))


def read_snapshot(path: Path) -> Any:
    """Read a tensor-aware state dict, its tensors on the CPU. Nothing in it is interpreted before all of it is checked.

    Raises:
        CheckpointDamagedError: the file is absent, truncated, or not what was written.
        UnsafeCheckpointError: it is another program's, or holds an object that loading does not allow.
    """
    try:
        with path.open("rb", buffering=0) as stream:
            header, tensors = _read_checked(stream, path)
    except FileNotFoundError as error:
        raise CheckpointDamagedError(f"{path} does not exist") from error
    except OSError as error:
        raise CheckpointDamagedError(f"{path} cannot be read: {error}") from error
    return snapshot.unpack_buffer(header, tensors, str(path))


def _read_checked(stream: BinaryIO, path: Path) -> tuple[bytes, torch.Tensor]:
    preamble = stream.read(_PREAMBLE.size)
    if preamble.startswith(_ZIP):
        raise UnsafeCheckpointError(
            f"{path} is not a snapshot of this program but a file of torch.save, as nvidia-resiliency-ext writes; such "
            "a file can run code when it is read. Delete it, or name another directory in "
            "checkpoint.non_persistent_local_ckpt_dir"
        )
    actual = os.fstat(stream.fileno()).st_size
    if len(preamble) < _PREAMBLE.size or not preamble.startswith(_MAGIC):
        raise CheckpointDamagedError(f"{path} is not a snapshot: it does not begin as one ({actual} bytes)")
    _, version, header_size, size = _PREAMBLE.unpack(preamble)
    if version != _VERSION:
        raise CheckpointDamagedError(f"{path} is of version {version}, and this version of bridge reads {_VERSION}")
    expected = _PREAMBLE.size + header_size + size + _TRAILER.size
    if actual != expected:
        raise CheckpointDamagedError(f"{path} has {actual} bytes instead of {expected}")
    header = bytearray(header_size)
    tensors = torch.empty(size, dtype=torch.uint8)
    checksum = crc32(preamble)
    trailer = bytearray(_TRAILER.size)
    for part in (memoryview(header), memoryview(tensors.numpy())):  # type: ignore[arg-type]
        checksum = _fill(stream, part, checksum, path)
    _fill(stream, memoryview(trailer), 0, path)
    if _TRAILER.unpack(trailer)[0] != checksum:
        raise CheckpointDamagedError(
            f"{path} has CRC-32 {checksum:08x} instead of {_TRAILER.unpack(trailer)[0]:08x}: it was changed after it "
            "was written"
        )
    return bytes(header), tensors


def _fill(stream: BinaryIO, view: memoryview, checksum: int, path: Path) -> int:
    """Read a part of the file into `view` and return the checksum continued over it."""
    while len(view):
        read = stream.readinto(view[:_PIECE])  # type: ignore[attr-defined]
        if not read:
            raise CheckpointDamagedError(f"{path} ends too early")
        checksum = crc32(view[:read], checksum)
        view = view[read:]
    return checksum
