"""A call in a forked process: its value, its error, its death, and the snapshot that it sees."""

import os
import signal
import time
from pathlib import Path

import psutil
import pytest

from bridge.training.checkpointing import background, liveness
from bridge.training.checkpointing.background import ForkedCall
from bridge.training.checkpointing.errors import CheckpointSaveError


def test_the_value_comes_back_however_large() -> None:
    call = ForkedCall(lambda: b"x" * 10_000_000, "writer")
    assert call.result() == b"x" * 10_000_000
    assert call.poll()


def test_an_exception_comes_back_with_its_type_and_traceback() -> None:
    def fail() -> None:
        raise OSError(28, "No space left on device")

    call = ForkedCall(fail, "writer")
    with pytest.raises(CheckpointSaveError) as caught:
        call.result()
    assert str(caught.value) == "the process of writer failed: OSError: [Errno 28] No space left on device"
    assert "in fail" in str(caught.value.__cause__)


def test_a_killed_process_is_noticed() -> None:
    call = ForkedCall(lambda: time.sleep(60), "writer")
    assert not call.poll()
    os.kill(call.pid, signal.SIGKILL)
    with pytest.raises(CheckpointSaveError, match=r"^the process of writer was killed by SIGKILL$"):
        call.result()


def test_a_process_that_exits_without_a_result_is_noticed() -> None:
    call = ForkedCall(lambda: os._exit(3), "writer")
    with pytest.raises(CheckpointSaveError, match=r"^the process of writer ended with status 3 and no result$"):
        call.result()


def test_the_call_sees_memory_as_it_was() -> None:
    values = [1]

    def later() -> int:
        time.sleep(0.2)
        return values[0]

    call = ForkedCall(later, "writer")
    values[0] = 2
    assert call.result() == 1


def test_signals_for_the_whole_job_neither_end_it_nor_reach_the_trainers_handlers() -> None:
    numbers = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
    handled: list[int] = []

    def survive() -> list[int]:
        for number in numbers:
            os.kill(os.getpid(), number)
        return handled

    previous = signal.signal(signal.SIGUSR1, lambda number, frame: handled.append(number))
    try:
        assert ForkedCall(survive, "writer").result() == []
    finally:
        signal.signal(signal.SIGUSR1, previous)


def test_it_dies_with_its_parent() -> None:
    """A trainer killed with SIGKILL leaves no writer behind."""

    def parent() -> int:
        child = ForkedCall(lambda: time.sleep(60), "grandchild")
        return child.pid

    grandchild = ForkedCall(parent, "child").result()
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline and _is_running(grandchild):
        time.sleep(0.01)
    assert not _is_running(grandchild)


@pytest.fixture
def _short_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(liveness, "LOOK_SECONDS", 0.1)


@pytest.mark.usefixtures("_short_looks")
def test_a_stopped_process_is_told_of_at_once_and_ended(caplog: pytest.LogCaptureFixture) -> None:
    call = ForkedCall(lambda: time.sleep(60), "writer", stall_seconds=1.0)
    os.kill(call.pid, signal.SIGSTOP)
    with pytest.raises(CheckpointSaveError) as caught:
        call.result()
    assert (
        str(caught.value) == "the process of writer is held by a signal and has done nothing for 1 s, so it was ended"
    )
    assert not _is_running(call.pid)
    assert [record.getMessage() for record in caplog.records] == [
        f"the process {call.pid} of writer is held by a signal; it is ended if that lasts 1 s"
    ]


@pytest.mark.usefixtures("_short_looks")
def test_a_process_that_waits_for_ever_is_noticed_by_polling() -> None:
    call = ForkedCall(lambda: time.sleep(60), "writer", stall_seconds=0.5)
    while not call.poll():
        time.sleep(0.02)
    with pytest.raises(CheckpointSaveError, match=r"neither computes nor writes and has done nothing for 0\.5 s"):
        call.result()


def hold_in_the_kernel(fifo: Path) -> None:
    """Be where no signal reaches: until the new process has begun, which waits for somebody to write to it."""
    waits = [(os.POSIX_SPAWN_OPEN, 0, str(fifo), os.O_RDONLY, 0)]
    os.waitpid(os.posix_spawn("/bin/true", ["true"], os.environ, file_actions=waits), 0)


