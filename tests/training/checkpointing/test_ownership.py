"""One writer for a save directory, with real processes: who waits, who is refused, and who is not held up."""

import errno
import json
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from bridge.training.checkpointing import commit, ownership, recovery
from bridge.training.checkpointing.errors import DirectoryInUseError
from bridge.training.checkpointing.layout import TRACKER, WRITER

FORK = multiprocessing.get_context("fork")


@pytest.fixture(autouse=True)
def _short_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ownership, "WAIT_SECONDS", 0.3)


@contextmanager
def process(action: Callable[[], str]) -> Iterator[tuple[int, str]]:
    """A process that does something, says what came of it, and lives on until it is killed."""

    def run(answer: Connection) -> None:
        try:
            answer.send(action())
        except Exception as error:
            answer.send(f"{type(error).__name__}: {error}")
        signal.pause()

    here, there = FORK.Pipe()
    child = FORK.Process(target=run, args=(there,), daemon=True)
    child.start()
    try:
        assert here.poll(30)
        yield child.pid or 0, here.recv()
    finally:
        child.kill()
        child.join()


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def claimed(directory: Path) -> Callable[[], str]:
    def action() -> str:
        ownership.claim(directory)
        return "claimed"

    return action


def test_a_second_writer_is_refused_and_the_firsts_save_in_flight_survives(tmp_path: Path) -> None:
    def begin() -> str:
        recovery.recover_once(tmp_path, None)
        return str(commit.begin_staging(tmp_path, 10))

    with process(begin) as (pid, staging):
        owner = json.loads((tmp_path / WRITER).read_text())
        assert owner["pid"] == pid
        with pytest.raises(DirectoryInUseError) as caught:
            recovery.recover_once(tmp_path, None)
        assert str(caught.value) == (
            f"checkpoint.save: {tmp_path} is in use by another run (host {owner['host']}, process {pid}, since "
            f"{owner['start']}), and two runs cannot save in one directory; stop that run, or set checkpoint.save "
            "to another directory"
        )
        assert Path(staging).is_dir()
    recovery.recover_once(tmp_path, None)  # its owner was killed, so it is a leftover now
    assert not Path(staging).exists()


def test_the_lock_is_free_as_soon_as_its_owner_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with process(claimed(tmp_path)) as (pid, answer):
        assert answer == "claimed"
        os.kill(pid, signal.SIGKILL)
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        monkeypatch.setattr(ownership, "WAIT_SECONDS", 0.0)
        ownership.claim(tmp_path)
    assert json.loads((tmp_path / WRITER).read_text())["pid"] == os.getpid()


def test_a_predecessor_that_is_shutting_down_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def claim_for_a_second() -> str:
        ownership.claim(tmp_path)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, 1.0)
        return "claimed"

    monkeypatch.setattr(ownership, "WAIT_SECONDS", 30.0)
    with process(claim_for_a_second) as (pid, _):
        begun = time.monotonic()
        ownership.claim(tmp_path)
        assert 0.5 < time.monotonic() - begun < 10
    messages = [record.getMessage() for record in caplog.records if "waiting" in record.getMessage()]
    assert len(messages) == 1
    assert f"process {pid}" in messages[0]


def test_a_forked_writer_does_not_keep_its_owners_lock(tmp_path: Path) -> None:
    def claim_and_fork() -> str:
        ownership.claim(tmp_path)
        child = os.fork()
        if child == 0:
            signal.pause()
        return str(child)

    with process(claim_and_fork) as (_, writer):
        pass
    try:
        os.kill(int(writer), 0)  # alive, with a copy of the descriptor
        ownership.claim(tmp_path)
    finally:
        os.kill(int(writer), signal.SIGKILL)


def test_a_forked_child_does_not_take_its_parents_claim_for_its_own(tmp_path: Path) -> None:
    ownership.claim(tmp_path)
    with process(claimed(tmp_path)) as (_, answer):
        assert answer.startswith("DirectoryInUseError")
    with process(claimed(tmp_path)) as (_, answer):  # and its attempt has not cost the parent the lock
        assert answer.startswith("DirectoryInUseError")


def test_claiming_again_under_any_name_keeps_the_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "save").mkdir()
    (tmp_path / "alias").symlink_to("save")
    monkeypatch.chdir(tmp_path)
    before = open_descriptors()
    for name in (tmp_path / "save", tmp_path / "alias", Path("save")):
        ownership.claim(name)
    assert open_descriptors() == before + 1
    with process(claimed(tmp_path / "save")) as (_, answer):
        assert answer.startswith("DirectoryInUseError")


def test_a_directory_that_was_deleted_and_made_again_is_claimed_again(tmp_path: Path) -> None:
    save = tmp_path / "save"
    save.mkdir()
    ownership.claim(save)
    shutil.rmtree(save)
    save.mkdir()
    ownership.claim(save)
    with process(claimed(save)) as (_, answer):
        assert answer.startswith("DirectoryInUseError")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b"\xff"])
