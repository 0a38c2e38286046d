"""What an uploader does with what it finds on both sides, step by step and without a process of its own."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from bridge.training.checkpointing.errors import CheckpointDamagedError, DirectoryInUseError, ObjectStoreError
from bridge.training.checkpointing.layout import TRACKER, TRAIN_STATE
from bridge.training.checkpointing.objects.client import ObjectStore
from bridge.training.checkpointing.objects.listing import list_bucket
from bridge.training.checkpointing.objects.owner import OWNER, BucketOwner, read_owner, successor, write_owner
from bridge.training.checkpointing.objects.upload import upload_checkpoint
from bridge.training.checkpointing.objects.uploader import Settings, Uploader, _Inbox
from bridge.training.object_url import ObjectUrl
from tests.training.checkpointing.objects.store import QUICK, Server, contents, make_checkpoint, require_truthful
from tests.training.checkpointing.objects.test_uploads import KEEP_ALL


class Steps:
    """An uploader, and what it has told."""

    def __init__(
        self,
        url: ObjectUrl,
        directory: Path,
        capsys: pytest.CaptureFixture[str],
        owner: BucketOwner | None = None,
        goes_on: bool = False,
        **retention: Any,
    ) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.inbox = _Inbox()
        who = {} if owner is None else asdict(owner)
        settings = Settings(
            str(url), str(directory), 0, KEEP_ALL | retention, asdict(QUICK), owner=who, goes_on=goes_on
        )
        self.uploader = Uploader(settings, self.inbox)
        self._capsys = capsys

    def run(self, *published: int) -> list[tuple[str, int]]:
        """All steps that there are; what is told, without that an upload begins and that the place is this run's."""
        self.inbox.published += published
        for _ in range(10):
            if not self.uploader.step():
                break
        else:
            raise AssertionError("it does not come to an end")
        return self.told()

    def told(self) -> list[tuple[str, int]]:
        reports = [json.loads(line) for line in self._capsys.readouterr().out.splitlines()]
        told = [(report["event"], report["iteration"]) for report in reports]
        return [each for each in told if each[0] not in ("begun", "owned")]


def saved_elsewhere(store: ObjectStore, url: ObjectUrl, directory: Path, created: dict[int, float], seed: int) -> None:
    for iteration, at in created.items():
        upload_checkpoint(store, url, make_checkpoint(directory, iteration, seed=seed, large=10, created=at))


