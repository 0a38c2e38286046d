"""The upload of one checkpoint: its files in parallel, its marker last, then the trackers.

Object storage cannot rename, so `manifest.json` is the mark: a checkpoint without it does not count. At any instant,
SIGKILL included, each iteration in the bucket is whole or does not count, and the trackers lead to a whole one.
An upload that was cut short goes on where it was: files that are there as the manifest describes them stay.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Lock

from bridge.training.checkpointing import checksums
from bridge.training.checkpointing.errors import (
    CheckpointDamagedError,
    CheckpointError,
    CheckpointNotFoundError,
    CheckpointSaveError,
)
from bridge.training.checkpointing.integrity import FileRecord, Manifest
from bridge.training.checkpointing.layout import LEGACY_TRACKER, MANIFEST, TRACKER, TRAIN_STATE, iteration_name
from bridge.training.checkpointing.objects.client import ObjectStore
from bridge.training.checkpointing.objects.labels import CHECKSUM, label_for, label_of_bytes
from bridge.training.checkpointing.objects.listing import BucketListing, list_bucket, parse_marker
from bridge.training.checkpointing.objects.parallel import in_parallel
from bridge.training.checkpointing.objects.transfer import parts_of
from bridge.training.object_url import ObjectUrl

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Uploaded:
    """A checkpoint that is in the bucket."""

    iteration: int
    total_bytes: int
    sent_bytes: int
    """Without what an earlier try had sent."""
    seconds: float


def upload_checkpoint(
    store: ObjectStore,
    url: ObjectUrl,
    directory: Path,
    *,
    move_trackers: bool = True,
    confirm: Callable[[], None] | None = None,
    progress: Callable[[int], None] | None = None,
) -> Uploaded:
    """Put a published checkpoint into a bucket, or finish what an earlier try began. May be called again at any time.

    Args:
        store: of the bucket.
        url: the place of checkpoints in it.
        directory: the checkpoint, an `iter_N` with its manifest.
        move_trackers: whether the trackers lead to it afterwards.
        confirm: called before a marker is deleted or put; what it raises ends the upload.
        progress: told, from several threads, how many bytes have been sent in a piece.

    Raises:
        CheckpointNotFoundError: it is not there (any more).
        CheckpointDamagedError: it is not what its manifest says.
        CheckpointSaveError: something else is in its place in the bucket.
        ObjectStoreError: the store failed.
    """
    begun = time.monotonic()
    marker = _read(directory / MANIFEST)
    place = url / directory.name
    manifest = parse_marker(marker, place)
    sent = 0
    before = store.find(place.key(MANIFEST))
    if before != marker:
        there = _find_own(store, place, before, manifest)
        if before is not None:
            if confirm is not None:
                confirm()
            _unpublish(store, url, manifest.iteration)
        sent = _send_files(store, place, directory, manifest, there, progress)
        _require_all(store, place, manifest)
        if _read(directory / MANIFEST) != marker:
            raise CheckpointNotFoundError(f"{directory} was replaced while it was being uploaded")
        if confirm is not None:
            confirm()
        store.put(place.key(MANIFEST), marker, {CHECKSUM: label_of_bytes(marker)})
    if move_trackers:
        point_trackers(store, url, manifest.iteration, _read(directory / TRAIN_STATE))
    return Uploaded(manifest.iteration, manifest.total_bytes, sent, time.monotonic() - begun)


def point_trackers(store: ObjectStore, url: ObjectUrl, iteration: int, train_state: bytes) -> None:
    """Make both trackers name a whole checkpoint; ours first, as in a directory.

    Args:
        store: of the bucket.
        url: the place of checkpoints in it.
        iteration: the checkpoint's.
        train_state: the bytes of its `train_state.pt`.
    """
    for name, data in ((TRACKER, train_state), (LEGACY_TRACKER, str(iteration).encode())):
        if store.find(url.key(name)) != data:
            store.put(url.key(name), data, {CHECKSUM: label_of_bytes(data)})


def _unpublish(store: ObjectStore, url: ObjectUrl, iteration: int) -> None:
    """Before the objects of an iteration change, it must not count: no tracker names it, and it has no marker."""
    place = url / iteration_name(iteration)
    logger.warning("replacing the checkpoint that was in %s", place)
    listing = list_bucket(store, url)
    if iteration in listing.named:
        _step_back(store, listing, iteration)
    store.delete([place.key(MANIFEST)])


def _step_back(store: ObjectStore, listing: BucketListing, iteration: int) -> None:
    line = [n for n in listing.present_line() if n < iteration]
    others = [n for n in listing.iterations if n != iteration]
    if others:
        newest = line[-1] if line else max(others, key=lambda n: (listing.manifests[n].created or 0.0, n))
        train_state = store.get(listing.url.key(iteration_name(newest), TRAIN_STATE))
        point_trackers(store, listing.url, newest, train_state)
        return
    for name in (TRACKER, LEGACY_TRACKER):
        store.delete([listing.url.key(name)])


def _send_files(
    store: ObjectStore,
    place: ObjectUrl,
    directory: Path,
    manifest: Manifest,
    found: Mapping[str, _Found],
    progress: Callable[[int], None] | None,
) -> int:
    """Upload what is not there yet, delete what is ours and does not belong there, and return the bytes sent."""
    _abort_uploads(store, place, manifest)
    wanted = {place.key(record.name): _Found(record.size, label_for(record)) for record in manifest.files}
    # Before anything is sent: what is there of another version must not be taken for this one.
    store.delete(key for key, each in found.items() if wanted.get(key) != each)
    missing = [
        record for record in manifest.files if found.get(place.key(record.name)) != wanted[place.key(record.name)]
    ]
    if len(missing) < len(wanted):
        there = len(wanted) - len(missing)
        logger.info("going on with the upload of %s: %d of %d files are there", place, there, len(wanted))
    sending = _Sending(store, place, directory, progress or (lambda _: None))
    sending.run(missing)
    if any(record.size > store.options.part_size(record.size) for record in missing):
        _abort_uploads(store, place, manifest)  # one whose begin was carried out and its answer lost was begun again
    return sum(record.size for record in missing)


@dataclass(frozen=True)
class _Found:
    """What is known of an object without reading it."""

    size: int
    """Bytes."""
    label: str
    """What `CHECKSUM` says; empty where an object has none."""


def _find_own(store: ObjectStore, place: ObjectUrl, before: bytes | None, manifest: Manifest) -> dict[str, _Found]:
    """The objects of an iteration that may be replaced: those that were uploaded, or belong to the one before.

    Raises:
        CheckpointSaveError: others are where this one's are to be.
    """
    own = {place.key(MANIFEST)} | {place.key(record.name) for record in _records(before, place)}
    keys = {item.key: item.size for item in store.objects(place.key())}
    labels = in_parallel([partial(label_of, store, key) for key in keys], store.options.threads)
    found = {key: _Found(keys[key], label) for key, label in zip(keys, labels, strict=True)}
    foreign = sorted(key for key, each in found.items() if not each.label and key not in own)
    wanted = {place.key(MANIFEST)} | {place.key(record.name) for record in manifest.files}
    if any(key in wanted for key in foreign):
        raise CheckpointSaveError(
            f"{place} holds what was not uploaded by bridge: {_shown(foreign, place)}; it stays as it is: move it "
            "away, or save to another place"
        )
    if foreign:
        logger.warning("%s holds what was not uploaded by bridge, and stays: %s", place, _shown(foreign, place))
    return {key: each for key, each in found.items() if key not in foreign and key != place.key(MANIFEST)}


def _records(marker: bytes | None, place: ObjectUrl) -> Sequence[FileRecord]:
    try:
        return () if marker is None else parse_marker(marker, place).files
    except CheckpointDamagedError:
        return ()


def _shown(keys: Sequence[str], place: ObjectUrl) -> str:
    return ", ".join(key.removeprefix(place.key()) for key in keys[:5])


def label_of(store: ObjectStore, key: str) -> str:
    """The checksum that was stored beside an object; empty for one that was not uploaded by bridge."""
    return (store.find_metadata(key) or {}).get(CHECKSUM, "")


def _abort_uploads(store: ObjectStore, place: ObjectUrl, manifest: Manifest) -> None:
    wanted = {place.key(record.name) for record in manifest.files}
    for upload in store.uploads(place.key()):
        if upload.key in wanted:
            store.abort_upload(upload)


def _require_all(store: ObjectStore, place: ObjectUrl, manifest: Manifest) -> None:
    """Hold sizes and labels of all objects against the manifest."""
    sizes = {item.key: item.size for item in store.objects(place.key())}
    keys = [place.key(record.name) for record in manifest.files]
    labels = in_parallel([partial(label_of, store, key) for key in keys if key in sizes], store.options.threads)
    found = dict(zip([key for key in keys if key in sizes], labels, strict=True))
    wrong = [
        record.name
        for key, record in zip(keys, manifest.files, strict=True)
        if sizes.get(key) != record.size or found[key] != label_for(record)
    ]
    if wrong:
        named = ", ".join(wrong[:5])
        raise CheckpointSaveError(f"what is in {place} is not what was uploaded: {named}; does another run save there?")


class _Sending:
    """The files of one checkpoint on their way."""

    def __init__(self, store: ObjectStore, place: ObjectUrl, directory: Path, progress: Callable[[int], None]) -> None:
        self._store = store
        self._place = place
        self._directory = directory
        self._progress = progress

    def run(self, records: Sequence[FileRecord]) -> None:
        """Upload files, several requests at a time. What is in memory at one time is a part for each thread."""
        tasks: list[Callable[[], None]] = []
        for record in records:
            part = self._store.options.part_size(record.size)
            if record.size <= part:
                tasks.append(partial(self._send_whole, record))
            else:
                key = self._place.key(record.name)
                tasks += _Parts(self._store, key, record, self._read, self._verify, self._progress).tasks()
        in_parallel(tasks, self._store.options.threads)

    def _send_whole(self, record: FileRecord) -> None:
        data = self._read(record, 0, record.size)
        self._compare(record, checksums.of_bytes(data, record.kind))
        self._store.put(self._place.key(record.name), data, {CHECKSUM: label_for(record)})
        self._progress(record.size)

    def _verify(self, record: FileRecord) -> None:
        try:
            found = checksums.of_file(self._directory / record.name, record.kind)
        except FileNotFoundError as error:
            raise self._absent(record) from error
        self._compare(record, found)

    def _compare(self, record: FileRecord, found: str) -> None:
        if found != record.checksum:
            raise CheckpointDamagedError(
                f"{self._directory / record.name} has {record.kind} {found} instead of {record.checksum}"
            )

    def _absent(self, record: FileRecord) -> CheckpointError:
        # A checkpoint is removed by its name first, so one of which only a part is missing was not removed by a run.
        if (self._directory / MANIFEST).is_file():
            return CheckpointDamagedError(f"{self._directory / record.name} is missing")
        return CheckpointNotFoundError(f"{self._directory} was removed while it was being uploaded")

    def _read(self, record: FileRecord, at: int, length: int) -> bytes:
        path = self._directory / record.name
        try:
            with path.open("rb", buffering=0) as stream:
                data = _pread(stream.fileno(), length, at)
        except FileNotFoundError as error:
            raise self._absent(record) from error
        if len(data) != length:
            raise CheckpointDamagedError(f"{path} ends at byte {at + len(data)} of {record.size}")
        return data


class _Parts:
    """One file that is sent in parts: begun with the first of them, and an object after the last."""

    def __init__(
        self,
        store: ObjectStore,
        key: str,
        record: FileRecord,
        read: Callable[[FileRecord, int, int], bytes],
        verify: Callable[[FileRecord], None],
        progress: Callable[[int], None],
    ) -> None:
        self._store = store
        self._key = key
        self._record = record
        self._read = read
        self._verify = verify
        self._progress = progress
        self._lock = Lock()
        self._upload_id = ""
        self._etags: dict[int, str] = {}
        self._parts = parts_of(record.size, store.options.part_size(record.size))

    def tasks(self) -> list[Callable[[], None]]:
        """One for each part; they may run in any order, and at the same time."""
        return [partial(self._send, number, at, length) for number, (at, length) in enumerate(self._parts, 1)]

    def _send(self, number: int, at: int, length: int) -> None:
        store, key = self._store, self._key
        with self._lock:
            if not self._upload_id:
                self._upload_id = store.begin_upload(key, {CHECKSUM: label_for(self._record)})
        etag = store.put_part(key, self._upload_id, number, self._read(self._record, at, length))
        self._progress(length)
        with self._lock:
            self._etags[number] = etag
            is_last = len(self._etags) == len(self._parts)
        if is_last:
            etags = [self._etags[number] for number in sorted(self._etags)]
            self._verify(self._record)
            store.complete_upload(key, self._upload_id, etags, {CHECKSUM: label_for(self._record)})


def _pread(descriptor: int, length: int, at: int) -> bytes:
    blocks = []
    while length > 0:
        block = os.pread(descriptor, length, at)
        if not block:
            break
        blocks.append(block)
        at += len(block)
        length -= len(block)
    return blocks[0] if len(blocks) == 1 else b"".join(blocks)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CheckpointNotFoundError(f"{path} is not there (any more)") from error
