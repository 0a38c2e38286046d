"""Runs on four real ranks: what makes them save, what makes them stop, and that nothing is lost by it."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest

from bridge.training.callbacks import CallbackContext
from bridge.training.checkpointing import DefaultCheckpointManager, schedule_async_save
from bridge.training.checkpointing.errors import CheckpointError
from bridge.training.setup import setup
from bridge.training.train import TrainOutcome, train
from tests.distributed.launch import init_ranks, run_ranks
from tests.training.tiny import SavedCheckpoints, digests, tiny_config

ITERS = 6
CAUGHT = (signal.SIGTERM, signal.SIGUSR1)
SECONDS_A_STEP = 25


class SignalledManager(DefaultCheckpointManager):
    """Saves as ever, while its process and its writers receive the signals of a scheduler that insists."""

    def save(self, ctx: Any, callback_manager: Any) -> None:
        insist(signal.SIGTERM)
        super().save(ctx, callback_manager)
        insist(signal.SIGTERM)

    def finalize_async_saves(self, state: Any, blocking: bool = False, terminate: bool = False) -> None:
        if terminate:
            insist(signal.SIGTERM)
        super().finalize_async_saves(state, blocking, terminate)


class RecordingManager:
    """Writes nothing and remembers what it was asked."""

    calls: list[tuple[Any, ...]] = []  # noqa: RUF012  (one list for the one run of a process)

    def __init__(self, checkpoint_config: Any) -> None:
        self.calls.clear()

    def save(self, ctx: Any, callback_manager: Any) -> None:
        kind = "non-persistent" if ctx.non_persistent_ckpt else "persistent"
        self.calls.append((kind, ctx.state.train_state.step, sorted(ctx.state.metrics)))

    def load(self, ctx: Any) -> tuple[int, int]:
        return 0, 0

    def finalize_async_saves(self, state: Any, blocking: bool = False, terminate: bool = False) -> None:
        self.calls.append(("finalize", blocking, terminate))


def insist(number: int) -> None:
    """Signal every process of this rank: the trainer, its writers, its data workers."""
    os.killpg(os.getpgrp(), number)


def rank() -> int:
    return int(os.environ["RANK"])


def run(
    settings: dict[str, Any],
    after_step: Callable[[CallbackContext, int], None] | None = None,
    *,
    seconds_a_step: float = SECONDS_A_STEP,
    after_setup: Callable[[Any], None] | None = None,
) -> dict[str, Any]:
    """Train on this rank, by a clock that steps move; `after_step` may interfere."""
    saved = SavedCheckpoints()
    if after_step is not None:
        saved.manager.register("on_train_step_end", lambda ctx: after_step(ctx, ctx.state.train_state.step))
    before = [signal.getsignal(number) for number in CAUGHT]
    run = setup(tiny_config(**{"train_iters": ITERS, **settings}), saved.manager)
    if after_setup is not None:
        after_setup(run)
    started_at = run.state.train_state.step
    outcome = train(run, clock=lambda: run.state.train_state.step * seconds_a_step)
    assert [signal.getsignal(number) for number in CAUGHT] == before
    found = {
        "outcome": outcome,
        "started at": started_at,
        "saved": [name for name, _, _ in saved.saved],
        "digests": digests(run),
    }
    run.train_data_iterator.close()  # or the next run waits 5 s for its worker, when the collector finds this one
    return found


END = TrainOutcome(True, f"train.train_iters ({ITERS}) reached", ITERS)


def test_sigterm_to_one_rank_of_four_saves_once_and_resume_loses_no_step(tmp_path: Path) -> None:
    def interrupt(ctx: CallbackContext, step: int) -> None:
        if step == 3 and rank() == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    def interrupted_and_resumed(mode: str) -> list[dict[str, Any]]:
        checkpoint = {
            "save": str(tmp_path / mode),
            "load": str(tmp_path / mode),
            "save_interval": 2,
            "async_save": mode == "async",
        }
        # A data worker is one more process that a signal to the whole job reaches.
        dataset = {"num_workers": 1}
        managed = checkpoint | {"custom_manager_class": f"{__name__}.SignalledManager"}
        interrupted = {"train": {"exit_signal_handler": True}, "checkpoint": managed, "dataset": dataset}
        logger = {"metrics_path": str(tmp_path / f"{mode}.jsonl")}
        return [
            run(interrupted | {"logger": logger}, interrupt),
            run({"checkpoint": checkpoint, "dataset": dataset, "logger": logger}),
        ]

    def all_runs() -> list[Any]:
        init_ranks()
        return [run({"logger": {"metrics_path": str(tmp_path / "whole.jsonl")}})] + [
            found for mode in ("sync", "async") for found in interrupted_and_resumed(mode)
        ]

    for whole, *pairs in run_ranks(all_runs, 4, timeout=240):
        assert (whole["outcome"], whole["saved"]) == (END, [])
        for first, second in (pairs[:2], pairs[2:]):
            # SignalledManager sends its signals during the save of step 2 already.
            assert first["outcome"] == TrainOutcome(False, "SIGTERM was received", 3)
            assert first["saved"] == ["iter_0000002", "iter_0000003"]
            assert second["started at"] == 3
            assert second["outcome"] == END
            assert second["saved"] == ["iter_0000004", "iter_0000006"]
            assert second["digests"] == whole["digests"]
    whole_losses = losses(tmp_path / "whole.jsonl")
    assert [n for n, _ in whole_losses] == list(range(1, ITERS + 1))
    assert losses(tmp_path / "sync.jsonl") == losses(tmp_path / "async.jsonl") == whole_losses


def losses(path: Path) -> list[tuple[int, str]]:
    """Iterations and losses, exactly as written and in that order."""
    return [(entry["iteration"], repr(entry["loss"])) for entry in map(json.loads, path.read_text().splitlines())]


def test_saves_while_training_goes_on(tmp_path: Path) -> None:
    def request(ctx: CallbackContext, step: int) -> None:
        if step == 2 and rank() == 0:  # any process may; this one does it before rank 0 looks
            (tmp_path / "requested" / "SAVE_NOW").touch()

    def signal_everybody(ctx: CallbackContext, step: int) -> None:
        if step == 2:
            insist(signal.SIGUSR1)

    def slow_and_fast_clocks() -> dict[str, Any]:
        checkpoint = {"save": str(tmp_path / "minutes"), "save_interval": 5, "save_interval_minutes": 1.0}
        seconds = SECONDS_A_STEP if rank() == 0 else 1000.0 * rank()
        return run({"checkpoint": checkpoint, "train_iters": 9}, seconds_a_step=seconds)

    def all_runs() -> list[dict[str, Any]]:
        init_ranks()
        return [
            run({"checkpoint": {"save": str(tmp_path / "requested"), "async_save": True}}, request),
            run({"checkpoint": {"save": str(tmp_path / "requested zero"), "save_interval": 0}}),
            run(
                {
                    "checkpoint": {
                        "save": str(tmp_path / "signalled"),
                        "save_signal": "SIGUSR1",
                        "save_interval": 3,
                        "async_save": True,
                    },
                    "dataset": {"num_workers": 1},
                },
                signal_everybody,
            ),
            slow_and_fast_clocks(),
        ]

    (tmp_path / "requested zero").mkdir()
    (tmp_path / "requested zero" / "SAVE_NOW").touch()
    for requested, zero, signalled, minutes in run_ranks(all_runs, 4, timeout=240):
        assert requested["outcome"] == zero["outcome"] == signalled["outcome"] == END
        assert requested["saved"] == ["iter_0000002", "iter_0000006"]
        assert zero["saved"] == ["iter_0000001"]
        assert signalled["saved"] == ["iter_0000002", "iter_0000003", "iter_0000006"]
        # 75 s after the start, then by the interval, 75 s after that, and at the end
        assert minutes["saved"] == ["iter_0000003", "iter_0000005", "iter_0000008", "iter_0000009"]
    assert not (tmp_path / "requested" / "SAVE_NOW").exists()
    assert not (tmp_path / "requested zero" / "SAVE_NOW").exists()


def test_an_exit_right_after_a_non_persistent_save_still_saves_persistently(tmp_path: Path) -> None:
    recording = {"save": str(tmp_path), "custom_manager_class": f"{__name__}.RecordingManager"}

    def often(run: Any) -> None:
        run.cfg.checkpoint.non_persistent_save_interval = 1

    def calls(**settings: Any) -> list[tuple[Any, ...]]:
        run(settings, after_setup=often)
        return list(RecordingManager.calls)

    def all_runs() -> list[list[tuple[Any, ...]]]:
        init_ranks()
        return [
            calls(train={"exit_interval": 3}, checkpoint=recording),
            calls(train={"exit_duration_in_mins": 1.0}, checkpoint=recording),
            calls(train_iters=3, checkpoint=recording | {"save_interval": 2}),
        ]

    polled = ("finalize", False, False)
    for interval, duration, end in run_ranks(all_runs, 2):
        metrics = ["grad_norm", "loss"]
        for found, second in ((interval, "non-persistent"), (duration, "non-persistent"), (end, "persistent")):
            assert found == [
                *(polled, ("non-persistent", 1, metrics)),
                *(polled, (second, 2, metrics)),
                *(polled, ("persistent", 3, metrics)),
                ("finalize", True, True),
            ]


def test_the_failure_of_an_earlier_save_does_not_keep_the_last_one_from_being_made(tmp_path: Path) -> None:
    save = str(tmp_path / "saved")

    def start_a_failing_write(ctx: CallbackContext, step: int) -> None:
        def write() -> None:
            if rank() == 1:
                raise OSError(5, "Input/output error")

        if step == 3:
            schedule_async_save(ctx.state, AsyncRequest(write, (), []))

    def stopped() -> str:
        try:
            checkpoint = {"save": save, "async_save": True}
            run({"train": {"exit_interval": 3}, "checkpoint": checkpoint}, start_a_failing_write)
        except CheckpointError as error:
            return str(error)
        return "nothing was raised"

    def all_runs() -> tuple[dict[str, Any], str, dict[str, Any]]:
        init_ranks()
        return run({}), stopped(), run({"checkpoint": {"load": save}})

    for whole, error, resumed in run_ranks(all_runs, 2):
        assert error == (
            "writing asynchronous save failed on rank 1: the process of the background writer of asynchronous save "
            "failed: OSError: [Errno 5] Input/output error"
        )
        assert resumed["started at"] == 3
        assert resumed["digests"] == whole["digests"]
