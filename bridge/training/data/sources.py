"""Finding text files and reading them."""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from bridge.training.data.errors import PrepareError

STDLIB_LEFT_OUT = frozenset({"test", "tests", "idlelib", "site-packages", "dist-packages"})


@dataclass(frozen=True)
class SourceFile:
    """A file that was found, in the state in which it was found."""

    path: Path
    size: int
    mtime_ns: int


@dataclass
class SkippedFiles:
    """Files that gave no document, by reason."""

    unreadable: int = 0
    not_utf8: int = 0
    empty: int = 0

    def __str__(self) -> str:
        return f"{self.unreadable} unreadable, {self.not_utf8} not UTF-8, {self.empty} empty"


def find_files(inputs: Sequence[Path], patterns: Sequence[str]) -> list[SourceFile]:
    """The files that `inputs` name, and those below the folders among them whose name fits a pattern.

    Each file comes once, however often it was reached: inputs in the order given, folders in the order of
    their paths. Hidden files and folders and `__pycache__` are left out of folders, and links to folders
    are not followed.

    Raises:
        PrepareError: an input does not exist.
    """
    found: dict[Path, SourceFile] = {}
    for path in inputs:
        if not path.exists():
            raise PrepareError(f"--input: {path} does not exist")
        for file in _walk(path, patterns) if path.is_dir() else [path]:
            _add(found, file)
    return list(found.values())


def find_stdlib_files(patterns: Sequence[str]) -> list[SourceFile]:
    """The running Python's standard library, without its tests, IDLE and installed packages."""
    root = Path(sysconfig.get_path("stdlib"))
    found: dict[Path, SourceFile] = {}
    for file in _walk(root, patterns, STDLIB_LEFT_OUT):
        _add(found, file)
    return list(found.values())


def limit_size(files: Sequence[SourceFile], max_bytes: int) -> list[SourceFile]:
    """The first files that together hold at most `max_bytes` bytes; the first too large ends the list.

    Raises:
        PrepareError: not even the first file fits.
    """
    total, kept = 0, []
    for file in files:
        total += file.size
        if total > max_bytes:
            break
        kept.append(file)
    if files and not kept:
        raise PrepareError(
            f"--max-mib allows {max_bytes} bytes, but the first file, {files[0].path}, has {files[0].size}"
        )
    return kept


def read_documents(files: Sequence[SourceFile], skipped: SkippedFiles) -> Iterator[str]:
    """The text of each file, byte for byte; a file that cannot be used is counted in `skipped` instead."""
    for file in files:
        try:
            text = file.path.read_bytes().decode("utf-8")
        except OSError:
            skipped.unreadable += 1
        except UnicodeDecodeError:
            skipped.not_utf8 += 1
        else:
            if text:
                yield text
            else:
                skipped.empty += 1


def _walk(root: Path, patterns: Sequence[str], left_out: frozenset[str] = frozenset()) -> list[Path]:
    files = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [
            name for name in subfolders if not name.startswith(".") and name != "__pycache__" and name not in left_out
        ]
        files += [
            Path(folder, name)
            for name in names
            if not name.startswith(".") and any(fnmatch(name, pattern) for pattern in patterns)
        ]
    return sorted(files)


def _add(found: dict[Path, SourceFile], path: Path) -> None:
    real = path.resolve()
    if real in found:
        return
    try:
        state = real.stat()
    except OSError:  # a dangling link: reading it will count it as unreadable
        found[real] = SourceFile(real, 0, 0)
        return
    if real.is_file():
        found[real] = SourceFile(real, state.st_size, state.st_mtime_ns)
