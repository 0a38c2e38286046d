"""What an uploader does with what it finds on both sides, step by step and without a process of its own."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from bridge.training.checkpointing.errors import ObjectStoreError
from bridge.training.checkpointing.objects.client import ObjectStore
from bridge.training.checkpointing.objects.listing import list_bucket
from bridge.training.checkpointing.objects.upload import upload_checkpoint
from bridge.training.checkpointing.objects.uploader import Settings, Uploader, _Inbox
from bridge.training.object_url import ObjectUrl
from tests.training.checkpointing.objects.store import QUICK, Server, contents, make_checkpoint, require_truthful
from tests.training.checkpointing.objects.test_uploads import KEEP_ALL


class Steps:
    """An uploader, and what it has told."""

    def __init__(self, url: ObjectUrl, directory: Path, capsys: pytest.CaptureFixture[str], **retention: Any) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.inbox = _Inbox()
        self.uploader = Uploader(Settings(str(url), str(directory), 0, KEEP_ALL | retention, asdict(QUICK)), self.inbox)
        self._capsys = capsys

    def run(self, *published: int) -> list[tuple[str, int]]:
        """All steps that there are; what is told, without what is only logged."""
        self.inbox.published += published
        for _ in range(10):
            if not self.uploader.step():
                break
        else:
            raise AssertionError("it does not come to an end")
        return self.told()

    def told(self) -> list[tuple[str, int]]:
        reports = [json.loads(line) for line in self._capsys.readouterr().out.splitlines()]
        return [(report["event"], report["iteration"]) for report in reports]


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
