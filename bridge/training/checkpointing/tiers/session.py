"""Which run a non-persistent checkpoint belongs to.

Local directories and host memory are shared by all jobs of a machine. What a run leaves there carries its
session, a name that is bound to the run's save directory: the same after a restart, another one for every other
save directory, for a copy of it, and for one that was deleted and made anew.
"""

from __future__ import annotations

import hashlib
import secrets
from pathlib import Path

from bridge.training.checkpointing.errors import DirectoryInUseError
from bridge.training.checkpointing.files import replace_file
from bridge.training.checkpointing.layout import TEMPORARY_SUFFIX, list_checkpoints

SESSION = ".bridge-session"
"""In a save directory: the token that its session is made of. In another directory: the session that owns it."""


def session_of(save_dir: Path) -> str:
    """The session of a save directory, 16 hexadecimal digits; its token is made where there is none.

    Call it in the one process that has claimed the directory.
    """
    return _digest(_token(save_dir), str(save_dir.resolve()))


def body_of(save_dir: Path) -> str:
    """What a save directory keeps when it is renamed or mounted elsewhere, and a copy of it does not have.

    16 hexadecimal digits, of its token and its inode. Call it where `session_of` may be called.
    """
    return _digest(_token(save_dir), f"inode {save_dir.stat().st_ino}")


def _token(save_dir: Path) -> bytes:
    file = save_dir / SESSION
    token = file.read_bytes() if file.exists() else b""
    if not token:
        token = secrets.token_hex(16).encode()
        replace_file(file, token)
    return token


def _digest(token: bytes, place: str) -> str:
    return hashlib.sha256(token + b"\n" + place.encode()).hexdigest()[:16]


def take_over(directory: Path, session: str, setting: str) -> None:
    """Make a directory outside the save directory belong to `session`.

    Raises:
        DirectoryInUseError: it belongs to another session, or to nobody who says so and holds checkpoints. They would
            be taken for this run's, and deleted as it makes its own.
    """
    file = directory / SESSION
    owner = file.read_bytes().decode(errors="replace") if file.exists() else ""
    if owner == session:
        return
    if owner:
        raise DirectoryInUseError(
            f"{setting}: {directory} holds checkpoints of another run, whose checkpoint.save is or was another "
            f"directory; name a directory of this run's own, or delete it if that run is over"
        )
    found = list_checkpoints(directory)
    unfinished = [name for name in found.leftovers if not name.endswith(TEMPORARY_SUFFIX)]
    if found.iterations or found.has_release or found.has_tracker or found.has_legacy_tracker or unfinished:
        raise DirectoryInUseError(
            f"{setting}: {directory} holds checkpoints that are not this run's non-persistent ones; name an empty or "
            "new directory"
        )
    replace_file(file, session.encode())
