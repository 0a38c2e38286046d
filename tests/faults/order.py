"""Whether a sequence of file operations would survive a power loss, judged by its order alone.

SIGKILL leaves what was written in the kernel's memory, so killing a job cannot show a missing fsync. The order of its
calls can: a rename may make durable what was never written, unless everything that it stands for was synced before.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePosixPath

from bridge.training.checkpointing.layout import (
    LEGACY_TRACKER,
    MANIFEST,
    TRACKER,
    TRASH_PREFIX,
    parse_iteration_name,
    staged_name,
)
from tests.faults.tracer import Call

_WRITES = {"write", "pwrite64", "writev", "pwritev", "pwritev2", "sendfile", "copy_file_range", "fallocate"}
_WRITES |= {"truncate", "ftruncate"}
_OPENS = {"open", "openat", "creat"}
_SYNCS = {"fsync", "fdatasync"}
_RENAMES = {"rename", "renameat", "renameat2"}
_MAKES = {"mkdir", "mkdirat", "symlink", "symlinkat", "link", "linkat"}
_REMOVES = {"unlink", "unlinkat", "rmdir"}
_TRACKERS = (TRACKER, LEGACY_TRACKER)


def violations(calls: Sequence[Call]) -> list[str]:
    """The calls, in a save directory, that come before others which they rest on; one sentence each.

    - A file or directory is renamed to a name that counts when all its bytes and entries are synced.
    - The manifest is the last file of a checkpoint to be made.
    - Trackers move when a checkpoint was published and its name is synced: in this run, or, as long as that has begun
      no save, in the one before.
    - No checkpoint is put away between the beginning of a save and the moving of the tracker.
    """
    watch = _Watch()
    for call in calls:
        if call.error == 0:
            watch.see(call)
    return watch.found


class _Watch:
    def __init__(self) -> None:
        self.found: list[str] = []
        self._unsynced_files: set[str] = set()
        self._unsynced_directories: set[str] = set()
        self._staging: set[str] = set()
        self._unsynced_names: set[str] = set()
        """Of published checkpoints, and of the save directory itself."""
        self._untracked = False
        """Whether a checkpoint is published that the tracker does not name yet."""
        self._names_are_synced = False
        """Whether the names that the run before has left are."""
        self._has_begun = False
        """Whether a save was begun."""

    def see(self, call: Call) -> None:
        """Take in the next call that has succeeded."""
        if call.name in _OPENS and call.creates:
            self._created(call)
        elif call.name in _WRITES:
            self._unsynced_files.add(call.files[0])
        elif call.name in _SYNCS:
            self._unsynced_files.discard(call.files[0])
            self._unsynced_directories.discard(call.files[0])
            self._unsynced_names = {name for name in self._unsynced_names if _parent(name) != call.files[0]}
            self._names_are_synced |= call.files[0] == "."
        elif call.name in _MAKES:
            self._unsynced_directories.add(_parent(call.files[-1]))
            if call.files[-1] == ".":
                self._unsynced_names.add(".")
            if staged_name(call.files[-1]):
                self._staging.add(call.files[-1])
                self._has_begun = True
        elif call.name in _REMOVES:
            self._forget(call.files[0])
        elif call.name in _RENAMES:
            self._renamed(call, *call.files)

    def _created(self, call: Call) -> None:
        path = call.files[0]
        if _name(path) == MANIFEST and staged_name(_parent(path)):
            self._require_synced(call, _parent(path))
        self._unsynced_files.add(path)
        self._unsynced_directories.add(_parent(path))

    def _renamed(self, call: Call, source: str, target: str) -> None:
        if parse_iteration_name(target) is not None:
            self._require_synced(call, source)
            self._untracked = True
            self._unsynced_names.add(target)
        elif _name(target) in _TRACKERS:
            self._require_synced(call, source)
            if self._unsynced_names:
                names = ", ".join(sorted(self._unsynced_names))
                self.found.append(f"{call} moves a tracker before the names are synced of {names}")
            is_of_the_run_before = self._names_are_synced and not self._has_begun
            if not self._untracked and not is_of_the_run_before and _name(target) == TRACKER:
                self.found.append(f"{call} moves the tracker though no checkpoint was published")
            if _name(target) == LEGACY_TRACKER:
                self._untracked = False
        elif self._puts_away_too_early(source, target):
            self.found.append(f"{call} puts a checkpoint away while a save is under way")
        self._forget(source)
        self._unsynced_directories |= {_parent(source), _parent(target)}

    def _puts_away_too_early(self, source: str, target: str) -> bool:
        if not target.startswith(TRASH_PREFIX) or parse_iteration_name(source) is None:
            return False
        return bool(self._staging) and source not in map(staged_name, self._staging)

    def _require_synced(self, call: Call, path: str) -> None:
        open_ends = sorted(
            entry for entry in self._unsynced_files | self._unsynced_directories if _is_below(entry, path)
        )
        if open_ends:
            self.found.append(f"{call} comes before the fsync of {', '.join(open_ends)}")

    def _forget(self, path: str) -> None:
        self._unsynced_files = {entry for entry in self._unsynced_files if not _is_below(entry, path)}
        self._unsynced_directories = {entry for entry in self._unsynced_directories if not _is_below(entry, path)}
        self._staging.discard(path)


def _is_below(entry: str, path: str) -> bool:
    return entry == path or entry.startswith(f"{path}/")


def _parent(path: str) -> str:
    """`..` of the save directory itself."""
    return ".." if path == "." else str(PurePosixPath(path).parent)


def _name(path: str) -> str:
    return PurePosixPath(path).name
