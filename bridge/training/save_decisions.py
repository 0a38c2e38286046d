"""When a run saves, what kind of checkpoint, and when it ends: pure decisions over what all ranks know alike.

A trigger is a condition that puts itself into words. Triggers are combined by "any of", and `SaveDecisions` is
made of three such combinations: what calls for a persistent save, for a non-persistent one, and for the end.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from bridge.training.callbacks import CheckpointKind
from bridge.training.checkpointing.layout import SAVE_NOW
from bridge.training.config import CheckpointConfig, TrainingConfig

SaveKind = Literal["persistent", "non-persistent"]


@dataclass(frozen=True)
class Moment:
    """What is known after a step, the same on every rank."""

    step: int
    """Completed iterations."""
    signals: frozenset[str] = frozenset()
    """Names of the signals that some rank has received and that nothing has answered."""
    requested: bool = False
    """Whether a save was asked for by a file."""
    seconds_running: float = 0.0
    """Since training began, on the rank where that was longest ago; 0 where no setting asks for it."""
    seconds_since_save: float = 0.0
    """Since training went on after the last persistent save, or began, by rank 0's clock; 0 likewise."""


class Trigger(Protocol):
    """A condition that is met after some steps."""

    def due(self, moment: Moment) -> str | None:
        """Why the condition is met, for the log; None if it is not."""


@dataclass(frozen=True)
class EveryIterations:
    """Met at every multiple of `interval`."""

    interval: int
    setting: str

    def due(self, moment: Moment) -> str | None:
        """See `Trigger`."""
        if moment.step % self.interval:
            return None
        return f"iteration {moment.step} is a multiple of {self.setting} ({self.interval})"


@dataclass(frozen=True)
class MinutesSinceSave:
    """Met when the last persistent save is `minutes` ago."""

    minutes: float

    def due(self, moment: Moment) -> str | None:
        """See `Trigger`."""
        if moment.seconds_since_save < 60 * self.minutes:
            return None
        return f"checkpoint.save_interval_minutes ({self.minutes:g}) has passed since the last save"


@dataclass(frozen=True)
class MinutesRunning:
    """Met when training has run for `minutes`."""

    minutes: float

    def due(self, moment: Moment) -> str | None:
        """See `Trigger`."""
        if moment.seconds_running < 60 * self.minutes:
            return None
        return f"train.exit_duration_in_mins ({self.minutes:g}) has passed"


@dataclass(frozen=True)
class OnSignal:
    """Met when any rank has received the signal of this name."""

    name: str

    def due(self, moment: Moment) -> str | None:
        """See `Trigger`."""
        return f"{self.name} was received" if self.name in moment.signals else None


@dataclass(frozen=True)
class OnRequest:
    """Met when somebody has put the file `SAVE_NOW` into the save directory."""

    def due(self, moment: Moment) -> str | None:
        """See `Trigger`."""
        return f"{SAVE_NOW} was found in checkpoint.save" if moment.requested else None


@dataclass(frozen=True)
class AtIteration:
    """Met from iteration `last` on."""

    last: int

    def due(self, moment: Moment) -> str | None:
        """See `Trigger`."""
        return f"train.train_iters ({self.last}) reached" if moment.step >= self.last else None


@dataclass(frozen=True)
class AnyOf:
    """Met when any of `triggers` is; the first one that is says why."""

    triggers: tuple[Trigger, ...] = ()

    def due(self, moment: Moment) -> str | None:
        """See `Trigger`."""
        return next((why for trigger in self.triggers if (why := trigger.due(moment)) is not None), None)


@dataclass(frozen=True)
class Decision:
    """What follows a step."""

    save: SaveKind | None = None
    why: str | None = None
    """Why a checkpoint is saved, for the log."""
    exit_reason: str | None = None
    """Why training stops here; None lets it go on."""


