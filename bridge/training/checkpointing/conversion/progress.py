"""What a conversion remembers of itself, so that one that was cut short can be continued.

It is kept in the staging directory, whose name tells the conversion: what it is of, and into which format. Just before
the checkpoint is sealed it is moved beside it, and it is deleted last. So whatever stage a conversion had reached, the
next one finds out.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from bridge.training.checkpointing.conversion.writers import Written
from bridge.training.checkpointing.files import delete_trash, discard, replace_file, sync_directory
from bridge.training.checkpointing.integrity import Manifest
from bridge.training.checkpointing.layout import MANIFEST, SAVING_PREFIX, TRASH_PREFIX, iteration_name

_DIRECTORY = ".conversion"
_PLAN = "plan.json"
_VERSION = 1
"""Of what is remembered, and of how a checkpoint is divided into parts."""


def fingerprint_of(source: Path, manifest: Manifest | None, target_format: str) -> str:
    """What tells a conversion from others: the checkpoint, as it is now, and the format. In hexadecimal digits."""
    if manifest is not None:
        state: Any = manifest.to_json()
    else:
        files = (path for path in sorted(source.rglob("*")) if path.is_file())
        state = [(path.relative_to(source).as_posix(), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    content = json.dumps([_VERSION, str(source.resolve()), target_format, state])
    return hashlib.sha256(content.encode()).hexdigest()


class Progress:
    """The progress of one conversion."""

    def __init__(self, save_dir: Path, iteration: int, fingerprint: str) -> None:
        """
        Args:
            save_dir: the directory of checkpoints that it writes into.
            iteration: the checkpoint's.
            fingerprint: of `fingerprint_of`.
        """
        name = iteration_name(iteration)
        self.staging = save_dir / f"{SAVING_PREFIX}{name}-{fingerprint[:16]}"
        """Where the checkpoint is written. A run that saves in the directory takes it for the remains of a save."""
        self._inside = self.staging / _DIRECTORY
        # A name that is swept with all others, should nobody ever continue.
        self._beside = save_dir / f"{TRASH_PREFIX}{_DIRECTORY[1:]}-{name}-{fingerprint[:8]}"
        self._final = save_dir / name

    def has_published(self) -> bool:
        """Whether an earlier try got as far as publishing, and no further."""
        if self.staging.exists() or not self._beside.is_dir() or not self._final.is_dir():
            return False
        known, found = (_read_bytes(path / MANIFEST) for path in (self._beside, self._final))
        return known == found

    def begin(self, limit: int) -> int:
        """Make the staging directory, or take up what an earlier try has left there.

        Args:
            limit: bytes that a piece may weigh now.

        Returns:
            The limit to divide the checkpoint by: that of the earlier try, if there is one that fits into memory now.
        """
        if self._beside.is_dir() and self.staging.is_dir() and not self._inside.exists():
            (self.staging / MANIFEST).unlink(missing_ok=True)
            self._beside.rename(self._inside)
        earlier = _read_json(self._inside / _PLAN)
        if isinstance(earlier, dict) and isinstance(earlier.get("limit"), int) and 0 < earlier["limit"] <= limit:
            return int(earlier["limit"])
        if self._beside.exists():
            delete_trash(self._beside)
        if self.staging.exists():
            discard(self.staging)
        self.staging.mkdir()
        self._inside.mkdir()
        replace_file(self._inside / _PLAN, json.dumps({"limit": limit}).encode())
        sync_directory(self.staging)
        return limit

    def written(self, number: int) -> Written | None:
        """What is remembered of a part; None if it is not finished."""
        content = _read_json(self._inside / _part_name(number))
        try:
            return None if content is None else Written.from_json(content)
        except (KeyError, TypeError):
            return None

    def remember(self, number: int, written: Written) -> None:
        """Remember that a part is finished."""
        replace_file(self._inside / _part_name(number), json.dumps(written.to_json()).encode())

    def is_done(self, step: str) -> bool:
        """Whether a step of the whole is remembered as done."""
        return (self._inside / step).exists()

    def done(self, step: str) -> None:
        """Remember that a step of the whole is done."""
        replace_file(self._inside / step, b"")

    def set_aside(self, manifest: Manifest | None) -> None:
        """Move what is remembered out of the staging directory, which holds nothing but the checkpoint then."""
        if manifest is not None:
            replace_file(self._inside / MANIFEST, manifest.to_json().encode())
        if self._beside.exists():
            shutil.rmtree(self._beside)
        self._inside.rename(self._beside)
        sync_directory(self._beside.parent)

    def forget(self) -> None:
        """Forget everything: the conversion is over, or begins anew."""
        if self._beside.exists():
            delete_trash(self._beside)
        if self.staging.exists():
            discard(self.staging)


def _part_name(number: int) -> str:
    return f"part-{number:06d}.json"


def _read_bytes(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:
        return None


def _read_json(path: Path) -> Any:
    data = _read_bytes(path)
    try:
        return None if data is None else json.loads(data)
    except ValueError:
        return None
