"""Uploading one checkpoint to a real S3 server, through all kinds of trouble."""

from __future__ import annotations

import base64
import itertools
import logging
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from bridge.training.checkpointing.errors import (
    CheckpointDamagedError,
    CheckpointNotFoundError,
    CheckpointSaveError,
    ObjectStoreError,
)
from bridge.training.checkpointing.integrity import read_manifest
from bridge.training.checkpointing.objects.client import ObjectStore
from bridge.training.checkpointing.objects.listing import list_bucket
from bridge.training.checkpointing.objects.sweep import retain, sweep
from bridge.training.checkpointing.objects.upload import CHECKSUM, _require_all, upload_checkpoint
from bridge.training.checkpointing.retention.policies import MostRecent
from bridge.training.object_url import ObjectUrl
from tests.training.checkpointing.objects.store import (
    PATIENT,
    QUICK,
    Server,
    contents,
    files_below,
    make_checkpoint,
    require_truthful,
)


def test_a_bucket_holds_what_the_directory_holds(store: ObjectStore, url: ObjectUrl, tmp_path: Path) -> None:
    sent: list[int] = []
    found = upload_checkpoint(store, url, make_checkpoint(tmp_path, 10), progress=sent.append)
    assert contents(store, url) == files_below(tmp_path)
    assert (found.iteration, found.sent_bytes) == (10, found.total_bytes)
    assert sum(sent) == found.total_bytes
    assert require_truthful(store, url) == {10}
    assert list_bucket(store, url).tracked == 10


def test_the_marker_comes_after_all_files_and_the_trackers_after_it(
    server: Server, store: ObjectStore, url: ObjectUrl, tmp_path: Path
) -> None:
    path = make_checkpoint(tmp_path, 10)
    server.rules()
    upload_checkpoint(store, url, path)
    written = [line.split("?")[0].split("/", 3)[3] for line in server.seen() if line.startswith("PUT")]
    assert [name.removeprefix("one/") for name in written[-3:]] == [
        "iter_0000010/manifest.json",
        "latest_train_state.pt",
        "latest_checkpointed_iteration.txt",
    ]


def test_what_is_there_is_not_sent_again(store: ObjectStore, url: ObjectUrl, tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, 10)
    upload_checkpoint(store, url, path)
    assert upload_checkpoint(store, url, path).sent_bytes == 0
    store.delete([url.key("iter_0000010", "manifest.json")])
    store.delete([url.key("iter_0000010", "common.pt")])
    assert upload_checkpoint(store, url, path).sent_bytes == 1000
    assert contents(store, url) == files_below(tmp_path)


def test_another_checkpoint_of_the_same_iteration_is_replaced_whole(
    store: ObjectStore, url: ObjectUrl, tmp_path: Path
) -> None:
    upload_checkpoint(store, url, make_checkpoint(tmp_path / "old", 10))
    store.put(url.key("iter_0000010", "remains"), b"x", {CHECKSUM: "xxh3:0"})
    store.put(url.key("iter_0000010", "a-note"), b"x")
    upload_checkpoint(store, url, make_checkpoint(tmp_path / "new", 10, seed=1))
    assert contents(store, url) == files_below(tmp_path / "new") | {"iter_0000010/a-note": b"x"}


def test_a_checkpoint_of_somebody_else_is_not_replaced(store: ObjectStore, url: ObjectUrl, tmp_path: Path) -> None:
    store.put(url.key("iter_0000010", "common.pt"), b"Megatron-LM's")
    with pytest.raises(CheckpointSaveError, match="holds what was not uploaded by bridge: common"):
        upload_checkpoint(store, url, make_checkpoint(tmp_path, 10))
    assert contents(store, url) == {"iter_0000010/common.pt": b"Megatron-LM's"}


