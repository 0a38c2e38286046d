"""The uploads of a run: begun with it, told of every checkpoint, and waited for at its planned end."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from bridge.training.checkpointing.agreement import Ranks
from bridge.training.checkpointing.errors import CheckpointSaveError, DirectoryInUseError, ObjectStoreError
from bridge.training.checkpointing.events.stream import EventStream
from bridge.training.checkpointing.layout import iteration_name, list_checkpoints, parse_iteration_name
from bridge.training.checkpointing.objects.client import ObjectStore, library
from bridge.training.checkpointing.objects.listing import BucketListing, list_bucket
from bridge.training.checkpointing.objects.owner import BucketOwner, read_owner, refusal, successor
from bridge.training.checkpointing.objects.places import (
    retention_settings,
    save_directory,
    upload_url,
    uploads_are_required,
)
from bridge.training.checkpointing.objects.transfer import TransferOptions
from bridge.training.checkpointing.objects.uploads import Uploads
from bridge.training.checkpointing.retention.sweeper import needed_again
from bridge.training.checkpointing.tiers.session import body_of, session_of
from bridge.training.object_url import ObjectUrl, is_url

logger = logging.getLogger(__name__)

_NOTICED_SECONDS = 0.5
_CONTEXT_KEY = "uploads"
_QUICK = TransferOptions(threads=1, connect_seconds=5.0, read_seconds=10.0, tries=2)
"""For a question at the start of a run."""

_begun: dict[tuple[int, str, Path], Uploads] = {}
"""By process, place and directory, because only one process may upload from a directory: a caller that keeps no context
between saves begins anew each time."""


def begin_uploads(checkpoint_config: Any, context: dict[str, Any]) -> None:
    """Begin what an earlier start has left, and be ready for more. For rank 0, once it has the directory.

    Raises:
        DirectoryInUseError: the place is another run's.
        ObjectStoreError: object storage cannot be used here at all.
    """
    cfg = checkpoint_config
    url = upload_url(cfg)
    known: Uploads | None = context.get(_CONTEXT_KEY)
    if url is None or (known is not None and (known.url, known.directory) == (url, save_directory(cfg))):
        return
    if known is not None:
        known.finish(0.0)
    require_library()
    needed = _iterations_in(url, needed_again(cfg))
    uploads = Uploads(
        url,
        save_directory(cfg),
        retention_settings(cfg),
        {"threads": cfg.upload_threads},
        needed,
        asdict(_owner(save_directory(cfg))),
        _goes_on(cfg, url),
    )
    place = (os.getpid(), url, uploads.directory.absolute())
    before = _begun.get(place)
    if before is not None and before.is_for(uploads):
        context[_CONTEXT_KEY] = before
        return
    if before is not None:
        before.finish(0.0)
    _require_place(cfg, uploads)
    context[_CONTEXT_KEY] = _begun[place] = uploads
    uploads.begin()


def report_uploads_to(events: EventStream, context: dict[str, Any]) -> None:
    """Let a run's events tell of its uploads from now on. For rank 0."""
    uploads: Uploads | None = context.get(_CONTEXT_KEY)
    if uploads is not None:
        uploads.events = events


def _owner(directory: Path) -> BucketOwner:
    since = datetime.now(timezone.utc).isoformat("T", "seconds")
    place = str(directory.absolute())
    return BucketOwner(session_of(directory), socket.gethostname(), place, since, body_of(directory))


def _goes_on(checkpoint_config: Any, url: str) -> bool:
    """Whether a run goes on from what is in the place that it uploads to: it loads from there, or has nothing else."""
    cfg = checkpoint_config
    if is_url(cfg.load):
        place = ObjectUrl.parse(cfg.load)
        return ObjectUrl.parse(url) in (place, place.parent)
    if is_url(cfg.save) or cfg.load is None:
        return False
    directory = save_directory(cfg)
    is_own = Path(cfg.load).expanduser().resolve() == directory.resolve()
    return is_own and not list_checkpoints(directory).iterations


def _is_empty(listing: BucketListing) -> bool:
    return not (listing.manifests or listing.unreadable or listing.has_tracker)


def _require_place(checkpoint_config: Any, uploads: Uploads) -> None:
    """Refuse the place of another run. A store that does not answer now says nothing; the uploads ask again.

    Raises:
        DirectoryInUseError: it is another run's.
        CheckpointDamagedError: whose it is cannot be read.
    """
    url, own = ObjectUrl.parse(uploads.url), BucketOwner.from_plain(uploads.owner)
    try:
        store = ObjectStore(url.bucket, _QUICK)
        found = read_owner(store, url)
        if found is not None and not found.is_same_run(own) and not uploads.goes_on:
            # Whoever had the place was ended before its first upload: there is nothing to mix up.
            uploads.goes_on = _is_empty(list_bucket(store, url))
    except ObjectStoreError as error:
        logger.warning("whether another run uploads to %s cannot be found out for now: %s", url, error)
        return
    if found is not None and successor(found, own, is_start=True, goes_on=uploads.goes_on) is None:
        setting = "checkpoint.save" if is_url(checkpoint_config.save) else "checkpoint.mirror"
        raise DirectoryInUseError(refusal(url, found, setting))


