"""Beginning the uploads of a run: whose place it is in object storage, and what is there. It brings the client."""

from __future__ import annotations

import logging
import os
import socket
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from bridge.training.checkpointing.errors import DirectoryInUseError, ObjectStoreError
from bridge.training.checkpointing.layout import list_checkpoints
from bridge.training.checkpointing.objects.client import ObjectStore, library
from bridge.training.checkpointing.objects.listing import BucketListing, list_bucket
from bridge.training.checkpointing.objects.owner import BucketOwner, read_owner, refusal, successor
from bridge.training.checkpointing.objects.places import retention_settings, save_directory, upload_url
from bridge.training.checkpointing.objects.run import BEGUN, UPLOADS, iterations_in
from bridge.training.checkpointing.objects.transfer import TransferOptions
from bridge.training.checkpointing.objects.uploads import Uploads
from bridge.training.checkpointing.retention.sweeper import needed_again
from bridge.training.checkpointing.tiers.session import body_of, session_of
from bridge.training.object_url import ObjectUrl, is_url

logger = logging.getLogger(__name__)

_QUICK = TransferOptions(threads=1, connect_seconds=5.0, read_seconds=10.0, tries=2)
"""For a question at the start of a run."""


def begin_uploads(checkpoint_config: Any, context: dict[str, Any]) -> None:
    """Begin what an earlier start has left, and be ready for more. For rank 0, once it has the directory.

    Raises:
        DirectoryInUseError: the place is another run's.
        ObjectStoreError: object storage cannot be used here at all.
    """
    cfg = checkpoint_config
    url = upload_url(cfg)
    known: Uploads | None = context.get(UPLOADS)
    if url is None or (known is not None and (known.url, known.directory) == (url, save_directory(cfg))):
        return
    if known is not None:
        known.finish(0.0)
    library()  # better at the start than at the first save
    needed = iterations_in(url, needed_again(cfg))
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
    before = BEGUN.get(place)
    if before is not None and before.is_for(uploads):
        context[UPLOADS] = before
        return
    if before is not None:
        before.finish(0.0)
    _require_place(cfg, uploads)
    context[UPLOADS] = BEGUN[place] = uploads
    uploads.begin()


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
