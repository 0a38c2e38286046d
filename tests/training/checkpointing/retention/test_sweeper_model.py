"""Retention against a model of it: whatever happens to a run and its directory, exactly the right checkpoints stay.

Hypothesis makes up lives of a run: saves, failures, rollbacks, crashes at any file operation of a save or a sweep,
restarts with other settings, clocks that jump, trackers that are damaged, directories that somebody else put there.
The saves go through the real commit and the sweeps through the real sweeper, on a real directory in memory. `Model`
says in its own words what must be there afterwards.
"""

from __future__ import annotations

import logging
import math
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bridge.training.checkpointing import commit, inheritance, recovery
from bridge.training.checkpointing.contents.train_state import train_state_sidecar
from bridge.training.checkpointing.files import delete_trash
from bridge.training.checkpointing.integrity import FileRecord, Manifest, find_damage, read_manifest
from bridge.training.checkpointing.layout import LEGACY_TRACKER, MANIFEST, TRACKER, is_leftover, iteration_name
from bridge.training.checkpointing.retention.policies import policies_of
from bridge.training.checkpointing.retention.sweeper import sweep_after_save
from bridge.training.checkpointing.retention.trash import Trash
from bridge.training.checkpointing.starts import STARTS, read_starts, write_starts
from bridge.training.config import CheckpointConfig
from bridge.training.state import TrainState

MEMORY = Path("/dev/shm")
FOREIGN = {
    "iter_best": "directory",
    "iter_0000030_bak": "directory",
    "iter_30": "directory",
    "release": "directory",
    "non_persistent": "nested",
    "iter_0000001": "link",
    "iter_0000002": "of Megatron-LM",
    "iter_0000003": "torn manifest",
    "iter_0000004": "copy under another name",
    "iter_0000999": "half written",
}
"""Names that are no checkpoints of the run, and what is behind them. Saves are multiples of 10, so they never meet."""


class Crash(BaseException):
    """The process is gone; no `except Exception` sees it."""


class _Bomb:
    """Raises `Crash` before the n-th file operation of a kind, while armed."""

    def __init__(self) -> None:
        self.events: frozenset[str] = frozenset()
        self.left = 0

    def __call__(self, event: str, arguments: Any) -> None:
        if event in self.events:
            self.left -= 1
            if self.left == 0:
                raise Crash

    @contextmanager
    def armed(self, events: Iterable[str], number: int) -> Iterator[None]:
        self.events, self.left = frozenset(events), number
        try:
            yield
        finally:
            self.events = frozenset()


@pytest.fixture(scope="module")
def bomb() -> Iterator[_Bomb]:
    installed = _Bomb()
    sys.addaudithook(installed)
    logging.disable()  # tens of thousands of lines about what is broken on purpose
    first_sign, inheritance._FIRST_SIGN_SECONDS = inheritance._FIRST_SIGN_SECONDS, 0.0  # these lives have no writers
    yield installed
    inheritance._FIRST_SIGN_SECONDS = first_sign
    logging.disable(logging.NOTSET)


class InlineTrash(Trash):
    """Deletes before it returns: thousands of lives have no time to start a process for each sweep."""

    def delete(self, paths: Iterable[Path] = ()) -> None:
        for path in paths:
            delete_trash(path)


# What happens in a run's life


@dataclass(frozen=True)
class Save:
    steps: int
    hours: float
    """Since the save before; negative where the clock was set back."""
    metrics: dict[str, float]
    dated: bool = True
    """Whether the manifest says when it was written, and by which start of the run."""
    tracker: str = ""
    """What happens to the trackers between the commit and the sweep."""
    crash: tuple[str, int] | None = None
    """The kind of operation of the sweep, and the how-manieth, before which the process dies."""


@dataclass(frozen=True)
class FailedSave:
    """A save that does not come to its end: the process lives on, or dies and leaves what it had."""

    steps: int
    left: str


@dataclass(frozen=True)
class Rollback:
    """The run goes on from an older checkpoint."""

    choice: int


@dataclass(frozen=True)
class Restart:
    settings: dict[str, Any]


@dataclass(frozen=True)
class PutForeign:
    name: str


@dataclass(frozen=True)
class Pin:
    """From now on `pretrained_checkpoint` is a link to one of the run's checkpoints."""

    choice: int


Event = Save | FailedSave | Rollback | Restart | PutForeign | Pin

