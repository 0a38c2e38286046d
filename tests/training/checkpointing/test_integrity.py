"""The manifest as a record, and directories held against it."""

import json
import zlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridge.training.checkpointing.errors import CheckpointDamagedError
from bridge.training.checkpointing.integrity import FileRecord, Manifest, find_damage, read_manifest, write_manifest


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


@given(st.dictionaries(names, st.tuples(st.integers(0, 2**60), st.integers(0, 2**32 - 1)), max_size=8))
def test_manifests_round_trip(files: dict[str, tuple[int, int]]) -> None:
    records = [FileRecord(name, size, f"{crc:08x}") for name, (size, crc) in sorted(files.items())]
    original = manifest(*records)
    assert Manifest.from_json(original.to_json()) == original


def test_a_record_describes_the_file(tmp_path: Path) -> None:
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "a.json").write_bytes(b"some bytes")
    record = FileRecord.of(tmp_path, "tokenizer/a.json")
    assert record == FileRecord("tokenizer/a.json", 10, f"{zlib.crc32(b'some bytes'):08x}")


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
    flipped = f"flipped has crc32 {zlib.crc32(b'0123456788'):08x} instead of {zlib.crc32(b'0123456789'):08x}"
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
        ({"format_version": 2}, "its format_version is 2; this version of bridge reads 1"),
        ({"checksum": "md5"}, "its checksum is 'md5'; this version of bridge reads 'crc32'"),
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
