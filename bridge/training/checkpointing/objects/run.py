"""The uploads of a run: told of every checkpoint, and waited for at its planned end. `beginning` begins them.

Runs without object storage import this, and nothing else that there is for it.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bridge.training.checkpointing.agreement import Ranks
from bridge.training.checkpointing.errors import CheckpointSaveError
from bridge.training.checkpointing.events.stream import EventStream
from bridge.training.checkpointing.layout import iteration_name, parse_iteration_name
from bridge.training.checkpointing.objects.places import (
    upload_url,
    uploads_are_required,
)
from bridge.training.object_url import is_url

if TYPE_CHECKING:
    from bridge.training.checkpointing.objects.uploads import Uploads

logger = logging.getLogger(__name__)

_NOTICED_SECONDS = 0.5
UPLOADS = "uploads"
"""Key of the checkpointing context: this run's `Uploads`, on rank 0."""
BEGUN: dict[tuple[int, str, Path], Uploads] = {}
"""By process, place and directory, because only one process may upload from a directory: a caller that keeps no context
between saves begins anew each time."""


def report_uploads_to(events: EventStream, context: dict[str, Any]) -> None:
    """Let a run's events tell of its uploads from now on. For rank 0."""
    uploads: Uploads | None = context.get(UPLOADS)
    if uploads is not None:
        uploads.events = events


def not_uploaded(checkpoint_config: Any, context: dict[str, Any]) -> list[Path]:
    """Checkpoints that retention may not remove from the directory, because they are nowhere else. For rank 0."""
    uploads: Uploads | None = context.get(UPLOADS)
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
    uploads: Uploads | None = context.get(UPLOADS)
    if uploads is not None:
        uploads.published(iteration, iterations_in(uploads.url, in_use))


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
        uploads: Uploads | None = context.get(UPLOADS)
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
    uploads: Uploads | None = context.get(UPLOADS)
    return 0.0 if uploads is None or not uploads.waiting else checkpoint_config.upload_wait_minutes * 60


def finish_uploads(checkpoint_config: Any, context: dict[str, Any], ranks: Ranks) -> None:
    """At the planned end of a run: wait for the uploads. Collective.

    Raises:
        CheckpointSaveError: the newest checkpoint could not be uploaded, and has to be. Every rank raises.
    """
    if upload_url(checkpoint_config) is None:
        return

    def finish() -> None:
        uploads: Uploads | None = context.pop(UPLOADS, None)
        if uploads is None:
            return
        BEGUN.pop((os.getpid(), uploads.url, uploads.directory.absolute()), None)
        uploads.finish(checkpoint_config.upload_wait_minutes * 60)
        problem = _problem(uploads, "it did not end within checkpoint.upload_wait_minutes")
        if uploads_are_required(checkpoint_config) and problem:
            raise CheckpointSaveError(problem)

    ranks.first("waiting for the uploads", finish)


def _problem(uploads: Uploads, otherwise: str = "") -> str:
    why = uploads.failure or otherwise
    if uploads.missing is None or not why:
        return uploads.take_loss()
    return f"the checkpoint of iteration {uploads.missing} is in {uploads.directory} and not in {uploads.url}: {why}"


def iterations_in(url: str, paths: Sequence[Path]) -> list[int]:
    """Those of some paths that lie in a place of object storage. As paths, URLs have one slash less."""
    return [n for path in paths if path.parent == Path(url) and (n := parse_iteration_name(path.name)) is not None]
