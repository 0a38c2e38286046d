"""The file of events: whole lines whatever happens, and not too many of them."""

from __future__ import annotations

import itertools
import os
import resource
import signal
import time
from pathlib import Path

import pytest

from bridge.training.checkpointing.events.file import EventFile, EventLog, read_events
from bridge.training.checkpointing.events.kinds import Event, SaveFailed, SaveStarted, to_json
from bridge.training.checkpointing.layout import EARLIER_EVENTS, EVENTS


def started(number: int) -> SaveStarted:
    return SaveStarted(time=float(number), iteration=number)


def append(directory: Path, *events: Event) -> None:
    file = EventFile(directory)
    for event in events:
        file.take(event)
    file.close()


def test_what_is_appended_is_read_back(tmp_path: Path) -> None:
    assert read_events(tmp_path) == EventLog(())
    append(tmp_path, started(1), started(2))
    append(tmp_path, started(3))
    assert read_events(tmp_path) == EventLog((started(1), started(2), started(3)))
    assert [path.name for path in tmp_path.iterdir()] == [EVENTS]


def test_the_file_is_there_from_the_start(tmp_path: Path) -> None:
    EventFile(tmp_path).close()
    assert (tmp_path / EVENTS).read_bytes() == b""


def test_a_torn_last_line_is_passed_over_and_spoils_no_other(tmp_path: Path) -> None:
    whole = f"{to_json(started(1))}\n"
    for length in range(1, len(whole)):
        (tmp_path / EVENTS).write_text(whole[:length])
        append(tmp_path, started(2), started(3))
        log = read_events(tmp_path)
        assert log.events[-2:] == (started(2), started(3))
        is_whole = length == len(whole) - 1  # only the line's end is missing
        assert (len(log.events), log.unreadable) == ((3, 0) if is_whole else (2, 1))


def test_what_is_no_event_is_counted(tmp_path: Path) -> None:
    (tmp_path / EVENTS).write_bytes(b"\xff\xfe\n{}\n\n" + to_json(started(1)).encode())
    assert read_events(tmp_path) == EventLog((started(1),), unreadable=2)


def test_a_full_file_takes_the_place_of_the_one_before(tmp_path: Path) -> None:
    file = EventFile(tmp_path, limit=1000)
    for number in range(200):
        file.take(started(number))
        assert all(path.stat().st_size <= 1000 for path in tmp_path.iterdir())
    file.close()
    assert {path.name for path in tmp_path.iterdir()} == {EVENTS, EARLIER_EVENTS}
    found = [event.iteration for event in read_events(tmp_path).events]
    assert found == list(range(200 - len(found), 200))
    assert len(found) > 10


def test_a_file_that_is_deleted_is_made_anew(tmp_path: Path) -> None:
    file = EventFile(tmp_path)
    file.take(started(1))
    (tmp_path / EVENTS).unlink()
    file.take(started(2))
    file.close()
    assert read_events(tmp_path).events == (started(2),)


def test_a_directory_that_is_deleted_is_an_error_until_it_is_back(tmp_path: Path) -> None:
    directory = tmp_path / "save"
    directory.mkdir()
    file = EventFile(directory)
    (directory / EVENTS).unlink()
    directory.rmdir()
    try:
        file.take(started(1))
    except FileNotFoundError:
        directory.mkdir()
    file.take(started(2))
    file.close()
    assert read_events(directory).events == (started(2),)


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").touch()
    (tmp_path / EVENTS).symlink_to(tmp_path / "elsewhere")
    file = EventFile(tmp_path)
    try:
        file.take(started(1))
    except OSError:
        pass
    else:
        raise AssertionError("it was followed")
    assert (tmp_path / "elsewhere").read_bytes() == b""


def test_one_large_event_does_not_displace_the_others(tmp_path: Path) -> None:
    file = EventFile(tmp_path, limit=10_000)
    file.take(started(1))
    for size in (2600, 20_000):
        with pytest.raises(ValueError, match="is too large for a file of 10000"):
            file.take(SaveFailed(time=1.0, message="x" * size))
    file.take(started(2))
    file.close()
    assert read_events(tmp_path) == EventLog((started(1), started(2)))


def test_an_event_that_is_written_in_part_is_an_error(tmp_path: Path) -> None:
    child = os.fork()
    if child == 0:
        code = 1
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
        try:
            append(tmp_path, started(1), started(2))
        except OSError as error:
            code = 0 if "bytes were written" in str(error) else 2
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        append(tmp_path, started(3))
        os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
    log = read_events(tmp_path)
    assert (log.events[-1], log.unreadable) == (started(3), 1)


def test_a_reader_misses_nothing_when_a_full_file_takes_the_place_of_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = EventFile(tmp_path, limit=2000)
    for number in range(20):
        file.take(started(number))
    before = [event.iteration for event in read_events(tmp_path).events]
    is_file, turns = Path.is_file, [0]

    def and_rotate(path: Path) -> bool:
        found = is_file(path)
        if path.name == EVENTS and not turns[0]:  # between the two
            turns[0] = 1
            path.replace(path.with_name(EARLIER_EVENTS))
            file.take(started(100))
        return found

    monkeypatch.setattr(Path, "is_file", and_rotate)
    after = [event.iteration for event in read_events(tmp_path).events]
    file.close()
    assert turns == [1]
    assert after[-1] == 100
    assert after[-2] == before[-1]


def test_a_kill_at_any_moment_leaves_whole_lines_in_order(tmp_path: Path) -> None:
    long = SaveFailed(time=1.0, message="x" * 3000)
    rounds = 8
    for round_number in range(rounds):
        child = os.fork()
        if child == 0:
            file = EventFile(tmp_path, limit=1 << 20)
            for number in itertools.count():
                file.take(started(number))
                file.take(long)
        time.sleep(0.01 + 0.013 * round_number)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        log = read_events(tmp_path)
        assert log.unreadable <= round_number + 1
        numbers = [event.iteration for event in log.events if isinstance(event, SaveStarted)]
        assert numbers or round_number < rounds - 1  # an early kill may come before the first line
        assert all(after in (before + 1, 0) for before, after in itertools.pairwise(numbers))  # type: ignore[operator]
