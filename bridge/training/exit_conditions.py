"""When a run saves and when it ends: pure decisions, and the two inputs that ranks must agree on."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType, TracebackType
from typing import Any

import torch
import torch.distributed as dist

from bridge import accelerator
from bridge.training.config import CheckpointConfig, TrainingConfig


@dataclass(frozen=True)
class StepDecision:
    """What follows after a step."""

    save: bool = False
    exit_reason: str | None = None
    """Why training stops here; None lets it go on."""


def decide_after_step(
    step: int,
    train: TrainingConfig,
    checkpoint: CheckpointConfig,
    *,
    signal_received: bool = False,
    duration_exceeded: bool = False,
) -> StepDecision:
    """Whether to save after `step` completed steps, and whether to stop.

    A save is due at every multiple of `checkpoint.save_interval`, and before every planned exit; never twice
    at one step, and never without `checkpoint.save`.
    """
    can_save = checkpoint.save is not None
    if signal_received:
        return StepDecision(can_save, "SIGTERM was received")
    if duration_exceeded:
        reason = f"train.exit_duration_in_mins ({train.exit_duration_in_mins:g}) has passed"
        return StepDecision(can_save, reason)
    if train.exit_interval and step % train.exit_interval == 0:
        return StepDecision(can_save, f"iteration {step} is a multiple of train.exit_interval ({train.exit_interval})")
    interval = checkpoint.save_interval
    return StepDecision(can_save and bool(interval) and step % (interval or 1) == 0)


def final_save_due(step: int, first_step: int, last_saved: int | None, checkpoint: CheckpointConfig) -> bool:
    """Whether the end of training still has to be saved.

    Args:
        step: completed steps.
        first_step: completed steps when this run began; nothing new is lost when no step was made.
        last_saved: step of this run's newest save.
        checkpoint: an interval of 0 declines the final save too.
    """
    wanted = checkpoint.save is not None and checkpoint.save_interval != 0
    return wanted and step > first_step and last_saved != step


class SignalFlag:
    """Remembers SIGTERM while it is entered, instead of letting it end the process."""

    def __init__(self, enabled: bool) -> None:
        self.received = False
        self._enabled = enabled
        self._previous: Any = None

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.received = True

    def __enter__(self) -> SignalFlag:
        if self._enabled:
            self._previous = signal.signal(signal.SIGTERM, self._remember)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._enabled:
            signal.signal(signal.SIGTERM, self._previous)


class ExitWatch:
    """Whether any rank received SIGTERM or has run for too long, agreed by all ranks at a step boundary."""

    def __init__(self, train: TrainingConfig, flag: SignalFlag, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit = None if train.exit_duration_in_mins is None else 60 * train.exit_duration_in_mins
        self._enabled = train.exit_signal_handler or self._limit is not None
        self._flag = flag
        self._clock = clock
        self._started = clock()

    def agree(self) -> tuple[bool, bool]:
        """(signal received, duration exceeded). Collective over all ranks if either condition is configured."""
        if not self._enabled:
            return False, False
        late = self._limit is not None and self._clock() - self._started > self._limit
        seen = torch.tensor([self._flag.received, late], dtype=torch.int32, device=accelerator.device())
        dist.all_reduce(seen, op=dist.ReduceOp.MAX)
        received, exceeded = seen.tolist()
        return bool(received), bool(exceeded)
