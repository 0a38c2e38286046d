"""The system calls that change storage: their numbers, and which files a call is about. Linux on x86-64."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

_AT_FDCWD = -100  # <fcntl.h>
_PAGE = 4096
OPEN_TO_WRITE = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
"""An opening with any of these flags may change something."""


@dataclass(frozen=True)
class SystemCall:
    """Where a system call's arguments name files."""

    name: str
    number: int
    descriptor: int | None = None
    """Position of an open file."""
    paths: tuple[tuple[int | None, int], ...] = ()
    """Positions of paths, each with that of the directory it is relative to; None: the working directory."""
    flags: int | None = None
    """Position of the flags of an opening."""


WRITE_LIKE = (
    SystemCall("open", 2, paths=((None, 0),), flags=1),
    SystemCall("creat", 85, paths=((None, 0),)),
    SystemCall("openat", 257, paths=((0, 1),), flags=2),
    SystemCall("write", 1, descriptor=0),
    SystemCall("pwrite64", 18, descriptor=0),
    SystemCall("writev", 20, descriptor=0),
    SystemCall("pwritev", 296, descriptor=0),
    SystemCall("pwritev2", 328, descriptor=0),
    SystemCall("sendfile", 40, descriptor=0),
    SystemCall("copy_file_range", 326, descriptor=2),
    SystemCall("fsync", 74, descriptor=0),
    SystemCall("fdatasync", 75, descriptor=0),
    SystemCall("sync_file_range", 277, descriptor=0),
    SystemCall("syncfs", 306, descriptor=0),
    SystemCall("truncate", 76, paths=((None, 0),)),
    SystemCall("ftruncate", 77, descriptor=0),
    SystemCall("fallocate", 285, descriptor=0),
    SystemCall("rename", 82, paths=((None, 0), (None, 1))),
    SystemCall("renameat", 264, paths=((0, 1), (2, 3))),
    SystemCall("renameat2", 316, paths=((0, 1), (2, 3))),
    SystemCall("mkdir", 83, paths=((None, 0),)),
    SystemCall("mkdirat", 258, paths=((0, 1),)),
    SystemCall("rmdir", 84, paths=((None, 0),)),
    SystemCall("unlink", 87, paths=((None, 0),)),
    SystemCall("unlinkat", 263, paths=((0, 1),)),
    SystemCall("link", 86, paths=((None, 0), (None, 1))),
    SystemCall("linkat", 265, paths=((0, 1), (2, 3))),
    SystemCall("symlink", 88, paths=((None, 1),)),
    SystemCall("symlinkat", 266, paths=((1, 2),)),
)
BY_NUMBER = {call.number: call for call in WRITE_LIKE}


def files_of(call: SystemCall, thread: int, arguments: list[int]) -> tuple[str, ...]:
    """The absolute paths that a call of a stopped thread is about; a descriptor counts as the file it was opened on."""
    if call.descriptor is not None:
        return (_target(f"/proc/{thread}/fd/{_signed(arguments[call.descriptor])}"),)
    found = []
    for directory, position in call.paths:
        base = _AT_FDCWD if directory is None else _signed(arguments[directory])
        place = f"/proc/{thread}/cwd" if base == _AT_FDCWD else f"/proc/{thread}/fd/{base}"
        path = _text_at(thread, arguments[position])
        found.append(os.path.normpath(path if path.startswith("/") else f"{_target(place)}/{path}"))
    return tuple(found)


def _signed(value: int) -> int:
    value &= 0xFFFFFFFF
    return value - (1 << 32) if value >> 31 else value


def _target(link: str) -> str:
    try:
        return str(Path(link).readlink())
    except OSError:
        return ""


def _text_at(thread: int, address: int) -> str:
    """The zero-terminated string at an address of a stopped thread."""
    data = b""
    with open(f"/proc/{thread}/mem", "rb", buffering=0) as memory:  # noqa: PTH123 (not a file of the file system)
        while b"\0" not in data:
            place = address + len(data)
            memory.seek(place)
            data += memory.read(_PAGE - place % _PAGE)  # what follows the page may not be mapped
    return os.fsdecode(data.split(b"\0")[0])
