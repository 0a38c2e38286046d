"""The keeper with real processes: what survives whose death, who may do what, and what it costs in memory."""

from __future__ import annotations

import json
import multiprocessing
import os
import secrets
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection as Pipe
from pathlib import Path
from typing import Any

import psutil
import pytest

from bridge.training.checkpointing.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    CheckpointSaveError,
    KeeperLostError,
    MemoryLimitError,
)
from bridge.training.checkpointing.tiers.memory import keeper as keeper_module
from bridge.training.checkpointing.tiers.memory import keeper_channel, keeper_process
from bridge.training.checkpointing.tiers.memory.keeper import Keeper, KeeperSettings, start_process
from bridge.training.checkpointing.tiers.memory.keeper_channel import Channel
from bridge.training.checkpointing.tiers.memory.keeper_process import GRANULE, address, capacity_for
from bridge.training.checkpointing.tiers.memory.keeper_readers import (
    OpenSnapshot,
    release_session,
    running_keepers,
    stored_snapshots,
)

MIB = 1 << 20
forking = multiprocessing.get_context("fork")


def keeper_processes(session: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if session in process.cmdline() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


def mappings(session: str) -> list[str]:
    """Buffers of a session's keepers that this process maps."""
    return [entry.path for entry in psutil.Process().memory_maps(grouped=False) if f"/{session}/" in entry.path]


def wait_until(condition: Callable[[], bool]) -> None:
    for _ in range(1000):
        if condition():
            return
        time.sleep(0.02)
    raise AssertionError("it did not come about within 20 s")


@pytest.fixture
def session() -> Iterator[str]:
    name = f"test-{secrets.token_hex(6)}"
    yield name
    for process in keeper_processes(name):
        process.send_signal(signal.SIGCONT)
    release_session(name)
    wait_until(lambda: not keeper_processes(name))


def keeper_of(session: str, rank: int = 0, limit: int | None = 64 * MIB, idle_seconds: float = 60) -> Keeper:
    return Keeper(KeeperSettings(session, rank, limit, idle_seconds))


def content_of(iteration: int, size: int = 3 * MIB) -> bytes:
    return bytes([iteration % 251, (iteration * 7 + 1) % 251]) * (size // 2)


def keep(keeper: Keeper, iteration: int, owner: int = 0, size: int = 3 * MIB) -> None:
    content, header = content_of(iteration, size), f"header {iteration}".encode()
    with keeper.begin(owner, iteration, len(content) + len(header)) as slot:
        slot.memory[: len(content)] = content
        slot.memory[len(content) : len(content) + len(header)] = header
        slot.commit(len(content), len(header))


def iterations(keeper: Keeper) -> list[int]:
    return sorted(found.iteration for found in keeper.snapshots())


def is_whole(found: OpenSnapshot) -> bool:
    payload = bytearray(found.kept.payload)
    found.read_payload(memoryview(payload))
    iteration = found.kept.iteration
    return payload == content_of(iteration) and found.read_header() == f"header {iteration}".encode()


def whole_snapshots(session: str) -> list[tuple[int, int, int]]:
    """Keeper's rank, owner and iteration of what is stored, all of it read."""
    with stored_snapshots(session) as stored:
        assert all(is_whole(found) for found in stored)
        return [(found.keeper_rank, found.kept.owner, found.kept.iteration) for found in stored]


@contextmanager
def process_that(function: Callable[[Pipe], Any]) -> Iterator[tuple[Any, Pipe]]:
    """A forked process that runs `function` with one end of a pipe; it is killed at the end."""
    here, there = forking.Pipe()
    process = forking.Process(target=function, args=(there,))
    process.start()
    there.close()
    try:
        yield process, here
    finally:
        process.kill()
        process.join()
        here.close()


def receive(pipe: Pipe) -> Any:
    assert pipe.poll(30)
    return pipe.recv()


def test_a_killed_trainers_snapshot_is_read_by_another_process(session: str) -> None:
    def train(pipe: Pipe) -> None:
        keep(keeper_of(session), 10)
        pipe.send("saved")
        time.sleep(60)

    with process_that(train) as (process, pipe):
        assert receive(pipe) == "saved"
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    assert whole_snapshots(session) == [(0, 0, 10)]
    restarted = keeper_of(session)
    with restarted.open(0, 10) as found:
        assert is_whole(found)


def test_a_trainer_killed_while_it_writes_leaves_the_older_snapshot(session: str) -> None:
    def train(pipe: Pipe) -> None:
        keeper = keeper_of(session)
        keep(keeper, 10)
        slot = keeper.begin(0, 20, 3 * MIB)
        slot.memory[: 2 * MIB] = b"\xff" * (2 * MIB)
        pipe.send("writing")
        time.sleep(60)

    with process_that(train) as (process, pipe):
        assert receive(pipe) == "writing"
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    restarted = keeper_of(session)
    assert iterations(restarted) == [10]
    assert whole_snapshots(session) == [(0, 0, 10)]
    account = restarted.stats()
    assert account is not None
    assert [buffer["state"] for buffer in account["buffers"]] == ["kept"], "what was half written is not used again"
    keep(restarted, 20)
    assert whole_snapshots(session) == [(0, 0, 10), (0, 0, 20)]


def test_leaving_a_slot_without_commit_keeps_nothing(session: str) -> None:
    keeper = keeper_of(session)
    with pytest.raises(ZeroDivisionError), keeper.begin(0, 5, 100):
        _ = 1 / 0
    assert keeper.snapshots() == []
    with pytest.raises(CheckpointNotFoundError, match="does not hold that snapshot"):
        keeper.open(0, 5)


def test_buffers_are_used_again_and_accounted_for(session: str) -> None:
    keeper = keeper_of(session)
    numbers = []
    for iteration in range(1, 8):
        keep(keeper, iteration)
        keeper.drop(below=iteration, above=iteration)
        account = keeper.stats()
        assert account is not None
        numbers.append({buffer["number"]: buffer["state"] for buffer in account["buffers"]})
        assert account["total"] <= 2 * capacity_for(3 * MIB + 20)
    assert numbers[0] == {1: "kept"}
    assert numbers[1:] == [{1: "free", 2: "kept"}, {1: "kept", 2: "free"}] * 3
    account = keeper.stats()
    assert account is not None
    # What it says is what it holds: the sizes of its files, none of which is mapped into the keeper itself.
    files = Path(f"/proc/{account['pid']}/fd").iterdir()
    held = [file.stat() for file in files if "memfd:" in str(file.readlink())]
    assert sum(file.st_size for file in held) == account["total"]
    assert sum(file.st_blocks * 512 for file in held) <= account["total"]
    process = psutil.Process(account["pid"])
    assert process.memory_info().rss < 24 * MIB
    assert not [entry for entry in process.memory_maps(grouped=False) if "memfd:" in entry.path]


def test_a_buffer_that_is_too_small_is_replaced(session: str) -> None:
    keeper = keeper_of(session)
    for iteration, size in ((1, MIB), (2, MIB), (3, 9 * MIB), (4, 9 * MIB)):
        keep(keeper, iteration, size=size)
        keeper.drop(below=iteration)
    account = keeper.stats()
    assert account is not None
    assert [buffer["capacity"] for buffer in account["buffers"]] == [10 * MIB] * 2


def test_the_limit_is_kept_and_the_refusal_says_why(session: str) -> None:
    keeper = keeper_of(session, limit=8 * MIB)
    keep(keeper, 10)
    keep(keeper, 20)
    with pytest.raises(MemoryLimitError) as refusal:
        keep(keeper, 30)
    assert str(refusal.value) == (
        "checkpoint.in_memory_limit_gib: an in-memory checkpoint needs 0.004 GiB on this rank, and of the 0.008 GiB "
        "allowed 0.008 GiB are in use (iterations kept: 10, 20); set checkpoint.in_memory_limit_gib to 0.012 or "
        "more, or make checkpoints smaller"
    )
    assert whole_snapshots(session) == [(0, 0, 10), (0, 0, 20)]
    keeper.drop(below=20)
    keep(keeper, 30)
    assert iterations(keeper) == [20, 30]


def test_a_restarted_trainer_brings_its_own_limit(session: str) -> None:
    first = keeper_of(session, limit=4 * MIB)
    keep(first, 1)
    first.close()
    unchanged = keeper_of(session, limit=None)
    with pytest.raises(MemoryLimitError):
        keep(unchanged, 2)
    unchanged.close()
    keep(keeper_of(session, limit=64 * MIB), 2)


def test_release_ends_the_keeper_and_frees_its_memory(session: str) -> None:
    keeper = keeper_of(session)
    keep(keeper, 10)
    (process,) = keeper_processes(session)
    keeper.release()
    wait_until(lambda: not process.is_running() or process.status() == psutil.STATUS_ZOMBIE)
    assert running_keepers() == [entry for entry in running_keepers() if entry[0] != session]
    assert keeper.snapshots() == []
    assert keeper.stats() is None
    keeper.release()  # once more is no error
    assert mappings(session) == []


def test_a_session_is_released_from_outside(session: str) -> None:
    for rank in (0, 1):
        keeper = keeper_of(session, rank)
        keep(keeper, 10)
    other = keeper_of(f"{session}-other")
    keep(other, 10)
    assert release_session(session) == [0, 1]
    assert [entry for entry in running_keepers() if entry[0].startswith(session)] == [(f"{session}-other", 0)]
    other.release()


def test_sessions_and_ranks_do_not_mix(session: str) -> None:
    mine, second_rank, other = keeper_of(session), keeper_of(session, 1), keeper_of(f"{session}.2")
    keep(mine, 10)
    keep(second_rank, 20)
    keep(other, 30)
    assert [iterations(keeper) for keeper in (mine, second_rank, other)] == [[10], [20], [30]]
    assert whole_snapshots(session) == [(0, 0, 10), (1, 0, 20)]
    other.release()
    assert whole_snapshots(session) == [(0, 0, 10), (1, 0, 20)]


@pytest.mark.parametrize("name", ["", "a/b", "a b", "x" * 65, "ü"])
def test_a_session_has_a_plain_name(name: str) -> None:
    with pytest.raises(ValueError, match="is no name of a session"):
        keeper_of(name)


def test_a_dead_keeper_is_noticed_and_replaced(session: str, caplog: pytest.LogCaptureFixture) -> None:
    keeper = keeper_of(session)
    keep(keeper, 10)
    slot = keeper.begin(0, 20, 100)
    (process,) = keeper_processes(session)
    process.kill()
    with pytest.raises(KeeperLostError, match=r"the keeper of rank 0's .* has died, and what it kept is lost"), slot:
        slot.commit(100, 0)
    assert keeper.snapshots() == []
    with pytest.raises(KeeperLostError, match="rank 0 has no keeper"):
        keeper.open(0, 10)
    keep(keeper, 30)
    (process,) = keeper_processes(session)
    process.kill()
    keep(keeper, 40)  # found dead in the middle of things: a warning, and the save goes on
    assert "has died, and what it kept is lost; starting another" in caplog.text
    assert whole_snapshots(session) == [(0, 0, 40)]
    (process,) = keeper_processes(session)
    process.kill()
    assert keeper.snapshots() == []


def test_a_keeper_that_does_not_answer_is_an_error_and_no_hang(session: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeper_channel, "TIMEOUT_SECONDS", 0.3)
    keeper = keeper_of(session)
    keep(keeper, 10)
    keeper.close()
    (process,) = keeper_processes(session)
    process.suspend()
    with pytest.raises(KeeperLostError, match=r"has not answered for 0\.3 s"):
        keep(keeper, 20)
    assert keeper.snapshots() == []
    assert whole_snapshots(session) == []
    process.resume()
    assert whole_snapshots(session) == [(0, 0, 10)]


def test_an_idle_keeper_ends_but_not_while_a_trainer_is_there(session: str) -> None:
    keeper = keeper_of(session, idle_seconds=0.2)
    keep(keeper, 10)
    (process,) = keeper_processes(session)
    time.sleep(0.6)
    assert iterations(keeper) == [10]
    with stored_snapshots(session) as stored:
        keeper.close()
        time.sleep(0.6)
        assert [is_whole(found) for found in stored] == [True], "nor while somebody reads"
    wait_until(lambda: not process.is_running() or process.status() == psutil.STATUS_ZOMBIE)


def test_the_polite_signal_ends_a_keeper_after_its_trainer(session: str) -> None:
    keeper = keeper_of(session)
    keep(keeper, 10)
    (process,) = keeper_processes(session)
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        process.send_signal(number)
    keep(keeper, 20)
    assert whole_snapshots(session) == [(0, 0, 10), (0, 0, 20)]
    keeper.close()
    wait_until(lambda: not keeper_processes(session))


def test_racing_trainers_get_one_keeper_and_one_of_them_has_it(session: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeper_module, "WAIT_SECONDS", 0.5)
    start, told = forking.Event(), forking.Queue()

    def train(number: int) -> None:
        keeper = keeper_of(session)
        start.wait()
        try:
            keep(keeper, number)
            told.put(number)
        except CheckpointSaveError as error:
            told.put(str(error))
        time.sleep(60)

    trainers = [forking.Process(target=train, args=(number,)) for number in (1, 2, 3, 4)]
    try:
        for trainer in trainers:
            trainer.start()
        start.set()
        answers = [told.get(timeout=30) for _ in trainers]
        winners = [answer for answer in answers if isinstance(answer, int)]
        assert len(winners) == 1
        pid = trainers[winners[0] - 1].pid
        assert {answer for answer in answers if isinstance(answer, str)} == {
            f"the keeper of rank 0's in-memory checkpoints (session {session}) serves another trainer, process {pid}: "
            "end that process, or set checkpoint.save to another directory"
        }
        assert len(keeper_processes(session)) == 1
        assert whole_snapshots(session) == [(0, 0, winners[0])]
    finally:
        for trainer in trainers:
            trainer.kill()
            trainer.join()


def test_starting_twice_makes_one_keeper(session: str) -> None:
    settings = KeeperSettings(session, 0, 64 * MIB, 60)
    start_process(settings)
    start_process(settings)
    assert len(keeper_processes(session)) == 1


def test_a_process_that_outlives_its_trainer_does_not_keep_the_next_one_out(session: str) -> None:
    def train(pipe: Pipe) -> None:
        keeper = keeper_of(session)
        keep(keeper, 10)
        child = os.fork()
        if child:
            pipe.send(child)
        time.sleep(60)  # the child too, with the trainer's socket

    with process_that(train) as (process, pipe):
        child = receive(pipe)
        try:
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            keep(keeper_of(session), 20)
            assert whole_snapshots(session) == [(0, 0, 10), (0, 0, 20)]
            assert psutil.pid_exists(child)
        finally:
            os.kill(child, signal.SIGKILL)


def test_a_process_forked_by_the_trainer_may_write(session: str) -> None:
    keeper = keeper_of(session)
    keep(keeper, 10)

    def write(pipe: Pipe) -> None:
        keep(keeper, 20)
        pipe.send(iterations(keeper))

    with process_that(write) as (process, pipe):
        assert receive(pipe) == [10, 20]
        process.join()
    keep(keeper, 30)
    assert iterations(keeper) == [10, 20, 30]
    again = keeper_of(session)  # nor is another object in this process another trainer
    assert iterations(again) == [10, 20, 30]


def test_what_is_being_read_does_not_change(session: str) -> None:
    keeper = keeper_of(session)
    keep(keeper, 10)
    with keeper.open(0, 10) as found:
        for iteration in (20, 30, 40):
            keep(keeper, iteration)
            keeper.drop(below=iteration)
        assert iterations(keeper) == [40]
        account = keeper.stats()
        assert account is not None
        assert sorted(buffer["state"] for buffer in account["buffers"]) == ["free", "kept", "retired"]
        assert is_whole(found)

    def is_freed() -> bool:
        account = keeper.stats()
        return account is not None and sorted(each["state"] for each in account["buffers"]) == ["free", "kept"]

    wait_until(is_freed)  # the keeper hears by another connection that nobody reads any more


def test_nothing_leaks(session: str) -> None:
    me = psutil.Process()
    at_first, others = me.num_fds(), me.children()
    keeper = keeper_of(session)
    keep(keeper, 1)
    keep(keeper, 2)
    (process,) = keeper_processes(session)
    before = me.num_fds(), process.num_fds()
    for iteration in range(3, 30):
        keep(keeper, iteration)
        keeper.drop(below=iteration)
        whole_snapshots(session)
    wait_until(lambda: (me.num_fds(), process.num_fds()) == before)
    assert me.children() == others
    assert len(mappings(session)) == 2
    keeper.release()
    assert me.num_fds() == at_first


def test_malformed_requests_are_refused_and_readers_change_nothing(session: str) -> None:
    keeper = keeper_of(session)
    keep(keeper, 10)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as raw:
        raw.settimeout(20)
        raw.connect(address(session, 0))
        for packet in (b"\xff\x00", b"7", b"{}", b'{"op": "no"}', b'{"op": "list", "x": 1}', b'{"op": "begin"}'):
            raw.send(packet)
            assert json.loads(raw.recv(10_000))["error"] == "protocol"
        raw.send(b'{"op": "drop", "below": null, "above": -1, "equal": null}')
        assert json.loads(raw.recv(10_000))["message"] == "a reader cannot change anything"
    channel = Channel.connect(session, 0)
    assert channel is not None
    with pytest.raises(CheckpointSaveError, match="buffer 1 is not being written by this process"):
        channel.request("commit", number=1, payload=1, header=1)
    channel.close()
    slot = keeper.begin(0, 20, 100)
    with pytest.raises(CheckpointSaveError, match="the snapshot is larger than its buffer"):
        slot.commit(GRANULE, 1)
    assert whole_snapshots(session) == [(0, 0, 10)]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_other_users_neither_get_nor_give_snapshots(session: str) -> None:
    keeper = keeper_of(session)
    keep(keeper, 10)
    theirs, ours = address(session, 0), address(session, 1)

    def pry(pipe: Pipe) -> None:
        os.setuid(65534)
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as squatter:
            squatter.bind(ours)
            squatter.listen()
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as thief:
                thief.connect(theirs)
                thief.settimeout(20)
                try:
                    thief.send(b'{"op": "list"}')
                    pipe.send(thief.recv(1000))
                except OSError:
                    pipe.send(b"")
            time.sleep(60)

    with process_that(pry) as (_, pipe):
        assert receive(pipe) == b""
        with pytest.raises(CheckpointError, match="has the name of a process of user 65534"):
            keep(keeper_of(session, 1), 10)
    assert whole_snapshots(session) == [(0, 0, 10)]


def test_a_keeper_that_cannot_start_says_why(session: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "keeper_process.py"
    broken.write_text("raise OSError('no memory for this')")
    monkeypatch.setattr(keeper_process, "__file__", str(broken))
    with pytest.raises(CheckpointSaveError, match="ended with status 1 as it started: OSError: no memory for this"):
        keep(keeper_of(session), 10)
