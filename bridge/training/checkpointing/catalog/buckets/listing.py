"""All checkpoints below a place in object storage in one list, and the one that a run would load."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from bridge.training.checkpointing.catalog.choosing import choose, recorded_doubts, recorded_settings
from bridge.training.checkpointing.catalog.entries import CatalogEntry
from bridge.training.checkpointing.catalog.listing import Listed, snapshot_rows
from bridge.training.checkpointing.errors import CheckpointDamagedError, CheckpointNotFoundError
from bridge.training.checkpointing.integrity import Manifest
from bridge.training.checkpointing.layout import RUN_CONFIG, iteration_name, parse_iteration_name
from bridge.training.checkpointing.objects.client import ObjectStore
from bridge.training.checkpointing.objects.listing import BucketListing, list_bucket
from bridge.training.checkpointing.objects.owner import read_owner
from bridge.training.checkpointing.objects.transfer import TransferOptions
from bridge.training.checkpointing.parallel import Layout
from bridge.training.config import CheckpointConfig
from bridge.training.object_url import ObjectUrl, is_url

OPTIONS = TransferOptions(threads=16, tries=3, read_seconds=20.0)
"""Somebody is waiting; and small objects take as long as their answers."""


def list_in_bucket(url: ObjectUrl, cfg: CheckpointConfig | None = None, *, thorough: bool = False) -> Listed:
    """Look at a place of checkpoints, or at one checkpoint, and at what a run would load that loads from there.

    Args:
        url: the place.
        cfg: the settings of the run; None takes those that its last checkpoint records.
        thorough: as for `choose`.

    Raises:
        ObjectStoreError: the store cannot be read.
    """
    store = ObjectStore(url.bucket, OPTIONS)
    listing = listing_at(store, url)
    settings, notes = (cfg, []) if cfg is not None else _recorded(store, listing, url)
    rows = list(_rows(listing))
    if cfg is not None and cfg.save is not None and not is_url(cfg.save):
        rows += snapshot_rows(cfg)
    rows.sort(key=lambda row: (-1 if row.iteration is None else row.iteration, row.kind != "persistent"))
    owner = owner_of(store, listing.url)
    if owner:
        notes.append(f"it belongs to a run: {owner}")
    choice = choose(replace(settings, load=str(url)), thorough=thorough)
    return Listed(
        Path(str(url)),
        tuple(rows),
        tuple(iteration_name(iteration) for iteration in listing.unfinished),
        choice,
        (*notes_on(listing), *notes),
        (),
        settings,
        is_given=cfg is not None,
        url=str(url),
    )


def listing_at(store: ObjectStore, url: ObjectUrl) -> BucketListing:
    """What a place of checkpoints holds; of one checkpoint, only that.

    Raises:
        ObjectStoreError: the store cannot be read.
    """
    named = parse_iteration_name(url.name)
    if named is None:
        return list_bucket(store, url)
    found = list_bucket(store, url.parent)
    return replace(
        found,
        manifests={n: manifest for n, manifest in found.manifests.items() if n == named},
        unfinished=tuple(n for n in found.unfinished if n == named),
        unreadable={n: problem for n, problem in found.unreadable.items() if n == named},
        trackers={},
    )


def require_any(listing: BucketListing, url: ObjectUrl) -> None:
    """Refuse a place that holds no checkpoint.

    Raises:
        CheckpointNotFoundError: it is one.
    """
    if not listing.manifests and not listing.unreadable:
        left = ", ".join(map(str, listing.unfinished))
        why = f"; iteration {left} has objects and no marker" if left else ""
        raise CheckpointNotFoundError(f"there is no checkpoint in {url}{why}; name a place of checkpoints")


def tracker_problems(listing: BucketListing) -> list[str]:
    """Trackers that lead to no whole checkpoint."""
    problems = []
    for name, target in listing.trackers.items():
        if target is None:
            problems.append(f"{listing.url / name} is of no checkpoint that is whole there")
        elif target not in listing.manifests:
            problems.append(f"{listing.url / name} names iteration {target}, which is not whole there")
    return problems


def notes_on(listing: BucketListing) -> list[str]:
    """What is worth knowing of a place."""
    notes = tracker_problems(listing)
    if listing.unfinished:
        left = ", ".join(map(str, listing.unfinished))
        notes.append(
            f"iteration {left} has objects and no marker: an upload or a deletion that did not end, or another "
            "program's; it counts for nothing, and the next run that uploads here goes on with it or removes it"
        )
    return notes


def owner_of(store: ObjectStore, url: ObjectUrl) -> str:
    """Who uploads to a place, in words; empty where nobody says so.

    Raises:
        ObjectStoreError: the store cannot be read.
    """
    try:
        owner = read_owner(store, url)
    except CheckpointDamagedError as error:
        return str(error)
    return "" if owner is None else str(owner)


def entry_of(url: ObjectUrl, manifest: Manifest, *, tracked: bool = False, left_behind: bool = False) -> CatalogEntry:
    """A whole checkpoint as catalogs have it.

    Args:
        url: of the checkpoint.
        manifest: its marker.
        tracked: whether the trackers lead to it.
        left_behind: whether the run has gone back to before it.
    """
    return CatalogEntry(
        Path(str(url)),
        manifest.iteration,
        "persistent",
        "committed",
        "bridge",
        manifest.checkpoint_format,
        manifest.total_bytes,
        len(manifest.files),
        manifest.created,
        Layout.from_sizes(manifest.parallel_sizes),
        manifest.world_size,
        manifest.versions,
        manifest.metrics,
        tracked=tracked,
        start=manifest.start,
        left_behind=left_behind,
        url=str(url),
        averaged=manifest.averaged,
    )


def _rows(listing: BucketListing) -> Iterator[CatalogEntry]:
    line = set(listing.present_line())
    for iteration, manifest in listing.manifests.items():
        place = listing.url / iteration_name(iteration)
        yield entry_of(place, manifest, tracked=iteration == listing.tracked, left_behind=iteration not in line)
    for iteration, problem in listing.unreadable.items():
        name = str(listing.url / iteration_name(iteration))
        yield CatalogEntry(Path(name), iteration, "persistent", "damaged", "", problem=problem, url=name)


@contextmanager
def only_configured(store: ObjectStore, place: ObjectUrl | None) -> Iterator[Path]:
    """A directory with a checkpoint's `run_config.yaml` and nothing else; without it where it is absent or damaged.

    Raises:
        ObjectStoreError: the store cannot be read.
    """
    config = None
    if place is not None:
        with suppress(CheckpointDamagedError):
            config = store.find(place.key(RUN_CONFIG))
    with tempfile.TemporaryDirectory(prefix="bridge-view-") as view:
        if config is not None:
            (Path(view) / RUN_CONFIG).write_bytes(config)
        yield Path(view)


def _recorded(store: ObjectStore, listing: BucketListing, url: ObjectUrl) -> tuple[CheckpointConfig, list[str]]:
    """The settings of the run that saved last, as far as its checkpoint tells them, and what they leave open."""
    newest = listing.tracked if listing.tracked in listing.manifests else max(listing.manifests, default=None)
    with only_configured(store, None if newest is None else listing.url / iteration_name(newest)) as view:
        found, doubts = recorded_settings(view, view), recorded_doubts(view)
    if found.non_persistent_ckpt_type is not None:
        doubts.append(
            f"the run has recorded checkpoint.non_persistent_ckpt_type: {found.non_persistent_ckpt_type}, and what it "
            "keeps there has not been looked at: give --recipe"
        )
    # Without a save directory, what a run has beside it is not looked for.
    return CheckpointConfig(load=str(url), integrity=found.integrity, fallback=found.fallback), doubts