RULES: dict[str, st.SearchStrategy[Any]] = {
    "most_recent_k": st.integers(1, 3),
    "save_retain_interval": st.sampled_from([20, 30, 50]),
    "retain_every_hours": st.sampled_from([1.0, 3.0]),
    "retain_best": st.tuples(st.integers(1, 2), st.sampled_from(["loss", "accuracy"]), st.sampled_from(["min", "max"])),
    "retain_iterations": st.lists(st.sampled_from([10, 20, 40, 70, 2]), min_size=1, max_size=2),
}
RETENTION: st.SearchStrategy[dict[str, Any]] = st.sets(st.sampled_from(sorted(RULES)), max_size=3).flatmap(
    lambda names: st.fixed_dictionaries({name: RULES[name] for name in sorted(names)})
)
_metrics = st.fixed_dictionaries(
    {}, optional={"loss": st.sampled_from([1.0, 2.0, 3.0]), "accuracy": st.sampled_from([-1.0, 0.5])}
)
_steps = st.sampled_from([10, 10, 20])
SAVES = st.builds(
    Save,
    _steps,
    st.sampled_from([0.5, 0.5, 1.0, 1.5, 4.0, -0.75, -30.0, 1e6]),
    _metrics,
    st.sampled_from([True, True, True, False]),
    st.sampled_from(
        [*[""] * 8, "torn", "absent", "legacy torn", "names nothing", "names the newest", "names the newest"]
    ),
    st.one_of(st.none(), st.none(), st.tuples(st.sampled_from(["rename", "delete"]), st.integers(1, 4))),
)
OTHERS = st.one_of(
    st.builds(FailedSave, _steps, st.sampled_from(["nothing", "unsealed", "sealed", "published"])),
    st.builds(Rollback, st.integers(0, 5)),
    st.builds(Restart, RETENTION),
    st.builds(PutForeign, st.sampled_from(sorted(FOREIGN))),
    st.builds(Pin, st.integers(0, 5)),
)
LIVES = st.lists(st.tuples(st.lists(OTHERS, max_size=2), SAVES), min_size=2, max_size=9).map(
    lambda stages: [event for before, save in stages for event in (*before, save)]
)


# What must be there


@dataclass
class Past:
    """What a start goes on from."""

    known: frozenset[tuple[int, int]]
    """The checkpoints that it was trained on from, each by its iteration and its start."""
    unknown: int
    """Up to this iteration there may be others."""
    saved: set[int] = field(default_factory=set)
    """The iterations that it has saved itself, where the checkpoints say so."""


