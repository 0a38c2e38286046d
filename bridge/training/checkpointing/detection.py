"""Telling what lies in a directory without loading it: the format, and Megatron-LM's tracker."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

from bridge.training.checkpointing.agreement import Ranks
from bridge.training.checkpointing.contents.run_config import read_run_config, value_at
from bridge.training.checkpointing.errors import (
    CheckpointDamagedError,
    CheckpointError,
    CheckpointMismatchError,
    CheckpointNotFoundError,
    NotACheckpointError,
)
from bridge.training.checkpointing.formats import Format
from bridge.training.checkpointing.formats.registry import format_to_read
from bridge.training.checkpointing.formats.strategies import stored_backend
from bridge.training.checkpointing.integrity import read_manifest
from bridge.training.checkpointing.layout import (
    COMMON,
    MANIFEST,
    MCORE_METADATA,
    PAYLOAD_METADATA,
    RELEASE,
    RUN_CONFIG,
    TRAIN_STATE,
    iteration_name,
)
from bridge.training.checkpointing.peeking import is_cut_short, is_plainly_configured, may_hold
from bridge.training.checkpointing.safety.payload_metadata import read_payload_metadata

FSDP_DTENSOR = "fsdp_dtensor"
_LARGEST_TRACKER = 1 << 10
"""Bytes."""
_NAMED = 10
"""Entries of an unknown directory that a message names."""
_OBJECT_OF_MCORE = re.compile(r"/shard_[0-9.]+_[0-9.]+$")
"""How the keys of megatron-core's ShardedObjects end; torch DCP has no such keys of its own."""
_LIKE_ONE = re.compile(rb"/shard_[0-9.]+_[0-9.]")


def get_checkpoint_format(checkpoint_path: str | os.PathLike[str]) -> str:
    """The format of one checkpoint, by its files.

    The commit record `manifest.json` says it. Without one, `metadata.json` does, with which megatron-core's formats
    end their save. `fsdp_dtensor` is plain torch DCP: it has `.metadata`, and neither `metadata.json` nor `common.pt`,
    and nothing that says otherwise in its configuration or among its keys.

    Args:
        checkpoint_path: an `iter_N` or `release` directory.

    Returns:
        `torch_dist`, `zarr`, `fsdp_dtensor`, or the name of another backend of megatron-core's.

    Raises:
        CheckpointNotFoundError: there is no such directory.
        CheckpointDamagedError: what says the format is unreadable, contradicts itself, or is missing from a save that
            did not end.
        NotACheckpointError: there is nothing in it that belongs to a checkpoint.
    """
    path = Path(checkpoint_path)
    if not path.is_dir():
        raise CheckpointNotFoundError(f"there is no checkpoint directory {path}")
    manifest = read_manifest(path)
    named = stored_backend(path) if (path / MCORE_METADATA).exists() else None
    if manifest is None:
        return _format_without_manifest(path) if named is None else named.name
    if named is not None and named.name != manifest.checkpoint_format:
        raise CheckpointDamagedError(
            f"{path} is mixed up: {MANIFEST} says that its format is {manifest.checkpoint_format!r}, and "
            f"{MCORE_METADATA} says {named.name!r}"
        )
    return manifest.checkpoint_format


def format_of(path: Path) -> Format:
    """The format of one checkpoint, by its files, ready to be used. Local.

    Raises:
        CheckpointError: as `get_checkpoint_format`.
        CheckpointMismatchError: it is in a format that cannot be read here.
    """
    return _readable(path, get_checkpoint_format(path))


def format_on_all_ranks(path: Path, ranks: Ranks) -> Format:
    """As `format_of`; rank 0 looks, for all. Collective."""
    name = ranks.first("looking for the format", lambda: get_checkpoint_format(path))
    return ranks.run("finding the format", lambda: _readable(path, name))


def _readable(path: Path, name: str) -> Format:
    try:
        return format_to_read(name)
    except CheckpointMismatchError as error:
        raise CheckpointMismatchError(f"{path} is in the format {name!r}, and this cannot be read: {error}") from error


