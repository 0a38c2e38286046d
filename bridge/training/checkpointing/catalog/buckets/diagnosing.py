"""Why a run would resume from a place in object storage, or would not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from bridge.training.checkpointing.catalog.buckets.listing import (
    OPTIONS,
    list_in_bucket,
    listing_at,
    only_configured,
    owner_of,
    tracker_problems,
)
from bridge.training.checkpointing.catalog.diagnosing import (
    Diagnosis,
    Finding,
    of_passed_over,
    plan_name,
    planned,
    recorded_config,
    settings_of,
)
from bridge.training.checkpointing.catalog.listing import Listed, best_of
from bridge.training.checkpointing.catalog.owners import Owner
from bridge.training.checkpointing.errors import ObjectStoreError
from bridge.training.checkpointing.layout import iteration_name
from bridge.training.checkpointing.objects.client import ObjectStore
from bridge.training.checkpointing.objects.listing import BucketListing
from bridge.training.config import ConfigContainer
from bridge.training.object_url import ObjectUrl

_NEXT = "the next run that uploads here sets them; until then checkpoint.ckpt_step loads another one"


def diagnose_bucket(url: ObjectUrl, recipe: ConfigContainer | None = None, world_size: int | None = None) -> Diagnosis:
    """Examine a place in object storage as a run would that is started with `checkpoint.load` set to it.

    Args:
        url: a place of checkpoints, or one checkpoint.
        recipe: of the run; None is the run that saved last, as its checkpoint records it.
        world_size: ranks of the run; None is as many as saved the checkpoint.

    Raises:
        ObjectStoreError: the store cannot be read.
    """
    cfg = None if recipe is None else settings_of(recipe, url)[0]
    store = ObjectStore(url.bucket, OPTIONS)
    listing = listing_at(store, url)
    listed = list_in_bucket(url, cfg, thorough=True)
    findings = list(_findings(listing, listed))
    plan, plan_of = None, ""
    source = listed.choice.source
    if listed.choice.saved is not None and source is not None:
        config = recipe or (_recorded(store, source.origin) if source.origin else recorded_config(source.path))
        plan_of = plan_name(recipe)
        plan, more = planned(source.path, listed.choice.saved, config, world_size)
        findings += more
    owner = Owner(None, owner_of(store, listing.url))
    return Diagnosis(Path(str(url)), owner, listed, tuple(findings), plan, plan_of)


def _findings(listing: BucketListing, listed: Listed) -> Iterator[Finding]:
    problems = tracker_problems(listing)
    yield from (Finding("problem", problem, _NEXT) for problem in problems)
    for name, target in listing.trackers.items():
        if target in listing.manifests:
            yield Finding("ok", f"{name} names {iteration_name(target)}")
    if listing.manifests and not listing.has_tracker:
        yield Finding("problem", "there is no tracker: a run takes the newest whole checkpoint", _NEXT)
    yield from of_passed_over(listed.choice)
    yield from (Finding("note", note) for note in listed.notes if note not in problems)
    yield from _of_newer(listed)
    for row in listed.rows:
        if row.state == "damaged":
            yield Finding("problem", f"{row.place}: {row.problem}", "delete it; runs pass over it")
    yield from (Finding("note", note) for note in listed.choice.notes)


def _of_newer(listed: Listed) -> Iterator[Finding]:
    chosen = listed.choice.iteration
    rows = [row for row in listed.rows if row.iteration is not None and row.state == "committed"]
    newer = [row for row in rows if chosen is not None and (row.iteration or 0) > chosen]
    if newer:
        names = ", ".join(f"{row.iteration}{' (left behind)' if row.left_behind else ''}" for row in newer)
        good = best_of(reversed(newer))
        advice = "" if good is None else f"to load the newest of them: checkpoint.ckpt_step={good.iteration}"
        yield Finding("note", f"newer than what would be loaded: iteration {names}", advice)


def _recorded(store: ObjectStore, place: str) -> ConfigContainer | None:
    """The configuration of the run that saved a checkpoint; None where it has none that can be read here."""
    try:
        with only_configured(store, ObjectUrl.parse(place)) as view:
            return recorded_config(view)
    except ObjectStoreError:
        return None
