"""What `torch.save` writes around the bytes of a tensor, made once for each type and shape.

A record is a zip archive of small entries with the tensor's bytes among them. What torch writes for a type and a number
of dimensions is seen from two small tensors that it is let save: the entries are taken from one, and what is made of
them for the shape of the other must be, byte for byte, what torch has made. A version of torch, or a type, for which
that is not so has no frames, and its tensors are left to torch.

Formats: see `record`; the order of the zip fields is that of miniz, as torch uses it.
"""

from __future__ import annotations

import io
import logging
import re
import struct
import zipfile
from dataclasses import dataclass, field
from itertools import accumulate
from math import prod

import torch
from zlib_ng.zlib_ng import crc32

from bridge.training.checkpointing.io.record import DESCRIPTION
from bridge.training.checkpointing.io.tails import DIGITS, Spots, complete, mixed

logger = logging.getLogger(__name__)

_LOCAL = struct.Struct("<4s5H3L2H")
_ENTRY = struct.Struct("<4s6H3L5H2L")
_END64 = struct.Struct("<4sQ2H2L4Q")
_LOCATOR = struct.Struct("<4sLQL")
_END = struct.Struct("<4s4H2LH")
_UTF8, _DESCRIPTOR = 0x0800, 0x0008
_FULL16, _FULL32 = 0xFFFF, 0xFFFFFFFF
_MADE, _NEEDED = 0x031E, 45
_DATA = re.compile(r"[^/]+/data/\d{1,2}")
_IDENTIFICATION = "/.data/serialization_id"


@dataclass(frozen=True, slots=True)
class Frame:
    """A record without the tensor's bytes."""

    head: bytes
    """What comes before them."""
    size: int
    """How many they are."""
    tail: bytes
    """What comes behind them, complete but for what depends on them."""
    spots: Spots | None
    """Where that belongs; None where there are no bytes."""
    length: int = field(init=False)
    """Bytes of the record."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "length", len(self.head) + self.size + len(self.tail))

    def record(self, payload: bytes) -> bytes:
        """The record of a tensor with these bytes."""
        tail = bytearray(self.tail)
        if self.spots is not None:
            complete(tail, 0, crc32(payload), self.spots)
        return self.head + payload + tail


class Frames:
    """The frames of the types and shapes met so far."""

    def __init__(self) -> None:
        self._kinds: dict[tuple[torch.dtype, int], _Kind | None] = {}
        self._known: dict[tuple[torch.dtype, torch.Size], Frame | None] = {}

    def of(self, dtype: torch.dtype, shape: torch.Size) -> Frame | None:
        """The frame of a contiguous tensor; None if its record is not made in a way that is known here."""
        key = (dtype, shape)
        try:
            return self._known[key]
        except KeyError:
            kind = self._kind(dtype, len(shape))
            frame = self._known[key] = None if kind is None else kind.frame(tuple(shape))
            return frame

    def _kind(self, dtype: torch.dtype, dims: int) -> _Kind | None:
        if (dtype, dims) not in self._kinds:
            self._kinds[dtype, dims] = kind = _learn(dtype, dims)
            if kind is None:
                logger.warning(
                    "torch saves %s tensors with %d dimension(s) in a way that is not known here; it serializes them "
                    "itself, in memory",
                    dtype,
                    dims,
                )
        return self._kinds[dtype, dims]


@dataclass(frozen=True)
class _Kind:
    """The entries of the records of one type and number of dimensions, in their order."""

    dtype: torch.dtype
    entries: tuple[tuple[str, bytes], ...]
    """Names and contents. Those of the tensor's bytes and of the identification are of one tensor, and are replaced."""
    pickled: int
    """The place of the tensor's description among them."""
    data: int
    """The place of its bytes."""
    alignment: int
    """Contents begin at multiples of so many bytes."""

    def frame(self, shape: tuple[int, ...]) -> Frame:
        """The frame of a contiguous tensor of that shape."""
        size = prod(shape) * self.dtype.itemsize
        description = _described_anew(self.entries[self.pickled][1], self.dtype, shape)
        archive = _Archive(self.alignment)
        crcs: list[int] = []
        head = b""
        at: list[int] = []
        for place, (name, content) in enumerate(self.entries):
            if place == self.data:
                archive.add(name, size, 0)
                head = archive.take()
                archive.skip(size)
            else:
                content = description if place == self.pickled else content
                crc = crc32(content)
                crcs.append(crc)
                archive.add(name, len(content), crc)
                at.append(archive.inside)
                archive.put(content)
            archive.describe()
        seed = 0
        for crc in crcs[: self.data]:
            seed = mixed(seed, crc)
        archive.end()
        tail = archive.take()
        last, following = len(self.entries) - 1, crcs[self.data]
        if not size:
            number = mixed(seed, following)
            return Frame(head, 0, _identified(tail, at[-1] + DIGITS, number, archive.crcs_of(last)), None)
        own, identification = archive.crcs_of(self.data), archive.crcs_of(last)
        return Frame(head, size, tail, Spots(seed, following, *own, at[-1] + DIGITS, *identification))