def test_an_old_directory_changes_nothing_in_the_bucket(
    store: ObjectStore, url: ObjectUrl, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another machine has gone on: neither its checkpoints nor the trackers give way, and retention deletes nothing."""
    make_checkpoint(tmp_path / "here", 30, large=10, created=1000.0)
    saved_elsewhere(store, url, tmp_path / "there", {10: 2010.0, 30: 2030.0, 50: 2050.0}, seed=7)
    before = contents(store, url)
    assert Steps(url, tmp_path / "here", capsys, most_recent_k=1).run() == [("outdated", 30)]
    assert contents(store, url) == before


def test_what_an_old_directory_alone_has_is_added_and_not_tracked(
    store: ObjectStore, url: ObjectUrl, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_checkpoint(tmp_path / "here", 60, large=10, created=1000.0)
    saved_elsewhere(store, url, tmp_path / "there", {40: 2040.0, 50: 2050.0}, seed=7)
    steps = Steps(url, tmp_path / "here", capsys, most_recent_k=1)
    assert steps.run() == [("uploaded", 60)]
    assert (require_truthful(store, url), list_bucket(store, url).tracked) == ({40, 50, 60}, 50)
    make_checkpoint(tmp_path / "here", 45, large=10, created=1.0)
    assert steps.run(45) == [("uploaded", 45), ("deleted", 40)]
    assert (require_truthful(store, url), list_bucket(store, url).tracked) == ({45, 50, 60}, 45)


def test_the_trackers_are_moved_by_the_next_start(
    store: ObjectStore, url: ObjectUrl, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    upload_checkpoint(store, url, make_checkpoint(tmp_path, 10, large=10))
    upload_checkpoint(store, url, make_checkpoint(tmp_path, 20, large=10), move_trackers=False)
    assert Steps(url, tmp_path, capsys).run() == [("there", 10), ("there", 20)]
    assert list_bucket(store, url).named == {20}


def test_trackers_that_could_not_be_moved_are_moved_at_the_next_try(
    server: Server, store: ObjectStore, url: ObjectUrl, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = Steps(url, tmp_path, capsys)
    make_checkpoint(tmp_path, 10, large=10)
    server.rules({"match": "PUT .*latest_", "do": "status:403"})
    with pytest.raises(ObjectStoreError):
        steps.run(10)
    server.rules()
    assert steps.run() == [("uploaded", 10)]
    assert list_bucket(store, url).tracked == 10


def test_the_trackers_move_to_a_checkpoint_that_retention_takes_from_the_directory_meanwhile(
    store: ObjectStore, url: ObjectUrl, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = make_checkpoint(tmp_path, 10, large=10)
    train_state = (path / TRAIN_STATE).read_bytes()
    steps = Steps(url, tmp_path, capsys)
    upload = steps.uploader._upload

    def upload_and_lose(*arguments: Any) -> None:
        upload(*arguments)
        shutil.rmtree(path)

    steps.uploader._upload = upload_and_lose  # type: ignore[method-assign]
    steps.run(10)
    assert list_bucket(store, url).named == {10}
    assert store.get(url.key(TRACKER)) == train_state


def test_a_clock_that_was_set_back_does_not_move_the_trackers_back(
    store: ObjectStore, url: ObjectUrl, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_checkpoint(tmp_path, 20, large=10, created=5000.0)
    make_checkpoint(tmp_path, 30, large=10, created=1000.0)
    assert Steps(url, tmp_path, capsys).run() == [("uploaded", 30), ("uploaded", 20)]
    assert list_bucket(store, url).named == {30}


def test_a_checkpoint_that_cannot_be_uploaded_does_not_hold_up_others(
    server: Server, store: ObjectStore, url: ObjectUrl, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for iteration in (10, 20, 30):
        path = make_checkpoint(tmp_path, iteration, large=10)
    (path / "common.pt").unlink()
    (tmp_path / "iter_0000020" / ".bridge-damaged").write_text("{}")
    steps = Steps(url, tmp_path, capsys)
    assert steps.run(30) == [("damaged", 30), ("uploaded", 10)]
    make_checkpoint(tmp_path, 40, large=10)
    make_checkpoint(tmp_path, 50, large=10)
    server.rules({"match": "PUT .*iter_0000050/", "do": "status:403"})
    with pytest.raises(ObjectStoreError):
        steps.run(40, 50)
    with pytest.raises(ObjectStoreError):
        steps.run()
    assert steps.told() == [("uploaded", 40)]
    assert require_truthful(store, url) == {10, 40}


def test_what_was_seen_before_it_was_announced_is_told_again(
    store: ObjectStore, url: ObjectUrl, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = Steps(url, tmp_path, capsys)
    make_checkpoint(tmp_path, 10, large=10)
    assert steps.run() == [("uploaded", 10)]
    assert steps.run(10) == [("there", 10)]
    assert steps.run() == []


def test_what_retention_would_delete_at_once_is_told_to_be_unneeded(
    store: ObjectStore, url: ObjectUrl, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for iteration in (10, 20):
        make_checkpoint(tmp_path, iteration, large=10)
    assert Steps(url, tmp_path, capsys, most_recent_k=1).run(10, 20) == [("unneeded", 10), ("uploaded", 20)]
    assert require_truthful(store, url) == {20}


def test_deletions_wait_for_a_save_and_stop_nothing(
    server: Server, store: ObjectStore, url: ObjectUrl, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved_elsewhere(store, url, tmp_path, {10: 10.0, 20: 20.0}, seed=0)
    store.put(url.key("iter_0000015", "common.pt"), b"Megatron-LM's")
    steps = Steps(url, tmp_path, capsys, most_recent_k=1)
    assert steps.run() == [("there", 10), ("there", 20)]
    shutil.rmtree(tmp_path / "iter_0000010")
    make_checkpoint(tmp_path, 30, large=10)
    server.rules({"match": r"DELETE|\?delete", "do": "status:403"})
    assert steps.run(30) == [("uploaded", 30)]
    assert require_truthful(store, url) == {10, 20, 30}
    server.rules()
    steps.inbox.protected = [10]
    assert steps.run() == [("deleted", 20)]
    assert "iter_0000015/common.pt" in contents(store, url)


A = BucketOwner("a" * 16, "first", "/runs/a", "2026-01-01T00:00:00+00:00", "body a")
B = BucketOwner("b" * 16, "second", "/runs/b", "2026-01-02T00:00:00+00:00", "body b")


@pytest.mark.parametrize(
    ("found", "is_start", "goes_on", "expected"),
    [
        (None, True, False, A),
        (None, False, False, A),
        (replace(A, since="before"), True, False, replace(A, since="before")),
        (replace(A, since="before"), False, False, replace(A, since="before")),
        (B, True, False, None),
        (B, True, True, A),
        (B, False, True, None),
        (replace(B, body=A.body), True, False, replace(B, body=A.body)),
        (replace(A, body="", session="c" * 16), True, False, None),
    ],
)
def test_who_has_a_place(
    found: BucketOwner | None, is_start: bool, goes_on: bool, expected: BucketOwner | None
) -> None:
    assert successor(found, A, is_start=is_start, goes_on=goes_on) == expected


def test_a_run_keeps_from_the_place_of_another(
    store: ObjectStore, url: ObjectUrl, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A start that goes on from there takes it; the run that had it uploads nothing any more, nor after a restart."""
    first = Steps(url, tmp_path / "a", capsys, A, most_recent_k=1)
    make_checkpoint(tmp_path / "a", 10, large=10)
    assert first.run(10) == [("uploaded", 10)]
    assert read_owner(store, url) == A
    other = Steps(url, tmp_path / "b", capsys, B)
    make_checkpoint(tmp_path / "b", 20, large=10, seed=7)
    before = contents(store, url)
    with pytest.raises(DirectoryInUseError, match=rf"{url} belongs to another run \(host first, directory /runs/a, "):
        other.run(20)
    assert contents(store, url) == before
    assert Steps(url, tmp_path / "b", capsys, B, goes_on=True).run(20) == [("uploaded", 20)]
    assert read_owner(store, url) == B
    make_checkpoint(tmp_path / "a", 30, large=10)
    with pytest.raises(DirectoryInUseError, match=rf"^{url} was taken over by another run \(host second, "):
        first.run(30)
    assert require_truthful(store, url) == {10, 20}
    with pytest.raises(DirectoryInUseError, match=rf"{url} belongs to another run \(host second, directory /runs/b, "):
        Steps(url, tmp_path / "a", capsys, A).run(30)
    store.delete([url.key(OWNER)])
    assert Steps(url, tmp_path / "a", capsys, A).run(30) == [("there", 10), ("uploaded", 30)]
    assert read_owner(store, url) == A
    store.delete([url.key(OWNER)])
    store.put(url.key(OWNER), b"garbage")
    with pytest.raises(CheckpointDamagedError, match="does not say which run uploads there"):
        Steps(url, tmp_path / "a", capsys, A).run()


def test_a_place_that_is_taken_in_the_middle_of_an_upload_gets_no_marker(
    server: Server, store: ObjectStore, url: ObjectUrl, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = Steps(url, tmp_path, capsys, A)
    make_checkpoint(tmp_path, 10, large=10)
    steps.uploader._require_place(store)
    upload, taken = steps.uploader._upload, B

    def upload_meanwhile(*arguments: Any) -> None:
        write_owner(store, url, taken)
        upload(*arguments)

    steps.uploader._upload = upload_meanwhile  # type: ignore[method-assign]
    with pytest.raises(DirectoryInUseError, match="was taken over by another run"):
        steps.run(10)
    assert require_truthful(store, url) == set()


def test_markers_are_read_once_and_what_is_deleted_by_is_read_anew(
    server: Server, store: ObjectStore, url: ObjectUrl, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for iteration in (10, 20, 30):
        upload_checkpoint(store, url, make_checkpoint(tmp_path, iteration, large=10))
    steps = Steps(url, tmp_path, capsys)

    def markers_read() -> int:
        return len([line for line in server.seen() if line.startswith("GET") and line.endswith("manifest.json")])

    server.rules()
    steps.run()
    assert markers_read() == 3
    server.rules()
    steps.run()
    assert markers_read() == 0
    make_checkpoint(tmp_path, 40, large=10)
    steps.run(40)
    steps.run()
    assert require_truthful(store, url) == {10, 20, 30, 40}
    keeping = Steps(url, tmp_path, capsys, most_recent_k=2)
    make_checkpoint(tmp_path, 50, large=10)
    store.delete([url.key("iter_0000040", "manifest.json")])
    assert ("deleted", 20) in keeping.run(50)
