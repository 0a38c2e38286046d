"""Telling what lies in a directory without loading it: the format, and Megatron-LM's tracker."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

from bridge.training.checkpointing.contents.run_config import read_run_config, value_at
from bridge.training.checkpointing.errors import (
    CheckpointDamagedError,
    CheckpointError,
    CheckpointNotFoundError,
    NotACheckpointError,
)
from bridge.training.checkpointing.layout import (
    COMMON,
    MCORE_METADATA,
    PAYLOAD_METADATA,
    RELEASE,
    iteration_name,
)

FSDP_DTENSOR = "fsdp_dtensor"
_LARGEST_TRACKER = 1 << 10
"""Bytes."""


def get_checkpoint_format(checkpoint_path: str | os.PathLike[str]) -> str:
    """The format of one checkpoint, by its files.

    megatron-core's formats end their save with `metadata.json`, which names the format. `fsdp_dtensor` is plain
    torch DCP: `.metadata` and neither `metadata.json` nor `common.pt`, and where there is a configuration it says so.

    Args:
        checkpoint_path: an `iter_N` or `release` directory.

    Returns:
        `torch_dist`, `zarr` or `fsdp_dtensor`.

    Raises:
        CheckpointNotFoundError: there is no such directory.
        CheckpointDamagedError: `metadata.json` is unreadable, or it is missing from a save that did not end.
        NotACheckpointError: there is nothing in it that belongs to a checkpoint.
    """
    path = Path(checkpoint_path)
    if not path.is_dir():
        raise CheckpointNotFoundError(f"there is no checkpoint directory {path}")
    if (path / MCORE_METADATA).exists():
        return _named_format(path / MCORE_METADATA)
    if not (path / PAYLOAD_METADATA).exists():
        if (path / COMMON).exists():
            raise CheckpointDamagedError(_unfinished(path, f"{MCORE_METADATA} and {PAYLOAD_METADATA} are missing"))
        raise NotACheckpointError(
            f"Unknown checkpoint format in {path}: it has neither {MCORE_METADATA} nor {PAYLOAD_METADATA}"
        )
    if (path / COMMON).exists():
        raise CheckpointDamagedError(_unfinished(path, f"it has {COMMON} but {MCORE_METADATA} is missing"))
    configured = value_at(read_run_config(path), "checkpoint", "ckpt_format", FSDP_DTENSOR)
    if configured != FSDP_DTENSOR:
        raise CheckpointDamagedError(
            _unfinished(path, f"it is configured as {configured!r} but {MCORE_METADATA} and {COMMON} are missing")
        )
    return FSDP_DTENSOR


def _unfinished(path: Path, finding: str) -> str:
    return f"{path} is damaged, or its save did not end: {finding}"


def _named_format(file: Path) -> str:
    try:
        return str(json.loads(file.read_text())["sharded_backend"])
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise CheckpointDamagedError(f"{file} does not say which format the checkpoint is in: {error}") from error


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
