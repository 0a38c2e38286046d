"""What happened during a step on any rank, agreed by all of them with one small collective."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist

from bridge import accelerator
from bridge.training.callbacks import CallbackContext
from bridge.training.checkpointing.objects.places import save_directory
from bridge.training.config import CheckpointConfig, TrainingConfig
from bridge.training.save_decisions import Moment
from bridge.training.save_request import SaveRequest
from bridge.training.signals import CaughtSignals

_REQUESTED, _RUNNING, _SINCE_SAVE = "requested", "seconds running", "seconds since the last save"


class StepWatch:
    """Brings signals, clocks and requests of all ranks together at step boundaries.

    Signals and the duration of the run count from any rank. Rank 0 alone looks for requests and tells the time
    since the last save: clocks differ, and storage is asked once.
    """

    def __init__(
        self,
        train: TrainingConfig,
        checkpoint: CheckpointConfig,
        signals: CaughtSignals,
        clock: Callable[[], float],
    ) -> None:
        """Start the clocks; `clock` gives seconds and never goes back."""
        self._signals = signals
        self._save_signal = checkpoint.save_signal
        self._clock = clock
        self._request: SaveRequest | None = None
        self._inputs: dict[str, Callable[[], float]] = {name: partial(signals.received, name) for name in signals.names}
        if train.exit_duration_in_mins is not None:
            self._inputs[_RUNNING] = lambda: clock() - self._started
        if checkpoint.save is not None:
            decides = dist.get_rank() == 0
            if decides:
                self._request = SaveRequest(save_directory(checkpoint), clock)
            self._inputs[_REQUESTED] = lambda: self._request is not None and self._request.is_open()
            if checkpoint.save_interval_minutes is not None:
                self._inputs[_SINCE_SAVE] = lambda: clock() - self._last_save if decides else 0.0
        self._started = self._last_save = clock()

    def agree(self, step: int) -> Moment:
        """What is known after `step` completed steps. Collective if anything is configured that ranks must agree on.

        A save directory is such a thing, because a request may appear in it. Only what is configured travels:
        gloo sends a message more for each number.
        """
        if not self._inputs:
            return Moment(step)
        local = [float(ask()) for ask in self._inputs.values()]
        highest = torch.tensor(local, dtype=torch.float64, device=accelerator.device())
        dist.all_reduce(highest, op=dist.ReduceOp.MAX)
        agreed = dict(zip(self._inputs, highest.tolist(), strict=True))
        return Moment(
            step,
            signals=frozenset(name for name in self._signals.names if agreed[name]),
            requested=bool(agreed.get(_REQUESTED)),
            seconds_running=agreed.get(_RUNNING, 0.0),
            seconds_since_save=agreed.get(_SINCE_SAVE, 0.0),
        )

    def saving(self, iteration: int) -> None:
        """A persistent save of the present step, `iteration`, begins; it may be published before `saved` is called."""
        if self._request is not None:
            self._request.answered_by(iteration)

    def saved(self) -> None:
        """That save is made, or captured and on its way, and training goes on.

        A signal that asks for a save and came meanwhile is answered too: nothing has changed since. So a signal
        sent to all ranks gives one checkpoint, although it does not reach all of them at the same instant.
        """
        self._last_save = self._clock()
        if self._save_signal is not None:
            self._signals.forget(self._save_signal)

    def published(self, context: CallbackContext) -> None:
        """Hears `on_checkpoint_save`."""
        info = context.checkpoint
        if self._request is not None and info is not None and info.kind == "persistent":
            self._request.published(info.iteration)
