"""Parts of a checkpoint in object storage, on the disk of each machine while it is loaded."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shutil
import socket
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from bridge.training.checkpointing import checksums
from bridge.training.checkpointing.agreement import Ranks
from bridge.training.checkpointing.errors import CheckpointDamagedError, NotEnoughSpaceError
from bridge.training.checkpointing.integrity import FileRecord
from bridge.training.checkpointing.objects.client import ObjectStore
from bridge.training.checkpointing.objects.labels import label_for
from bridge.training.checkpointing.objects.parallel import in_parallel
from bridge.training.checkpointing.objects.transfer import MIB, parts_of
from bridge.training.checkpointing.verification import shares
from bridge.training.object_url import ObjectUrl

logger = logging.getLogger(__name__)

_PREFIX = "bridge-objects-"


@dataclass(frozen=True)
class LocalCopy:
    """A directory that the ranks of one machine share."""

    directory: Path
    """Where the checkpoint's files are."""
    own: Path
    """What this rank has made, and deletes."""
    index: int
    """Of this rank, among those that share the directory."""
    sharing: int
    """How many they are."""
    lock: int
    """The descriptor that keeps others from taking `own` for a dead process's."""

    @classmethod
    def make(cls, name: str, ranks: Ranks) -> LocalCopy:
        """Make a directory on each machine, below the system's one for temporary files. Collective.

        Args:
            name: of the checkpoint.
            ranks: all ranks.
        """
        own, lock = ranks.run("making a directory for parts of the checkpoint", make_directory)
        machine = socket.gethostname()
        found = ranks.gather_all("sharing a directory", (machine, str(own)))
        # In containers of one machine, a directory of another rank may be out of sight.
        theirs = [path for other, path in found if other == machine and os.access(path, os.W_OK)]
        chosen = theirs[0] if theirs else str(own)
        users = ranks.gather_all("sharing a directory", (machine, chosen))
        members = [rank for rank, user in enumerate(users) if user == (machine, chosen)]
        return cls(Path(chosen) / name, own, members.index(ranks.rank), len(members), lock)

    def share(self, records: Sequence[FileRecord]) -> list[FileRecord]:
        """The files that this rank downloads."""
        return shares(records, self.sharing, every_byte=True)[self.index]

    def delete(self) -> None:
        """Delete what this rank has made. Call it once, when no rank reads from it any more."""
        shutil.rmtree(self.own, ignore_errors=True)
        os.close(self.lock)


def make_directory() -> tuple[Path, int]:
    """Make a directory below the system's one for temporary files, and sweep those of dead processes there.

    Returns:
        It, and a descriptor: as long as that is open, here or in a forked process, nobody sweeps the directory.
    """
    _sweep(Path(tempfile.gettempdir()))
    while True:
        path = Path(tempfile.mkdtemp(prefix=_PREFIX))
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            continue  # another rank has swept it: nothing said yet that it is in use
        if _is_kept(path, descriptor):
            return path, descriptor
        os.close(descriptor)


def _is_kept(path: Path, descriptor: int) -> bool:
    """Lock a new directory; False where another process has taken it for a dead one's before that."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True  # a file system without locks, where nothing is swept
    return path.exists()


def _sweep(place: Path) -> None:
    """Delete what processes of this user have left that died in the middle of a load."""
    for path in place.glob(f"{_PREFIX}*"):
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            if path.is_symlink() or path.stat().st_uid != os.getuid():
                continue
            descriptor = os.open(path, os.O_RDONLY)
            stack.callback(os.close, descriptor)
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            logger.info("removing %s: a load that did not end", path)
            shutil.rmtree(path, ignore_errors=True)


def download(store: ObjectStore, place: ObjectUrl, records: Sequence[FileRecord], directory: Path) -> None:
    """Download files of a checkpoint, in parallel and by ranges, and hold them against their checksums.

    Args:
        store: of the bucket.
        place: of the checkpoint.
        records: the files.
        directory: receives them.

    Raises:
        CheckpointDamagedError: one is not what its record says.
        NotEnoughSpaceError: there is no room for them.
        ObjectStoreError: the store failed.
    """
    directory.mkdir(parents=True, exist_ok=True)
    needed, free = sum(record.size for record in records), shutil.disk_usage(directory).free
    if needed > free:
        raise NotEnoughSpaceError(
            f"loading {place} needs {needed / MIB:.0f} MiB on this machine for a while, and {directory} has "
            f"{free / MIB:.0f} MiB; set TMPDIR to a directory with more room"
        )
    for record in records:
        path = directory / record.name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as stream:
            stream.truncate(record.size)
    pieces = [
        partial(_download_piece, store, place, record, directory / record.name, at, length)
        for record in records
        for at, length in parts_of(record.size, store.options.part_bytes)
    ]
    in_parallel(pieces, store.options.threads)
    in_parallel([partial(_require, directory, record, place) for record in records], store.options.threads)


def verify_in_place(store: ObjectStore, place: ObjectUrl, records: Sequence[FileRecord]) -> list[str]:
    """Read files where they are and compare their checksums; one sentence for each that differs."""

    def check(record: FileRecord) -> str:
        hasher = checksums.new_hasher(record.kind)
        for at, length in parts_of(record.size, store.options.part_bytes):
            data = bytearray(length)
            store.read(place.key(record.name), memoryview(data), at, label=label_for(record))
            hasher.update(memoryview(data))
        found = hasher.hexdigest()
        differs = f"{record.name} has {record.kind} {found} instead of {record.checksum}"
        return "" if found == record.checksum else differs

    return [text for text in in_parallel([partial(check, record) for record in records], store.options.threads) if text]


def _download_piece(store: ObjectStore, place: ObjectUrl, record: FileRecord, path: Path, at: int, length: int) -> None:
    data = bytearray(length)
    store.read(place.key(record.name), memoryview(data), at, label=label_for(record))
    with path.open("r+b", buffering=0) as stream:
        done = 0
        while done < length:
            done += os.pwrite(stream.fileno(), memoryview(data)[done:], at + done)


def _require(directory: Path, record: FileRecord, place: ObjectUrl) -> None:
    found = checksums.of_file(directory / record.name, record.kind)
    if found != record.checksum:
        raise CheckpointDamagedError(
            f"{place} is damaged: {record.name} has {record.kind} {found} instead of {record.checksum}"
        )