@dataclass
class Model:
    """What a directory holds, by the documented rules alone."""

    rules: dict[str, Any]
    committed: dict[int, tuple[float, dict[str, float]]] = field(default_factory=dict)
    """Iteration to (hours, metrics)."""
    tracked: int | None = None
    pinned: int | None = None
    foreign: set[str] = field(default_factory=set)
    starts: list[Past] = field(default_factory=list)
    """What each start that has saved went on from."""
    saved_by: dict[int, int] = field(default_factory=dict)
    """Iteration to the start that has saved it, where the checkpoint says so."""

    def doomed(self, saved: int) -> list[int]:
        """What a sweep after the save of `saved` deletes, in its order."""
        limits = self.rules.keys() - {"retain_iterations"}
        if not limits or self.tracked is None:
            return []
        return [
            iteration
            for iteration in sorted(self.committed)
            if iteration < self.tracked and iteration not in (saved, self.pinned) and not self._is_wanted(iteration)
        ]

    def _is_wanted(self, iteration: int) -> bool:
        reached = {i: about for i, about in self.committed.items() if i <= (self.tracked or 0)}
        present = {i: about for i, about in reached.items() if not self._was_left_behind(i)}
        doubtful = {i: about for i, about in present.items() if self._is_doubtful(i)}
        certain = {i: about for i, about in present.items() if i not in doubtful}
        # What a rollback has left behind takes no place from the others, and has none of its own taken for it. Of what
        # it may have left behind, all may be what it has, or none, or any one.
        asked = [reached, present, certain, *(certain | {i: about} for i, about in doubtful.items())]
        return any(iteration in among and self._has_a_reason(iteration, among) for among in asked)

    def begin(self, resumed: int) -> int:
        """Another start saves, which went on from the checkpoint of an iteration; the start that had saved that."""
        source = self.saved_by.get(resumed, 0) if resumed in self.committed else 0
        known, unknown = set[tuple[int, int]](), resumed
        if source:
            past = self.starts[source - 1]
            known = past.known | {(i, source) for i in past.saved if i <= resumed}
            unknown = past.unknown
        self.starts.append(Past(frozenset(known), unknown))
        return source

    def _was_left_behind(self, iteration: int) -> bool:
        if iteration not in self.saved_by:
            return False
        start, last = self.saved_by[iteration], self.starts[-1]
        return start != len(self.starts) and (iteration, start) not in last.known and iteration > last.unknown

    def _is_doubtful(self, iteration: int) -> bool:
        if iteration not in self.saved_by or self._was_left_behind(iteration):
            return False
        start, last = self.saved_by[iteration], self.starts[-1]
        return start != len(self.starts) and (iteration, start) not in last.known

    def _has_a_reason(self, iteration: int, reached: dict[int, tuple[float, dict[str, float]]]) -> bool:
        rules = self.rules
        newer = sum(1 for other in reached if other > iteration)
        if "most_recent_k" in rules and newer < rules["most_recent_k"]:
            return True
        if (
            "save_retain_interval" in rules
            and iteration / rules["save_retain_interval"] == iteration // rules["save_retain_interval"]
        ):
            return True
        if "retain_every_hours" in rules and self._begins_a_span(iteration, reached, rules["retain_every_hours"]):
            return True
        if "retain_best" in rules and self._is_among_the_best(iteration, reached, *rules["retain_best"]):
            return True
        return iteration in rules.get("retain_iterations", [])

    @staticmethod
    def _begins_a_span(iteration: int, reached: dict[int, tuple[float, dict[str, float]]], span: float) -> bool:
        """The last span that began before it is at least a span away, on either side."""
        begins: dict[int, bool] = {}
        for i in sorted(reached):
            before = [reached[j][0] for j in begins if begins[j]]
            begins[i] = not before or not (before[-1] - span < reached[i][0] < before[-1] + span)
        return begins[iteration]

    @staticmethod
    def _is_among_the_best(
        iteration: int, reached: dict[int, tuple[float, dict[str, float]]], count: int, metric: str, mode: str
    ) -> bool:
        values = {i: metrics[metric] for i, (_, metrics) in reached.items() if metric in metrics}
        if not values:
            return True
        if iteration not in values:
            return False
        mine = values[iteration]
        ahead = {i for i, value in values.items() if (value < mine if mode == "min" else value > mine)}
        ahead |= {i for i, value in values.items() if value == mine and i > iteration}
        return len(ahead) < count


# The real thing


@cache
def tracker_bytes(iteration: int) -> bytes:
    return train_state_sidecar(TrainState(step=iteration), 0).data


