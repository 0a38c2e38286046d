"""Checkpoints without a manifest: which program has written them, and whether they are what is left of one of ours."""

from __future__ import annotations

import json
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from bridge.training.checkpointing.errors import CheckpointDamagedError
from bridge.training.checkpointing.events.file import read_events
from bridge.training.checkpointing.events.kinds import RunStarted
from bridge.training.checkpointing.layout import (
    COMMON,
    COMPACT_METADATA,
    MANIFEST,
    MCORE_METADATA,
    PAYLOAD_METADATA,
    RUN_CONFIG,
    TRAIN_STATE,
)

Origin = Literal["bridge", "Megatron Bridge", "Megatron-LM", "torch DCP", ""]
"""Empty if the files do not tell."""
PLAIN: Origin = "torch DCP"
"""Of checkpoints that tell neither a run nor an iteration."""
_LONGEST_LINE = 1 << 16
"""Bytes."""


def origin_of(path: Path) -> Origin:
    """The program that wrote a checkpoint without a manifest, by its files."""
    if (path / RUN_CONFIG).is_file():
        return "bridge" if _is_of_bridge(path / RUN_CONFIG) else "Megatron Bridge"
    if (path / COMPACT_METADATA).exists():
        return "bridge"
    if (path / TRAIN_STATE).exists():
        return ""
    if (path / COMMON).is_file() or (path / MCORE_METADATA).is_file():
        return "Megatron-LM"
    return PLAIN if (path / PAYLOAD_METADATA).is_file() else ""


def require_foreign(path: Path) -> None:
    """Refuse what is not another program's, but what is left of one of ours.

    Raises:
        CheckpointDamagedError: its other files say so.
    """
    if (path / RUN_CONFIG).is_file():
        if _is_of_bridge(path / RUN_CONFIG):
            raise CheckpointDamagedError(f"{path} is damaged: {MANIFEST} is missing, the last file that a save writes")
        return
    if (path / COMPACT_METADATA).exists():
        raise CheckpointDamagedError(
            f"{path} is damaged: {MANIFEST} and {RUN_CONFIG} are missing: {COMPACT_METADATA} is of bridge"
        )
    if (path / TRAIN_STATE).exists():
        raise CheckpointDamagedError(
            f"{path} is damaged: {RUN_CONFIG} is missing, and so is {MANIFEST} if it is of bridge: no other program "
            f"that writes {TRAIN_STATE} leaves it out"
        )


def _is_of_bridge(config: Path) -> bool:
    """Whether a configuration is one of ours, by the line that names its class: reading YAML takes long."""
    with config.open("rb") as stream:
        data = stream.read(1 << 20)
    return b"\n_target_: bridge." in b"\n" + data


def metrics_files(directory: Path) -> list[Path]:
    """The files in a directory of checkpoints in which a run keeps its metrics, as far as they can be told without its
    recipe: its events name them, or their lines say so."""
    named = set(_named(directory))
    return [
        path
        for path in (sorted(directory.glob("[!.]*")) if directory.is_dir() else ())
        if path.absolute() in named or (path.suffix == ".jsonl" and _holds_metrics(path))
    ]


def _named(directory: Path) -> Iterator[Path]:
    try:
        events = read_events(directory).events
    except OSError:
        return
    for event in events:
        if isinstance(event, RunStarted) and event.metrics_path:
            yield Path(event.metrics_path)


def _holds_metrics(path: Path) -> bool:
    """Whether a file begins with a line of metrics, or is still empty."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            return False
        with path.open("rb") as stream:
            line = stream.readline(_LONGEST_LINE)
        values = json.loads(line) if line else {"iteration": 0, "loss": 0.0}
        return isinstance(values, dict) and {"iteration", "loss"} <= values.keys()
    except (OSError, ValueError, RecursionError):
        return False
