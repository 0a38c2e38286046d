"""Whether checkpoints in a bucket are sound: every object against the marker, and the trackers against the checkpoints.

Objects are read where they are, a block at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from bridge.training.checkpointing.catalog.buckets.examining import downloaded
from bridge.training.checkpointing.catalog.buckets.listing import listing_at, require_any, tracker_problems
from bridge.training.checkpointing.catalog.reading import BLOCK, Reading, Report
from bridge.training.checkpointing.catalog.verifying import Level, Verification, Verified
from bridge.training.checkpointing.catalog.warnings import collected
from bridge.training.checkpointing.errors import (
    CheckpointDamagedError,
    CheckpointError,
    CheckpointMismatchError,
    CheckpointNotFoundError,
    NotACheckpointError,
    NotEnoughSpaceError,
    ObjectStoreError,
)
from bridge.training.checkpointing.integrity import FileRecord, Manifest
from bridge.training.checkpointing.layout import MANIFEST, iteration_name, parse_iteration_name
from bridge.training.checkpointing.objects.client import ObjectInfo, ObjectStore
from bridge.training.checkpointing.objects.listing import BucketListing, parse_marker
from bridge.training.checkpointing.objects.stored import differences_in_size, objects_of, small_files
from bridge.training.checkpointing.objects.transfer import TransferOptions, parts_of
from bridge.training.checkpointing.resolve import Source
from bridge.training.checkpointing.source import describe
from bridge.training.object_url import ObjectUrl

_THREADS = 8
"""A ranged read spends most of its time waiting for its first byte."""


def verify_bucket(
    url: ObjectUrl,
    *,
    step: int | None = None,
    level: Level = "full",
    threads: int | None = None,
    report: Report | None = None,
    done: Callable[[Verified], None] | None = None,
) -> Verification:
    """Check every checkpoint of a place that has its marker, or one. Nothing is changed.

    Args:
        url: a place of checkpoints, or one checkpoint.
        step: only the checkpoint of this iteration.
        level: `full` reads every byte; `sizes` compares the sizes of all objects, and the contents of those that hold
            no shards.
        threads: that read at the same time, each one block; None is 8.
        report: told of the progress.
        done: told of each checkpoint when it is checked.

    Raises:
        CheckpointNotFoundError: there is no checkpoint, or none of this iteration.
        ObjectStoreError: the store cannot be read.
    """
    store = ObjectStore(url.bucket, TransferOptions(threads=threads or _THREADS, part_bytes=BLOCK))
    listing = listing_at(store, url)
    wanted = _to_check(listing, url, step)
    problems = [] if step is not None else tracker_problems(listing)
    found = []
    with Reading.begun(threads or _THREADS, report) as reading:
        for iteration in wanted:
            place = listing.url / iteration_name(iteration)
            if iteration in listing.unreadable:
                verified: Verified | None = _unreadable(place, listing.unreadable[iteration])
            else:
                verified = _Checking(store, place, level, reading).verify()
            if verified is not None:
                found.append(verified)
                if done is not None:
                    done(verified)
    if not found and not problems:
        raise CheckpointNotFoundError(f"what there was to check in {url} has been deleted meanwhile")
    return Verification(Path(str(url)), level, tuple(found), tuple(problems), url=str(url))


def _to_check(listing: BucketListing, url: ObjectUrl, step: int | None) -> list[int]:
    there = sorted({*listing.manifests, *listing.unreadable})
    if step is None:
        require_any(listing, url)
        return there
    if parse_iteration_name(url.name) is not None:
        raise CheckpointMismatchError(
            f"--step: {step} cannot be looked up in {url}, which is itself one checkpoint; leave it out"
        )
    if step not in there:
        why = "it has objects and no marker; " if step in listing.unfinished else ""
        listed = ", ".join(map(str, there[-8:])) or "none"
        raise CheckpointNotFoundError(f"--step: {step} is not in {url} ({why}there: {listed})")
    return [step]


def _unreadable(place: ObjectUrl, problem: str) -> Verified:
    return Verified(Path(str(place)), False, (problem,), (), 0, 0, False, url=str(place))


@dataclass(frozen=True)
class _Checking:
    """The check of one checkpoint."""

    store: ObjectStore
    place: ObjectUrl
    level: Level
    reading: Reading

    def verify(self) -> Verified | None:
        """None where it has been deleted or replaced meanwhile."""
        marker = self.store.find(self.place.key(MANIFEST))
        if marker is None:
            return None
        notes: list[str] = []
        try:
            manifest = parse_marker(marker, self.place)
        except CheckpointDamagedError as error:
            return _unreadable(self.place, str(error))
        problems = self._problems(manifest, marker, notes)
        if problems and self.store.find(self.place.key(MANIFEST)) != marker:
            return None
        files, size = len(manifest.files), manifest.total_bytes
        path, url = Path(str(self.place)), str(self.place)
        return Verified(path, not problems, tuple(problems), tuple(notes), files, size, True, url=url)

    def _problems(self, manifest: Manifest, marker: bytes, notes: list[str]) -> list[str]:
        objects = objects_of(self.store, self.place)
        problems = differences_in_size(manifest, objects)
        gone = {record.name for record in manifest.files if record.name not in objects}
        if self.level == "full":
            there = [record for record in manifest.files if record.name not in gone]
            whole = [record for record in there if objects[record.name].size == record.size]
            problems += self.reading.problems(self.place.name, whole, partial(self._damage, objects))
        if not problems:
            problems += self._describe(manifest, marker, notes)
        return problems

    def _damage(self, objects: Mapping[str, ObjectInfo], record: FileRecord) -> list[str]:
        return self.reading.compare(record, self._blocks(objects[record.name], record.size))

    def _blocks(self, info: ObjectInfo, size: int) -> Iterator[memoryview]:
        block = bytearray(min(BLOCK, size))
        for at, length in parts_of(size, BLOCK):
            piece = memoryview(block)[:length]
            self.store.read(info.key, piece, at, info.etag or None)
            yield piece

    def _describe(self, manifest: Manifest, marker: bytes, notes: list[str]) -> list[str]:
        """Read what a run reads first: files that contradict one another, or that cannot be read, are damage."""
        try:
            with downloaded(self.store, self.place, small_files(manifest), marker) as directory, collected():
                describe(Source(directory, False, "it is verified"), "off")
        except (ObjectStoreError, NotEnoughSpaceError):
            raise
        except (CheckpointDamagedError, NotACheckpointError) as error:
            return [str(error).removeprefix(f"{self.place} is damaged: ")]
        except CheckpointError as error:
            notes.append(f"a run needs more to load it: {error}")
        return []
