"""The manifest: a checkpoint's commit record, and the check of a directory against it.

`manifest.json` is the last file of a checkpoint to be written. It lists every other file with its size
and checksum, so a directory that has a readable manifest was written to its end, and one whose files
do not match it has been damaged since.
"""

from __future__ import annotations

import json
import stat
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from bridge.training.checkpointing import checksums as sums
from bridge.training.checkpointing.errors import CheckpointDamagedError, tells_of_damage
from bridge.training.checkpointing.files import write_file
from bridge.training.checkpointing.layout import MANIFEST
from bridge.training.checkpointing.safety.containment import is_plain_name

FORMAT_VERSION = 2
_READABLE_VERSIONS = (1, 2)
"""The first had neither samples nor a checksum of the manifest itself."""

_LARGEST_MANIFEST = 1 << 28
"""Bytes; a million files take half of it."""

Level = Literal["off", "sizes", "full"]
"""How much of a checkpoint is checked before it is loaded, as `checkpoint.integrity` says it."""


@dataclass(frozen=True)
class FileRecord:
    """One file of a checkpoint."""

    name: str
    """Path inside the checkpoint, with forward slashes."""
    size: int
    """Bytes."""
    checksum: str
    """Of the contents, in hexadecimal digits."""
    kind: str = sums.DEFAULT
    """Of the checksum: one of `checksums.KINDS`."""
    sample: str = ""
    """Checksum of some of a large file, as `checksums.sample_of` takes it; empty where there is none."""

    @classmethod
    def of(cls, directory: Path, name: str, kind: str = sums.DEFAULT) -> FileRecord:
        """Describe a file by reading it."""
        path = directory / name
        return cls(name, path.stat().st_size, sums.of_file(path, kind), kind).sampled(directory)

    @classmethod
    def of_bytes(cls, name: str, data: bytes, kind: str = sums.DEFAULT) -> FileRecord:
        """Describe a small file by what is meant to be in it."""
        return cls(name, len(data), sums.of_bytes(data, kind), kind)

    def sampled(self, directory: Path) -> FileRecord:
        """The same with a sample of the file, if it is large."""
        if self.size <= sums.SAMPLED_BYTES:
            return self
        sample = sums.sample_of(directory / self.name, self.kind)
        return FileRecord(self.name, self.size, self.checksum, self.kind, sample)

    def to_entry(self) -> dict[str, Any]:
        """What the manifest says of the file, under its name."""
        return {"size": self.size, "checksum": self.checksum} | ({"sample": self.sample} if self.sample else {})


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
    """Every file except the manifest itself, by name; their checksums are of one kind."""
    format_version: int = field(default=FORMAT_VERSION)
    created: float | None = None
    """When the checkpoint was committed, Unix time in seconds; None in manifests that do not say."""
    start: int = 0
    """Number of the run's start that saved it; 0 where nobody counts."""
    metrics: dict[str, float] = field(default_factory=dict)
    """What the run measured in the step before the save, by name; finite numbers."""
    averaged: tuple[int, ...] = ()
    """The iterations whose mean the model's tensors are; empty for what a run has saved."""

    @property
    def total_bytes(self) -> int:
        """Bytes of all files."""
        return sum(record.size for record in self.files)

    @property
    def checksum(self) -> str:
        """The kind of all its checksums.

        Raises:
            ValueError: they are of several kinds.
        """
        kinds = {record.kind for record in self.files}
        if len(kinds) > 1:
            raise ValueError(f"the files have checksums of several kinds: {', '.join(sorted(kinds))}")
        return kinds.pop() if kinds else sums.DEFAULT

    def record(self, name: str) -> FileRecord | None:
        """What it says of one file; None if that is not among its files."""
        return next((record for record in self.files if record.name == name), None)

    def to_json(self) -> str:
        """The text of `manifest.json`."""
        content = {
            "iteration": self.iteration,
            "checkpoint_format": self.checkpoint_format,
            "world_size": self.world_size,
            "parallel_sizes": self.parallel_sizes,
            "versions": self.versions,
            "format_version": self.format_version,
            "created": self.created,
            "start": self.start,
            "metrics": self.metrics,
            "checksum": self.checksum,
            "files": {record.name: record.to_entry() for record in self.files},
        }
        if self.averaged:
            content["averaged"] = list(self.averaged)
        if self.format_version > 1:
            content["own_checksum"] = _own_checksum(content)
        return json.dumps(content, indent=1, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Parse and check a manifest.

        Raises:
            ValueError: it is not a manifest that this version writes or understands, or it has been changed.
        """
        content = json.loads(text)
        if not isinstance(content, dict):
            raise ValueError("it is not a JSON object")
        version = content.get("format_version")
        if isinstance(version, bool) or version not in _READABLE_VERSIONS:
            readable = " and ".join(map(str, _READABLE_VERSIONS))
            raise ValueError(f"its format_version is {version!r}; this version of bridge reads {readable}")
        kind = content.get("checksum")
        if kind not in sums.KINDS:
            raise ValueError(f"its checksum is {kind!r}; this version of bridge reads {', '.join(sums.KINDS)}")
        files = _typed(content, "files", dict)
        metrics = _typed({"metrics": {}} | content, "metrics", dict)
        manifest = cls(
            iteration=_typed(content, "iteration", int),
            checkpoint_format=_typed(content, "checkpoint_format", str),
            world_size=_typed(content, "world_size", int),
            parallel_sizes=_typed(content, "parallel_sizes", dict),
            versions=_typed(content, "versions", dict),
            files=tuple(_file_record(name, entry, kind) for name, entry in sorted(files.items())),
            format_version=version,
            created=None if content.get("created") is None else _finite("created", content["created"]),
            start=_typed({"start": 0} | content, "start", int),
            metrics={name: _finite(name, value) for name, value in metrics.items()},
            averaged=tuple(_whole("averaged", each) for each in _typed({"averaged": []} | content, "averaged", list)),
        )
        if version > 1 and content.pop("own_checksum", None) != _own_checksum(content):
            raise ValueError("it has been changed since it was written: its own_checksum is another one")
        if version > 1 and not text.endswith("}\n"):
            raise ValueError("its end is missing")
        return manifest


def merged_metrics(by_rank: list[dict[str, float]]) -> dict[str, float]:
    """What all ranks know together: each metric from the lowest rank that has it."""
    merged: dict[str, float] = {}
    for metrics in by_rank:
        for name, value in metrics.items():
            merged.setdefault(name, value)
    return merged


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
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):  # reading a pipe would wait for ever
            raise ValueError("it is not a file")
        if found.st_size > _LARGEST_MANIFEST:
            raise ValueError(f"it has {found.st_size} bytes")
        return Manifest.from_json(path.read_text())
    except FileNotFoundError as error:
        if path.is_symlink():
            raise CheckpointDamagedError(f"{path} is not a readable manifest: it is a link to nothing") from error
        return None
    except (ValueError, OSError, RecursionError) as error:
        if isinstance(error, OSError) and not tells_of_damage(error):
            raise
        raise CheckpointDamagedError(f"{path} is not a readable manifest: {error}") from error


def find_damage(
    directory: Path, records: Iterable[FileRecord], *, checksums: bool = False, samples: bool = False
) -> list[str]:
    """Compare the files of a directory with their records; one sentence for each file that differs.

    Args:
        directory: the checkpoint.
        records: the files to check.
        checksums: also read every file and compare its checksum.
        samples: also read some of every large file, and all of every small one.
    """
    found = (_damage_of(directory, record, checksums, samples) for record in records)
    return [problem for problem in found if problem]


def _damage_of(directory: Path, record: FileRecord, checksums: bool, samples: bool) -> str:
    path = directory / record.name
    try:
        if path.is_symlink() or not path.is_file():
            return f"{record.name} is missing" if not path.exists() else f"{record.name} is not a file"
        size = path.stat().st_size
        if size != record.size:
            return f"{record.name} has {size} bytes instead of {record.size}"
        if samples and not checksums and record.sample:
            sampled = sums.sample_of(path, record.kind)
            if sampled != record.sample:
                return f"{record.name} has {record.kind} {sampled} instead of {record.sample} in a sample of it"
        elif checksums or (samples and record.size <= sums.SAMPLED_BYTES):
            checksum = sums.of_file(path, record.kind)
            if checksum != record.checksum:
                return f"{record.name} has {record.kind} {checksum} instead of {record.checksum}"
    except OSError as error:
        if not tells_of_damage(error):
            raise
        return f"{record.name} cannot be read: {error.strerror or error}"
    return ""


def _own_checksum(content: dict[str, Any]) -> str:
    """The checksum of everything else in a manifest, whatever its layout on the page."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return sums.of_bytes(text.encode(), str(content["checksum"]))


def _file_record(name: str, entry: Any, kind: str) -> FileRecord:
    if not is_plain_name(name):
        raise ValueError(f"the file name {name!r} leaves the checkpoint or is not in its plain form")
    if not isinstance(entry, dict):
        raise ValueError(f"the entry of {name!r} is not an object")
    size = _typed(entry, "size", int)
    if size < 0:
        raise ValueError(f"the size of {name!r} is {size}")
    sample = _typed({"sample": ""} | entry, "sample", str)
    return FileRecord(name, size, _typed(entry, "checksum", str), kind, sample)


def _finite(name: str, value: Any) -> float:
    # Compared before it is converted: an integer of a thousand digits is no float.
    if not isinstance(value, int | float) or isinstance(value, bool) or not -1e308 < value < 1e308:
        raise ValueError(f"its {name!r} is {str(value)[:40]}, not a finite number")
    return float(value)


def _whole(name: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"its {name!r} holds {repr(value)[:40]}, not a whole number")
    return value


def _typed(content: dict[str, Any], key: str, kind: type) -> Any:
    value = content.get(key)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(f"its {key!r} is {repr(value)[:80]}, not of type {kind.__name__}")
    return value