def test_an_upload_that_was_aborted_from_outside_is_not_taken_for_the_old_object(
    server: Server, store: ObjectStore, url: ObjectUrl, tmp_path: Path
) -> None:
    """The object that it is to replace has the same name and size."""
    upload_checkpoint(store, url, make_checkpoint(tmp_path / "old", 20))
    old, key = {CHECKSUM: "other:0"}, url.key("outside")
    store.put(key, b"old", old)
    server.rules({"match": "POST .*uploadId", "do": "status:404:NoSuchUpload"})
    store.complete_upload(key, "lost", ["etag"], old)
    with pytest.raises(ObjectStoreError, match="NoSuchUpload"):
        store.complete_upload(key, "lost", ["etag"], {CHECKSUM: "other:1"})
    with pytest.raises(ObjectStoreError, match="NoSuchUpload"):
        upload_checkpoint(store, url, make_checkpoint(tmp_path / "new", 20, seed=1))
    server.rules()
    assert require_truthful(store, url) == set()


def test_an_object_whose_label_is_another_one_keeps_the_marker_away(
    store: ObjectStore, url: ObjectUrl, tmp_path: Path
) -> None:
    path = make_checkpoint(tmp_path, 20)
    manifest = read_manifest(path)
    upload_checkpoint(store, url, path)
    store.put(url.key("iter_0000020", "common.pt"), bytes(1000), {CHECKSUM: "xxh3:0"})
    with pytest.raises(CheckpointSaveError, match="is not what was uploaded: common"):
        _require_all(store, url / "iter_0000020", manifest)
    store.delete([url.key("iter_0000020", "manifest.json")])
    assert upload_checkpoint(store, url, path).sent_bytes == 1000
    assert require_truthful(store, url) == {20}


def test_a_large_file_that_is_not_what_the_manifest_says_is_not_published(
    store: ObjectStore, url: ObjectUrl, tmp_path: Path
) -> None:
    path = make_checkpoint(tmp_path, 20)
    data = bytearray((path / "__0_0.distcp").read_bytes())
    data[5000] ^= 255
    (path / "__0_0.distcp").write_bytes(data)
    with pytest.raises(CheckpointDamagedError, match=r"__0_0.distcp has xxh3 .* instead of"):
        upload_checkpoint(store, url, path)
    assert require_truthful(store, url) == set()
    assert "iter_0000020/__0_0.distcp" not in contents(store, url)


@pytest.mark.parametrize("trouble", ["status:500", "lose", "halve"])
def test_an_upload_survives_trouble_with_every_third_request(
    server: Server, store: ObjectStore, url: ObjectUrl, tmp_path: Path, trouble: str
) -> None:
    path = make_checkpoint(tmp_path, 10)
    server.rules(*[{"at": at, "do": trouble} for at in range(1, 200, 3)])
    # Three threads that take turns may meet every third request with the same one again and again.
    upload_checkpoint(ObjectStore(url.bucket, replace(QUICK, tries=12)), url, path)
    server.rules()
    assert contents(store, url) == files_below(tmp_path)
    assert store.uploads(url.key()) == []


