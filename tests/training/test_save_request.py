"""SAVE_NOW: how often it is looked for, what it asks for, and when it goes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from bridge.training.checkpointing.layout import list_checkpoints
from bridge.training.save_request import SaveRequest


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def touch(path: Path, seconds: int) -> None:
    """Make the file, or give it another time of change."""
    path.touch()
    os.utime(path, (seconds, seconds))


def test_the_directory_is_looked_at_once_a_second(tmp_path: Path) -> None:
    clock = Clock()
    request = SaveRequest(tmp_path, clock)
    assert not request.is_open()
    (tmp_path / "SAVE_NOW").touch()
    clock.now += 0.9
    assert not request.is_open()
    clock.now += 0.1
    assert request.is_open()
    assert request.is_open()  # remembered between looks


def test_a_request_that_is_there_at_the_start_is_seen_at_once(tmp_path: Path) -> None:
    (tmp_path / "SAVE_NOW").touch()
    assert SaveRequest(tmp_path, Clock()).is_open()


def test_the_file_goes_when_its_checkpoint_is_published_and_not_before(tmp_path: Path) -> None:
    clock, path = Clock(), tmp_path / "SAVE_NOW"
    path.touch()
    request = SaveRequest(tmp_path, clock)
    assert request.is_open()
    request.answered_by(7)
    clock.now += 5
    assert not request.is_open()
    request.published(6)  # an earlier asynchronous save, which ended now
    assert path.exists()
    request.published(7)
    assert not path.exists()
    path.touch()
    clock.now += 5
    assert request.is_open()


def test_a_withdrawn_request_asks_for_nothing(tmp_path: Path) -> None:
    clock, path = Clock(), tmp_path / "SAVE_NOW"
    path.touch()
    request = SaveRequest(tmp_path, clock)
    assert request.is_open()
    path.unlink()
    clock.now += 5
    assert not request.is_open()


def test_a_save_that_nobody_asked_for_leaves_a_file_that_came_later(tmp_path: Path) -> None:
    clock, path = Clock(), tmp_path / "SAVE_NOW"
    request = SaveRequest(tmp_path, clock)
    assert not request.is_open()
    path.touch()
    request.answered_by(7)
    request.published(7)
    assert path.exists()
    clock.now += 1
    assert request.is_open()


def test_touching_the_file_again_asks_again(tmp_path: Path) -> None:
    clock, path = Clock(), tmp_path / "SAVE_NOW"
    touch(path, 1000)
    request = SaveRequest(tmp_path, clock)
    assert request.is_open()
    request.answered_by(7)
    touch(path, 2000)
    request.published(7)
    assert path.exists()
    clock.now += 5
    assert request.is_open()


def test_a_request_that_cannot_be_removed_is_answered_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    clock, path = Clock(), tmp_path / "SAVE_NOW"
    path.mkdir()  # by mistake; a directory cannot be unlinked
    request = SaveRequest(tmp_path, clock)
    assert request.is_open()
    request.answered_by(7)
    request.published(7)
    clock.now += 5
    assert not request.is_open()
    assert "is answered and cannot be removed" in caplog.text


def test_a_directory_that_cannot_be_looked_at_asks_for_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    clock = Clock()
    request = SaveRequest(tmp_path / "file", clock)
    for _ in range(3):
        assert not request.is_open()
        clock.now += 5
    assert caplog.text.count("cannot look for") == 1
    assert not SaveRequest(tmp_path / "absent", clock).is_open()


def test_the_file_is_no_foreign_content(tmp_path: Path) -> None:
    (tmp_path / "SAVE_NOW").touch()
    listing = list_checkpoints(tmp_path)
    assert (listing.foreign, listing.leftovers, listing.iterations) == ((), (), ())
