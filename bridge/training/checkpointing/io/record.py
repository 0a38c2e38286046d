"""Finding a tensor's bytes in the record that `torch.save` wrote for it, without unpickling the record.

torch DCP stores each tensor as what `torch.save` writes: a zip archive whose entries are stored as they are, among
them `data.pkl`, which describes the tensor, and `data/<name>`, its bytes. The archive's directory, at its end, says
where they are. Both are checked here against what torch writes for one contiguous tensor. What looks different is
not an error: it is left to torch's own reader.

Formats: PKWARE's APPNOTE.TXT for zip, `pickletools` for pickle, torch/serialization.py for the names.
"""

from __future__ import annotations

import re
import struct
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import torch
from zlib_ng.zlib_ng import crc32

HEAD = 1024
"""Bytes at the beginning of a record that are enough to find the tensor in what torch writes."""
TAIL = 1024
"""Likewise at its end."""

_END = struct.Struct("<4s4H2LH")
_LOCATOR = struct.Struct("<4sLQL")
_END64 = struct.Struct("<4sQ2H2L4Q")
_ENTRY = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")
_MOST_ENTRIES = 64
_ENCRYPTED, _STORED = 1, 0
_FULL16, _FULL32 = 0xFFFF, 0xFFFFFFFF
"""Values that stand for a longer number elsewhere."""

_INTEGER = rb"(?:K.|M..|J.{4}|\x8a(?:\x05.{5}|\x06.{6}|\x07.{7}|\x08.{8}))"
_TUPLE = rb"(?:\)|(?:%(i)s\x85|%(i)s{2}\x86|%(i)s{3}\x87|\(%(i)s{4,}t)q.)" % {b"i": _INTEGER}
DESCRIPTION = re.compile(
    rb"\x80\x02ctorch\._utils\n(?P<call>_rebuild_tensor_v[23])\nq."
    rb"\(\(X\x07\x00\x00\x00storageq."
    rb"c(?P<storage>torch\n\w+|torch\.storage\nUntypedStorage)\nq."
    rb"X(?P<name>\x01\x00\x00\x00\d|\x02\x00\x00\x00\d\d)q."
    rb"X.\x00\x00\x00(?P<device>[a-z]+(?::\d+)?)q."
    rb"(?P<count>%(i)s)tq.Q"
    rb"(?P<offset>%(i)s)(?P<shape>%(t)s)(?P<stride>%(t)s)[\x88\x89]"
    rb"ccollections\nOrderedDict\nq.\)Rq."
    rb"(?:ctorch\n(?P<dtype>\w+)\nq.)?tq.Rq.\." % {b"i": _INTEGER, b"t": _TUPLE},
    re.DOTALL,
)
"""The operations that pickling one plain tensor takes, and no others."""
_NUMBER = re.compile(_INTEGER, re.DOTALL)

_UNTYPED = b"torch.storage\nUntypedStorage"
_BY_STORAGE: Mapping[bytes, torch.dtype] = {
    b"torch\n" + name: dtype
    for name, dtype in {
        b"DoubleStorage": torch.float64,
        b"FloatStorage": torch.float32,
        b"HalfStorage": torch.float16,
        b"BFloat16Storage": torch.bfloat16,
        b"LongStorage": torch.int64,
        b"IntStorage": torch.int32,
        b"ShortStorage": torch.int16,
        b"CharStorage": torch.int8,
        b"ByteStorage": torch.uint8,
        b"BoolStorage": torch.bool,
        b"ComplexFloatStorage": torch.complex64,
        b"ComplexDoubleStorage": torch.complex128,
    }.items()
}
_BY_NAME: Mapping[bytes, torch.dtype] = {
    name.encode(): value for name, value in vars(torch).items() if isinstance(value, torch.dtype)
}


