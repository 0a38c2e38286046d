"""Which checkpoint of a bucket to load."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bridge.training.checkpointing.errors import (
    CheckpointDamagedError,
    CheckpointNotFoundError,
    NotACheckpointError,
)
from bridge.training.checkpointing.layout import iteration_name, parse_iteration_name
from bridge.training.checkpointing.objects.client import ObjectStore
from bridge.training.checkpointing.objects.listing import BucketListing, list_bucket
from bridge.training.checkpointing.resolve import Source
from bridge.training.object_url import ObjectUrl


def find_in_bucket(
    store: ObjectStore, url: ObjectUrl, ckpt_step: int | None, *, fallback: bool, setting: str
) -> list[Source]:
    """The checkpoints that a place in object storage leads to, the best first; none where there never was one.

    Args:
        store: of its bucket.
        url: a place of checkpoints, or one checkpoint.
        ckpt_step: explicit iteration.
        fallback: whether older ones may stand in for the best.
        setting: the setting that names `url`, for messages.

    Raises:
        CheckpointError: the explicit one is not there, or what is there is damaged or foreign.
        ObjectStoreError: the store cannot be read.
    """
    parent, _, name = url.prefix.rpartition("/")
    named = parse_iteration_name(name)
    if named is not None:
        listing = list_bucket(store, ObjectUrl(url.bucket, parent))
        if ckpt_step not in (None, named):
            raise CheckpointNotFoundError(
                f"checkpoint.ckpt_step is {ckpt_step}, and {setting} names the one checkpoint {url}"
            )
        return _sources(listing, choose(listing, named, fallback=False, setting=setting))
    listing = list_bucket(store, url)
    return _sources(listing, choose(listing, ckpt_step, fallback=fallback, setting=setting))


def choose(listing: BucketListing, ckpt_step: int | None, *, fallback: bool, setting: str) -> list[tuple[int, str]]:
    """The iterations to load, the best first, each with the reason. A decision only; raises as `find_in_bucket`."""
    whole = sorted(listing.manifests, reverse=True)
    if ckpt_step is not None:
        if ckpt_step in listing.manifests:
            return [(ckpt_step, f"iteration {ckpt_step} was asked for")]
        raise _absent(listing, ckpt_step, setting)
    if listing.tracked is not None:
        line = listing.present_line()
        below = [n for n in whole if n < listing.tracked] if fallback else []
        # What a rollback has left behind comes last: the run did not go on from there.
        older = sorted(below, key=lambda n: (n not in line, -n))
        reason = f"it stands in for iteration {listing.tracked}"
        return [(listing.tracked, "the trackers in the bucket name it"), *((n, reason) for n in older)]
    if listing.has_tracker and not (fallback and whole):
        there = f"whole are {_listed(whole)}" if whole else "no checkpoint there is whole"
        raise CheckpointDamagedError(
            f"{setting}: the trackers in {listing.url} name no whole checkpoint; {there}; set checkpoint.ckpt_step to "
            "one of those"
        )
    if not whole and (listing.unreadable or listing.foreign):
        found = [*listing.unreadable.values(), *listing.foreign][:5]
        raise NotACheckpointError(f"{setting}: there is no checkpoint in {listing.url}; found in it: {_listed(found)}")
    trackers = "whose trackers name no whole one" if listing.has_tracker else "which has no tracker"
    return [(n, f"it is the newest whole one in the bucket, {trackers}") for n in whole]


def _absent(listing: BucketListing, step: int, setting: str) -> CheckpointNotFoundError:
    why = "its upload, or its deletion, did not end" if step in listing.unfinished else "it is not there"
    why = listing.unreadable.get(step, why)
    return CheckpointNotFoundError(
        f"{setting}: iteration {step} cannot be loaded from {listing.url}: {why}; whole are "
        f"{_listed(sorted(listing.manifests)) or 'none'}"
    )


def _listed(values: Sequence[object]) -> str:
    return ", ".join(map(str, values))


def _sources(listing: BucketListing, chosen: list[tuple[int, str]]) -> list[Source]:
    found = []
    for iteration, reason in chosen:
        place = listing.url / iteration_name(iteration)
        found.append(Source(Path(str(place)), False, reason, origin=str(place)))
    return found