@dataclass(frozen=True)
class SaveDecisions:
    """Decides after each step what is saved and whether training goes on.

    There is one decision a step, so no step is saved twice. A step that calls for both kinds of checkpoint gets
    the persistent one, and so does every step that ends the run: what is left behind must be durable. Only with
    `checkpoint.save_interval` 0 the last of all steps is not saved.
    """

    early_exit: Trigger
    end: Trigger
    persistent: Trigger
    """Calls for a persistent save while training goes on."""
    non_persistent: Trigger
    has_directory: bool
    """Whether there is a directory for persistent checkpoints; without it none are saved."""
    saves_end: bool
    """Whether the end of training is saved for its own sake."""

    @classmethod
    def of(cls, train: TrainingConfig, checkpoint: CheckpointConfig, train_iters: int) -> SaveDecisions:
        """What the settings ask for."""
        return cls(
            early_exit=AnyOf(_exits(train)),
            end=AtIteration(train_iters),
            persistent=AnyOf(_persistent_saves(checkpoint)),
            non_persistent=AnyOf(_non_persistent_saves(checkpoint)),
            has_directory=checkpoint.save is not None,
            saves_end=checkpoint.save_interval != 0,
        )

    def after_step(self, moment: Moment) -> Decision:
        """What follows the step."""
        early, end = self.early_exit.due(moment), self.end.due(moment)
        exit_reason = end or early
        if self.has_directory:
            why = early or (end if self.saves_end else None) or self.persistent.due(moment)
            if why is not None:
                return Decision("persistent", why, exit_reason)
        # Nothing of the last step is to be saved: a recovery point of it would be for nobody.
        why = None if end else self.non_persistent.due(moment)
        return Decision(None if why is None else "non-persistent", why, exit_reason)

    def after_load(self, kind: CheckpointKind | None, is_over: bool) -> Decision:
        """What is saved before the first step.

        Args:
            kind: of the checkpoint that was loaded; None for a fresh start.
            is_over: whether there is no step left.
        """
        if kind == "in_memory" and self.has_directory:
            # What was only in memory has survived one crash; it shall survive the machine's too.
            return Decision("persistent", "it was restored from memory")
        if is_over and kind not in (None, "persistent") and self.has_directory and self.saves_end:
            return Decision("persistent", "the end of training is in no persistent checkpoint")
        return Decision()

    def after_failed_step(self, reason: str, save: bool) -> Decision:
        """What follows a step that was not taken: the run ends, and `save` tells whether the state is worth saving.

        The last step may have been saved before; it is saved again, because why the run ends is part of the state.
        """
        saves = save and self.has_directory
        return Decision("persistent" if saves else None, reason if saves else None, reason)


def watched_signals(train: TrainingConfig, checkpoint: CheckpointConfig) -> tuple[str, ...]:
    """Names of the signals that the settings give a meaning to, in the same order on every rank."""
    exit_signal = train.exit_signal if train.exit_signal_handler else None
    return tuple(name for name in (exit_signal, checkpoint.save_signal) if name is not None)


def _exits(train: TrainingConfig) -> tuple[Trigger, ...]:
    triggers: list[Trigger] = []
    if train.exit_signal_handler:
        triggers.append(OnSignal(train.exit_signal))
    if train.exit_duration_in_mins is not None:
        triggers.append(MinutesRunning(train.exit_duration_in_mins))
    if train.exit_interval:
        triggers.append(EveryIterations(train.exit_interval, "train.exit_interval"))
    return tuple(triggers)


def _persistent_saves(checkpoint: CheckpointConfig) -> tuple[Trigger, ...]:
    triggers: list[Trigger] = [OnRequest()]
    if checkpoint.save_signal is not None:
        triggers.append(OnSignal(checkpoint.save_signal))
    if checkpoint.save_interval:
        triggers.append(EveryIterations(checkpoint.save_interval, "checkpoint.save_interval"))
    if checkpoint.save_interval_minutes is not None:
        triggers.append(MinutesSinceSave(checkpoint.save_interval_minutes))
    return tuple(triggers)


def _non_persistent_saves(checkpoint: CheckpointConfig) -> tuple[Trigger, ...]:
    interval = checkpoint.non_persistent_save_interval
    if not interval:
        return ()
    return (EveryIterations(interval, "checkpoint.non_persistent_save_interval"),)
