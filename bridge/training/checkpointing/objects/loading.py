"""What a load finds in object storage: the sources that the settings lead to, and opening one."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from bridge.training.checkpointing.errors import CheckpointError, CheckpointNotFoundError
from bridge.training.checkpointing.integrity import Level, read_manifest
from bridge.training.checkpointing.layout import MANIFEST
from bridge.training.checkpointing.objects.choosing import find_in_bucket
from bridge.training.checkpointing.objects.client import ObjectStore
from bridge.training.checkpointing.objects.listing import parse_marker
from bridge.training.checkpointing.objects.stored import ObjectCheckpoint
from bridge.training.checkpointing.objects.transfer import TransferOptions
from bridge.training.checkpointing.resolve import Source
from bridge.training.checkpointing.source import find_source
from bridge.training.object_url import ObjectUrl, is_url

logger = logging.getLogger(__name__)

_READS_FOR_EACH_THREAD = 4
"""A ranged read spends most of its time waiting for its first byte."""


def options_of(checkpoint_config: Any) -> TransferOptions:
    """How a load makes its requests."""
    return TransferOptions(threads=_READS_FOR_EACH_THREAD * checkpoint_config.upload_threads)


def find_sources(checkpoint_config: Any) -> list[Source]:
    """The checkpoints that `load`, a place in object storage, leads to, the best first. For rank 0.

    Where `save` is the same place, the newest one of `staging_dir` comes first, if that is as new.

    Raises:
        CheckpointError: as `find_in_bucket`.
    """
    cfg = checkpoint_config
    url = ObjectUrl.parse(cfg.load)
    store = ObjectStore(url.bucket, options_of(cfg))
    found = find_in_bucket(store, url, cfg.ckpt_step, fallback=cfg.fallback, setting="checkpoint.load")
    if cfg.ckpt_step is None and is_url(cfg.save) and ObjectUrl.parse(cfg.save) == url:
        return _staged(cfg, store, found) + found
    return found


def find_in_mirror(checkpoint_config: Any) -> list[Source]:
    """The checkpoints in the mirror, for a run whose own directory has none. For rank 0.

    Raises:
        CheckpointError: as `find_in_bucket`.
    """
    cfg = checkpoint_config
    url = ObjectUrl.parse(cfg.mirror)
    store = ObjectStore(url.bucket, options_of(cfg))
    found = find_in_bucket(store, url, None, fallback=cfg.fallback, setting="checkpoint.mirror")
    if found:
        logger.warning("GOING ON FROM THE MIRROR: there is no checkpoint in checkpoint.save (%s)", cfg.save)
    return found


def find_one(checkpoint_config: Any, url: str, ckpt_step: int | None, setting: str) -> Source:
    """The checkpoint that a place in object storage leads to. For rank 0.

    Raises:
        CheckpointError: as `find_in_bucket`, or there is none.
    """
    place = ObjectUrl.parse(url)
    store = ObjectStore(place.bucket, options_of(checkpoint_config))
    found = find_in_bucket(store, place, ckpt_step, fallback=False, setting=setting)
    if not found:
        raise CheckpointNotFoundError(f"{setting}: there is no checkpoint in {place}")
    return found[0]


def open_source(source: Source, checkpoint_config: Any, integrity: Level) -> ObjectCheckpoint:
    """A checkpoint that `find_sources` or `find_one` has found; nothing is read yet."""
    return ObjectCheckpoint(source, options_of(checkpoint_config), integrity)


def _staged(cfg: Any, store: ObjectStore, found: list[Source]) -> list[Source]:
    staging = Path(cfg.staging_dir).expanduser()
    try:
        local = find_source(staging, None, setting="checkpoint.staging_dir", check_trackers=True, fallback=True)
        manifest = None if local is None else read_manifest(local.path)
    except CheckpointError as error:
        logger.warning("passing over what is in checkpoint.staging_dir: %s", error)
        return []
    if local is None or manifest is None:
        return []
    if found:
        place = ObjectUrl.parse(found[0].origin)
        remote = parse_marker(store.get(place.key(MANIFEST)), place)
        if (remote.created or 0.0) > (manifest.created or 0.0):
            return []
    return [Source(local.path, False, f"it is in checkpoint.staging_dir, and {cfg.save} has none that is newer")]