def test_an_owner_that_cannot_be_read_is_still_an_owner(tmp_path: Path, content: bytes) -> None:
    with process(claimed(tmp_path)):
        (tmp_path / WRITER).write_bytes(content)
        with pytest.raises(DirectoryInUseError, match=r"in use by another run \(which has not said who it is\)"):
            ownership.claim(tmp_path)


def test_without_locks_a_process_that_lives_still_has_its_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    with process(claimed(tmp_path)):
        monkeypatch.setattr(ownership.fcntl, "lockf", refuse)
        with pytest.raises(DirectoryInUseError):
            ownership.claim(tmp_path, wait_seconds=0.0)
    assert ownership.claim(tmp_path, wait_seconds=0.0)
    ownership.give_up(tmp_path)
    owner = json.loads((tmp_path / WRITER).read_text())
    # Another process has the number of the one that had it.
    (tmp_path / WRITER).write_text(json.dumps(owner | {"pid": os.getppid(), "start": "2001-01-01T00:00:00+00:00"}))
    assert ownership.claim(tmp_path, wait_seconds=0.0)


def test_a_predecessor_that_has_announced_its_end_is_waited_for_longer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def claim_and_end() -> str:
        ownership.claim(tmp_path)
        ownership.announce_end(tmp_path, 30.0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, 1.5)
        return "claimed"

    monkeypatch.setattr(ownership, "PROGRESS_SECONDS", 0.4)
    with process(claim_and_end) as (pid, _):
        ownership.claim(tmp_path)
    messages = [record.getMessage() for record in caplog.records]
    assert f"process {pid}, since " in messages[0]
    assert messages[0].endswith("; it is at its end, and deletes or uploads checkpoints")
    assert all(message.startswith("still waiting for it, for ") for message in messages[1:])
    assert len(messages) > 1
    assert f"process {pid}, since " in ownership.predecessor_of(tmp_path)


def test_a_predecessor_that_does_not_come_to_its_end_is_named(tmp_path: Path) -> None:
    def claim_and_stay() -> str:
        ownership.claim(tmp_path)
        ownership.announce_end(tmp_path, 0.2)
        return "claimed"

    with process(claim_and_stay) as (pid, _):
        with pytest.raises(DirectoryInUseError) as caught:
            ownership.claim(tmp_path)
        assert (
            f"is still in use by a run that has announced its end (host {os.uname().nodename}, process {pid},"
            in str(caught.value)
        )


def test_who_does_not_wait_does_not_wait_for_an_announced_end_either(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def claim_and_stay() -> str:
        ownership.claim(tmp_path)
        ownership.announce_end(tmp_path, 3000.0)
        return "claimed"

    with process(claim_and_stay):
        for seconds in (0.0, 0.2):
            with pytest.raises(DirectoryInUseError):
                ownership.claim(tmp_path, "DIR", wait_seconds=seconds)
    assert not any("at its end" in record.getMessage() for record in caplog.records)


def test_a_later_announcement_counts_and_a_silent_successor_ends_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def announce_again_and_again() -> str:
        ownership.claim(tmp_path)
        ownership.announce_end(tmp_path, 5.0)

        def announce() -> None:
            for _ in range(3):
                time.sleep(0.6)
                ownership.announce_end(tmp_path, 5.0)
            time.sleep(0.6)
            os._exit(0)

        threading.Thread(target=announce, daemon=True).start()
        return "claimed"

    monkeypatch.setattr(ownership, "WAIT_SECONDS", 0.3)
    monkeypatch.setattr(ownership, "_POLL_SECONDS", 0.05)
    with process(announce_again_and_again):
        ownership.claim(tmp_path)
    assert len([record for record in caplog.records if "it is at its end" in record.getMessage()]) == 4
    ownership.give_up(tmp_path)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[" * 100_000, b"[1]", b'{"ends_within": null}', b'{"ends_within": "soon"}', b'{"ends_within": -1}'],
)
def test_an_announcement_that_says_nothing_is_none(tmp_path: Path, content: bytes) -> None:
    (tmp_path / WRITER).write_bytes(content)
    assert ownership._announced_end(tmp_path) == ownership._Ending()
    assert ownership.owner_of(tmp_path) == "which has not said who it is"


def test_a_start_says_whose_remains_it_found_and_what_became_of_each(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def begin() -> str:
        recovery.recover_once(tmp_path, None)
        (tmp_path / ".trash-iter_0000005-0123abcd").mkdir()
        (tmp_path / f".{TRACKER}.bridge-tmp").write_bytes(b"half")
        return str(commit.begin_staging(tmp_path, 10))

    with process(begin) as (pid, staging):
        start = json.loads((tmp_path / WRITER).read_text())["start"]
    recovery.recover_once(tmp_path, None)
    host = os.uname().nodename
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path} holds 3 unfinished things of the run that had it before (host {host}, process {pid}, since "
        f"{start})",
        f"deleting {tmp_path}/.{TRACKER}.bridge-tmp: a file that was not written to its end",
        f"removing {staging}: a save that did not finish",
        f"deleting {tmp_path}/.trash-iter_0000005-0123abcd: a deletion that did not finish",
    ]
    assert [entry.name for entry in tmp_path.iterdir()] == [WRITER]
