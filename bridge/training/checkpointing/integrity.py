"""The manifest: a checkpoint's commit record, and the check of a directory against it.

`manifest.json` is the last file of a checkpoint to be written. It lists every other file with its size
and checksum, so a directory that has a readable manifest was written to its end, and one whose files
do not match it has been damaged since.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from bridge.training.checkpointing.errors import CheckpointDamagedError
from bridge.training.checkpointing.files import crc32_of_file, write_file
from bridge.training.checkpointing.layout import MANIFEST

FORMAT_VERSION = 1
CHECKSUM = "crc32"

_LARGEST_MANIFEST = 1 << 30


@dataclass(frozen=True)
class FileRecord:
    """One file of a checkpoint."""

    name: str
    """Path inside the checkpoint, with forward slashes."""
    size: int
    """Bytes."""
    checksum: str
    """CRC-32 of the contents, 8 hexadecimal digits."""

    @classmethod
    def of(cls, directory: Path, name: str) -> FileRecord:
        """Describe a file that has just been written."""
        path = directory / name
        return cls(name, path.stat().st_size, crc32_of_file(path))


@dataclass(frozen=True)
class Manifest:
    """What a published checkpoint consists of, and the run that wrote it."""

    iteration: int
    checkpoint_format: str
    world_size: int
    parallel_sizes: dict[str, int]
    """Sizes by name: tensor, pipeline, virtual_pipeline, context, expert, expert_tensor, data."""
    versions: dict[str, str]
    """bridge, torch and megatron-core."""
    files: tuple[FileRecord, ...]
    """Every file except the manifest itself, by name."""
    format_version: int = field(default=FORMAT_VERSION)
    created: float | None = None
    """When the checkpoint was committed, Unix time in seconds; None in manifests that do not say."""
    metrics: dict[str, float] = field(default_factory=dict)
    """What the run measured in the step before the save, by name; finite numbers."""

    @property
    def total_bytes(self) -> int:
        """Bytes of all files."""
        return sum(record.size for record in self.files)

    def to_json(self) -> str:
        """The text of `manifest.json`."""
        content = asdict(self) | {
            "checksum": CHECKSUM,
            "files": {r.name: {"size": r.size, "checksum": r.checksum} for r in self.files},
        }
        return json.dumps(content, indent=1, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Parse and check a manifest.

        Raises:
            ValueError: it is not a manifest that this version writes or understands.
        """
        content = json.loads(text)
        if not isinstance(content, dict):
            raise ValueError("it is not a JSON object")
        version = content.get("format_version")
        if version != FORMAT_VERSION:
            raise ValueError(f"its format_version is {version!r}; this version of bridge reads {FORMAT_VERSION}")
        if content.get("checksum") != CHECKSUM:
            raise ValueError(f"its checksum is {content.get('checksum')!r}; this version of bridge reads {CHECKSUM!r}")
        files = _typed(content, "files", dict)
        metrics = _typed({"metrics": {}} | content, "metrics", dict)
        return cls(
            iteration=_typed(content, "iteration", int),
            checkpoint_format=_typed(content, "checkpoint_format", str),
            world_size=_typed(content, "world_size", int),
            parallel_sizes=_typed(content, "parallel_sizes", dict),
            versions=_typed(content, "versions", dict),
            files=tuple(_file_record(name, entry) for name, entry in sorted(files.items())),
            created=None if content.get("created") is None else _finite("created", content["created"]),
            metrics={name: _finite(name, value) for name, value in metrics.items()},
        )


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write `manifest.json`: call it when every other file is on storage."""
    write_file(directory / MANIFEST, manifest.to_json().encode())


def read_manifest(directory: Path) -> Manifest | None:
    """The manifest of a checkpoint directory; None if it has none.

    Raises:
        CheckpointDamagedError: the file is there but is no manifest.
    """
    path = directory / MANIFEST
    try:
        if path.stat().st_size > _LARGEST_MANIFEST:
            raise ValueError(f"it has {path.stat().st_size} bytes")
        return Manifest.from_json(path.read_text())
    except FileNotFoundError:
        return None
    except (ValueError, OSError, RecursionError) as error:
        raise CheckpointDamagedError(f"{path} is not a readable manifest: {error}") from error


def find_damage(directory: Path, records: Iterable[FileRecord], *, checksums: bool = False) -> list[str]:
    """Compare the files of a directory with their records; one sentence for each file that differs.

    Args:
        directory: the checkpoint.
        records: the files to check.
        checksums: also read every file and compare its checksum.
    """
    problems = []
    for record in records:
        path = directory / record.name
        if path.is_symlink() or not path.is_file():
            problems.append(f"{record.name} is missing" if not path.exists() else f"{record.name} is not a file")
            continue
        size = path.stat().st_size
        if size != record.size:
            problems.append(f"{record.name} has {size} bytes instead of {record.size}")
        elif checksums and (found := crc32_of_file(path)) != record.checksum:
            problems.append(f"{record.name} has {CHECKSUM} {found} instead of {record.checksum}")
    return problems


def _file_record(name: str, entry: Any) -> FileRecord:
    path = PurePosixPath(name)
    if path.is_absolute() or not path.parts or ".." in path.parts or str(path) != name:
        raise ValueError(f"the file name {name!r} leaves the checkpoint or is not in its plain form")
    if not isinstance(entry, dict):
        raise ValueError(f"the entry of {name!r} is not an object")
    return FileRecord(name, _typed(entry, "size", int), _typed(entry, "checksum", str))


def _finite(name: str, value: Any) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise ValueError(f"its {name!r} is {value!r}, not a finite number")
    return float(value)


def _typed(content: dict[str, Any], key: str, kind: type) -> Any:
    value = content.get(key)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(f"its {key!r} is {value!r}, not of type {kind.__name__}")
    return value