def _identified(tail: bytes, at: int, number: int, crcs: tuple[int, int]) -> bytes:
    """The tail of an entry without bytes: torch leaves it out of the identification, which is then always the same."""
    complete_tail = bytearray(tail)
    complete_tail[at : at + DIGITS] = b"%020d" % number
    crc = crc32(complete_tail[at - DIGITS : at + DIGITS])
    for place in crcs:
        struct.pack_into("<I", complete_tail, place, crc)
    return bytes(complete_tail)


class _Archive:
    """A zip archive in the making, in the form that miniz gives it: contents as they are, checksums behind them."""

    def __init__(self, alignment: int) -> None:
        self._alignment = alignment
        self._position = 0
        self._parts: list[bytes] = []
        self._inside = 0
        """Bytes of the parts."""
        self._entries: list[tuple[bytes, int, int, int]] = []
        """Name, size, CRC, place of the local header."""
        self._crcs: list[list[int]] = []
        """Of each entry, where its CRC lies among the parts that are not taken yet."""

    @property
    def inside(self) -> int:
        """Bytes that are not taken yet."""
        return self._inside

    def crcs_of(self, entry: int) -> tuple[int, int]:
        """Where the CRC of an entry lies among the bytes that were taken last."""
        first, second = self._crcs[entry]
        return first, second

    def put(self, data: bytes) -> None:
        """Append bytes."""
        self._parts.append(data)
        self._position += len(data)
        self._inside += len(data)

    def skip(self, size: int) -> None:
        """Count bytes that somebody else puts there."""
        self._position += size

    def take(self) -> bytes:
        """What has been appended since the last time."""
        data = b"".join(self._parts)
        self._parts.clear()
        self._inside = 0
        return data

    def add(self, name: str, size: int, crc: int) -> None:
        """Append a local header; the contents follow."""
        start, encoded = self._position, name.encode()
        long = b""
        if size >= _FULL32:
            long += struct.pack("<2Q", size, 0)
        if start >= _FULL32:
            long += struct.pack("<Q", start)
        extra = struct.pack("<2H", 1, len(long)) + long if long else b""
        before = start + _LOCAL.size + len(encoded) + len(extra) + 4
        padding = -before % self._alignment
        extra += b"FB" + struct.pack("<H", padding) + b"Z" * padding
        flags = _UTF8 | (_DESCRIPTOR if size else 0)
        self.put(_LOCAL.pack(b"PK\x03\x04", 0, flags, 0, 0, 0, 0, 0, 0, len(encoded), len(extra)) + encoded + extra)
        self._entries.append((encoded, size, crc, start))
        self._crcs.append([])

    def describe(self) -> None:
        """Append what follows the contents of the entry that was added last."""
        _, size, crc, start = self._entries[-1]
        if not size:
            return
        self._crcs[-1].append(self._inside + 4)
        long = size >= _FULL32 or start >= _FULL32
        self.put(struct.pack("<4sL2Q" if long else "<4s3L", b"PK\x07\x08", crc, size, size))

    def end(self) -> None:
        """Append the directory."""
        start = self._position
        for number, (name, size, crc, local) in enumerate(self._entries):
            long = b""
            if size >= _FULL32:
                long += struct.pack("<2Q", size, size)
            if local >= _FULL32:
                long += struct.pack("<Q", local)
            extra = struct.pack("<2H", 1, len(long)) + long if long else b""
            short, place = min(size, _FULL32), min(local, _FULL32)
            flags = _UTF8 | (_DESCRIPTOR if size else 0)
            sizes = (crc, short, short, len(name), len(extra))
            self._crcs[number].append(self._inside + 16)
            self.put(_ENTRY.pack(b"PK\x01\x02", 0, 0, flags, 0, 0, 0, *sizes, 0, 0, 0, 0, place) + name + extra)
        length, end, count = self._position - start, self._position, len(self._entries)
        self.put(_END64.pack(b"PK\x06\x06", _END64.size - 12, _MADE, _NEEDED, 0, 0, count, count, length, start))
        self.put(_LOCATOR.pack(b"PK\x06\x07", 0, end, 1))
        self.put(_END.pack(b"PK\x05\x06", 0, 0, count, count, length, min(start, _FULL32), 0))


