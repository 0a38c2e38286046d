"""What ranks agree on after a step."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from bridge.training.callbacks import CallbackContext, CheckpointInfo
from bridge.training.config import CheckpointConfig, TrainingConfig
from bridge.training.save_decisions import Moment
from bridge.training.signals import CaughtSignals
from bridge.training.step_watch import StepWatch
from tests.distributed.launch import init_ranks, run_ranks


def test_without_conditions_ranks_do_not_communicate() -> None:
    # torch.distributed does not run here, so a collective would raise.
    watch = StepWatch(TrainingConfig(), CheckpointConfig(), CaughtSignals([]), time.monotonic)
    assert watch.agree(3) == Moment(3)


def test_ranks_agree_on_signals_clocks_and_requests(tmp_path: Path) -> None:
    def moments() -> list[Moment]:
        init_ranks()
        rank = int(os.environ["RANK"])
        now = [0.0]
        train = TrainingConfig(exit_signal_handler=True, exit_duration_in_mins=9.0)
        checkpoint = CheckpointConfig(save=str(tmp_path), save_signal="SIGUSR1", save_interval_minutes=9.0)
        with CaughtSignals(["SIGTERM", "SIGUSR1"]) as signals:
            watch = StepWatch(train, checkpoint, signals, lambda: now[0])
            found = [watch.agree(1)]
            # Rank 2's clock runs fast: it may end the run, and says nothing about the last save.
            now[0] = 500.0 if rank == 2 else 10.0 + rank
            if rank == 1:
                os.kill(os.getpid(), signal.SIGUSR1)
            if rank == 0:
                (tmp_path / "SAVE_NOW").touch()
            found.append(watch.agree(2))
            watch.saving(2)
            # The signal reached another rank only while the checkpoint was captured.
            if rank == 2:
                os.kill(os.getpid(), signal.SIGUSR1)
            watch.saved()
            now[0] += 1.5
            found.append(watch.agree(3))
            info = CheckpointInfo(tmp_path / "iter_0000002", 2, "local")
            watch.published(CallbackContext(None, checkpoint=info))  # type: ignore[arg-type]
            assert rank or (tmp_path / "SAVE_NOW").exists()
            info = CheckpointInfo(tmp_path / "iter_0000002", 2, "persistent")
            watch.published(CallbackContext(None, checkpoint=info))  # type: ignore[arg-type]
            assert rank or not (tmp_path / "SAVE_NOW").exists()
            if rank == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            found += [watch.agree(4), watch.agree(5)]
        return found

    term = frozenset({"SIGTERM"})
    assert run_ranks(moments, 3) == 3 * [
        [
            Moment(1),
            Moment(2, frozenset({"SIGUSR1"}), True, 500.0, 10.0),
            Moment(3, frozenset(), False, 501.5, 1.5),
            Moment(4, term, False, 501.5, 1.5),
            Moment(5, term, False, 501.5, 1.5),
        ]
    ]