def test_a_server_that_hangs_once_costs_a_timeout_and_a_retry(
    server: Server, store: ObjectStore, url: ObjectUrl, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = make_checkpoint(tmp_path, 10)
    server.rules({"match": "PUT .*partNumber=2", "at": 1, "do": "hang", "seconds": 4})
    upload_checkpoint(store, url, path)
    assert contents(store, url) == files_below(tmp_path)
    assert "UploadPart of s3://" in caplog.text
    assert "no answer, ReadTimeoutError), retry 1 of 3" in caplog.text


def test_a_server_that_dies_in_the_middle_fails_the_upload_and_the_next_one_goes_on(
    server: Server, store: ObjectStore, url: ObjectUrl, tmp_path: Path
) -> None:
    path = make_checkpoint(tmp_path, 10)
    server.rules({"match": "PUT .*partNumber", "at": 2, "do": "die"})
    with pytest.raises(ObjectStoreError, match=r"failed in each of 4 tries: no answer, .*; check AWS_ENDPOINT_URL_S3"):
        upload_checkpoint(store, url, path)
    server.rules()
    assert require_truthful(store, url) == set()
    assert upload_checkpoint(store, url, path).sent_bytes > 0
    assert contents(store, url) == files_below(tmp_path)
    assert store.uploads(url.key()) == []


def test_no_retry_helps_without_permission_and_nothing_secret_is_told(
    server: Server, store: ObjectStore, url: ObjectUrl, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = make_checkpoint(tmp_path, 10)
    server.rules({"match": "PUT .*common.pt", "do": "status:403"})
    with caplog.at_level(logging.DEBUG), pytest.raises(ObjectStoreError) as caught:
        upload_checkpoint(store, url, path)
    assert str(caught.value) == (
        f"PutObject of {url}/iter_0000010/common.pt failed: status 403, AccessDenied; allow s3:GetObject, PutObject, "
        "DeleteObject and AbortMultipartUpload on the objects, and ListBucket and ListBucketMultipartUploads on the "
        "bucket"
    )
    assert len([line for line in server.seen() if "common.pt" in line]) == 1
    assert "nobody-may-see" not in caplog.text + str(caught.value)


def test_a_bucket_that_is_not_there_is_named(server: Server, tmp_path: Path) -> None:
    url = ObjectUrl("no-such-bucket", "x")
    with pytest.raises(ObjectStoreError, match=r"ListObjectsV2 of s3://no-such-bucket/x/ failed: status 404, NoSuchBu"):
        list_bucket(ObjectStore(url.bucket, QUICK), url)


def test_what_retention_removes_under_way_is_told_apart(store: ObjectStore, url: ObjectUrl, tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, 10)
    (path / "__0_0.distcp").unlink()
    with pytest.raises(CheckpointDamagedError, match=r"__0_0.distcp is missing"):
        upload_checkpoint(store, url, path)
    other = make_checkpoint(tmp_path / "other", 20)
    with pytest.raises(CheckpointNotFoundError, match=r"was removed while it was being|is not there"):
        upload_checkpoint(store, url, other, progress=lambda _: shutil.rmtree(other, ignore_errors=True))
        upload_checkpoint(store, url, path)
    assert require_truthful(store, url) == set()


def test_a_file_that_is_not_what_the_manifest_says_is_not_published(
    store: ObjectStore, url: ObjectUrl, tmp_path: Path
) -> None:
    path = make_checkpoint(tmp_path, 10)
    (path / "common.pt").write_bytes(bytes(1000))
    with pytest.raises(CheckpointDamagedError, match=r"common.pt has xxh3 .* instead of"):
        upload_checkpoint(store, url, path)
    assert require_truthful(store, url) == set()


def test_retention_in_the_bucket_spares_what_the_trackers_name(
    store: ObjectStore, url: ObjectUrl, tmp_path: Path
) -> None:
    for iteration in (10, 20, 30, 40):
        upload_checkpoint(store, url, make_checkpoint(tmp_path, iteration, large=10), move_trackers=iteration <= 30)
    assert retain(store, list_bucket(store, url), [MostRecent(1)]) == [10, 20]
    assert require_truthful(store, url) == {30, 40}


def test_deletions_carry_a_checksum_that_every_store_knows(store: ObjectStore, url: ObjectUrl) -> None:
    sent: list[str] = []
    keep = lambda request, **_: sent.append(request.headers["Content-MD5"])  # noqa: E731
    store._client.meta.events.register("before-send.s3.DeleteObjects", keep)
    for name in ("a", "b"):
        store.put(url.key(name), b"x")
    store.delete([url.key("a"), url.key("b")])
    assert [len(base64.b64decode(each)) for each in sent] == [16]
    assert contents(store, url) == {}


def test_remains_are_swept(store: ObjectStore, url: ObjectUrl, tmp_path: Path) -> None:
    upload_checkpoint(store, url, make_checkpoint(tmp_path, 10))
    own = {CHECKSUM: "xxh3:0"}
    store.put(url.key("iter_0000020", "common.pt"), b"x", own)
    store.put(url.key("iter_0000030", "common.pt"), b"x", own)
    store.put(url.key("iter_0000040", "common.pt"), b"Megatron-LM's")
    store.put(url.key("iter_0000050", "common.pt"), b"x", own)
    store.put(url.key("iter_0000050", "a-note"), b"x")
    store.put(url.key("iter_best", "common.pt"), b"x")
    for name in ("iter_0000020", "iter_0000040", "iter_best"):
        store.begin_upload(url.key(name, "__0_0.distcp"), {})
    assert sweep(store, list_bucket(store, url), resumed=[30]) == [20]
    left = {info.key[len(url.key()) :].split("/")[0] for info in store.objects(url.key())}
    assert left == {f"iter_00000{n}0" for n in (1, 3, 4, 5)} | {
        *("iter_best", "latest_train_state.pt", "latest_checkpointed_iteration.txt")
    }
    assert {each.key.split("/")[-2] for each in store.uploads(url.key())} == {"iter_0000040", "iter_best"}


def _forked(work: Callable[[], object]) -> int:
    """Run `work` in a forked process that waits for a byte first; returns its pid."""
    pid = os.fork()
    if pid == 0:
        try:
            os.kill(os.getpid(), signal.SIGSTOP)
            work()
        finally:
            os._exit(0)
    os.waitpid(pid, os.WUNTRACED)
    return pid


def _killed_at(server: Server, rule: dict[str, object], work: Callable[[], object]) -> bool:
    """Run `work` in a process that is killed by the rule; says whether it was."""
    pid = _forked(work)
    server.rules({**rule, "pid": pid})
    os.kill(pid, signal.SIGCONT)
    _, status = os.waitpid(pid, 0)
    server.rules()
    return os.WIFSIGNALED(status)


def _kill_at_requests(server: Server, directory: Path, first: int, step: int, moments: tuple[str, ...]) -> None:
    """Kill uploads at their requests `first`, `first + step`, … until one ends by itself."""
    source = directory / "run"
    old = make_checkpoint(source, 10, large=10)
    path = make_checkpoint(source, 20)
    wanted = {n: d for n, d in files_below(source).items() if not n.startswith("iter_0000010")}

    def work(store: ObjectStore, url: ObjectUrl) -> None:
        sweep(store, list_bucket(store, url), resumed=[20])
        upload_checkpoint(store, url, path)
        retain(store, list_bucket(store, url), [MostRecent(1)])

    # Making one takes longer than what it then does here. The second makes requests in forked processes only.
    store, fresh = ObjectStore("any", PATIENT), ObjectStore("any", PATIENT)
    for count in itertools.count():
        at, moment = first + count * step, moments[count % len(moments)]
        url = ObjectUrl(server.bucket(), "p")
        store.bucket = fresh.bucket = url.bucket
        upload_checkpoint(store, url, old)
        was_killed = _killed_at(server, {"at": at, "do": moment}, partial(work, fresh, url))
        assert require_truthful(store, url) & {10, 20}, at
        work(store, url)
        assert contents(store, url) == wanted, at
        assert store.uploads("") == []
        if not was_killed:
            assert at > 25
            return


def test_sigkill_leaves_the_bucket_truthful_and_the_upload_goes_on(server: Server, tmp_path: Path) -> None:
    """A sample of the next test: before and after every few requests, those around the marker among them."""
    _kill_at_requests(server, tmp_path, 2, 7, ("kill", "kill-after"))


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["kill", "kill-after"])
def test_sigkill_at_every_request(server: Server, tmp_path: Path, moment: str) -> None:
    _kill_at_requests(server, tmp_path, 1, 1, (moment,))


def test_sigkill_while_a_checkpoint_is_replaced_leaves_the_bucket_truthful(server: Server, tmp_path: Path) -> None:
    older, old = make_checkpoint(tmp_path / "a", 10, large=10), make_checkpoint(tmp_path / "b", 20, large=10)
    new = make_checkpoint(tmp_path / "c", 20, seed=1, large=10)
    at, was_killed = -2, True
    store, fresh = ObjectStore("any", PATIENT), ObjectStore("any", PATIENT)
    while was_killed:
        at += 7
        url = ObjectUrl(server.bucket())
        store.bucket = fresh.bucket = url.bucket
        upload_checkpoint(store, url, older)
        upload_checkpoint(store, url, old)
        was_killed = _killed_at(server, {"at": at, "do": "kill"}, partial(upload_checkpoint, fresh, url, new))
        assert 10 in require_truthful(store, url), at
        upload_checkpoint(store, url, new)
        assert require_truthful(store, url) == {10, 20}, at
        assert list_bucket(store, url).tracked == 20
    assert at > 10
