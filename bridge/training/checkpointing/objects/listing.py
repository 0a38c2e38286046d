"""What a bucket holds: which checkpoints are whole, by their markers, and what is left of unfinished uploads."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from bridge.training.checkpointing import checksums
from bridge.training.checkpointing.errors import CheckpointDamagedError
from bridge.training.checkpointing.integrity import Manifest
from bridge.training.checkpointing.layout import (
    LEGACY_TRACKER,
    MANIFEST,
    TRACKER,
    TRAIN_STATE,
    iteration_name,
    parse_iteration_name,
)
from bridge.training.checkpointing.objects.client import ObjectStore
from bridge.training.checkpointing.resolve import Older, present_history
from bridge.training.checkpointing.retention.policies import Entry
from bridge.training.checkpointing.starts import Starts
from bridge.training.object_url import ObjectUrl

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class BucketListing:
    """What lies below one place in object storage."""

    url: ObjectUrl
    manifests: dict[int, Manifest]
    """Of the whole checkpoints, by iteration, ascending."""
    unfinished: tuple[int, ...]
    """Iterations that have objects and no marker: uploads or deletions that were cut short."""
    unreadable: dict[int, str]
    """Iterations whose marker is no manifest, and what is wrong with it."""
    tracked: int | None
    """The whole checkpoint that the trackers lead to: ours, or Megatron-LM's where ours names none."""
    named: frozenset[int]
    """The iterations that either tracker names. A save moves ours first."""
    has_tracker: bool
    """Whether there is one at all."""
    foreign: tuple[str, ...]
    """Other names."""
    trackers: dict[str, int | None] = field(default_factory=dict)
    """What each tracker that there is leads to; None where that is nothing."""

    @property
    def iterations(self) -> tuple[int, ...]:
        """The whole checkpoints, ascending."""
        return tuple(self.manifests)

    def entries(self, starts: Starts | None = None) -> list[Entry]:
        """The whole checkpoints as retention sees them.

        Args:
            starts: of the run, as far as they are known.
        """
        return entries_of(self.manifests, starts)

    def present_line(self) -> list[int]:
        """The whole checkpoints that no rollback has left behind, as far as their times tell; ascending."""
        line, _ = present_history(Older(n, Path(), m.created) for n, m in self.manifests.items())
        return [entry.iteration for entry in line]


def entries_of(manifests: Mapping[int, Manifest], starts: Starts | None = None) -> list[Entry]:
    """Checkpoints as retention sees them.

    Args:
        manifests: by iteration.
        starts: of the run, as far as they are known.
    """
    told = (starts or Starts()).judge_to_delete((n, m.start) for n, m in manifests.items())
    return [Entry(n, m.created or 0.0, m.metrics, left) for (n, m), left in zip(manifests.items(), told, strict=True)]


def list_bucket(store: ObjectStore, url: ObjectUrl, known: dict[int, Manifest] | None = None) -> BucketListing:
    """Look at all checkpoints below a place. Their markers and the trackers are read, nothing else.

    Args:
        store: of its bucket.
        url: the place.
        known: manifests that were read before, by whoever alone changes the place and forgets what it changes. They are
            not read again, and those that are read are added.

    Raises:
        ObjectStoreError: the store cannot be read.
    """
    objects, below = store.names(url.key())
    found = {n: name for name in below if (n := parse_iteration_name(name)) is not None}
    manifests = {} if known is None else {n: manifest for n, manifest in known.items() if n in found}
    unread = sorted(found.keys() - manifests.keys())
    unfinished: list[int] = []
    unreadable: dict[int, str] = {}
    for iteration, marker in zip(unread, _markers(store, url, unread), strict=True):
        if marker is None:
            unfinished.append(iteration)
        elif isinstance(marker, Manifest):
            manifests[iteration] = marker
        else:
            unreadable[iteration] = marker
    manifests = dict(sorted(manifests.items()))
    if known is not None:
        known.clear()
        known.update(manifests)
    own = _tracker(store, url.key(TRACKER)) if TRACKER in objects else None
    legacy = _tracker(store, url.key(LEGACY_TRACKER)) if LEGACY_TRACKER in objects else None
    trackers: dict[str, int | None] = {} if own is None else {TRACKER: _own_target(own, manifests)}
    trackers |= {} if legacy is None else {LEGACY_TRACKER: _legacy_target(legacy)}
    named = [target for target in trackers.values() if target is not None]
    ours = {TRACKER, LEGACY_TRACKER, *found.values()}
    foreign = sorted(n for n in {*objects, *below} - ours if n and not n.startswith("."))
    return BucketListing(
        url,
        manifests,
        tuple(unfinished),
        unreadable,
        next((target for target in named if target in manifests), None),
        frozenset(named),
        own is not None or legacy is not None,
        tuple(foreign),
        trackers,
    )


def parse_marker(data: bytes, url: ObjectUrl) -> Manifest:
    """The manifest in a marker object.

    Args:
        data: its bytes.
        url: of the checkpoint.

    Raises:
        CheckpointDamagedError: it is no manifest, or another iteration's.
    """
    try:
        manifest = Manifest.from_json(data.decode())
    except (ValueError, RecursionError) as error:
        raise CheckpointDamagedError(f"{url}/{MANIFEST} is not a readable manifest: {error}") from error
    named = parse_iteration_name(url.prefix.rpartition("/")[2])
    if named not in (None, manifest.iteration):
        raise CheckpointDamagedError(f"{url}/{MANIFEST} is of iteration {manifest.iteration}")
    return manifest


def _markers(store: ObjectStore, url: ObjectUrl, iterations: Iterable[int]) -> list[Manifest | str | None]:
    """The manifest of each; what is wrong with it; or None where there is none."""

    def read(place: ObjectUrl) -> Manifest | str | None:
        try:
            marker = store.find(place.key(MANIFEST))
            return None if marker is None else parse_marker(marker, place)
        except CheckpointDamagedError as error:
            return str(error)

    with ThreadPoolExecutor(store.options.threads, thread_name_prefix="bucket-list") as pool:
        return list(pool.map(read, [url / iteration_name(iteration) for iteration in iterations]))


def _tracker(store: ObjectStore, key: str) -> bytes | None:
    try:
        return store.find(key)
    except CheckpointDamagedError as error:
        logger.warning("%s", error)
        return b""  # it names nothing


def _own_target(tracker: bytes | None, manifests: Mapping[int, Manifest]) -> int | None:
    """The checkpoint whose `train_state.pt` our tracker is a copy of."""
    if tracker is None:
        return None
    for iteration, manifest in manifests.items():
        record = manifest.record(TRAIN_STATE)
        if record is None or record.size != len(tracker):
            continue
        if checksums.of_bytes(tracker, record.kind) == record.checksum:
            return iteration
    return None


def _legacy_target(tracker: bytes | None) -> int | None:
    text = "" if tracker is None else tracker[:64].decode("ascii", "replace").strip()
    return int(text) if text.isdecimal() else None
