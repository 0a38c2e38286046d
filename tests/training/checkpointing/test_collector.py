"""Searches for objects that refer to themselves, while a save makes its state dict."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest

from bridge.training.checkpointing.collector import collecting_new_objects_only, without_collector


class Loop:
    """Refers to itself, so that only a search finds that nobody needs it."""

    def __init__(self) -> None:
        self.own = self


def lost_loop() -> weakref.ref[Loop]:
    return weakref.ref(Loop())


@pytest.fixture(autouse=True)
def collector() -> Iterator[None]:
    gc.collect()
    yield
    gc.unfreeze()
    gc.enable()


def test_a_search_sees_new_objects_only() -> None:
    old = lost_loop()
    with collecting_new_objects_only():
        new = lost_loop()
        gc.collect()
        assert (old() is None, new() is None) == (False, True)
    assert gc.get_freeze_count() == 0
    gc.collect()
    assert old() is None


def test_it_ends_with_an_error_too() -> None:
    with pytest.raises(ValueError, match="lost"), collecting_new_objects_only():
        raise ValueError("lost")
    assert gc.get_freeze_count() == 0


def test_programs_without_the_collector_keep_the_whole_search() -> None:
    gc.disable()
    old = lost_loop()
    with collecting_new_objects_only():
        gc.collect()
        assert old() is None


def test_what_a_program_has_frozen_stays_frozen() -> None:
    gc.freeze()
    with collecting_new_objects_only():
        pass
    assert gc.get_freeze_count() > 0


def test_the_collector_waits_and_goes_on() -> None:
    with without_collector():
        assert not gc.isenabled()
        with without_collector():
            pass
        assert not gc.isenabled()
    assert gc.isenabled()
