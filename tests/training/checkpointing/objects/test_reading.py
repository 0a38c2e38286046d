"""What a load does in a bucket: which checkpoint it chooses, and which bytes it reads."""

from __future__ import annotations

import os
import re
import signal
import tempfile
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemWriter

from bridge.training.checkpointing.errors import (
    CheckpointDamagedError,
    CheckpointNotFoundError,
    NotACheckpointError,
    ObjectStoreError,
)
from bridge.training.checkpointing.integrity import FileRecord, Manifest
from bridge.training.checkpointing.io.plan import Want
from bridge.training.checkpointing.io.reader import ChunkShapes, DirectReader
from bridge.training.checkpointing.io.reading import read_wants
from bridge.training.checkpointing.objects.choosing import choose
from bridge.training.checkpointing.objects.client import ObjectInfo, ObjectStore
from bridge.training.checkpointing.objects.labels import CHECKSUM, label_of_bytes
from bridge.training.checkpointing.objects.listing import BucketListing, list_bucket
from bridge.training.checkpointing.objects.local_copy import download, make_directory, verify_in_place
from bridge.training.checkpointing.objects.remote_file import RemoteFile
from bridge.training.checkpointing.objects.stored import read_options
from bridge.training.checkpointing.objects.upload import upload_checkpoint
from bridge.training.object_url import ObjectUrl
from tests.training.checkpointing.objects.store import Server, make_checkpoint

URL = ObjectUrl("bucket", "run")


def listing(
    whole: list[int],
    tracked: int | None = None,
    *,
    has_tracker: bool = False,
    unfinished: tuple[int, ...] = (),
    foreign: tuple[str, ...] = (),
) -> BucketListing:
    manifests = {n: Manifest(n, "torch_dist", 1, {}, {}, ()) for n in whole}
    named = frozenset() if tracked is None else frozenset({tracked})
    return BucketListing(URL, manifests, unfinished, {}, tracked, named, has_tracker or tracked is not None, foreign)


@pytest.mark.parametrize(
    ("found", "step", "fallback", "expected"),
    [
        (listing([]), None, True, []),
        (listing([], unfinished=(10,)), None, True, []),
        (listing([10, 20, 30], 20), None, True, [20, 10]),
        (listing([10, 20, 30], 20), None, False, [20]),
        (listing([10, 20]), None, False, [20, 10]),
        (listing([10, 20], has_tracker=True), None, True, [20, 10]),
        (listing([10, 20], 20), 10, True, [10]),
    ],
)
def test_the_choice(found: BucketListing, step: int | None, fallback: bool, expected: list[int]) -> None:
    assert [n for n, _ in choose(found, step, fallback=fallback, setting="checkpoint.load")] == expected