def not_uploaded(checkpoint_config: Any, context: dict[str, Any]) -> list[Path]:
    """Checkpoints that retention may not remove from the directory, because they are nowhere else. For rank 0."""
    uploads: Uploads | None = context.get(_CONTEXT_KEY)
    if uploads is None or not is_url(checkpoint_config.save):
        return []
    iterations = {*uploads.waiting, *uploads.unconfirmed}
    return [uploads.directory / iteration_name(iteration) for iteration in sorted(iterations)]


def upload(iteration: int, context: dict[str, Any], in_use: Sequence[Path] = ()) -> None:
    """There is a new persistent checkpoint. For rank 0.

    Args:
        iteration: its own.
        context: of the run.
        in_use: paths of checkpoints that retention spares.
    """
    uploads: Uploads | None = context.get(_CONTEXT_KEY)
    if uploads is not None:
        uploads.published(iteration, _iterations_in(uploads.url, in_use))


def wait_for_uploads(checkpoint_config: Any, context: dict[str, Any], ranks: Ranks) -> str:
    """Before a save: take in how the uploads go, and wait for them where too many are waiting. Collective.

    Where `save` is in object storage, no more than `staging_keep` checkpoints wait for their upload, and the save
    waits with them. A process that has died is replaced.

    Returns:
        Why an upload that has to succeed does not; empty if that is not so. The save is made all the same, because
        the directory may be the only place where it can be made, and fails afterwards.
    """
    cfg = checkpoint_config
    if upload_url(cfg) is None:
        return ""

    def look() -> str:
        uploads: Uploads | None = context.get(_CONTEXT_KEY)
        if uploads is None:
            return ""
        uploads.revive()
        if is_url(cfg.save):
            seconds = uploads.wait_for_room(cfg.staging_keep, cfg.upload_wait_minutes * 60)
            if seconds > _NOTICED_SECONDS:
                logger.warning(
                    "training waited %.1f s for an upload to %s; raise checkpoint.save_interval, staging_keep or "
                    "upload_threads",
                    seconds,
                    uploads.url,
                )
        return _problem(uploads) if uploads_are_required(cfg) else ""

    return ranks.first("looking at the uploads", look)


def longest_wait(checkpoint_config: Any, context: dict[str, Any]) -> float:
    """Seconds that `finish_uploads` may take; 0 where nothing waits for its upload. For rank 0."""
    uploads: Uploads | None = context.get(_CONTEXT_KEY)
    return 0.0 if uploads is None or not uploads.waiting else checkpoint_config.upload_wait_minutes * 60


def finish_uploads(checkpoint_config: Any, context: dict[str, Any], ranks: Ranks) -> None:
    """At the planned end of a run: wait for the uploads. Collective.

    Raises:
        CheckpointSaveError: the newest checkpoint could not be uploaded, and has to be. Every rank raises.
    """
    if upload_url(checkpoint_config) is None:
        return

    def finish() -> None:
        uploads: Uploads | None = context.pop(_CONTEXT_KEY, None)
        if uploads is None:
            return
        _begun.pop((os.getpid(), uploads.url, uploads.directory.absolute()), None)
        uploads.finish(checkpoint_config.upload_wait_minutes * 60)
        problem = _problem(uploads, "it did not end within checkpoint.upload_wait_minutes")
        if uploads_are_required(checkpoint_config) and problem:
            raise CheckpointSaveError(problem)

    ranks.first("waiting for the uploads", finish)


def require_library() -> None:
    """Check that requests to object storage can be made at all: better at the start than at the first save.

    Raises:
        ObjectStoreError: the library is not installed.
    """
    library()


def _problem(uploads: Uploads, otherwise: str = "") -> str:
    why = uploads.failure or otherwise
    if uploads.missing is None or not why:
        return uploads.take_loss()
    return f"the checkpoint of iteration {uploads.missing} is in {uploads.directory} and not in {uploads.url}: {why}"


def _iterations_in(url: str, paths: Sequence[Path]) -> list[int]:
    """Those of some paths that lie in a place of object storage. As paths, URLs have one slash less."""
    return [n for path in paths if path.parent == Path(url) and (n := parse_iteration_name(path.name)) is not None]
