"""The events of real runs: what is in the file, and what a sink can and cannot do to a run."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from bridge.training.checkpointing.errors import CheckpointError
from bridge.training.checkpointing.events.file import read_events
from bridge.training.checkpointing.events.kinds import (
    CheckpointLoaded,
    Event,
    FellBack,
    LoadResolved,
    RunEnded,
    RunStarted,
    SaveCommitted,
    SaveFailed,
    SaveStarted,
)
from bridge.training.checkpointing.integrity import read_manifest
from bridge.training.checkpointing.layout import LEGACY_TRACKER
from bridge.training.config import ConfigContainer
from bridge.training.setup import setup
from bridge.training.train import train
from tests.distributed.launch import run_ranks
from tests.training.tiny import digests, run_to_end, tiny_config

SAVE = ["save_started", "snapshot_taken", "save_written", "save_committed", "checkpoints_retained"]


class Stuck:
    """A sink that never takes anything."""

    def take(self, event: Event) -> None:
        threading.Event().wait()

    def close(self) -> None:
        pass


class Broken:
    """A sink that takes nothing."""

    def take(self, event: Event) -> None:
        raise RuntimeError("no connection")

    def close(self) -> None:
        raise RuntimeError("no connection")


def config(save: Path, iters: int, load: bool = True, **checkpoint: Any) -> ConfigContainer:
    places = {"save": str(save), "load": str(save) if load else None}
    return tiny_config(train_iters=iters, checkpoint={"save_interval": 2, **places, **checkpoint})


def run_with_sinks(cfg: ConfigContainer) -> dict[str, str]:
    """A run whose sinks are one that hangs and one that fails."""
    run = setup(cfg)
    if dist.get_rank() == 0:
        run.state.events.add("stuck", Stuck)
        run.state.events.add("broken", Broken)
        original: Callable[..., None] = run.state.events.close
        run.state.events.close = lambda seconds=0.1: original(seconds)  # type: ignore[method-assign]
    train(run)
    return digests(run)


def run_and_fail(cfg: ConfigContainer) -> str:
    """A run that cannot collect its state at the second save."""
    run = setup(cfg)
    calls = Counter[str]()
    save_state = run.train_data_iterator.save_state  # type: ignore[union-attr]

    def fail_at_the_second() -> Any:
        calls["save"] += 1
        if calls["save"] == 2:
            raise OSError(28, "No space left on device")
        return save_state()

    run.train_data_iterator.save_state = fail_at_the_second  # type: ignore[union-attr]
    try:
        train(run)
    except CheckpointError as error:
        return str(error)
    return "reached the end"


def run_without_a_tracker(cfg: ConfigContainer) -> str:
    """A run whose checkpoint is published, and whose tracker cannot be written."""
    tracker = Path(cfg.checkpoint.save or "") / LEGACY_TRACKER
    if dist.get_rank() == 0:
        (tracker / "in the way").mkdir(parents=True)
    dist.barrier()
    try:
        run_to_end(cfg)
    except CheckpointError as error:
        return str(error)
    return "reached the end"


class Unusable(Exception):
    pass


def refuse(request: Any) -> Any:
    raise Unusable("no data")


def sinks() -> list[str]:
    """That still have a thread, but for the one that never ends."""
    threads = [thread for thread in threading.enumerate() if thread.name.startswith("events-")]
    others = [thread for thread in threads if thread.name != "events-stuck"]
    for thread in others:
        thread.join(1.0)
    return [thread.name for thread in others if thread.is_alive()]


def run_that_cannot_be_set_up(cfg: ConfigContainer) -> list[str]:
    """What of its sinks is left of a run that has opened them and then cannot be built."""
    try:
        setup(cfg, iterator_builder=refuse)
    except Exception as error:
        assert "no data" in str(error)
        return sinks()
    raise AssertionError("it was set up")


def train_twice(cfg: ConfigContainer, scalars: Path) -> list[int]:
    """How many files the sink has begun after one call of `train`, and after a second one."""
    run, found = setup(cfg), []
    for iters in (2, 4):
        run.cfg.train.train_iters = iters
        train(run)
        found.append(len(list(scalars.glob("events.out.tfevents.*"))))
        dist.barrier()  # rank 0's next call begins another one
    return found


def rounds(root: Path) -> dict[str, Any]:
    """All runs of this module, one after the other in the same processes."""
    found: dict[str, Any] = {}
    metrics = str(root / "metrics.jsonl")
    first = config(root / "async", 4, async_save=True, most_recent_k=1)
    first.logger.metrics_path = metrics
    run_to_end(first)
    run_to_end(config(root / "async", 6, async_save=True, most_recent_k=1))
    run_to_end(config(root / "sync", 4))
    dist.barrier()
    if dist.get_rank() == 0:
        (shard,) = (root / "sync" / "iter_0000004").glob("__0_0.distcp")
        shard.write_bytes(shard.read_bytes()[:-1])
    dist.barrier()
    run_to_end(config(root / "sync", 4))
    off = config(root / "off", 2)
    off.logger.checkpoint_events = False
    found["plain"] = run_to_end(off)["digests"]
    found["with sinks"] = run_with_sinks(config(root / "sinks", 2, async_save=True))
    found["trackers"] = run_without_a_tracker(config(root / "trackers", 2, load=False, save_retries=0))
    drawn = config(root / "drawn", 2)
    drawn.logger.tensorboard_dir = str(root / "scalars")
    found["left"] = run_that_cannot_be_set_up(drawn)
    drawn.logger.tensorboard_dir = str(root / "twice")
    found["files"] = train_twice(drawn, root / "twice")
    found["failed"] = run_and_fail(config(root / "failed", 6, async_save=True))
    return found


def test_events_of_real_runs(tmp_path: Path) -> None:
    for found in run_ranks(rounds, 2, tmp_path):
        assert found["plain"] == found["with sinks"]
        assert "No space left on device" in found["failed"]
        assert "Is a directory" in found["trackers"]
        assert (found["left"], found["files"]) == ([], [1, 2])
    _check_asynchronous(tmp_path)
    _check_fallback(tmp_path / "sync")
    assert not list((tmp_path / "off").glob(".bridge-events*"))
    assert (tmp_path / "sinks" / "latest_checkpointed_iteration.txt").read_text() == "2"
    assert read_events(tmp_path / "sinks").events
    _check_failure(tmp_path / "failed")
    (late,) = [event for event in read_events(tmp_path / "trackers").events if isinstance(event, SaveFailed)]
    assert (late.iteration, late.published) == (2, True)
    assert read_manifest(tmp_path / "trackers" / "iter_0000002") is not None


def _check_asynchronous(root: Path) -> None:
    log = read_events(root / "async")
    assert log.unreadable == 0
    deletes = ["checkpoint_deleted"]
    assert [event.kind for event in log.events] == [
        *("load_resolved", "run_started"),
        *SAVE,
        *SAVE[:-1],
        *(*deletes, SAVE[-1], "run_ended"),
        *("load_resolved", "checkpoint_loaded", "run_started"),
        *SAVE[:-1],
        *(*deletes, SAVE[-1], "run_ended"),
    ]
    resolved = [event for event in log.events if isinstance(event, LoadResolved)]
    assert (resolved[0].path, resolved[0].reason) == (None, f"there is no checkpoint in {root / 'async'}")
    assert (resolved[1].path, resolved[1].iteration) == (str(root / "async" / "iter_0000004"), 4)
    starts = [event for event in log.events if isinstance(event, RunStarted)]
    assert [(e.iteration, e.world_size, e.metrics_path) for e in starts] == [
        (0, 2, str(root / "metrics.jsonl")),
        (4, 2, None),
    ]
    ends = [event for event in log.events if isinstance(event, RunEnded)]
    assert [(e.iteration, e.reason) for e in ends] == [
        (4, "train.train_iters (4) reached"),
        (6, "train.train_iters (6) reached"),
    ]
    commits = [event for event in log.events if isinstance(event, SaveCommitted)]
    assert [(e.iteration, e.tier, e.checkpoint_format) for e in commits] == [
        (number, "persistent", "torch_dist") for number in (2, 4, 6)
    ]
    manifest = read_manifest(root / "async" / "iter_0000006")
    assert manifest is not None
    last = commits[-1]
    assert (last.path, last.total_bytes) == (str(root / "async" / "iter_0000006"), manifest.total_bytes)
    assert last.metrics == manifest.metrics
    assert last.blocking_seconds is not None and last.background_seconds is not None
    assert last.blocking_seconds > 0 and last.background_seconds > 0 and last.write_seconds
    assert last.since_seconds is not None and last.since_seconds > 0
    (loaded,) = [event for event in log.events if isinstance(event, CheckpointLoaded)]
    assert list(loaded.phases) == ["examining", "preparing", "reading", "applying"]
    assert loaded.blocking_seconds == sum(loaded.phases.values())
    assert loaded.total_bytes is not None and loaded.bytes_read is not None and loaded.bytes_read > 0


def _check_fallback(save: Path) -> None:
    log = read_events(save)
    started = [event for event in log.events if isinstance(event, SaveStarted)]
    assert all(not event.background for event in started)
    (fell,) = [event for event in log.events if isinstance(event, FellBack)]
    assert (fell.path, fell.to) == (str(save / "iter_0000004"), str(save / "iter_0000002"))
    assert "is damaged" in fell.message
    (loaded,) = [event for event in log.events if isinstance(event, CheckpointLoaded)]
    assert (loaded.iteration, loaded.path) == (2, fell.to)
    assert list(loaded.phases) == ["failed attempt", "examining", "preparing", "reading", "applying"]
    assert [e.background_seconds for e in log.events if isinstance(e, SaveCommitted)] == [0.0] * 3


def _check_failure(save: Path) -> None:
    events = read_events(save).events
    (failed,) = [event for event in events if isinstance(event, SaveFailed)]
    assert (failed.iteration, failed.error, failed.published) == (4, "CheckpointError", False)
    assert "No space left on device" in failed.message
    assert [event.iteration for event in events if isinstance(event, SaveCommitted)] == [2]
    assert not any(isinstance(event, RunEnded) for event in events)
