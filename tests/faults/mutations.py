"""Bugs to plant in the ranks of a job: a suite that does not find them proves nothing.

    make faults ARGS='--mutate tracker-before-manifest'

Each is a function that is called in a rank before it begins, and that changes the order of a commit there.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from bridge.training.checkpointing import commit, files, integrity
from bridge.training.checkpointing.integrity import Manifest
from bridge.training.checkpointing.layout import TRAIN_STATE, iteration_name, list_checkpoints


def tracker_before_manifest() -> None:
    """The trackers name a checkpoint that is still to be sealed and published."""

    def plant(staging: Path, manifest: Manifest) -> None:
        commit.move_trackers(staging.parent, manifest.iteration, (staging / TRAIN_STATE).read_bytes())

    _before_sealing(plant)


def retention_before_commit() -> None:
    """Older checkpoints go as soon as the files of the next one are written."""

    def plant(staging: Path, manifest: Manifest) -> None:
        for iteration in list_checkpoints(staging.parent).iterations:
            if iteration < manifest.iteration:
                files.discard(staging.parent / iteration_name(iteration))

    _before_sealing(plant)


def manifest_without_fsync() -> None:
    """The staging directory is renamed before the bytes of its manifest are synced."""
    _set(integrity, "write_file", _write_without_fsync)


def tracker_without_fsync() -> None:
    """A tracker is renamed into place before its bytes are synced."""
    _set(files, "write_file", _write_without_fsync)


def publication_without_fsync() -> None:
    """The trackers move before the name of the checkpoint is synced."""
    _set(commit, "sync_directory", lambda path: None)


MUTATIONS: dict[str, Callable[[], None]] = {
    function.__name__.replace("_", "-"): function
    for function in (
        tracker_before_manifest,
        retention_before_commit,
        manifest_without_fsync,
        tracker_without_fsync,
        publication_without_fsync,
    )
}


def _before_sealing(plant: Callable[[Path, Manifest], None]) -> None:
    original = commit.seal

    def seal(staging: Path, manifest: Manifest) -> None:
        plant(staging, manifest)
        original(staging, manifest)

    _set(commit, "seal", seal)


def _set(module: Any, name: str, value: Any) -> None:
    if not hasattr(module, name):
        raise AttributeError(f"{module.__name__} has no {name} any more: plant this bug elsewhere")
    setattr(module, name, value)


def _write_without_fsync(path: Path, data: bytes) -> None:
    with path.open("xb") as stream:
        stream.write(data)