def _described_anew(pickled: bytes, dtype: torch.dtype, shape: tuple[int, ...]) -> bytes:
    """The description of one tensor, made one of a contiguous tensor of another shape with as many dimensions."""
    found = DESCRIPTION.fullmatch(pickled)
    if found is None:
        raise ValueError("a description that is not known")
    count = prod(shape) * (dtype.itemsize if found["dtype"] is not None else 1)
    sizes = [max(1, size) for size in reversed(shape)]
    strides = tuple(reversed(list(accumulate([1, *sizes[:-1]], int.__mul__)))) if shape else ()
    parts, done = [], 0
    for group, number in (("count", count), ("shape", shape), ("stride", strides)):
        first, end = found.span(group)
        new = _integer(number) if isinstance(number, int) else _numbers(number, pickled[first:end])
        parts += [pickled[done:first], new]
        done = end
    return b"".join([*parts, pickled[done:]])


def _numbers(numbers: tuple[int, ...], pickled: bytes) -> bytes:
    """A tuple of integers as pickle has them, in the place of one that is as long."""
    if not numbers:
        return pickled
    integers = b"".join(map(_integer, numbers))
    if len(numbers) > 3:
        return b"(" + integers + b"t" + pickled[-2:]
    return integers + (b"\x85", b"\x86", b"\x87")[len(numbers) - 1] + pickled[-2:]


def _integer(number: int) -> bytes:
    if number <= 0xFF:
        return b"K" + struct.pack("<B", number)
    if number <= _FULL16:
        return b"M" + struct.pack("<H", number)
    if number <= 0x7FFFFFFF:
        return b"J" + struct.pack("<i", number)
    length = (number.bit_length() >> 3) + 1
    return b"\x8a" + bytes([length]) + number.to_bytes(length, "little")


def _learn(dtype: torch.dtype, dims: int) -> _Kind | None:
    """How torch saves such tensors; None where that is not how it is known here."""
    try:
        first, second = (_saved(dtype, (size,) + (2,) * (dims - 1) if dims else ()) for size in (3, 300))
        kind = _kind_of(first[0], dtype)
        learnt = all(kind.frame(shape).record(payload) == record for record, payload, shape in (first, second))
    except MemoryError:  # says nothing about torch
        raise
    except Exception:  # of all that a type may lack, or another torch do
        return None
    return kind if learnt else None


def _saved(dtype: torch.dtype, shape: tuple[int, ...]) -> tuple[bytes, bytes, tuple[int, ...]]:
    payload = bytes(number % 2 for number in range(prod(shape) * dtype.itemsize))
    stream = io.BytesIO()
    torch.save(torch.tensor(list(payload), dtype=torch.uint8, device="cpu").view(dtype).view(shape), stream)
    return stream.getvalue(), payload, shape


def _kind_of(record: bytes, dtype: torch.dtype) -> _Kind:
    with zipfile.ZipFile(io.BytesIO(record)) as archive:
        entries = tuple((entry.filename, archive.read(entry)) for entry in archive.infolist())
    names = [name for name, _ in entries]
    (data,) = (place for place, name in enumerate(names) if _DATA.fullmatch(name))
    (pickled,) = (place for place, name in enumerate(names) if name.endswith("/data.pkl"))
    if data != len(names) - 3 or pickled > data or not names[-1].endswith(_IDENTIFICATION):
        raise ValueError("entries in an order that is not known")
    alignment = next((int(content) for name, content in entries if name.endswith("/.storage_alignment")), 64)
    return _Kind(dtype, entries, pickled, data, alignment)
