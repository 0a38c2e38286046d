"""Going back to an older checkpoint: the order, what may be passed over, and what the next saves leave behind."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import pytest

from bridge.training.checkpointing import marks
from bridge.training.checkpointing.agreement import Ranks
from bridge.training.checkpointing.errors import (
    CheckpointDamagedError,
    CheckpointError,
    CheckpointMismatchError,
    NotACheckpointError,
    UnsafeCheckpointError,
)
from bridge.training.checkpointing.fallback import Candidates, load_best
from bridge.training.checkpointing.layout import list_checkpoints
from bridge.training.checkpointing.parallel import Layout
from bridge.training.checkpointing.plans.load_plan import Saved
from bridge.training.checkpointing.resolve import Offer, Older, Source, present_history, stand_ins
from bridge.training.checkpointing.retention.sweeper import committed_entries
from bridge.training.checkpointing.trackers import read_tracker
from tests.distributed.launch import run_ranks
from tests.training.tiny import run_to_end, tiny_config

BASE = Path("/ckpt")


def older(*entries: tuple[int, float | None]) -> list[Older]:
    return [Older(iteration, BASE / str(iteration), created) for iteration, created in entries]


def offers(*entries: tuple[str, int]) -> list[Offer]:
    return [Offer(kind, iteration, BASE / f"{kind}-{iteration}") for kind, iteration in entries]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("persistent", "others", "expected"),
    [
        ([], [], []),
        ([(2, 1.0), (4, 2.0), (6, 3.0)], [], ["6", "4", "2"]),
        # other programs' checkpoints do not say when they were saved
        ([(2, None), (4, None)], [], ["4", "2"]),
        ([(2, 5.0), (4, None), (6, 7.0)], [], ["6", "4", "2"]),
        # 2, 4, 6, then back to 2 and saves at 3 and 5: 4 and 6 were left behind
        ([(2, 1.0), (3, 4.0), (4, 2.0), (5, 5.0), (6, 3.0)], [], ["5", "3", "2", "6", "4"]),
        # all tiers in one order, of equal iterations the persistent one first
        (
            [(2, 1.0), (4, 2.0)],
            [("local", 5), ("local", 4), ("in_memory", 3)],
            ["local-5", "4", "local-4", "in_memory-3", "2"],
        ),
        ([(4, 2.0)], [("local", 4), ("in_memory", 4)], ["4", "in_memory-4", "local-4"]),
        ([], [("local", 5)], ["local-5"]),
    ],
)
def test_the_order_of_what_can_stand_in(
    persistent: list[tuple[int, float | None]], others: list[tuple[str, int]], expected: list[str]
) -> None:
    assert [source.path.name for source in stand_ins(older(*persistent), offers(*others), 8)] == expected


@pytest.mark.parametrize(
    ("found", "line", "left_behind"),
    [
        ([(2, 1.0, False), (4, 2.0, True), (6, 3.0, False)], [2, 6], [4]),
        # A clock that was set back, and one that was set ahead, say nothing where the starts do.
        ([(2, 9.0, False), (4, 1.0, False), (6, 5.0, False)], [2, 4, 6], []),
        ([(2, None, False), (4, None, True)], [2], [4]),
        # Of starts that nobody has counted the times decide; those of the others do not meddle with them.
        ([(2, 1.0, None), (4, 3.0, None), (5, 2.0, None)], [2, 4], [5]),
        ([(2, 5.0, None), (4, 1.0, False), (6, 0.5, False)], [2, 4, 6], []),
        ([(1, 9.0, True), (2, 5.0, None), (3, 6.0, None)], [2, 3], [1]),
    ],
)
def test_the_starts_decide_what_belongs_to_the_history_and_times_only_where_they_do_not(
    found: list[tuple[int, float | None, bool | None]], line: list[int], left_behind: list[int]
) -> None:
    entries = [Older(iteration, BASE / str(iteration), created, told) for iteration, created, told in found]
    divided = present_history(entries[::-1])
    assert tuple([entry.iteration for entry in part] for part in divided) == (line, left_behind)


def saved(*, has_optimizer: bool = True) -> Saved:
    layout = Layout.from_sizes(dict.fromkeys(("tensor", "pipeline", "context", "expert", "expert_tensor", "data"), 1))
    return Saved(
        iteration=1,
        release=False,
        layout=layout,
        layout_is_known=True,
        content_metadata={},
        has_optimizer=has_optimizer,
        has_rng=True,
        has_train_state=True,
        data_iterator_ranks=0,
    )


DAMAGED = CheckpointDamagedError("it is torn")


@pytest.mark.parametrize(
    ("errors", "fallback", "expected"),
    [
        ([DAMAGED], True, "2"),
        ([NotACheckpointError("empty")], True, "2"),
        ([DAMAGED], False, "CheckpointDamagedError: it is torn"),
        ([UnsafeCheckpointError("it runs code")], True, "UnsafeCheckpointError: it runs code"),
        ([CheckpointMismatchError("other keys")], True, "CheckpointMismatchError: other keys"),
        ([CheckpointError("a bug")], True, "CheckpointError: a bug"),
        ([DAMAGED, UnsafeCheckpointError("it runs code")], True, "UnsafeCheckpointError: it runs code"),
        (
            [DAMAGED, NotACheckpointError("empty")],
            True,
            "NotACheckpointError: no checkpoint can be loaded: it is torn; empty",
        ),
    ],
)
@pytest.mark.parametrize("while_restoring", [False, True])
def test_what_is_passed_over(
    errors: list[CheckpointError], fallback: bool, expected: str, while_restoring: bool
) -> None:
    sources = [Source(BASE / "4", False, ""), Source(BASE / "2", False, "")]
    failures = dict(zip(sources, errors, strict=False))

    def describe(source: Source) -> tuple[Source, Saved]:
        if source in failures and not while_restoring:
            raise failures[source]
        return source, saved()

    def restore(source: Source, _: Saved) -> str:
        if source in failures:
            raise failures[source]
        return source.path.name

    try:
        found = load_best(Candidates(list(sources), fallback=fallback), describe, restore, Ranks.current())
    except CheckpointError as error:
        found = f"{type(error).__name__}: {error}"
    assert found == expected


def test_an_older_checkpoint_that_cannot_undo_what_was_read_is_refused() -> None:
    reads = True
    candidates = Candidates([])

    def describe(source: Source) -> tuple[Source, Saved]:
        return source, saved(has_optimizer="4" in source.path.name)

    def restore(source: Source, described: Saved) -> str:
        if "4" not in source.path.name:
            return source.path.name
        if reads:
            candidates.begun = described
        raise DAMAGED

    sources = [Source(BASE / "4", False, ""), Source(BASE / "2", False, "")]
    candidates.waiting = list(sources)
    with pytest.raises(CheckpointMismatchError, match="/ckpt/2 has no optimizer state to go back to"):
        load_best(candidates, describe, restore, Ranks.current())
    reads, candidates = False, Candidates(list(sources))
    assert load_best(candidates, describe, restore, Ranks.current()) == "2", "nothing was read, so nothing is to undo"


@pytest.mark.parametrize("kind", ["local", "in_memory", "non_persistent_global"])
def test_a_checkpoint_of_another_tier_that_does_not_fit_is_passed_over_whatever_the_setting(kind: Any) -> None:
    candidates = Candidates([Source(BASE / "5", False, "", kind), Source(BASE / "4", False, "")], fallback=False)

    def describe(source: Source) -> tuple[Source, Saved]:
        if source.kind == kind:
            raise CheckpointMismatchError("another layout")
        return source, saved()

    assert load_best(candidates, describe, lambda source, _: source.path.name, Ranks.current()) == "4"


def config(directory: Path, **checkpoint: Any) -> Any:
    settings = {"save": str(directory), "load": str(directory), "save_interval": 2, "async_save": False}
    return tiny_config(train_iters=checkpoint.pop("train_iters", 6), checkpoint=settings | checkpoint)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """A run of six iterations with checkpoints of 2, 4 and 6, and what it was at its end."""
    save = tmp_path_factory.mktemp("finished") / "save"
    (result,) = run_ranks(run_to_end, 1, config(save))
    return save, result["digests"]


def damage(checkpoint: Path) -> None:
    (checkpoint / "__0_0.distcp").write_bytes(b"")


def state_of(save: Path) -> tuple[tuple[int, ...], int, list[int], list[int]]:
    """Iterations there, what the tracker names, what retention counts, and what is marked."""
    listing = list_checkpoints(save)
    tracked = read_tracker(listing)
    assert tracked is not None
    marked = [i for i in listing.iterations if marks.is_marked(save / f"iter_{i:07d}")]
    return listing.iterations, tracked.iteration, [entry.iteration for entry in committed_entries(listing)], marked


@pytest.mark.parametrize("async_save", [False, True])
def test_saving_again_over_a_damaged_checkpoint_replaces_it_whole(
    finished: tuple[Path, dict[str, str]], tmp_path: Path, async_save: bool
) -> None:
    """The run goes back from 6 to 4, does the two iterations again, and ends bit for bit where it ended before."""
    save = tmp_path / "save"
    shutil.copytree(finished[0], save)
    damage(save / "iter_0000006")
    (result,) = run_ranks(run_to_end, 1, config(save, async_save=async_save))
    assert (result["started at"], Path(result["loaded from"]).name) == (4, "iter_0000004")
    assert result["digests"] == finished[1]
    assert state_of(save) == ((2, 4, 6), 6, [2, 4, 6], [])
    (again,) = run_ranks(run_to_end, 1, config(save))
    assert (again["started at"], again["digests"]) == (6, finished[1])


def test_what_a_save_of_another_iteration_leaves(finished: tuple[Path, dict[str, str]], tmp_path: Path) -> None:
    """The damaged 6 stays, marked; it is neither loaded nor deleted, and takes no place from the good ones."""
    save = tmp_path / "save"
    shutil.copytree(finished[0], save)
    damage(save / "iter_0000006")
    (result,) = run_ranks(run_to_end, 1, config(save, train_iters=5, save_interval=5, most_recent_k=2))
    assert result["started at"] == 4
    assert state_of(save) == ((4, 5, 6), 5, [4, 5], [6])
    assert "__0_0.distcp has 0 bytes instead of " in (marks.problem_of(save / "iter_0000006") or "")
    (result,) = run_ranks(run_to_end, 1, config(save, train_iters=8, save_interval=8, most_recent_k=2))
    assert result["started at"] == 5
    assert state_of(save) == ((5, 6, 8), 8, [5, 8], [6])


def test_a_run_that_only_loads_marks_nothing(finished: tuple[Path, dict[str, str]], tmp_path: Path) -> None:
    save = tmp_path / "save"
    shutil.copytree(finished[0], save)
    damage(save / "iter_0000006")
    (result,) = run_ranks(run_to_end, 1, config(save, save=str(tmp_path / "mine")))
    assert result["started at"] == 4
    assert state_of(save) == ((2, 4, 6), 6, [2, 4, 6], [])


def test_a_checkpoint_that_was_repaired_is_loaded_and_loses_its_mark(
    finished: tuple[Path, dict[str, str]], tmp_path: Path
) -> None:
    """And one whose bytes are still wrong is found out by the mark, although sizes and samples are right."""
    save = tmp_path / "save"
    shutil.copytree(finished[0], save)
    newest = save / "iter_0000006"
    marks.mark(newest, "it was unreadable")
    data = (newest / "__0_0.distcp").read_bytes()
    flipped = bytearray(data)
    flipped[len(data) // 30] ^= 1
    (newest / "__0_0.distcp").write_bytes(flipped)
    only_load = config(save, train_iters=4, save_interval=None, integrity="off")
    (result,) = run_ranks(run_to_end, 1, only_load)
    assert result["started at"] == 4
    (newest / "__0_0.distcp").write_bytes(data)
    (result,) = run_ranks(run_to_end, 1, only_load)
    assert (result["started at"], state_of(save)) == (6, ((2, 4, 6), 6, [2, 4, 6], []))


@pytest.mark.parametrize(
    "settings", [{"fallback": False}, {"ckpt_step": 6}, {"load": "iter_0000006"}], ids=["fallback", "step", "directory"]
)
def test_a_named_checkpoint_has_no_stand_in(
    finished: tuple[Path, dict[str, str]], tmp_path: Path, settings: dict[str, Any]
) -> None:
    save = tmp_path / "save"
    shutil.copytree(finished[0], save)
    damage(save / "iter_0000006")
    if "load" in settings:
        settings = {"load": str(save / settings["load"])}

    def start() -> str:
        try:
            run_to_end(config(save, **settings))
        except CheckpointDamagedError as error:
            return str(error)
        return "started"

    assert run_ranks(start, 1)[0].startswith(f"{save}/iter_0000006 is damaged: __0_0.distcp has 0 bytes instead of ")
    assert state_of(save) == ((2, 4, 6), 6, [2, 4, 6], [])


def test_the_log_says_what_is_wrong_and_where_it_goes(finished: tuple[Path, dict[str, str]], tmp_path: Path) -> None:
    save = tmp_path / "save"
    shutil.copytree(finished[0], save)
    for iteration in (6, 4):
        damage(save / f"iter_000000{iteration}")

    def start() -> list[str]:
        records: list[logging.LogRecord] = []
        handler = logging.Handler(logging.ERROR)
        handler.emit = records.append  # type: ignore[method-assign]
        logging.getLogger("bridge").addHandler(handler)
        assert run_to_end(config(save, train_iters=2))["started at"] == 2
        return [record.getMessage() for record in records]

    (messages,) = run_ranks(start, 1)
    size = (finished[0] / "iter_0000006" / "__0_0.distcp").stat().st_size
    assert messages == [
        f"PASSING OVER A DAMAGED CHECKPOINT, going back to {save}/iter_000000{to}: {save}/iter_000000{of} is damaged: "
        f"__0_0.distcp has 0 bytes instead of {size}"
        for of, to in ((6, 4), (4, 2))
    ]


def test_when_none_is_good_every_problem_is_told(finished: tuple[Path, dict[str, str]], tmp_path: Path) -> None:
    save = tmp_path / "save"
    shutil.copytree(finished[0], save)
    for checkpoint in save.glob("iter_*"):
        damage(checkpoint)

    def start() -> str:
        try:
            run_to_end(config(save))
        except CheckpointDamagedError as error:
            return str(error)
        return "started"

    (message,) = run_ranks(start, 1)
    assert message.startswith(f"no checkpoint can be loaded: {save}/iter_0000006 is damaged: ")
    assert f"; {save}/iter_0000004 is damaged: " in message
    assert f"; {save}/iter_0000002 is damaged: " in message