class World:
    """A run and its directory, and the model beside it."""

    def __init__(self, root: Path, rules: dict[str, Any], bomb: _Bomb) -> None:
        self.save_dir = root / "save"
        self.save_dir.mkdir()
        self.link = root / "pretrained"
        self.elsewhere = root / "elsewhere"
        self.bomb = bomb
        self.step = 0
        self.resumed: int | None = 0
        """Where this start went on from; None when it has saved."""
        self.hours = 1000.0
        self.model = Model(rules)

    def live(self, event: Event) -> None:
        """Let one thing happen, to the directory and to the model, and compare."""
        deeds: dict[type, Callable[[Any], None]] = {
            Save: self._save,
            FailedSave: self._failed_save,
            Rollback: self._rollback,
            Restart: self._restart,
            PutForeign: self._put_foreign,
            Pin: self._pin,
        }
        deeds[type(event)](event)
        self.compare()

    def compare(self) -> None:
        """The directory holds exactly what the model says, and every checkpoint in it is whole."""
        names = {entry.name for entry in self.save_dir.iterdir()} - {TRACKER, LEGACY_TRACKER, STARTS}
        hidden = {name for name in names if name.startswith(".")}
        assert hidden == {name for name in hidden if is_leftover(name)}
        expected = {iteration_name(iteration) for iteration in self.model.committed}
        assert names - hidden - self.model.foreign == expected
        assert self.model.foreign <= names
        for iteration in self.model.committed:
            path = self.save_dir / iteration_name(iteration)
            manifest = read_manifest(path)
            assert manifest is not None and find_damage(path, manifest.files) == []
        for name in self.model.foreign & {"non_persistent"}:
            assert (self.save_dir / name / "iter_0000010" / MANIFEST).exists()
        if "iter_0000001" in self.model.foreign:
            assert (self.elsewhere / MANIFEST).exists()

    def _stage(
        self, iteration: int, *, seal: bool, dated: bool = True, metrics: dict[str, float] | None = None
    ) -> Path:
        if self.resumed is not None:
            starts = read_starts(self.save_dir)
            source = self.model.begin(self.resumed)
            write_starts(self.save_dir, starts.followed_by(starts.next, self.resumed, source))
            self.resumed = None
        staging = commit.begin_staging(self.save_dir, iteration)
        (staging / "shard").write_bytes(b"%d" % iteration)
        created = self.hours * 3600 if dated else None
        manifest = Manifest(
            iteration,
            "torch_dist",
            1,
            {},
            {},
            (FileRecord.of(staging, "shard"),),
            created=created,
            start=len(self.model.starts) if dated else 0,
            metrics=metrics or {},
        )
        if seal:
            commit.seal(staging, manifest)
            if not dated:
                os.utime(staging / MANIFEST, (self.hours * 3600, self.hours * 3600))
        return staging

    def _save(self, event: Save) -> None:
        self.step += event.steps
        self.hours += event.hours
        staging = self._stage(self.step, seal=True, dated=event.dated, metrics=event.metrics)
        commit.publish(staging, self.step)
        commit.move_trackers(self.save_dir, self.step, tracker_bytes(self.step))
        self._commit(self.step, event.metrics, dated=event.dated)
        self.model.tracked = self.step
        self._harm_tracker(event.tracker)
        readable = event.tracker in ("", "names the newest")
        doomed = self.model.doomed(self.step) if readable else []
        kind, number = event.crash or ("rename", 0)
        try:
            with self.bomb.armed({"os.rename"} if kind == "rename" else {"os.remove", "os.rmdir"}, number):
                sweep_after_save(
                    self.save_dir,
                    self.step,
                    policies_of(config_of(self.model.rules)),
                    InlineTrash(),
                    in_use=[self.link, Path("/nowhere")],
                )
        except Crash:
            if kind == "rename":
                doomed = doomed[: number - 1]
            self._forget(doomed)
            self.compare()
            self._recover()
        else:
            self._forget(doomed)
            if readable:
                assert not [entry for entry in self.save_dir.iterdir() if is_leftover(entry.name)]
        assert self.step in self.model.committed
        if not readable:
            commit.move_trackers(self.save_dir, self.step, tracker_bytes(self.step))

    def _commit(self, iteration: int, metrics: dict[str, float], *, dated: bool = True) -> None:
        self.model.committed[iteration] = (self.hours, metrics)
        self.model.saved_by.pop(iteration, None)
        if dated:
            self.model.saved_by[iteration] = len(self.model.starts)
            self.model.starts[-1].saved.add(iteration)

    def _forget(self, doomed: Iterable[int]) -> None:
        for iteration in doomed:
            del self.model.committed[iteration]

    def _harm_tracker(self, how: str) -> None:
        if how == "torn":
            (self.save_dir / TRACKER).write_bytes(tracker_bytes(self.step)[:100])
        elif how == "absent":
            (self.save_dir / TRACKER).unlink()
            (self.save_dir / LEGACY_TRACKER).unlink()
        elif how == "legacy torn":
            (self.save_dir / LEGACY_TRACKER).write_text("")
        elif how == "names nothing":
            (self.save_dir / TRACKER).write_bytes(tracker_bytes(77777))
        elif how == "names the newest":
            self.model.tracked = max(self.model.committed)
            commit.move_trackers(self.save_dir, self.model.tracked, tracker_bytes(self.model.tracked))

    def _failed_save(self, event: FailedSave) -> None:
        iteration = self.step + event.steps
        staging = self._stage(iteration, seal=event.left in ("sealed", "published"))
        if event.left == "nothing":
            commit.abandon(staging)
            return
        if event.left == "published" or (event.left == "sealed" and iteration not in self.model.committed):
            # Dead before the trackers moved: it is a checkpoint, at once or when the next start finds it whole.
            self._commit(iteration, {})
        if event.left == "published":
            commit.publish(staging, iteration)
        self._recover()

    def _rollback(self, event: Rollback) -> None:
        if self.model.committed:
            self.step = self.resumed = sorted(self.model.committed)[event.choice % len(self.model.committed)]

    def _restart(self, event: Restart) -> None:
        self.model.rules = event.settings
        self.step = self.resumed = self.model.tracked or 0
        self._recover()

    def _recover(self) -> None:
        recovery.recover(self.save_dir)
        assert not [entry for entry in self.save_dir.iterdir() if is_leftover(entry.name)]

    def _pin(self, event: Pin) -> None:
        if self.model.committed:
            self.model.pinned = sorted(self.model.committed)[event.choice % len(self.model.committed)]
            self.link.unlink(missing_ok=True)
            self.link.symlink_to(self.save_dir / iteration_name(self.model.pinned))

    def _put_foreign(self, event: PutForeign) -> None:
        if event.name in self.model.foreign:
            return
        self.model.foreign.add(event.name)
        path, kind = self.save_dir / event.name, FOREIGN[event.name]
        text = Manifest(10, "torch_dist", 1, {}, {}, (), created=0.0).to_json()
        if kind == "link":
            self.elsewhere.mkdir()
            (self.elsewhere / MANIFEST).write_text(text.replace('"iteration": 10', '"iteration": 1'))
            path.symlink_to(self.elsewhere)
            return
        inner = path / "iter_0000010" if kind == "nested" else path
        inner.mkdir(parents=True)
        contents = {"torn manifest": {MANIFEST: text[:40]}, "of Megatron-LM": {"metadata.json": "{}", "common.pt": ""}}
        for name, content in contents.get(kind, {} if kind == "half written" else {MANIFEST: text}).items():
            (inner / name).write_text(content)