@pytest.mark.usefixtures("_short_looks")
def test_a_process_that_storage_holds_is_waited_for_longer(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    os.mkfifo(tmp_path / "fifo")
    call = ForkedCall(lambda: hold_in_the_kernel(tmp_path / "fifo"), "writer", stall_seconds=0.6, storage_seconds=60)
    assert not call.poll(2.0)
    os.close(os.open(tmp_path / "fifo", os.O_WRONLY))
    assert call.result() is None
    assert [record.getMessage() for record in caplog.records] == [
        f"the process {call.pid} of writer has waited 0.6 s for storage, which has not failed yet; it is ended if that "
        "lasts until 60 s after its beginning"
    ]


@pytest.mark.parametrize(
    ("limit", "storage_limit", "since", "end"),
    [
        (10.0, 100.0, 0.0, 100.0),
        (10.0, 100.0, 50.0, 100.0),  # the others have waited for it since its beginning
        (10.0, 100.0, 95.0, 105.0),
        (10.0, 0.0, 50.0, 60.0),
    ],
)
def test_how_long_storage_is_waited_for_counts_from_the_beginning(
    limit: float, storage_limit: float, since: float, end: float
) -> None:
    watch = liveness.Watch(os.getpid(), "writer", limit, storage_limit, _began=0.0, _since=since)
    assert watch._end_of_patience() == end


@pytest.mark.usefixtures("_short_looks")
def test_a_process_that_storage_holds_is_not_waited_for_for_ever(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    call = ForkedCall(lambda: hold_in_the_kernel(tmp_path / "fifo"), "writer", stall_seconds=0.5, storage_seconds=1.0)
    while not call.poll():
        time.sleep(0.02)
    with pytest.raises(CheckpointSaveError, match=r"waits for storage and has done nothing for 1 s"):
        call.result()
    os.close(os.open(tmp_path / "fifo", os.O_RDWR))  # lets go what was spawned


@pytest.mark.usefixtures("_short_looks")
@pytest.mark.parametrize("in_a_child", [False, True])
def test_a_process_that_gets_on_slowly_is_left_alone(tmp_path: Path, in_a_child: bool) -> None:
    def write_slowly() -> str:
        with (tmp_path / "file").open("wb", buffering=0) as stream:
            for _ in range(20):
                stream.write(b"x")
                time.sleep(0.1)
        return "written"

    def in_one() -> str:
        return ForkedCall(write_slowly, "child").result()

    assert ForkedCall(in_one if in_a_child else write_slowly, "writer", stall_seconds=0.8).result() == "written"


def test_kill_ends_it_at_once() -> None:
    call = ForkedCall(lambda: time.sleep(60), "writer")
    call.kill()
    assert call.poll()
    assert not _is_running(call.pid)


def test_several_are_waited_for_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The time is over when the turn of the second comes. It has been told to end before, and has ended."""

    def held() -> None:
        if os.fork() == 0:  # keeps the connection open, as a process would that storage holds
            (tmp_path / "pid").write_text(str(os.getpid()))
        time.sleep(60)

    monkeypatch.setattr(background, "KILL_SECONDS", 0.5)
    calls = [ForkedCall(held, "the first"), ForkedCall(lambda: time.sleep(60), "the second")]
    while not ((file := tmp_path / "pid").exists() and file.read_text()):
        time.sleep(0.01)
    background.kill_all(calls)
    os.kill(int(file.read_text()), signal.SIGKILL)
    assert [record.getMessage() for record in caplog.records] == [
        f"process {calls[0].pid} of the first cannot be ended: storage holds it"
    ]
    assert not psutil.pid_exists(calls[1].pid)
    for call in calls:
        with pytest.raises(CheckpointSaveError, match=r"was killed by SIGKILL$"):
            call.result()
    os.waitpid(calls[0].pid, 0)


def test_a_child_that_hangs_inside_fork_is_forked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hang is made by a fork handler, which runs where the interpreter's own deadlock happens."""

    def hang_in_the_first_child() -> None:
        if not (tmp_path / "hung").exists():
            (tmp_path / "hung").touch()
            time.sleep(60)

    def fork_with_the_handler() -> str:
        os.register_at_fork(after_in_child=hang_in_the_first_child)
        return ForkedCall(lambda: "written", "writer").result()

    monkeypatch.setattr(background, "START_SECONDS", 0.5)
    assert ForkedCall(fork_with_the_handler, "process with a handler").result() == "written"
    assert (tmp_path / "hung").exists()


def _is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_a_result_is_taken_where_somebody_else_reaps_the_processes() -> None:
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        assert ForkedCall(lambda: 42, "the answer").result() == 42
    finally:
        signal.signal(signal.SIGCHLD, before)
