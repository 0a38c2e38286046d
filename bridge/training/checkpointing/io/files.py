"""Reading bytes of open files into memory, all of them or an error that names the file."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from bridge.training.checkpointing.errors import CheckpointDamagedError
from bridge.training.checkpointing.readable import ReadableFile

_AT_ONCE = 1 << 30
"""The system reads no more than 2 GiB at once."""


@contextmanager
def opened(paths: Mapping[str, Path | ReadableFile]) -> Iterator[Mapping[str, ReadableFile]]:
    """Files by name, open while the context lasts; those that are no paths are open already.

    Raises:
        CheckpointDamagedError: one cannot be opened.
    """
    files: dict[str, ReadableFile] = {}
    own: list[OpenFile] = []
    try:
        for name, path in paths.items():
            if not isinstance(path, Path):
                files[name] = path
                continue
            try:
                own.append(OpenFile(path, os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)))
            except OSError as error:
                raise unreadable(path, error) from error
            files[name] = own[-1]
        yield files
    finally:
        for file in own:
            os.close(file.descriptor)


def read_bytes(source: Path | ReadableFile, at: int, length: int) -> bytearray:
    """Some bytes of a file.

    Raises:
        CheckpointError: it cannot be opened, ends before that, or storage fails.
    """
    data = bytearray(length)
    with opened({"": source}) as files:
        files[""].read(memoryview(data), at)
    return data


def read_each(file: ReadableFile, into: memoryview, length: int, places: Iterable[int]) -> None:
    """Fill memory with what a file holds at each of some places, `length` bytes each.

    Raises:
        CheckpointError: the file ends before that, or storage fails.
    """
    done = 0
    if not isinstance(file, OpenFile):
        for at in places:
            file.read(into[done : done + length], at)
            done += length
        return
    # Of a column there are thousands of runs of a few hundred bytes: what is not the system's call counts.
    read, descriptor = os.preadv, file.descriptor
    for at in places:
        piece = into[done : done + length]
        try:
            got = read(descriptor, (piece,), at)
        except OSError as error:
            raise unreadable(file.path, error) from error
        if got < length:
            file.read(piece[got:], at + got)
        done += length


class OpenFile:
    """A file, open for reading. Several threads may read from it."""

    __slots__ = ("descriptor", "path")

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self.descriptor = descriptor

    def __str__(self) -> str:
        return str(self.path)

    def read(self, into: memoryview, at: int) -> None:
        """Fill memory with what the file holds from byte `at` on.

        Raises:
            CheckpointDamagedError: the file ends before that, or storage fails.
        """
        done, size = 0, len(into)
        while done < size:
            try:
                got = os.preadv(self.descriptor, [into[done : done + _AT_ONCE]], at + done)
            except OSError as error:
                raise unreadable(self.path, error) from error
            if got == 0:
                raise CheckpointDamagedError(
                    f"{self.path} ends at byte {at + done}, in the middle of a tensor that goes on to {at + size}"
                )
            done += got


def unreadable(path: Path, error: OSError) -> CheckpointDamagedError:
    """The error for a file that storage does not deliver."""
    return CheckpointDamagedError(f"{path} cannot be read: {error.strerror or error}")
