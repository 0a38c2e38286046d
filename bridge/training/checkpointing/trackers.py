"""Reading the two trackers of a directory of checkpoints, and telling a damaged one.

Ours is a copy of the `train_state.pt` of the checkpoint that it names, so its bytes can be held against that
checkpoint's manifest. A save moves ours first and Megatron-LM's after it: where they differ, ours is the newer.
"""

from __future__ import annotations

import logging
import math
from pathlib import Path

from bridge.training.checkpointing import checksums
from bridge.training.checkpointing.contents.train_state import read_train_state
from bridge.training.checkpointing.detection import read_metadata
from bridge.training.checkpointing.errors import CheckpointDamagedError, CheckpointNotFoundError
from bridge.training.checkpointing.integrity import Manifest, read_manifest
from bridge.training.checkpointing.layout import LEGACY_TRACKER, TRACKER, TRAIN_STATE, Listing, iteration_name
from bridge.training.checkpointing.resolve import Tracked

logger = logging.getLogger(__name__)


def read_tracker(listing: Listing) -> Tracked | None:
    """What the tracker says: ours if there is one, else Megatron-LM's, else None.

    Raises:
        CheckpointDamagedError: the tracker is there but unreadable.
    """
    if listing.has_tracker:
        return _read_own(listing)
    return _read_legacy(listing) if listing.has_legacy_tracker else None


def sound_tracker(listing: Listing, *, fallback: bool) -> tuple[Tracked | None, str]:
    """What the trackers say when they are held against each other and against what they name.

    Args:
        listing: the directory of checkpoints.
        fallback: go by Megatron-LM's tracker where ours is damaged, and by none where both are.

    Returns:
        What to go by, and what is wrong with the trackers, in words.

    Raises:
        CheckpointDamagedError: without `fallback`, the tracker to go by is damaged.
    """
    problems: list[str] = []
    for present, read in ((listing.has_tracker, _read_checked), (listing.has_legacy_tracker, _read_legacy)):
        if not present:
            continue
        try:
            tracked = read(listing)
        except CheckpointDamagedError as error:
            if not fallback:
                raise
            logger.error("A TRACKER IS DAMAGED: %s", error)
            problems.append(str(error))
        else:
            _warn_of_difference(listing, tracked)
            return tracked, "; ".join(problems)
    return None, "; ".join(problems)


def _read_own(listing: Listing) -> Tracked:
    path = listing.path / TRACKER
    try:
        return Tracked(int(read_train_state(path)["step"]), False, TRACKER)
    except OSError as error:
        raise CheckpointDamagedError(f"{path} is not a readable train state: {error}") from error


def _read_legacy(listing: Listing) -> Tracked:
    try:
        iteration, release = read_metadata(listing.path / LEGACY_TRACKER)
    except CheckpointNotFoundError as error:  # it was listed, so it is a link to nothing
        raise CheckpointDamagedError(str(error)) from error
    return Tracked(iteration, release, LEGACY_TRACKER)


def _read_checked(listing: Listing) -> Tracked:
    """Ours, if it is what the save of the checkpoint that it names wrote, and not one from before."""
    tracked = _read_own(listing)
    manifest = _manifest(listing, tracked.iteration)
    record = None if manifest is None else manifest.record(TRAIN_STATE)
    # Where the manifest is another checkpoint's, it is not the tracker that is damaged.
    if manifest is None or record is None or manifest.iteration != tracked.iteration:
        return tracked
    found = checksums.of_file(listing.path / TRACKER, record.kind)
    if found != record.checksum:
        raise CheckpointDamagedError(
            f"{listing.path / TRACKER} is not the {TRAIN_STATE} of the checkpoint that it names, iteration "
            f"{tracked.iteration}: it has {record.kind} {found} instead of {record.checksum}"
        )
    other = _named_by_legacy(listing)
    is_ahead = other is not None and other.iteration > tracked.iteration  # clocks alone are no proof
    if other is not None and is_ahead and (other.created or 0.0) > (manifest.created or math.inf):
        raise CheckpointDamagedError(
            f"{listing.path / TRACKER} is out of date: it names iteration {tracked.iteration}, and {LEGACY_TRACKER}, "
            f"which a save moves after it, names iteration {other.iteration}, which was saved later"
        )
    return tracked


def _named_by_legacy(listing: Listing) -> Manifest | None:
    """The manifest of the checkpoint that Megatron-LM's tracker names, if it can be read."""
    if not listing.has_legacy_tracker:
        return None
    try:
        legacy = _read_legacy(listing)
    except CheckpointDamagedError:
        return None
    return None if legacy.release else _manifest(listing, legacy.iteration)


def _warn_of_difference(listing: Listing, tracked: Tracked) -> None:
    """Readers of Megatron-LM go by the other tracker, so say what is wrong with it. The next save writes it anew."""
    if tracked.file != TRACKER or not listing.has_legacy_tracker:
        return
    try:
        legacy = _read_legacy(listing)
    except CheckpointDamagedError as error:
        logger.warning("the next save repairs a damaged tracker: %s", error)
        return
    if (legacy.iteration, legacy.release) != (tracked.iteration, tracked.release):
        logger.warning(
            "%s names iteration %s and %s names %d, which counts; the next save moves both",
            listing.path / LEGACY_TRACKER,
            "release" if legacy.release else legacy.iteration,
            TRACKER,
            tracked.iteration,
        )


def _manifest(listing: Listing, iteration: int) -> Manifest | None:
    """A listed checkpoint's manifest, if it can be read."""
    path: Path = listing.path / iteration_name(iteration)
    try:
        return read_manifest(path) if iteration in listing.iterations else None
    except CheckpointDamagedError:
        return None
