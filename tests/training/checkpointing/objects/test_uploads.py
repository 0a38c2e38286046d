"""The background process that uploads: what a run sees of it, through trouble and restarts."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from bridge.training.checkpointing.events.kinds import Event, UploadFailed, UploadFinished, UploadStarted
from bridge.training.checkpointing.events.stream import EventStream
from bridge.training.checkpointing.objects.beginning import begin_uploads
from bridge.training.checkpointing.objects.client import ObjectStore
from bridge.training.checkpointing.objects.listing import list_bucket
from bridge.training.checkpointing.objects.run import not_uploaded
from bridge.training.checkpointing.objects.uploads import Uploads, _parsed
from bridge.training.object_url import ObjectUrl
from tests.training.checkpointing.objects.store import Server, contents, files_below, make_checkpoint, require_truthful

TRANSFER = {"threads": 2, "part_bytes": 1 << 20, "tries": 2, "first_wait": 0.01, "read_seconds": 5.0}
KEEP_ALL = {
    **{"most_recent_k": -1, "save_retain_interval": None, "retain_every_hours": None, "retain_iterations": None},
    **{"retain_best_k": None, "retain_best_metric": None, "retain_best_mode": "min"},
}


def uploads_of(url: ObjectUrl, directory: Path, **retention: object) -> Uploads:
    return Uploads(str(url), directory, KEEP_ALL | retention, TRANSFER)


class Taken:
    """A sink that keeps what it takes."""

    def __init__(self, stream: EventStream) -> None:
        self.found: list[Event] = []
        self.take = self.found.append
        self._stream = stream

    @classmethod
    def by(cls, uploads: Uploads) -> Taken:
        sink = cls(uploads.events)
        uploads.events.add("a test", lambda: sink)
        return sink

    def events(self) -> list[Event]:
        assert self._stream.flush(60)
        return self.found

    def close(self) -> None:
        pass


def wait_until(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + 300  # of a machine that does many other things
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)


def visible(directory: Path) -> dict[str, bytes]:
    return {name: data for name, data in files_below(directory).items() if not name.startswith(".bridge")}


def test_checkpoints_reach_the_bucket_and_retention_applies_there_too(
    store: ObjectStore, url: ObjectUrl, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    make_checkpoint(tmp_path, 10, large=10)
    uploads = uploads_of(url, tmp_path, most_recent_k=2)
    taken = Taken.by(uploads)
    uploads.begin()
    wait_until(lambda: uploads.poll() is not None and require_truthful(store, url) == {10})
    for iteration in (20, 30):
        make_checkpoint(tmp_path, iteration, large=10)
        uploads.published(iteration)
        wait_until(lambda: uploads.poll() is not None and uploads.missing is None)
    uploads.finish(60)
    assert {n: d for n, d in visible(tmp_path).items() if "iter_0000010" not in n} == contents(store, url)
    assert [(type(each), each.iteration) for each in taken.events()] == [
        (kind, iteration) for iteration in (10, 20, 30) for kind in (UploadStarted, UploadFinished)
    ]
    last = taken.found[-1]
    assert isinstance(last, UploadFinished)
    assert (last.path, last.sent_bytes, last.total_bytes) == (f"{url}/iter_0000030", 7416, 7416)
    assert last.background_seconds is not None
    assert f"uploaded the checkpoint of iteration 30 to {url}: 0.0 MiB of 0.0 MiB sent" in caplog.text
    assert f"removing the old checkpoint {url}/iter_0000010" in caplog.text


def test_what_a_dead_run_left_is_uploaded_by_the_next(
    server: Server, store: ObjectStore, url: ObjectUrl, tmp_path: Path
) -> None:
    """A run is killed in the middle of an upload; its uploader ends with it, and that of the next start goes on."""
    make_checkpoint(tmp_path, 10)
    server.rules({"match": "PUT .*partNumber=2", "do": "hang"})
    program = (
        "import sys, time; from pathlib import Path; "
        "from tests.training.checkpointing.objects.test_uploads import uploads_of; "
        "from bridge.training.object_url import ObjectUrl; "
        f"u = uploads_of(ObjectUrl.parse('{url}'), Path('{tmp_path}')); u.begin(); "
        "print(u._running.process.pid, flush=True); time.sleep(600)"
    )
    run = subprocess.Popen([sys.executable, "-W", "ignore", "-c", program], stdout=subprocess.PIPE, text=True)
    child = int(run.stdout.readline())
    wait_until(lambda: any("partNumber=2" in line for line in server.seen()))
    run.send_signal(signal.SIGKILL)
    run.wait()
    wait_until(lambda: not Path(f"/proc/{child}").exists() or "zombie" in Path(f"/proc/{child}/status").read_text())
    server.rules()
    assert require_truthful(store, url) == set()
    uploads = uploads_of(url, tmp_path)
    uploads.begin()
    uploads.finish(60)
    assert contents(store, url) == visible(tmp_path)
    assert store.uploads("") == []


def test_a_failure_is_told_and_the_next_checkpoint_makes_up_for_it(
    server: Server, store: ObjectStore, url: ObjectUrl, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server.rules({"match": "PUT", "do": "status:403"})
    make_checkpoint(tmp_path, 10, large=10)
    uploads = uploads_of(url, tmp_path)
    taken = Taken.by(uploads)
    uploads.published(10)
    wait_until(lambda: uploads.poll() is not None and uploads.failure != "")
    begun, failed = taken.events()[:2]
    assert isinstance(begun, UploadStarted)
    assert isinstance(failed, UploadFailed)
    assert (failed.iteration, failed.path, failed.total_bytes) == (10, f"{url}/iter_0000010", begun.total_bytes)
    assert failed.message == uploads.failure
    assert uploads.missing == 10
    assert f"UPLOADING TO {url} FAILED: PutObject of {url}/iter_0000010/" in caplog.text
    assert "trying again in 10 s at the latest" in uploads.failure
    server.rules()
    make_checkpoint(tmp_path, 20, large=10)
    uploads.published(20)
    uploads.finish(60)
    assert (uploads.missing, uploads.failure) == (None, "")
    assert require_truthful(store, url) == {10, 20}
    assert list_bucket(store, url).tracked == 20


def test_a_process_that_dies_is_replaced_at_the_next_save(
    store: ObjectStore, url: ObjectUrl, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    uploads = uploads_of(url, tmp_path)
    uploads.begin()
    os.kill(uploads._running.process.pid, signal.SIGKILL)  # type: ignore[union-attr]
    wait_until(lambda: uploads.poll() is not None and uploads._running is None)
    assert uploads.failure == "the process that uploads checkpoints ended with status -9"
    make_checkpoint(tmp_path, 10, large=10)
    uploads.published(10)
    uploads.finish(60)
    assert require_truthful(store, url) == {10}


def test_nothing_that_an_earlier_start_left_is_given_up_before_the_bucket_has_it(
    server: Server, url: ObjectUrl, tmp_path: Path
) -> None:
    """And a save without a context goes on with the uploads that there are."""
    server.rules({"match": "GET", "do": "status:403"})
    make_checkpoint(tmp_path, 10, large=10)
    make_checkpoint(tmp_path, 20, large=10)
    place = {"save": str(url), "staging_dir": str(tmp_path), "mirror": None, "upload_threads": 2, "load": None}
    cfg = SimpleNamespace(**place, **KEEP_ALL, ckpt_step=5, pretrained_checkpoint=None)
    contexts: list[dict[str, Uploads]] = [{}, {}]
    for context in contexts:
        begin_uploads(cfg, context)
    (uploads,) = {id(each): each for context in contexts for each in context.values()}.values()
    assert not_uploaded(cfg, contexts[1]) == [tmp_path / "iter_0000010", tmp_path / "iter_0000020"]
    wait_until(lambda: uploads.poll() is not None and uploads.failure != "")
    os.kill(uploads._running.process.pid, signal.SIGKILL)  # type: ignore[union-attr]
    wait_until(lambda: uploads.poll() is not None and uploads._running is None)
    server.rules()
    uploads.revive()
    wait_until(lambda: uploads.poll() is not None and not_uploaded(cfg, contexts[0]) == [])
    uploads.finish(60)
    assert uploads.failure == ""


def test_what_is_no_report_is_passed_over(caplog: pytest.LogCaptureFixture) -> None:
    assert _parsed(b"a warning of some library") is None
    assert _parsed(b'{"event": "there", "surprise": 1}') is None
    assert "the process that uploads checkpoints said: a warning of some library" in caplog.text


def test_a_planned_end_does_not_wait_for_ever(
    server: Server, store: ObjectStore, url: ObjectUrl, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server.rules({"match": "PUT", "do": "hang", "seconds": 3})
    make_checkpoint(tmp_path, 10, large=10)
    uploads = uploads_of(url, tmp_path)
    uploads.published(10)
    wait_until(lambda: any(line.startswith("PUT") for line in server.seen()))
    uploads.finish(0.5)
    assert uploads.missing == 10
    assert f"the upload to {url} did not end within 0 s; the next start of the run goes on with it" in caplog.text


def test_the_process_is_small(tmp_path: Path) -> None:
    program = (
        "import runpy, sys; import bridge.training; "
        "g = runpy.run_path('bridge/training/checkpointing/objects/uploader_program.py'); "
        "sys.stdin.close(); import io; sys.stdin = io.StringIO(''); \n"
        "try: g['_start']()\n"
        "except ValueError: pass\n"
        "print('torch' in sys.modules, 'bridge.training.checkpointing.objects.uploader' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["False", "True"]