def config_of(rules: dict[str, Any]) -> CheckpointConfig:
    """The settings that ask for the model's rules."""
    settings = dict(rules)
    count, metric, mode = settings.pop("retain_best", (None, None, "min"))
    return CheckpointConfig(
        save="/save", retain_best_k=count, retain_best_metric=metric, retain_best_mode=mode, **settings
    )


@given(RETENTION, LIVES)
@settings(max_examples=700, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_exactly_what_the_model_says_is_kept(bomb: _Bomb, rules: dict[str, Any], life: list[Event]) -> None:
    live(rules, life, bomb)


@pytest.mark.slow
@given(RETENTION, LIVES)
@settings(max_examples=10_000, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_exactly_what_the_model_says_is_kept_in_many_lives(
    bomb: _Bomb, rules: dict[str, Any], life: list[Event]
) -> None:
    live(rules, life, bomb)


def live(rules: dict[str, Any], life: list[Event], bomb: _Bomb) -> None:
    """A run's whole life in a directory of its own."""
    with tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None) as root:
        world = World(Path(root), rules, bomb)
        for event in life:
            world.live(event)


def test_the_model_is_tried_with_lives_that_delete(bomb: _Bomb, tmp_path: Path) -> None:
    """A model that never expects a deletion would agree with a sweeper that does nothing."""
    world = World(tmp_path, {"most_recent_k": 1, "save_retain_interval": 30, "retain_every_hours": 3.0}, bomb)
    for hours in (1.0, 1.0, 1.0, 1.0, -math.e, 1.0, 1.0):
        world.live(Save(10, hours, {}))
    assert sorted(world.model.committed) == [10, 30, 40, 60, 70]


def test_what_a_rollback_leaves_behind_takes_no_place(bomb: _Bomb, tmp_path: Path) -> None:
    """Nor is it deleted sooner than without that."""
    world = World(tmp_path, {"most_recent_k": 2}, bomb)
    for event in (Save(10, 1.0, {}), Save(10, 1.0, {}), Restart({}), Save(10, 1.0, {}), Rollback(0)):
        world.live(event)
    assert (sorted(world.model.committed), world.step) == ([10, 20, 30], 10)
    # Saved after 20 and 30, by a clock that was set back.
    world.model.rules = {"most_recent_k": 2}
    world.live(Save(15, -5.0, {}))
    assert sorted(world.model.committed) == [10, 20, 25, 30], "newer than the tracked one; and 20 is left behind"
    world.live(Save(10, 1.0, {}))
    assert sorted(world.model.committed) == [25, 30, 35]
    world.live(Save(10, 1.0, {}))
    assert sorted(world.model.committed) == [35, 45]