@dataclass(frozen=True)
class Described:
    """What a record's `data.pkl` says about its tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    storage: bytes
    """The name, in `data/`, of the bytes that the tensor is a part of."""
    storage_bytes: int
    first: int
    """Where in them the tensor begins, in bytes."""

    @property
    def length(self) -> int:
        """Bytes of the tensor."""
        return prod(self.shape) * self.dtype.itemsize


def describe_tensor(pickled: bytes) -> Described | None:
    """What a `data.pkl` describes; None where that is not one contiguous tensor in the form that torch writes."""
    found = DESCRIPTION.fullmatch(pickled)
    if found is None:
        return None
    untyped = found["storage"] == _UNTYPED
    # The two calls go with the two kinds of storage: one has the type of its elements, the other names it apart.
    if untyped != (found["call"] == b"_rebuild_tensor_v3") or untyped != (found["dtype"] is not None):
        return None
    dtype = _BY_NAME.get(found["dtype"]) if untyped else _BY_STORAGE.get(found["storage"])
    if dtype is None:
        return None
    (count,), (offset,) = _numbers(found["count"]), _numbers(found["offset"])
    shape, stride = _numbers(found["shape"]), _numbers(found["stride"])
    if min((count, offset, *shape, *stride)) < 0 or not _is_contiguous(shape, stride):
        return None
    described = Described(
        dtype, shape, found["name"][4:], count * (1 if untyped else dtype.itemsize), offset * dtype.itemsize
    )
    return described if described.first + described.length <= described.storage_bytes else None


def _numbers(operations: bytes) -> tuple[int, ...]:
    return tuple(_number(found[0]) for found in _NUMBER.finditer(operations))


def _number(operation: bytes) -> int:
    code = operation[:1]
    if code == b"\x8a":
        return int.from_bytes(operation[2:], "little", signed=True)
    return int.from_bytes(operation[1:], "little", signed=code == b"J")


def _is_contiguous(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    if len(shape) != len(stride):
        return False
    if 0 in shape:
        return True
    expected = 1
    for size, step in zip(reversed(shape), reversed(stride), strict=True):
        if size != 1 and step != expected:
            return False
        expected *= size
    return True


@dataclass(frozen=True)
class Layout:
    """Where the parts of a record are. Records of equal tensors have the same; they differ in payload and checksums."""

    payload: int
    """Where the tensor's bytes begin, in bytes from the record's beginning."""
    size: int
    """How many they are."""
    header: bytes
    """Everything before the bytes of its storage."""
    entry: bytes
    """What the archive's directory says about the payload, up to its checksum."""
    entry_place: int
    """Where that is, in bytes back from the record's end."""
    entry_rest: bytes
    """And what it says behind the checksum."""
    end: bytes
    """The end of the directory."""

    def matches(self, head: bytearray, at: int, tail: bytearray, end: int) -> bool:
        """Whether a record has this layout: it begins at `head[at]` and ends before `tail[end]`."""
        entry = end - self.entry_place
        return (
            head.startswith(self.header, at)
            and tail.startswith(self.entry, entry)
            and tail.startswith(self.entry_rest, entry + len(self.entry) + 4)
            and tail.startswith(self.end, end - len(self.end))
        )


def find_layout(head: bytes, tail: bytes, length: int, dtype: torch.dtype, shape: tuple[int, ...]) -> Layout | None:
    """The layout of a record.

    Args:
        head: its first bytes, `HEAD` of them or all.
        tail: its last bytes, `TAIL` of them or all.
        length: bytes of the record.
        dtype: of the tensor that belongs there.
        shape: of the tensor that belongs there.

    Returns:
        None where it is not what torch writes for one contiguous tensor of that type and shape.
    """
    try:
        return _find_layout(head, tail, length, dtype, shape)
    except (struct.error, ValueError, IndexError):
        return None


class _Unrecognised(ValueError):
    pass


def _require(condition: bool) -> None:
    if not condition:
        raise _Unrecognised


@dataclass(frozen=True)
class _Entry:
    crc: int
    size: int
    local: int
    """Where its local header begins, in bytes from the record's beginning."""
    place: int
    """Where it is in the directory, in bytes from the beginning of the record's tail."""
    rest: int
    """Bytes of it in the directory."""


def _find_layout(head: bytes, tail: bytes, length: int, dtype: torch.dtype, shape: tuple[int, ...]) -> Layout | None:
    _require(len(head) <= length and len(tail) <= length)
    entries, directory = _entries(tail, length)
    (root,) = {name.split(b"/", 1)[0] for name in entries}
    pickled = _content(head, root + b"/data.pkl", entries, directory)
    _require(_content_or(head, root + b"/byteorder", entries, directory, b"little") == b"little" == _native())
    described = describe_tensor(pickled)
    if described is None or (described.dtype, described.shape) != (dtype, shape):
        raise _Unrecognised
    name = root + b"/data/" + described.storage
    _require([other for other in entries if other.startswith(root + b"/data/")] == [name])
    entry = entries[name]
    _require(entry.size == described.storage_bytes)
    start = _start(head, name, entry, directory)
    return Layout(
        payload=start + described.first,
        size=described.length,
        header=bytes(head[:start]),
        entry=bytes(tail[entry.place : entry.place + 16]),
        entry_place=len(tail) - entry.place,
        entry_rest=bytes(tail[entry.place + 20 : entry.place + entry.rest]),
        end=bytes(tail[-_END.size :]),
    )


def _native() -> bytes:
    return sys.byteorder.encode()


