"""What a run that goes back leaves behind: a model of starts, and the file that remembers them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridge.training.checkpointing import load_checkpoint, save_checkpoint
from bridge.training.checkpointing.errors import CheckpointDamagedError, CheckpointError
from bridge.training.checkpointing.integrity import Manifest, write_manifest
from bridge.training.checkpointing.layout import LEGACY_TRACKER, MANIFEST, TRACKER, iteration_name, list_checkpoints
from bridge.training.checkpointing.rescue import require_known
from bridge.training.checkpointing.source import left_behind_in, older_sources
from bridge.training.checkpointing.starts import (
    STARTS,
    Start,
    Starts,
    read_starts,
    starts_or_none,
    starts_to_go_on,
    write_starts,
)
from bridge.training.setup import setup
from tests.distributed.launch import run_ranks
from tests.training.tiny import run_to_end, tiny_config


def starts_of(*entries: tuple[int, ...]) -> Starts:
    return Starts(tuple(Start(*entry) for entry in entries))


@pytest.mark.parametrize(
    ("entries", "iteration", "start", "told"),
    [
        # What no number was given, and what nobody has counted yet.
        ((), 10, 1, None),
        ((), 10, 0, None),
        (((1, 0),), 10, 0, None),
        (((1, 0), (2, 30, 0)), 30, 0, None),
        (((1, 0),), 10, 2, None),
        # The line, and where it left each start.
        (((1, 0),), 10, 1, False),
        (((1, 0), (2, 4, 1)), 7, 1, True),
        (((1, 0), (2, 4, 1)), 4, 1, False),
        (((1, 0), (2, 7, 1)), 7, 1, False),
        (((1, 0), (2, 4, 1)), 7, 2, False),
        (((1, 0), (2, 4, 1), (3, 9, 2)), 9, 2, False),
        (((1, 0), (2, 4, 1), (3, 9, 2)), 10, 2, True),
        (((1, 0), (2, 4, 1), (3, 9, 2)), 8, 1, True),
        # Start 1 went on from 5, and start 2 from 3: what start 1 saved is left behind.
        (((1, 5), (2, 3)), 6, 1, True),
        (((1, 0), (2, 20, 1)), 15, 1, False),
        # A start that went back and died before it had saved anything: the line does not go through it.
        (((1, 0), (2, 2, 1), (3, 6, 1)), 6, 1, False),
        (((1, 0), (2, 2, 1), (3, 6, 1)), 7, 1, True),
        (((1, 0), (2, 2, 1), (3, 6, 1)), 4, 2, True),
        # Starts that saved again what they had gone on from.
        (((1, 0), (2, 20, 1), (3, 20, 2), (4, 40, 3)), 20, 2, False),
        (((1, 0), (2, 20, 1), (3, 20, 2), (4, 40, 3)), 40, 3, False),
        # The line begins with a checkpoint of elsewhere: what is older than that may be of it or not.
        (((1, 0), (2, 30)), 10, 1, None),
        (((1, 0), (2, 30)), 31, 1, True),
        # Starts that have been lost: only that of the checkpoint that was gone on from is known.
        (((1007, 20, 6),), 20, 6, False),
        (((1007, 20, 6),), 21, 6, True),
        (((1007, 20, 6),), 20, 5, None),
        (((1007, 20, 6),), 21, 5, True),
    ],
)
def test_starts_tell_what_the_line_of_the_run_has_left_behind(
    entries: tuple[tuple[int, ...], ...], iteration: int, start: int, told: bool | None
) -> None:
    starts = starts_of(*entries)
    assert starts.tell(iteration, start) is told
    assert starts.have_left_behind(iteration, start) is (told is True)


@dataclass(eq=False)
class Save:
    """A checkpoint in a tree of them."""

    iteration: int
    start: int
    parent: Save | None
    """What it was trained on from."""

    def line(self) -> set[Save]:
        """It, and all that it was trained on from."""
        return {self} | (set() if self.parent is None else self.parent.line())


@given(
    st.lists(
        st.tuples(
            st.none() | st.integers(0, 30),  # which checkpoint a start goes on from; None for a fresh start
            st.lists(st.integers(0, 4), max_size=4),  # the steps to each of its saves; without any, it dies before
        ),
        min_size=1,
        max_size=8,
    )
)
def test_starts_tell_the_same_as_the_tree_of_all_saves(history: list[tuple[int | None, list[int]]]) -> None:
    saves: list[Save] = []
    starts = Starts()
    last: Save | None = None
    for chosen, steps in history:
        last = None if chosen is None or not saves else saves[chosen % len(saves)]
        number = starts.next
        starts = starts.followed_by(number, 0 if last is None else last.iteration, 0 if last is None else last.start)
        for step in steps:
            last = Save(step if last is None else last.iteration + step, number, last)
            saves.append(last)
    line = set() if last is None else last.line()
    for save in saves:
        if save.iteration:
            told = starts.tell(save.iteration, save.start)
            # A start may save an iteration twice, which are the same; nothing is known of one of iteration 0.
            same = {(each.iteration, each.start) for each in line}
            assert told is ((save.iteration, save.start) not in same)


def test_a_directory_that_has_lost_count_begins_far_above_what_its_checkpoints_say(tmp_path: Path) -> None:
    assert starts_to_go_on(tmp_path).next == 1
    for iteration, start in ((10, 1), (20, 3), (30, 1)):
        directory = tmp_path / iteration_name(iteration)
        directory.mkdir()
        write_manifest(directory, Manifest(iteration, "torch_dist", 1, {}, {}, (), start=start))
    (tmp_path / iteration_name(40)).mkdir()
    (tmp_path / iteration_name(50)).mkdir()
    (tmp_path / iteration_name(50) / MANIFEST).write_text("{")
    write_starts(tmp_path, starts_of((1, 0), (4, 20, 3)))
    assert starts_to_go_on(tmp_path).next == 5
    write_starts(tmp_path, starts_of((1, 0), (2, 20, 1)))  # an older one, as from a backup
    assert starts_to_go_on(tmp_path).next == 1004
    (tmp_path / STARTS).unlink()
    assert starts_to_go_on(tmp_path) == Starts(uncounted=1003)
    (tmp_path / STARTS).write_bytes(b"")
    assert starts_to_go_on(tmp_path) == Starts(uncounted=1003)


def checkpoints(directory: Path, *found: tuple[int, int, float]) -> None:
    """Checkpoints of so many iterations, starts and times, with nothing but a manifest."""
    for iteration, start, created in found:
        path = directory / iteration_name(iteration)
        path.mkdir()
        write_manifest(path, Manifest(iteration, "torch_dist", 1, {}, {}, (), created=created, start=start))


def test_a_lost_count_is_told_of_by_whoever_would_need_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lost = (
        f"{tmp_path / STARTS} is gone, so nobody knows which checkpoints this run has left behind by going back; if "
        "the directory was copied, copy that file too"
    )
    checkpoints(tmp_path, (10, 1, 1.0), (20, 1, 2.0))
    assert starts_or_none(tmp_path) == Starts()
    assert starts_to_go_on(tmp_path) == Starts(uncounted=1001)
    assert caplog.messages == []  # of one start, whose order is that of its iterations
    checkpoints(tmp_path, (15, 2, 3.0))
    assert starts_to_go_on(tmp_path) == Starts(uncounted=1002)
    assert starts_or_none(tmp_path) == Starts()
    assert caplog.messages == [
        f"{lost}; the starts of the run are counted on from 1002",
        f"the order of the checkpoints in {tmp_path} is taken from their times: {lost}",
    ]


def test_no_snapshot_is_chosen_where_the_count_is_lost_and_matters(tmp_path: Path) -> None:
    for snapshots in (set(), {0}, {0, 2}):
        require_known(snapshots, Starts(), tmp_path)
    require_known({1, 2}, starts_of((1, 0), (2, 4, 1)), tmp_path)
    with pytest.raises(CheckpointDamagedError, match=r"with --force the newest is taken: .*/\.bridge-starts is gone"):
        require_known({1, 2}, Starts(), tmp_path)
    checkpoints(tmp_path, (10, 1, 1.0))
    require_known({1}, Starts(), tmp_path)
    with pytest.raises(CheckpointDamagedError, match=r"it is not known which snapshots the run of .* has left behind"):
        require_known({2}, Starts(), tmp_path)


def test_without_a_count_no_clock_decides_among_the_checkpoints_of_one_start(tmp_path: Path) -> None:
    checkpoints(tmp_path, (10, 3, 9.0), (20, 3, 1.0), (30, 3, 5.0))
    names = lambda: [source.path.name for source in older_sources(list_checkpoints(tmp_path), 99)]  # noqa: E731
    assert names() == ["iter_0000030", "iter_0000020", "iter_0000010"]
    checkpoints(tmp_path, (25, 4, 2.0))
    assert names() == ["iter_0000010", "iter_0000030", "iter_0000025", "iter_0000020"]


def test_a_directory_remembers_the_starts(tmp_path: Path) -> None:
    assert read_starts(tmp_path) == Starts()
    starts = Starts().followed_by(1, 0).followed_by(2, 40, 1).followed_by(7, 3)
    assert starts == starts_of((1, 0, 0), (2, 40, 1), (7, 3, 0))
    write_starts(tmp_path, starts)
    assert read_starts(tmp_path) == starts
    assert [entry.name for entry in tmp_path.iterdir()] == [STARTS]
    # Each had gone on in the line of the one before it, where there are only two numbers.
    (tmp_path / STARTS).write_bytes(b"[[1, 0], [3, 40]]")
    assert read_starts(tmp_path) == starts_of((1, 0, 0), (3, 40, 1))


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"{", b"{}", b"null", b"[1]", b"[[1]]", b'[["a", 2]]', b"\xff", b"[[1, Infinity]]", b"[" * 10**5),
        *(b"[[0, 0]]", b"[[1, -1]]", b"[[1, 0, 1]]", b"[[1, 0, -1]]", b"[[2, 0], [2, 1]]", b"[[true, 0]]"),
        *(b"[[1, 2.5]]", b"[[1, 0, 0, 0]]", b'["ab"]', b'[{"1": 0, "2": 0}]'),
    ],
)
def test_starts_that_cannot_be_read_are_not_taken_for_none(
    tmp_path: Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / STARTS).write_bytes(content)
    with pytest.raises(CheckpointDamagedError, match=f"{tmp_path / STARTS} is damaged"):
        read_starts(tmp_path)
    assert starts_or_none(tmp_path) == Starts()
    assert "is taken from their times" in caplog.text


def config(save: Path, train_iters: int, **checkpoint: Any) -> Any:
    settings = {"save": str(save), "load": str(save), "save_interval": 2, "async_save": False}
    return tiny_config(train_iters=train_iters, checkpoint=settings | checkpoint)


def save_without_a_context(cfg: Any) -> list[tuple[tuple[int, int], ...]]:
    """Load, and save three times without a checkpointing context; the starts after each."""
    run = setup(cfg)
    seen = []
    for _ in range(3):
        run.state.train_state.step += 1
        save_checkpoint(run.state, run.model, run.optimizer, run.scheduler, 0, pg_collection=run.pg_collection)
        seen.append(read_starts(Path(cfg.checkpoint.save)).entries)
    return seen


def iteration_loaded(cfg: Any) -> int:
    return int(setup(cfg).state.train_state.step)


def test_a_run_without_other_tiers_counts_its_starts_too(tmp_path: Path) -> None:
    save = tmp_path / "save"
    run_ranks(run_to_end, 1, config(save, 6))
    assert read_starts(save) == starts_of((1, 0, 0))
    run_ranks(run_to_end, 1, config(save, 5, ckpt_step=2, save_interval=3))
    assert read_starts(save) == starts_of((1, 0, 0), (2, 2, 1))
    assert left_behind_in(list_checkpoints(save)) == {4, 6}
    for tracker in (TRACKER, LEGACY_TRACKER):
        (save / tracker).unlink()
    # Clocks have no say: the newest of the history, which is older than what was left behind.
    assert run_ranks(iteration_loaded, 1, config(save, 5)) == [5]
    assert run_ranks(save_without_a_context, 1, config(save, 9)) == [[((1, 0, 0), (2, 2, 1), (3, 5, 2))] * 3]


def die_in_the_first_save(cfg: Any) -> None:
    """Count the start, and end before its first checkpoint is published."""

    def die(state: dict[str, Any]) -> dict[str, Any]:
        raise RuntimeError("this process ends here")

    run = setup(cfg)
    run.state.train_state.step += 1
    with pytest.raises(CheckpointError, match="this process ends here"):
        save_checkpoint(
            run.state,
            run.model,
            run.optimizer,
            run.scheduler,
            0,
            preprocess_common_state_dict_fn=die,
            pg_collection=run.pg_collection,
        )


def go_back_within_a_process(cfg: Any) -> Starts:
    """Save with the manager's context and with fresh ones, go back, and save on: two starts, not one and not many."""
    run = setup(cfg)
    kept: dict[str, Any] = {}

    def save(step: int, context: dict[str, Any] | None) -> None:
        run.state.train_state.step = step
        save_checkpoint(
            run.state,
            run.model,
            run.optimizer,
            run.scheduler,
            0,
            checkpointing_context=context,
            pg_collection=run.pg_collection,
        )

    for step, context in ((2, kept), (4, {}), (6, None)):
        save(step, context)
    run.state.cfg.checkpoint.ckpt_step = 2
    load_checkpoint(run.state, run.model, run.optimizer, run.scheduler, pg_collection=run.pg_collection)
    # The kept context knows nothing of what was counted with the others.
    for step, context in ((3, {}), (5, kept), (8, None)):
        save(step, context)
    return read_starts(Path(cfg.checkpoint.save))


def test_a_start_that_died_before_it_saved_anything_leaves_nothing_behind(tmp_path: Path) -> None:
    save = tmp_path / "save"
    run_ranks(run_to_end, 1, config(save, 6))
    run_ranks(die_in_the_first_save, 1, config(save, 6, ckpt_step=2))
    run_ranks(run_to_end, 1, config(save, 8))
    assert read_starts(save) == starts_of((1, 0, 0), (2, 2, 1), (3, 6, 1))
    damaged = next((save / iteration_name(8)).glob("*.distcp"))
    damaged.write_bytes(damaged.read_bytes()[:100])
    assert run_ranks(iteration_loaded, 1, config(save, 9)) == [6]


def test_a_start_lasts_from_a_load_to_the_next_whatever_the_context(tmp_path: Path) -> None:
    save = tmp_path / "save"
    assert run_ranks(go_back_within_a_process, 1, config(save, 20)) == [starts_of((1, 0, 0), (2, 2, 1))]
    assert left_behind_in(list_checkpoints(save)) == {4, 6}
