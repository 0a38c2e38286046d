"""What a bucket holds: which checkpoints are whole, by their markers, and what is left of unfinished uploads."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
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

    @property
    def iterations(self) -> tuple[int, ...]:
        """The whole checkpoints, ascending."""
        return tuple(self.manifests)

    def entries(self, starts: Starts | None = None) -> list[Entry]:
        """The whole checkpoints as retention sees them.

        Args:
            starts: of the run, as far as they are known.
        """
        known = starts or Starts()
        return [
            Entry(n, m.created or 0.0, m.metrics, known.have_left_behind(n, m.start)) for n, m in self.manifests.items()
        ]

    def present_line(self) -> list[int]:
        """The whole checkpoints that no rollback has left behind, as far as their times tell; ascending."""
        line, _ = present_history(Older(n, Path(), m.created) for n, m in self.manifests.items())
        return [entry.iteration for entry in line]


def list_bucket(store: ObjectStore, url: ObjectUrl) -> BucketListing:
    """Look at all checkpoints below a place. Their markers are read, nothing else.

    Raises:
        ObjectStoreError: the store cannot be read.
    """
    objects, below = store.names(url.key())
    found = {n: name for name in below if (n := parse_iteration_name(name)) is not None}
    manifests: dict[int, Manifest] = {}
    unfinished: list[int] = []
    unreadable: dict[int, str] = {}
    for iteration, marker in zip(sorted(found), _markers(store, url, sorted(found)), strict=True):
        if marker is None:
            unfinished.append(iteration)
            continue
        try:
            manifests[iteration] = parse_marker(marker, url / found[iteration])
        except CheckpointDamagedError as error:
            unreadable[iteration] = str(error)
    own = store.find(url.key(TRACKER)) if TRACKER in objects else None
    legacy = store.find(url.key(LEGACY_TRACKER)) if LEGACY_TRACKER in objects else None
    named = [target for target in (_own_target(own, manifests), _legacy_target(legacy)) if target is not None]
    known = {TRACKER, LEGACY_TRACKER, *found.values()}
    foreign = sorted(n for n in {*objects, *below} - known if n and not n.startswith("."))
    return BucketListing(
        url,
        manifests,
        tuple(unfinished),
        unreadable,
        next((target for target in named if target in manifests), None),
        frozenset(named),
        own is not None or legacy is not None,
        tuple(foreign),
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


def _markers(store: ObjectStore, url: ObjectUrl, iterations: Iterable[int]) -> list[bytes | None]:
    keys = [url.key(iteration_name(iteration), MANIFEST) for iteration in iterations]
    with ThreadPoolExecutor(store.options.threads, thread_name_prefix="bucket-list") as pool:
        return list(pool.map(store.find, keys))


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
