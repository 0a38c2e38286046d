"""The beginning and the end of a manifest, without the list of files, which may be as long as a run has ranks."""

from __future__ import annotations

import json
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bridge.training.checkpointing.errors import CheckpointDamagedError
from bridge.training.checkpointing.integrity import Manifest
from bridge.training.checkpointing.layout import MANIFEST
from bridge.training.checkpointing.parallel import Layout

_FILES = b'\n "files": {\n'
_END = b'\n },\n "format_version"'
"""What stands around the list in the text that `Manifest.to_json` makes; a name in it can hold no line break."""
_SIZE = re.compile(rb'\n   "size": (\d+)')
_LARGEST = 1 << 28
"""Bytes, as for `integrity.read_manifest`."""


@dataclass(frozen=True)
class ManifestHead:
    """What a manifest says of a checkpoint as a whole. Nothing of it has been verified."""

    iteration: int
    checkpoint_format: str
    world_size: int
    layout: Layout
    total_bytes: int
    """Of all files in the list."""
    files: int
    created: float | None
    """Unix time in seconds; None if it does not say."""
    versions: dict[str, str]
    metrics: dict[str, float]
    start: int = 0
    """Number of the run's start that saved it; 0 where nobody counts."""
    averaged: tuple[int, ...] = ()
    """The iterations whose mean it is; none for what a run has saved."""


def read_head(checkpoint: Path) -> ManifestHead | None:
    """What a checkpoint's manifest says; None if it has none.

    Raises:
        CheckpointDamagedError: the file is there but is no manifest.
    """
    path = checkpoint / MANIFEST
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):  # reading a pipe would wait for ever
            raise CheckpointDamagedError(f"{path} is no manifest: it is not a file")
        if found.st_size > _LARGEST:
            raise CheckpointDamagedError(f"{path} is no manifest: it has {found.st_size} bytes")
        return _head(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise CheckpointDamagedError(f"{path} is no manifest: {error}") from error


def _head(data: bytes) -> ManifestHead:
    start = data.find(_FILES)
    end = data.find(_END, start)
    if start < 0 or end < 0:
        return _of_manifest(Manifest.from_json(data.decode()))
    sizes = [int(size) for size in _SIZE.findall(data, start, end)]
    content: dict[str, Any] = json.loads(data[:start] + data[end + len(b"\n },") :])
    if not isinstance(content, dict):
        raise ValueError("it is not a JSON object")
    created = content.get("created")
    metrics: dict[str, Any] = {"metrics": {}} | content
    return ManifestHead(
        _of_type(content, "iteration", int),
        _of_type(content, "checkpoint_format", str),
        _of_type(content, "world_size", int),
        Layout.from_sizes(_of_type(content, "parallel_sizes", dict)),
        sum(sizes),
        len(sizes),
        None if created is None else _finite("created", created),
        {str(name): str(version) for name, version in _of_type(content, "versions", dict).items()},
        {str(name): _finite(name, value) for name, value in _of_type(metrics, "metrics", dict).items()},
        _of_type({"start": 0} | content, "start", int),
        _iterations(content.get("averaged", [])),
    )


def _of_type(content: dict[str, Any], key: str, kind: type) -> Any:
    value = content.get(key)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(f"its {key!r} is {repr(value)[:80]}, not of type {kind.__name__}")
    return value


def _iterations(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list) or any(type(each) is not int for each in value):
        raise ValueError(f"its 'averaged' is {str(value)[:40]}, not a list of iterations")
    return tuple(value)


def _finite(name: str, value: Any) -> float:
    # Compared before it is converted: an integer of a thousand digits is no float.
    if not isinstance(value, int | float) or isinstance(value, bool) or not -1e308 < value < 1e308:
        raise ValueError(f"its {name!r} is {str(value)[:40]}, not a finite number")
    return float(value)


def _of_manifest(manifest: Manifest) -> ManifestHead:
    return ManifestHead(
        manifest.iteration,
        manifest.checkpoint_format,
        manifest.world_size,
        Layout.from_sizes(manifest.parallel_sizes),
        manifest.total_bytes,
        len(manifest.files),
        manifest.created,
        manifest.versions,
        manifest.metrics,
        manifest.start,
        manifest.averaged,
    )