def _entries(tail: bytes, length: int) -> tuple[dict[bytes, _Entry], int]:
    """The directory's entries by name, and where it begins, in bytes from the record's beginning."""
    skipped = length - len(tail)
    _require(len(tail) >= _END.size)
    sign, disk, first_disk, here, count, size, start, comment = _END.unpack_from(tail, len(tail) - _END.size)
    _require(sign == b"PK\x05\x06" and (disk, first_disk, comment) == (0, 0, 0))
    end = length - _END.size
    if tail[-_END.size - _LOCATOR.size :][:4] == b"PK\x06\x07":
        end -= _LOCATOR.size + _END64.size
        values = _END64.unpack_from(tail, end - skipped)
        _require(values[0] == b"PK\x06\x06" and values[1] == _END64.size - 12 and values[4:6] == (0, 0))
        _, _, _, _, _, _, here, count, size64, start64 = values
        _require(size in (size64, _FULL32) and start in (start64, _FULL32))
        _require(_LOCATOR.unpack_from(tail, len(tail) - _END.size - _LOCATOR.size)[1:] == (0, end, 1))
        size, start = size64, start64
    _require(here == count <= _MOST_ENTRIES and start + size == end and start >= skipped)
    entries: dict[bytes, _Entry] = {}
    at = start - skipped
    for _ in range(count):
        name, entry = _entry(tail, at)
        _require(name not in entries)
        entries[name] = entry
        at += entry.rest
    _require(at == end - skipped)
    return entries, start


def _entry(tail: bytes, at: int) -> tuple[bytes, _Entry]:
    values = _ENTRY.unpack_from(tail, at)
    sign, _, _, flags, method, _, _, crc, packed, size, named, extra, comment, disk, _, _, local = values
    _require(sign == b"PK\x01\x02" and method == _STORED and not flags & _ENCRYPTED and disk == 0)
    name = bytes(tail[at + _ENTRY.size :][:named])
    _require(len(name) == named > 0)
    if _FULL32 in (packed, size, local):
        packed, size, local = _longer(tail[at + _ENTRY.size + named :][:extra], packed, size, local)
    _require(packed == size)
    return name, _Entry(crc, size, local, at, _ENTRY.size + named + extra + comment)


def _longer(extra: bytes, packed: int, size: int, local: int) -> tuple[int, int, int]:
    """The numbers that do not fit into an entry, from its extra field of kind 1."""
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, at)
        if kind == 1:
            numbers = iter(struct.unpack_from(f"<{length // 8}Q", extra, at + 4))
            # In this order, and only those that are needed.
            size = next(numbers, -1) if size == _FULL32 else size
            packed = next(numbers, -1) if packed == _FULL32 else packed
            return packed, size, next(numbers, -1) if local == _FULL32 else local
        at += 4 + length
    raise _Unrecognised


def _start(head: bytes, name: bytes, entry: _Entry, directory: int) -> int:
    """Where the bytes of an entry begin, by its local header, which must be in the record's head."""
    _require(0 <= entry.local < directory)
    sign, _, flags, method, _, _, _, _, _, named, extra = _LOCAL.unpack_from(head, entry.local)
    _require(sign == b"PK\x03\x04" and method == _STORED and not flags & _ENCRYPTED)
    at = entry.local + _LOCAL.size
    _require(head[at : at + named] == name)
    start: int = at + named + extra
    _require(start <= len(head) and start + entry.size <= directory)
    return start


def _content(head: bytes, name: bytes, entries: Mapping[bytes, _Entry], directory: int) -> bytes:
    _require(name in entries)
    entry = entries[name]
    start = _start(head, name, entry, directory)
    content = bytes(head[start : start + entry.size])
    _require(len(content) == entry.size and crc32(content) == entry.crc)
    return content


def _content_or(head: bytes, name: bytes, entries: Mapping[bytes, _Entry], directory: int, default: bytes) -> bytes:
    return _content(head, name, entries, directory) if name in entries else default


class Layouts:
    """The layouts found so far. Most records of a checkpoint have that of another, which is quick to see."""

    def __init__(self) -> None:
        self._known: dict[tuple[torch.dtype, tuple[int, ...], int], list[Layout]] = {}

    def payload(
        self,
        head: bytearray,
        at: int,
        tail: bytearray,
        end: int,
        length: int,
        dtype: torch.dtype,
        shape: tuple[int, ...],
    ) -> tuple[int, int]:
        """Where a record's tensor begins, and how long it is, in bytes; (-1, 0) where it is not recognised.

        Args:
            head: holds the record's first bytes, from `at` on.
            at: where it begins there.
            tail: holds the record's last bytes, up to `end`. It may be `head`.
            end: where it ends there.
            length: bytes of the record.
            dtype: of the tensor that belongs there.
            shape: of the tensor that belongs there.
        """
        kind = (dtype, shape, length)
        known = self._known.get(kind)
        if known is not None:
            for layout in known:
                if layout.matches(head, at, tail, end):
                    return layout.payload, layout.size
        first, last = min(HEAD, length), min(TAIL, length)
        found = find_layout(bytes(head[at : at + first]), bytes(tail[end - last : end]), length, dtype, shape)
        if found is None:
            return -1, 0
        layouts = self._known.setdefault(kind, [])
        if len(layouts) < _MOST_LAYOUTS:
            layouts.append(found)
        return found.payload, found.size


_MOST_LAYOUTS = 4
"""Of one kind of record that are kept. Every writer has its own, and a checkpoint has few writers."""