def found_in(path: Path) -> str:
    """What a directory holds, for messages: `found in it: a, b`."""
    names = sorted(entry.name for entry in path.iterdir())
    more = " …" if len(names) > _NAMED else ""
    return f"found in it: {', '.join(names[:_NAMED]) or 'nothing'}{more}"


def _format_without_manifest(path: Path) -> str:
    """Of a directory that has neither `manifest.json` nor `metadata.json`."""
    has_payload = (path / PAYLOAD_METADATA).exists()
    has_own = any((path / name).exists() for name in (COMMON, TRAIN_STATE, RUN_CONFIG)) or any(path.glob("*.distcp"))
    if not has_payload and not has_own:
        absent = f"{MANIFEST}, {MCORE_METADATA} or {PAYLOAD_METADATA}"
        raise NotACheckpointError(f"{path} is not a checkpoint: it has no {absent}; {found_in(path)}")
    if not has_payload:
        raise _unfinished(path, f"it has no {MCORE_METADATA} or {PAYLOAD_METADATA}; {found_in(path)}")
    if (path / COMMON).exists():
        raise _unfinished(path, f"it has no {MCORE_METADATA}, and it has {COMMON}")
    if is_plainly_configured(path, FSDP_DTENSOR):
        if is_cut_short(path):
            read_payload_metadata(path)
        return FSDP_DTENSOR
    configured = value_at(read_run_config(path), "checkpoint", "ckpt_format", FSDP_DTENSOR)
    if configured != FSDP_DTENSOR:
        raise _unfinished(path, f"it has no {MCORE_METADATA} and no {COMMON}, and is configured as {configured!r}")
    # To parse it takes a hundred times as long, and of thousands of checkpoints only damaged ones need it.
    if is_cut_short(path) or may_hold(path, _LIKE_ONE):
        keys = read_payload_metadata(path).state_dict_metadata
        object_of_mcore = next((key for key in keys if _OBJECT_OF_MCORE.search(key)), None)
        if object_of_mcore is not None:
            raise _unfinished(path, f"it has no {MCORE_METADATA}, and {object_of_mcore!r} is a key of 'torch_dist'")
    return FSDP_DTENSOR


def _unfinished(path: Path, finding: str) -> CheckpointDamagedError:
    return CheckpointDamagedError(f"{path} is damaged: {finding} (perhaps its save did not end)")


def find_checkpoint_rank_0(checkpoints_path: str, iteration: int, release: bool = False) -> str | None:
    """The directory of one checkpoint, if there is a distributed checkpoint in it.

    Args:
        checkpoints_path: directory of checkpoints.
        iteration: the iteration; without meaning for a release checkpoint.
        release: look for `release` instead.

    Returns:
        The path, or None where the directory is absent or is no whole distributed checkpoint.
    """
    path = Path(checkpoints_path) / (RELEASE if release else iteration_name(iteration))
    try:
        get_checkpoint_format(path)
    except CheckpointError:
        return None
    return str(path)


def read_metadata(tracker_filename: str | os.PathLike[str]) -> tuple[int, bool]:
    """Read Megatron-LM's tracker, `latest_checkpointed_iteration.txt`. Each rank reads for itself.

    Returns:
        (iteration, False), or (0, True) if it says `release`.

    Raises:
        CheckpointNotFoundError: there is no such file.
        CheckpointDamagedError: it holds something else.
    """
    path = Path(tracker_filename)
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode) or found.st_size > _LARGEST_TRACKER:  # reading a pipe would wait for ever
            raise CheckpointDamagedError(f"{path} is not a readable tracker: it is no file of a few bytes")
        text = path.read_text(encoding="ascii").strip()
    except FileNotFoundError as error:
        raise CheckpointNotFoundError(f"there is no tracker {path}") from error
    except (UnicodeDecodeError, OSError) as error:
        raise CheckpointDamagedError(f"{path} is not a readable tracker: {error}") from error
    if text == RELEASE:
        return 0, True
    if not text.isdecimal():
        raise CheckpointDamagedError(
            f"{path} holds {text[:40]!r} where an iteration or 'release' belongs; "
            "set checkpoint.ckpt_step to the iteration to load"
        )
    return int(text), False
