"""A tensor is found in the record that torch wrote, and nothing else is taken for one."""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bridge.training.checkpointing.io.record import HEAD, TAIL, Layouts, describe_tensor, find_layout

DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.bool),
    *(torch.complex64, torch.complex128),
]


def record_of(value: Any, **options: Any) -> bytearray:
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return bytearray(buffer.getvalue())


def values(dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """Random bytes as a tensor; for booleans, zeros and ones."""
    size = torch.Size(shape).numel() * dtype.itemsize
    raw = torch.randint(0, 2 if dtype is torch.bool else 256, (size,), dtype=torch.uint8)
    return raw.view(dtype).view(shape)


def raw_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def found_in(record: bytearray, dtype: torch.dtype, shape: tuple[int, ...], layouts: Layouts) -> bytes | None:
    start, size = layouts.payload(record, 0, record, len(record), len(record), dtype, shape)
    return None if start < 0 else bytes(record[start : start + size])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_type_is_found(dtype: torch.dtype) -> None:
    layouts = Layouts()
    for shape in [(), (0,), (0, 3), (1,), (7,), (3, 5), (2, 3, 4), (2, 1, 3, 2, 1), (300, 300)]:
        for _ in range(2):  # the second time by the layout of the first
            tensor = values(dtype, shape)
            assert found_in(record_of(tensor), dtype, shape, layouts) == raw_bytes(tensor)


def test_a_part_of_a_larger_storage_is_found() -> None:
    whole = torch.arange(10_000, dtype=torch.float32)
    assert found_in(record_of(whole[3:9]), torch.float32, (6,), Layouts()) == raw_bytes(whole[3:9])
    far = whole[9000:9010]
    assert found_in(record_of(far), torch.float32, (10,), Layouts()) == raw_bytes(far)


@pytest.mark.parametrize(
    "value",
    [
        pytest.param(torch.zeros(4, 3).t(), id="not contiguous"),
        pytest.param(torch.nn.Parameter(torch.zeros(3, 4)), id="a parameter"),
        pytest.param(torch.zeros(3, 4).to_sparse(), id="sparse"),
        pytest.param([torch.zeros(3, 4)], id="a list"),
        pytest.param({"a": 1}, id="an object"),
        pytest.param(torch.zeros(3, 5), id="another shape"),
        pytest.param(torch.zeros(3, 4, dtype=torch.float64), id="another type"),
        pytest.param(torch.zeros(3, 4, dtype=torch.complex64).conj(), id="conjugated"),
    ],
)
def test_what_is_no_plain_tensor_of_that_kind_is_not_taken_for_one(value: Any) -> None:
    assert found_in(record_of(value), torch.float32, (3, 4), Layouts()) is None


def test_the_form_before_zip_is_not_recognised() -> None:
    record = record_of(torch.zeros(3, 4), _use_new_zipfile_serialization=False)
    assert found_in(record, torch.float32, (3, 4), Layouts()) is None


def test_layouts_that_differ_are_both_known() -> None:
    """Records of one kind whose storages begin at different places in their archives."""
    layouts, tensor = Layouts(), torch.rand(64, 64)
    plain = record_of(tensor)
    renamed = bytearray(bytes(plain).replace(b"archive/", b"another/"))
    for record in (plain, renamed, plain, renamed):
        assert found_in(record, torch.float32, (64, 64), layouts) == raw_bytes(tensor)


def test_a_record_of_the_other_byte_order_is_not_recognised() -> None:
    source = zipfile.ZipFile(io.BytesIO(bytes(record_of(torch.rand(4)))))
    content = {name: source.read(name) for name in source.namelist()}
    content["archive/byteorder"] = b"big"
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in content.items():
            archive.writestr(name, data)
    assert found_in(bytearray(buffer.getvalue()), torch.float32, (4,), Layouts()) is None


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_an_archive_of_another_writer_is_found_if_it_is_not_compressed(compression: int) -> None:
    tensor = torch.rand(5, 5)
    source = zipfile.ZipFile(io.BytesIO(bytes(record_of(tensor))))
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name in source.namelist():
            archive.writestr(name, source.read(name))
    found = found_in(bytearray(buffer.getvalue()), torch.float32, (5, 5), Layouts())
    assert found == (raw_bytes(tensor) if compression == zipfile.ZIP_STORED else None)


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_garbled_records_are_refused_or_lead_inside_the_record(data: st.DataObject) -> None:
    record = record_of(torch.arange(48, dtype=torch.int32).view(6, 8))
    layouts = Layouts()
    if data.draw(st.booleans()):
        found_in(bytearray(record), torch.int32, (6, 8), layouts)
    for _ in range(data.draw(st.integers(1, 6))):
        place = data.draw(st.integers(0, len(record) - 1))
        record[place] = data.draw(st.integers(0, 255))
    cut = data.draw(st.one_of(st.just(len(record)), st.integers(0, len(record))))
    record = record[:cut]
    start, size = layouts.payload(record, 0, record, len(record), len(record), torch.int32, (6, 8))
    assert (start, size) == (-1, 0) or (size == 192 and 0 <= start <= len(record) - size)


@pytest.mark.parametrize("length", [0, 1, 21, 22, 63])
def test_a_record_that_is_too_short_is_none(length: int) -> None:
    data = b"PK\x05\x06" + bytes(18)
    assert find_layout(data[:length], data[-length:] if length else b"", length, torch.float32, (1,)) is None


def test_a_storage_that_is_smaller_than_the_tensor_is_refused() -> None:
    good = b"K\x04tq\x05QK\x00K\x04\x85q\x06K\x01\x85"
    pickled = zipfile.ZipFile(io.BytesIO(bytes(record_of(torch.zeros(4))))).read("archive/data.pkl")
    assert good in pickled
    described = describe_tensor(pickled)
    assert described is not None and described.length == 16
    assert describe_tensor(pickled.replace(good, b"K\x03tq\x05QK\x00K\x04\x85q\x06K\x01\x85")) is None
    assert describe_tensor(pickled.replace(good, b"K\x04tq\x05QK\x01K\x04\x85q\x06K\x01\x85")) is None
    negative = b"J\xff\xff\xff\xff"
    assert describe_tensor(pickled.replace(good, b"K\x04tq\x05Q" + negative + b"K\x04\x85q\x06K\x01\x85")) is None


def test_a_tensor_of_more_than_4_gib_is_found_by_the_long_numbers() -> None:
    """The ends of a record as torch writes them for 6 GiB; the middle is never looked at."""
    count = 6 << 30
    small = record_of(torch.zeros(1, dtype=torch.uint8))
    layout = find_layout(bytes(small[:HEAD]), bytes(small[-TAIL:]), len(small), torch.uint8, (1,))
    assert layout is not None
    archive = zipfile.ZipFile(io.BytesIO(bytes(small)))
    big = b"\x8a\x05" + count.to_bytes(5, "little")
    pickled = archive.read("archive/data.pkl").replace(b"K\x01tq\x05Q", big + b"tq\x05Q")
    pickled = pickled.replace(b"K\x00K\x01\x85", b"K\x00" + big + b"\x85")
    head, tail, length = long_record(pickled, count)
    found = find_layout(head, tail, length, torch.uint8, (count,))
    assert found is not None
    assert (found.payload, found.size) == (len(head), count)


def long_record(pickled: bytes, count: int) -> tuple[bytes, bytes, int]:
    """The first and the last bytes of a zip archive with `data.pkl` and `count` bytes of storage, and its length."""

    def local(name: bytes, data: bytes) -> bytes:
        return struct.pack("<4s5H3L2H", b"PK\x03\x04", 0, 0, 0, 0, 0, 0, 0, 0, len(name), 0) + name + data

    def entry(name: bytes, crc: int, size: int, at: int) -> bytes:
        extra = b"" if size < 1 << 32 else struct.pack("<2H2Q", 1, 16, size, size)
        shown = min(size, 0xFFFFFFFF)
        fixed = (0, 0, 0, 0, 0, 0, crc, shown, shown, len(name), len(extra), 0, 0, 0, 0, at)
        return struct.pack("<4s6H3L5H2L", b"PK\x01\x02", *fixed) + name + extra

    first = local(b"archive/data.pkl", pickled)
    head = first + local(b"archive/data/0", b"")
    start = len(head) + count
    directory = entry(b"archive/data.pkl", zlib.crc32(pickled), len(pickled), 0) + entry(
        b"archive/data/0", 0, count, len(first)
    )
    end64 = struct.pack("<4sQ2H2L4Q", b"PK\x06\x06", 44, 0, 0, 0, 0, 2, 2, len(directory), start)
    locator = struct.pack("<4sLQL", b"PK\x06\x07", 0, start + len(directory), 1)
    end = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 2, 2, len(directory), 0xFFFFFFFF, 0)
    tail = directory + end64 + locator + end
    return head, tail, start + len(tail)
