"""The manifest as a record, and directories held against it."""

import hashlib
import io
import json
import random
import zlib
from pathlib import Path
from typing import Any

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from bridge.training.checkpointing import checksums, marks
from bridge.training.checkpointing.errors import CheckpointDamagedError, CheckpointSaveError
from bridge.training.checkpointing.integrity import FileRecord, Manifest, find_damage, read_manifest, write_manifest
from bridge.training.checkpointing.verification import shares


def manifest(*files: FileRecord) -> Manifest:
    return Manifest(
        iteration=10,
        checkpoint_format="torch_dist",
        world_size=2,
        parallel_sizes={"tensor": 1, "data": 2},
        versions={"torch": "2.13.0"},
        files=files,
    )


names = st.lists(st.from_regex(r"[a-z_.]{1,12}[a-z]", fullmatch=True), min_size=1, max_size=3).map("/".join)
kinds = st.sampled_from(checksums.KINDS)


@given(st.dictionaries(names, st.tuples(st.integers(0, 2**60), st.integers(0, 2**32 - 1)), max_size=8), kinds)
def test_manifests_round_trip(files: dict[str, tuple[int, int]], kind: str) -> None:
    records = [
        FileRecord(name, size, f"{crc:08x}", kind, "" if size % 2 else f"{crc + 1:x}")
        for name, (size, crc) in sorted(files.items())
    ]
    original = manifest(*records)
    assert Manifest.from_json(original.to_json()) == original
    assert not records or json.loads(original.to_json())["checksum"] == kind


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("crc32", f"{zlib.crc32(b'some bytes'):08x}"),
        ("sha256", hashlib.sha256(b"some bytes").hexdigest()),
        ("xxh3", xxhash.xxh3_64_hexdigest(b"some bytes")),
    ],
)
def test_a_record_describes_the_file(tmp_path: Path, kind: str, expected: str) -> None:
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "a.json").write_bytes(b"some bytes")
    record = FileRecord.of(tmp_path, "tokenizer/a.json", kind)
    assert record == FileRecord("tokenizer/a.json", 10, expected, kind)
    assert record == FileRecord.of_bytes("tokenizer/a.json", b"some bytes", kind)


@pytest.mark.parametrize("kind", checksums.KINDS)
def test_a_stream_has_the_checksum_of_what_was_meant(tmp_path: Path, kind: str) -> None:
    pieces = [b"", b"a" * 70_000, memoryview(bytearray(range(256)) * 300).cast("B", (256, 300)), b"end"]
    with (tmp_path / "file").open("wb") as raw:
        stream = checksums.HashingStream(raw, kind)
        for piece in pieces:
            stream.write(piece)
        assert stream.tell() == stream.size == 146_803
    assert stream.checksum() == checksums.of_file(tmp_path / "file", kind)
    (tmp_path / "file").write_bytes(b"what a broken disk gave back")
    assert stream.checksum() != checksums.of_file(tmp_path / "file", kind)


