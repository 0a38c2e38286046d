"""Which checkpoint is loaded: a table of what the directory holds, what was asked for, and the outcome."""

from pathlib import Path

import pytest

from bridge.training.checkpointing.errors import (
    CheckpointDamagedError,
    CheckpointError,
    CheckpointNotFoundError,
    NotACheckpointError,
)
from bridge.training.checkpointing.layout import Listing
from bridge.training.checkpointing.resolve import Tracked, resolve

BASE = Path("/ckpt")


def listing(
    *iterations: int, release: bool = False, foreign: tuple[str, ...] = (), leftovers: tuple[str, ...] = ()
) -> Listing:
    return Listing(BASE, True, iterations, release, False, False, leftovers, foreign)


def ours(iteration: int) -> Tracked:
    return Tracked(iteration, False, "latest_train_state.pt")


RELEASE = Tracked(0, True, "latest_checkpointed_iteration.txt")


@pytest.mark.parametrize(
    ("held", "tracked", "ckpt_step", "whole", "expected"),
    [
        # the tracker decides, whatever else is there
        (listing(10, 20), ours(20), None, (), "iter_0000020"),
        (listing(10, 20, 30), ours(20), None, (10, 20, 30), "iter_0000020"),
        (listing(10, foreign=("notes",)), ours(10), None, (), "iter_0000010"),
        (listing(0), ours(0), None, (), "iter_0000000"),
        (listing(10, release=True), RELEASE, None, (), "release"),
        # an explicit step beats the tracker
        (listing(10, 20), ours(20), 10, (), "iter_0000010"),
        (listing(10), ours(20), 10, (), "iter_0000010"),
        (listing(10), None, 10, (), "iter_0000010"),
        # no tracker: the newest whole one
        (listing(10, 20), None, None, (10, 20), "iter_0000020"),
        (listing(10, 20), None, None, (10,), "iter_0000010"),
        (listing(release=True), None, None, (), "release"),
        # nothing was ever published
        (listing(), None, None, (), None),
        (listing(leftovers=(".saving-iter_0000005-00",)), None, None, (), None),
        (Listing(BASE, False, (), False, False, False, (), ()), None, None, (), None),
    ],
)
def test_resolution(
    held: Listing, tracked: Tracked | None, ckpt_step: int | None, whole: tuple[int, ...], expected: str | None
) -> None:
    source = resolve(held, tracked, ckpt_step, lambda iteration: iteration in whole)
    assert (source.path.name if source else None) == expected
    assert source is None or source.release == (expected == "release")


@pytest.mark.parametrize(
    ("left_behind", "whole", "expected"),
    [
        ((30, 40), (10, 20, 30, 40), 20),
        ((30, 40), (30, 40), 40),
        ((30, 40), (10, 30), 10),
        ((20,), (20, 40), 40),
    ],
)
def test_a_scan_takes_what_a_rollback_left_behind_last(
    left_behind: tuple[int, ...], whole: tuple[int, ...], expected: int
) -> None:
    source = resolve(listing(10, 20, 30, 40), None, None, lambda i: i in whole, left_behind=lambda: left_behind)
    assert source is not None
    assert source.path.name == f"iter_{expected:07d}"
    assert ("a rollback had left it behind" in source.reason) is (expected in left_behind)


def test_a_tracker_is_followed_to_what_a_rollback_left_behind() -> None:
    source = resolve(listing(10, 20), ours(20), None, lambda _: False, left_behind=lambda: (20,))
    assert source is not None
    assert source.path.name == "iter_0000020"


@pytest.mark.parametrize(
    ("held", "tracked", "ckpt_step", "error", "message"),
    [
        (
            listing(10, 20),
            ours(20),
            30,
            CheckpointNotFoundError,
            "checkpoint.ckpt_step: 30 is not in /ckpt (iter_0000030 does not exist; there are 10, 20)",
        ),
        (
            Listing(BASE, False, (), False, False, False, (), ()),
            None,
            30,
            CheckpointNotFoundError,
            "checkpoint.ckpt_step: 30 is not in /ckpt (iter_0000030 does not exist; the directory does not exist)",
        ),
        (
            listing(10),
            ours(20),
            None,
            CheckpointDamagedError,
            "/ckpt/latest_train_state.pt names iter_0000020, which does not exist (there is 10); "
            "set checkpoint.ckpt_step to one that does",
        ),
        (
            listing(),
            RELEASE,
            None,
            CheckpointDamagedError,
            "/ckpt/latest_checkpointed_iteration.txt names release, which does not exist "
            "(there is no checkpoint in it); set checkpoint.ckpt_step to one that does",
        ),
        (
            listing(10, 20),
            None,
            None,
            CheckpointDamagedError,
            "/ckpt has no tracker, and none of its checkpoints is whole (there are 10, 20); "
            "set checkpoint.ckpt_step to load one all the same",
        ),
        (
            listing(foreign=("a.txt", "b.txt")),
            None,
            None,
            NotACheckpointError,
            "checkpoint.load: /ckpt holds no checkpoint but something else (a.txt, b.txt); "
            "name a directory of checkpoints, or an empty or new one to start afresh",
        ),
    ],
)
def test_refusals(
    held: Listing, tracked: Tracked | None, ckpt_step: int | None, error: type[CheckpointError], message: str
) -> None:
    with pytest.raises(error) as caught:
        resolve(held, tracked, ckpt_step, lambda iteration: False)
    assert type(caught.value) is error
    assert str(caught.value) == message


def test_a_missing_step_is_a_file_not_found_error() -> None:
    with pytest.raises(FileNotFoundError, match="iter_0000005"):
        resolve(listing(), None, 5, lambda iteration: True)
