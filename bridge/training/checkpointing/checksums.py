"""Checksums: which kinds there are, and how they are taken of bytes, of files, and of a stream while it is written."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, Protocol

import xxhash
from zlib_ng.zlib_ng import crc32

from bridge.training.checkpointing.errors import CheckpointSaveError

DEFAULT = "xxh3"
"""The fastest by far, as `scripts/benchmarks/checksums.py` measures it."""

_BLOCK = 8 << 20
_SAMPLES = 16
_SAMPLE_BYTES = 4096
SAMPLED_BYTES = _SAMPLES * _SAMPLE_BYTES
"""How much of a file is read for a sample of it; smaller files are read whole."""


class Hasher(Protocol):
    """A checksum in the making, as in hashlib."""

    def update(self, data: bytes | memoryview, /) -> None:
        """Take in further bytes."""

    def hexdigest(self) -> str:
        """The checksum of all bytes so far, in hexadecimal digits."""


class _Crc32:
    """CRC-32 as in zip files."""

    def __init__(self) -> None:
        self._value = 0

    def update(self, data: bytes | memoryview, /) -> None:
        self._value = crc32(data, self._value)

    def hexdigest(self) -> str:
        return f"{self._value:08x}"


_KINDS: dict[str, Callable[[], Hasher]] = {
    "xxh3": xxhash.xxh3_64,
    "crc32": _Crc32,
    "sha256": hashlib.sha256,
}

KINDS = tuple(_KINDS)
"""The names of the kinds: `xxh3` is XXH3 with 64 bits, `crc32` that of zip files, `sha256` the cryptographic one."""


def new_hasher(kind: str) -> Hasher:
    """A checksum of no bytes yet.

    Raises:
        ValueError: there is no such kind.
    """
    try:
        return _KINDS[kind]()
    except KeyError:
        raise ValueError(f"{kind!r} is no kind of checksum; there are {', '.join(KINDS)}") from None


def of_bytes(data: bytes, kind: str = DEFAULT) -> str:
    """The checksum of `data`."""
    hasher = new_hasher(kind)
    hasher.update(data)
    return hasher.hexdigest()


def of_file(path: Path, kind: str = DEFAULT) -> str:
    """The checksum of a file's contents."""
    hasher = new_hasher(kind)
    buffer = memoryview(bytearray(min(_BLOCK, max(path.stat().st_size, 1))))
    with path.open("rb", buffering=0) as stream:
        while size := stream.readinto(buffer):
            hasher.update(buffer[:size])
    return hasher.hexdigest()


def sample_of(path: Path, kind: str = DEFAULT) -> str:
    """The checksum of some of a file: pieces at even distances, with its first and its last bytes among them.

    It costs a few reads however large the file is. What it finds are files in the place of others, and ends or long
    stretches that were never written; what it does not find is a single bit.
    """
    hasher = new_hasher(kind)
    last = max(0, path.stat().st_size - _SAMPLE_BYTES)
    with path.open("rb", buffering=0) as stream:
        for number in range(_SAMPLES):
            stream.seek(last * number // (_SAMPLES - 1))
            hasher.update(stream.read(_SAMPLE_BYTES))
    return hasher.hexdigest()


class HashingStream:
    """A file that is being written, and the checksum of what was meant to be written into it."""

    def __init__(self, stream: BinaryIO, kind: str = DEFAULT) -> None:
        self._stream = stream
        self._hasher = new_hasher(kind)
        self.size = 0
        """Bytes written."""

    def write(self, data: bytes | memoryview) -> int:
        """Write all of `data`."""
        view = memoryview(data).cast("B")
        written = self._stream.write(view)
        if written != len(view):
            raise CheckpointSaveError(f"{written} of {len(view)} bytes could be written")
        self._hasher.update(view)
        self.size += written
        return written

    def tell(self) -> int:
        """The position, which is the end."""
        return self.size

    def flush(self) -> None:
        """Hand what is buffered to the system."""
        self._stream.flush()

    def checksum(self) -> str:
        """Of all bytes so far."""
        return self._hasher.hexdigest()
