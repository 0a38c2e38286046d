"""Where what was made of checkpoints is published as one: the directory, its claim, its trackers, the manifest."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from megatron.core import __version__ as megatron_version

import bridge
from bridge.training.checkpointing import commit, ownership
from bridge.training.checkpointing.errors import (
    CheckpointError,
    CheckpointMismatchError,
    CheckpointSaveError,
    NotACheckpointError,
)
from bridge.training.checkpointing.files import make_directory, replace_file
from bridge.training.checkpointing.integrity import FileRecord, Manifest
from bridge.training.checkpointing.layout import (
    LEGACY_TRACKER,
    TRAIN_STATE,
    Listing,
    is_iteration_directory,
    iteration_name,
    list_checkpoints,
)
from bridge.training.checkpointing.starts import read_starts
from bridge.training.checkpointing.trackers import read_tracker

TO = "DST"
"""What messages call the place: it is named on a command line."""
_ENDING_SECONDS = 5.0


@contextmanager
def claimed(destination: Path) -> Iterator[None]:
    """Make the destination and have it claimed for as long as the context lasts.

    What an error leaves there unfinished is this process's, and the lock file goes on saying so.
    """
    new, is_done = _claim(destination), False
    try:
        yield
        is_done = True
    finally:
        if new:
            ownership.give_up(destination, is_done=is_done)


def _claim(destination: Path) -> bool:
    """Whether this process did not have it before."""
    try:
        make_directory(destination)
        # A run that is alive goes on saving; a conversion that was just killed may still be ending.
        return ownership.claim(destination, TO, wait_seconds=_ENDING_SECONDS, passing=True)
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointSaveError(f"{TO}: cannot save in {destination}: {error}") from error


def check_destination(destination: Path, source: Path, iteration: int, deed: str = "converted") -> Listing:
    """Check that the destination is a directory of checkpoints, or can become one; nothing is made.

    Args:
        destination: the directory.
        source: the checkpoint that is read, or one of them.
        iteration: of the one that is going to be published.
        deed: what is done to the source, for messages.

    Raises:
        NotACheckpointError: it is something else.
        CheckpointMismatchError: the source would be replaced.
    """
    real = destination.resolve()
    if source.resolve() in (real, *real.parents):
        raise NotACheckpointError(f"{TO}: {destination} lies in the checkpoint that is to be {deed}")
    if (real / iteration_name(iteration)).resolve() == source.resolve():
        raise CheckpointMismatchError(
            f"{TO}: {destination} is the directory of the checkpoint that is to be {deed}, which is never "
            "replaced; name another"
        )
    if destination.exists() and not destination.is_dir():
        raise NotACheckpointError(f"{TO}: {destination} is not a directory")
    listing = list_checkpoints(destination)
    if listing.exists and is_iteration_directory(destination):
        raise NotACheckpointError(f"{TO}: {destination} is one checkpoint; name a directory of checkpoints")
    has_checkpoints = listing.iterations or listing.has_release or listing.has_tracker or listing.has_legacy_tracker
    if listing.foreign and not has_checkpoints:
        raise NotACheckpointError(
            f"{TO}: {destination} holds something else than checkpoints ({', '.join(listing.foreign[:5])}); name a "
            "directory of checkpoints, or an empty or new one"
        )
    return listing


def manifest_of(source: Manifest, target_format: str, files: Sequence[FileRecord], directory: Path) -> Manifest:
    """What a run would have written, had it saved in this format: with the time and the start of the source.

    A directory of checkpoints that counts starts of its own takes it as its last start's.

    Raises:
        CheckpointDamagedError: what the directory says of its starts is damaged.
        CheckpointSaveError: it cannot be read.
    """
    try:
        starts = read_starts(directory)
    except OSError as error:
        raise CheckpointSaveError(f"{TO}: the starts of the run in {directory} cannot be read: {error}") from error
    return Manifest(
        iteration=source.iteration,
        checkpoint_format=target_format,
        world_size=source.world_size,
        parallel_sizes=source.parallel_sizes,
        versions={"bridge": bridge.__version__, "torch": torch.__version__, "megatron-core": megatron_version},
        files=tuple(files),
        created=time.time() if source.created is None else source.created,
        start=starts.entries[-1][0] if starts.entries else source.start,
        metrics={name: value for name, value in source.metrics.items() if math.isfinite(value)},
    )


def tracking(listing: Listing, iteration: int) -> tuple[bool, str]:
    """Whether the trackers are to name the new checkpoint, and if not, why, in words.

    Raises:
        CheckpointDamagedError: a tracker is unreadable.
    """
    tracked = read_tracker(listing)
    if tracked is not None and tracked.release:
        return False, f"the trackers were left: {tracked.file} names the release checkpoint"
    newest = max([*listing.iterations, *([] if tracked is None else [tracked.iteration])], default=iteration)
    if newest > iteration:
        return False, f"the trackers were left: the directory has the newer iteration {newest}"
    return True, ""


def move_trackers(directory: Path, iteration: int, path: Path, listing: Listing) -> str:
    """Make the trackers name a published checkpoint; return what was done, in words."""
    train_state = path / TRAIN_STATE
    if train_state.exists():
        commit.move_trackers(directory, iteration, train_state.read_bytes())
        return f"the trackers name iteration {iteration}"
    if listing.has_tracker:
        return f"the trackers were left: the checkpoint has no {TRAIN_STATE}, which ours is a copy of"
    replace_file(directory / LEGACY_TRACKER, str(iteration).encode())
    return f"{LEGACY_TRACKER} names iteration {iteration}"