@pytest.mark.parametrize(
    ("found", "step", "error", "message"),
    [
        (
            listing([10], 10, unfinished=(20,)),
            20,
            CheckpointNotFoundError,
            "checkpoint.load: iteration 20 cannot be loaded from s3://bucket/run: its upload, or its deletion, did not "
            "end; whole are 10",
        ),
        (
            listing([10], has_tracker=True),
            None,
            CheckpointDamagedError,
            "checkpoint.load: the trackers in s3://bucket/run name no whole checkpoint; whole are 10; set "
            "checkpoint.ckpt_step to one of those",
        ),
        (
            listing([], foreign=("data",)),
            None,
            NotACheckpointError,
            "checkpoint.load: there is no checkpoint in s3://bucket/run; found in it: data",
        ),
    ],
)
def test_what_cannot_be_chosen(found: BucketListing, step: int | None, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        choose(found, step, fallback=False, setting="checkpoint.load")


def info_of(store: ObjectStore, key: str) -> ObjectInfo:
    return next(found for found in store.objects(key) if found.key == key)


def test_neighbouring_small_reads_are_one_request(server: Server, store: ObjectStore) -> None:
    data = bytes(range(256)) * 1024
    store.put("file", data)
    file = RemoteFile(store, info_of(store, "file"))
    server.rules()
    for at in range(0, 60_000, 500):
        into = bytearray(300)
        file.read(memoryview(into), at)
        assert into == data[at : at + 300]
    assert len(server.seen()) == 1
    into = bytearray(100_000)
    file.read(memoryview(into), 100_001)
    assert into == data[100_001:200_001]
    assert len(server.seen()) == 2
    with pytest.raises(CheckpointDamagedError, match="file ends at byte 262144, and 262140 to 262145 are needed"):
        file.read(memoryview(bytearray(5)), 262_140)


def test_an_object_that_was_replaced_since_is_not_read(store: ObjectStore) -> None:
    store.put("file", bytes(100_000))
    file = RemoteFile(store, info_of(store, "file"))
    store.put("file", bytes([1]) * 100_000)
    with pytest.raises(ObjectStoreError, match=r"GetObject of s3://.*/file failed: status 412"):
        file.read(memoryview(bytearray(70_000)), 0)


@pytest.mark.parametrize("trouble", ["", "status:503", "halve"])
def test_tensors_are_read_by_ranges_straight_into_place(
    server: Server, store: ObjectStore, tmp_path: Path, trouble: str
) -> None:
    """Small tensors, large ones, and a part of one: no more bytes than are needed, whatever goes wrong under way."""
    saved = {f"small{i}": torch.randn(50, i + 1) for i in range(40)}
    saved |= {"large": torch.randn(3 << 20), "rows": torch.randn(2048, 1024)}
    dcp.save(saved, storage_writer=FileSystemWriter(tmp_path, single_file_per_rank=True), no_dist=True)
    (path,) = tmp_path.glob("*.distcp")
    store.put(path.name, path.read_bytes())
    metadata = DirectReader(tmp_path).read_metadata()
    shapes = ChunkShapes(metadata)
    loaded = {key: torch.zeros_like(value) for key, value in saved.items() if key != "rows"} | {
        "rows": torch.zeros(128, 1024)
    }
    wants = []
    for index, place in metadata.storage_data.items():
        box = ((256, 0), (128, 1024)) if index.fqn == "rows" else None
        shape = shapes.of(index)
        wants.append(
            Want(index.fqn, path.name, place.offset, place.length, torch.float32, shape, loaded[index.fqn], box)
        )
    server.rules(*([{"match": "GET", "at": at, "do": trouble} for at in range(1, 60, 3)] if trouble else []))
    stats = read_wants(wants, {path.name: RemoteFile(store, info_of(store, path.name))}, read_options(4))
    assert all(torch.equal(loaded[key], saved[key]) for key in saved if key != "rows")
    assert torch.equal(loaded["rows"], saved["rows"][256:384])
    assert stats.by_torch == 0
    assert stats.read == stats.needed
    if not trouble:
        assert len(server.seen()) < 12


def test_files_are_downloaded_by_pieces_and_held_against_their_checksums(store: ObjectStore, tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "a").mkdir(parents=True)
    (source / "a" / "large").write_bytes(bytes(range(251)) * 10_000)
    (source / "empty").touch()
    records = [FileRecord.of(source, name) for name in ("a/large", "empty")]
    place = ObjectUrl(store.bucket, "x")
    for record in records:
        store.put(place.key(record.name), (source / record.name).read_bytes())
    download(store, place, records, tmp_path / "copy")
    assert (tmp_path / "copy/a/large").read_bytes() == (source / "a/large").read_bytes()
    assert verify_in_place(store, place, records) == []
    store.put(place.key("a/large"), bytes(2_510_000))
    assert [text.split(" has ")[0] for text in verify_in_place(store, place, records)] == ["a/large"]
    with pytest.raises(CheckpointDamagedError, match=r"s3://.*/x is damaged: a/large has xxh3 "):
        download(store, place, records, tmp_path / "copy")


def test_what_a_dead_process_left_is_swept_by_the_next_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    pid = os.fork()
    if pid == 0:
        make_directory()
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)
    (tmp_path / "other").mkdir()
    (left,) = tmp_path.glob("bridge-objects-*")
    own, descriptor = make_directory()
    second, other = make_directory()
    assert set(tmp_path.iterdir()) == {own, second, tmp_path / "other"}
    assert left not in (own, second)
    for each in (descriptor, other):
        os.close(each)


def test_ranks_that_make_directories_at_once_leave_one_another_theirs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each sweeps what nobody holds, and for a moment nobody holds a new one."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    pids = []
    for _ in range(3):
        pid = os.fork()
        if pid == 0:
            try:
                made = [make_directory() for _ in range(100)]
                os._exit(0 if all(path.is_dir() for path, _ in made) else 1)
            finally:
                os._exit(2)
        pids.append(pid)
    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids] == [0, 0, 0]


def test_objects_that_are_not_what_was_uploaded_are_noticed(store: ObjectStore, url: ObjectUrl, tmp_path: Path) -> None:
    """Their labels say so, whatever the sizes are."""
    upload_checkpoint(store, url, make_checkpoint(tmp_path, 10, large=10))
    store.put(url.key("a"), b"bytes", {CHECKSUM: label_of_bytes(b"others")})
    with pytest.raises(CheckpointDamagedError, match=rf"^{url}/a holds other bytes than those which were uploaded"):
        store.get(url.key("a"))
    into = memoryview(bytearray(3))
    store.read(url.key("a"), into, 1, label=label_of_bytes(b"others"))
    assert bytes(into) == b"yte"
    with pytest.raises(CheckpointDamagedError, match=r"was uploaded with bridge-checksum xxh3:.* instead of xxh3:"):
        store.read(url.key("a"), into, 1, label=label_of_bytes(b"bytes"))
    marker = store.get(url.key("iter_0000010", "manifest.json"))
    store.put(url.key("iter_0000010", "manifest.json"), marker + b"\n", {CHECKSUM: label_of_bytes(marker)})
    found = list_bucket(store, url)
    assert (found.iterations, found.tracked) == ((), None)
    assert "holds other bytes" in found.unreadable[10]
