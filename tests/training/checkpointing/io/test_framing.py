"""A record is, byte for byte, what torch.save writes."""

from __future__ import annotations

import io
import zipfile
import zlib
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bridge.training.checkpointing.io.framing import Frames
from bridge.training.checkpointing.io.tails import complete
from tests.training.checkpointing.io.test_record import DTYPES, raw_bytes, record_of, values

SHAPES = [(), (0,), (0, 3), (3, 0, 2), (1,), (7,), (255, 1), (256,), (3, 5), (2, 3, 4), (2, 1, 3, 2, 1), (66000,)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_records_are_torchs(dtype: torch.dtype) -> None:
    frames = Frames()
    for shape in SHAPES:
        tensor = values(dtype, shape)
        frame = frames.of(dtype, tensor.shape)
        assert frame is not None
        assert frame.record(raw_bytes(tensor)) == record_of(tensor)
        assert frame.length == len(record_of(tensor))


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(DTYPES), st.lists(st.integers(0, 9), max_size=6), st.integers(0, 2**32))
def test_records_of_random_tensors_are_torchs(dtype: torch.dtype, shape: list[int], seed: int) -> None:
    torch.manual_seed(seed)
    tensor = values(dtype, tuple(shape))
    frame = Frames().of(dtype, tensor.shape)
    assert frame is not None
    assert frame.record(raw_bytes(tensor)) == record_of(tensor)


def test_another_way_to_save_is_noticed() -> None:
    """Without CRCs, torch writes something else."""
    from torch.serialization import get_crc32_options, set_crc32_options

    before = get_crc32_options()
    set_crc32_options(False)
    try:
        assert Frames().of(torch.float32, torch.Size((3,))) is None
    finally:
        set_crc32_options(before)


class WithoutPayload(io.RawIOBase):
    """Takes what is written and keeps all of it but what is large."""

    def __init__(self) -> None:
        self.position = 0
        self.parts: list[tuple[int, bytes]] = []

    def write(self, data: Any) -> int:
        size = memoryview(data).nbytes
        if size < 1 << 20:
            self.parts.append((self.position, bytes(data)))
        self.position += size
        return size

    def around(self, payload: int, size: int) -> tuple[bytes, bytes]:
        """What was written before the payload and behind it."""
        head = b"".join(part for at, part in self.parts if at < payload)
        return head, b"".join(part for at, part in self.parts if at >= payload + size)


@pytest.mark.parametrize(
    "size", [(4 << 30) + 5, *(pytest.param(size, marks=pytest.mark.slow) for size in (0xFFFFFFFE, 0xFFFFFFFF))]
)
def test_records_of_tensors_beyond_four_gibibytes_are_torchs(size: int) -> None:
    """The tensor's memory is never touched, so it takes none."""
    tensor = torch.empty(size, dtype=torch.uint8)
    stream = WithoutPayload()
    torch.save(tensor, stream)
    frame = Frames().of(torch.uint8, tensor.shape)
    assert frame is not None and frame.spots is not None
    assert stream.position == frame.length
    head, expected = stream.around(len(frame.head), size)
    crc = int.from_bytes(expected[4:8], "little")
    tail = bytearray(frame.tail)
    complete(tail, 0, crc, frame.spots)
    assert frame.head == head
    assert bytes(tail) == expected


def test_the_checksums_of_the_archive_are_right() -> None:
    tensor = values(torch.float32, (100,))
    frame = Frames().of(torch.float32, tensor.shape)
    assert frame is not None
    record = frame.record(raw_bytes(tensor))
    with zipfile.ZipFile(io.BytesIO(record)) as archive:
        assert archive.testzip() is None
        (payload,) = [entry for entry in archive.infolist() if "/data/" in entry.filename and entry.file_size == 400]
        assert zlib.crc32(raw_bytes(tensor)) == payload.CRC
