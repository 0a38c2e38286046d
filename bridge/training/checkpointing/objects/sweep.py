"""What leaves a bucket: checkpoints that no policy keeps, and the remains of what was cut short.

A checkpoint goes by its marker first, so wherever a deletion is cut short it is whole or it does not count. What has
objects and no marker, all of them labelled, is the remains of an upload or a deletion.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from functools import partial

from bridge.training.checkpointing.layout import MANIFEST, iteration_name
from bridge.training.checkpointing.objects.client import ObjectStore
from bridge.training.checkpointing.objects.listing import BucketListing
from bridge.training.checkpointing.objects.parallel import in_parallel
from bridge.training.checkpointing.objects.upload import label_of
from bridge.training.checkpointing.retention.policies import Policy, removable
from bridge.training.checkpointing.starts import Starts
from bridge.training.object_url import ObjectUrl

logger = logging.getLogger(__name__)


def delete_checkpoint(store: ObjectStore, url: ObjectUrl) -> None:
    """Delete a checkpoint: its marker, and then everything else.

    Args:
        store: of its bucket.
        url: of the checkpoint.
    """
    store.delete([url.key(MANIFEST)])
    store.delete(found.key for found in store.objects(url.key()) if found.key != url.key(MANIFEST))


def sweep(store: ObjectStore, listing: BucketListing, resumed: Collection[int] = ()) -> list[int]:
    """Delete what unfinished uploads and deletions have left.

    Only what bears the label of an upload is deleted. An iteration in which anything else lies, as a checkpoint of
    Megatron-LM, stays as it is, and so do multipart uploads where nothing shows whose they are.

    Args:
        store: of the bucket.
        listing: what is there.
        resumed: iterations whose upload is about to go on; what they have stays.

    Returns:
        The iterations whose remains are gone.
    """
    swept = []
    for iteration in listing.unfinished:
        place = listing.url / iteration_name(iteration)
        if iteration in resumed:
            continue
        keys = [found.key for found in store.objects(place.key())]
        if not keys or not all(in_parallel([partial(label_of, store, key) for key in keys], store.options.threads)):
            logger.info("leaving %s as it is: it is no checkpoint, and not all of it was uploaded by bridge", place)
            continue
        logger.warning("removing %s: an upload that did not finish", place)
        for upload in store.uploads(place.key()):
            store.abort_upload(upload)
        store.delete(keys)
        swept.append(iteration)
    return swept


def retain(
    store: ObjectStore,
    listing: BucketListing,
    policies: Sequence[Policy],
    protected: Collection[int] = (),
    starts: Starts | None = None,
) -> list[int]:
    """Delete the whole checkpoints that no policy keeps. What a tracker names stays, and everything newer.

    Args:
        store: of the bucket.
        listing: what is there.
        policies: each keeps what it names; without any, everything is kept.
        protected: further iterations to keep.
        starts: of the run, as far as they are known.

    Returns:
        The iterations that are gone. None, with an error in the log, where no tracker names a whole checkpoint.
    """
    if not policies or not listing.manifests:
        return []
    if listing.tracked is None:
        logger.error("old checkpoints in %s are not deleted: no tracker there names a whole one", listing.url)
        return []
    gone = removable(listing.entries(starts), policies, listing.tracked, {*listing.named, *protected})
    for iteration in gone:
        logger.info("removing the old checkpoint %s", listing.url / iteration_name(iteration))
        delete_checkpoint(store, listing.url / iteration_name(iteration))
    return gone