class Refusing(io.BytesIO):
    """Takes half of what it is given, as a raw stream may."""

    def write(self, data: Any) -> int:
        return super().write(bytes(data)[: len(data) // 2])


def test_a_stream_that_writes_less_than_it_is_given_is_an_error() -> None:
    with pytest.raises(CheckpointSaveError, match="4 of 8 bytes could be written"):
        checksums.HashingStream(Refusing()).write(b"12345678")


SIZE = 1_000_000
SPARED = SIZE // 30
"""A byte between two of the pieces that a sample reads."""


@pytest.mark.parametrize(
    ("change", "found_by_sample"),
    [
        ({}, False),
        ({0: b"x"}, True),
        ({SIZE - 1: b"x"}, True),
        ({SIZE - 5000: b"\0" * 5000}, True),
        ({SIZE // 2: b"\0" * 70_000}, True),
        ({SPARED: b"x"}, False),
    ],
)
def test_a_sample_finds_other_contents_and_missing_ends_but_not_a_bit(
    tmp_path: Path, change: dict[int, bytes], found_by_sample: bool
) -> None:
    data = bytearray(random.Random(1).randbytes(SIZE))
    (tmp_path / "shard").write_bytes(data)
    record = FileRecord.of(tmp_path, "shard")
    assert record.sample
    for position, value in change.items():
        data[position : position + len(value)] = value
    (tmp_path / "shard").write_bytes(data)
    assert find_damage(tmp_path, [record]) == []
    assert bool(find_damage(tmp_path, [record], samples=True)) == found_by_sample
    assert bool(find_damage(tmp_path, [record], checksums=True)) == bool(change)


def test_a_sample_of_a_small_file_is_all_of_it(tmp_path: Path) -> None:
    (tmp_path / "small").write_bytes(b"0123456789")
    record = FileRecord.of(tmp_path, "small")
    assert record.sample == ""
    (tmp_path / "small").write_bytes(b"0123456788")
    assert find_damage(tmp_path, [record], samples=True) == [
        f"small has xxh3 {checksums.of_bytes(b'0123456788')} instead of {record.checksum}"
    ]


def test_damage_is_named_file_by_file(tmp_path: Path) -> None:
    for name in ("whole", "short", "long", "gone", "flipped", "folder", "link"):
        (tmp_path / name).write_bytes(b"0123456789")
    records = [
        FileRecord.of(tmp_path, name) for name in ("flipped", "folder", "gone", "link", "long", "short", "whole")
    ]
    (tmp_path / "short").write_bytes(b"0123")
    (tmp_path / "long").write_bytes(b"0123456789ab")
    (tmp_path / "gone").unlink()
    (tmp_path / "flipped").write_bytes(b"0123456788")
    (tmp_path / "folder").unlink()
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").unlink()
    (tmp_path / "link").symlink_to(tmp_path / "whole")
    by_size = [
        "folder is not a file",
        "gone is missing",
        "link is not a file",
        "long has 12 bytes instead of 10",
        "short has 4 bytes instead of 10",
    ]
    assert find_damage(tmp_path, records) == by_size
    found, expected = checksums.of_bytes(b"0123456788"), checksums.of_bytes(b"0123456789")
    flipped = f"flipped has xxh3 {found} instead of {expected}"
    assert find_damage(tmp_path, records, checksums=True) == [flipped, *by_size]


def test_no_manifest_is_none_and_a_torn_one_is_damage(tmp_path: Path) -> None:
    assert read_manifest(tmp_path) is None
    write_manifest(tmp_path, manifest())
    assert read_manifest(tmp_path) == manifest()
    text = (tmp_path / "manifest.json").read_text()
    (tmp_path / "manifest.json").write_text(text[: len(text) // 2])
    with pytest.raises(CheckpointDamagedError, match="is not a readable manifest"):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 3}, "its format_version is 3; this version of bridge reads 1 and 2"),
        ({"format_version": True}, "its format_version is True; this version of bridge reads 1 and 2"),
        ({"checksum": "md5"}, "its checksum is 'md5'; this version of bridge reads xxh3, crc32, sha256"),
        ({"world_size": 3}, "it has been changed since it was written: its own_checksum is another one"),
        ({"own_checksum": "0"}, "it has been changed since it was written: its own_checksum is another one"),
        ({"created": 10**400}, "its 'created' is 1000000000000000000000000000000000000000, not a finite number"),
        ({"metrics": {"loss": float("nan")}}, "its 'loss' is nan, not a finite number"),
        ({"files": {"a": {"size": -1, "checksum": ""}}}, "the size of 'a' is -1"),
        ({"files": {"a": {"size": 1, "checksum": "", "sample": 1}}}, "its 'sample' is 1, not of type str"),
        ({"iteration": True}, "its 'iteration' is True, not of type int"),
        ({"files": []}, "its 'files' is [], not of type dict"),
        ({"files": {"../../etc/x": {"size": 1, "checksum": ""}}}, "the file name '../../etc/x' leaves the checkpoint"),
        ({"files": {"/etc/x": {"size": 1, "checksum": ""}}}, "the file name '/etc/x' leaves the checkpoint"),
        ({"files": {"a//b": {"size": 1, "checksum": ""}}}, "the file name 'a//b' leaves the checkpoint"),
        ({"files": {"a": {"size": "1", "checksum": ""}}}, "its 'size' is '1', not of type int"),
    ],
)
def test_manifests_that_make_no_sense_are_refused(change: dict[str, object], message: str) -> None:
    content = json.loads(manifest().to_json()) | change
    with pytest.raises(ValueError) as caught:
        Manifest.from_json(json.dumps(content))
    assert message in str(caught.value)


@given(st.text(max_size=60) | st.binary(max_size=60).map(lambda data: data.decode("latin-1")))
def test_any_text_is_a_manifest_or_a_value_error(text: str) -> None:
    with pytest.raises(ValueError):
        Manifest.from_json(text)


def test_every_bit_of_a_manifest_counts() -> None:
    original = manifest(FileRecord("a", 5, "00ff", sample="77"), FileRecord("b", 1 << 30, "01"))
    data = original.to_json().encode()
    for position in range(len(data)):
        for bit in range(8):
            changed = bytearray(data)
            changed[position] ^= 1 << bit
            try:
                found = Manifest.from_json(changed.decode())
            except ValueError:
                continue
            # Nothing but the layout on the page has changed.
            assert found == original, (position, bit)


FIRST = """{
 "checkpoint_format": "torch_dist", "checksum": "crc32", "format_version": 1, "iteration": 7, "world_size": 1,
 "files": {"common.pt": {"checksum": "0a1b2c3d", "size": 12}}, "parallel_sizes": {"data": 1}, "versions": {}
}"""
"""As the first version wrote it."""


def test_manifests_of_the_first_version_are_read() -> None:
    found = Manifest.from_json(FIRST)
    assert found.files == (FileRecord("common.pt", 12, "0a1b2c3d", "crc32"),)
    assert (found.iteration, found.created, found.format_version) == (7, None, 1)
    assert Manifest.from_json(found.to_json()) == found


def test_checksums_of_several_kinds_do_not_make_a_manifest() -> None:
    mixed = manifest(FileRecord("a", 1, "00", "crc32"), FileRecord("b", 1, "00", "sha256"))
    with pytest.raises(ValueError, match="checksums of several kinds: crc32, sha256"):
        mixed.to_json()


@given(st.lists(st.integers(0, 1 << 40), max_size=40), st.integers(1, 8), st.booleans())
def test_the_reading_is_shared_evenly_and_every_file_is_read_once(
    sizes: list[int], ranks: int, every_byte: bool
) -> None:
    records = [FileRecord(f"{number:03d}", size, "") for number, size in enumerate(sizes)]
    divided = shares(records, ranks, every_byte)
    assert len(divided) == ranks
    assert sorted(record.name for share in divided for record in share) == [record.name for record in records]
    cost = [sum(record.size if every_byte else 1 for record in share) for share in divided]
    largest = max((record.size if every_byte else 1 for record in records), default=0)
    assert max(cost) - min(cost) <= largest


def test_a_link_in_the_place_of_a_manifest_that_leads_nowhere_is_damage(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").symlink_to("gone")
    with pytest.raises(CheckpointDamagedError, match="it is a link to nothing"):
        read_manifest(tmp_path)


def test_a_mark_is_read_whatever_it_holds_and_removed(tmp_path: Path) -> None:
    assert (marks.is_marked(tmp_path), marks.problem_of(tmp_path)) == (False, None)
    marks.mark(tmp_path, "x.distcp is missing")
    assert (marks.is_marked(tmp_path), marks.problem_of(tmp_path)) == (True, "x.distcp is missing")
    for content in (b"", b"{", b"[]", b"\xff", b'{"problem": 3}', b"[" * 100_000):
        (tmp_path / ".bridge-damaged").write_bytes(content)
        assert marks.is_marked(tmp_path)
        assert isinstance(marks.problem_of(tmp_path), str)
    marks.unmark(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_marked_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "iter_0000001").symlink_to("elsewhere")
    marks.mark(tmp_path / "iter_0000001", "damaged")
    marks.mark(tmp_path / "iter_0000002", "absent")
    assert list((tmp_path / "elsewhere").iterdir()) == []
