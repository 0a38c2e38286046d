"""Going back to an older checkpoint where the newest is damaged: the order, the rules, and the marks that it leaves.

What is damaged is passed over; what does not fit the run, or is unsafe, is the user's to decide about. All of this is
the same on every rank, because every rank meets the same error.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from bridge.training.checkpointing import marks
from bridge.training.checkpointing.agreement import Ranks
from bridge.training.checkpointing.errors import (
    DAMAGE,
    CheckpointError,
    CheckpointMismatchError,
    KeeperLostError,
)
from bridge.training.checkpointing.events.recording import Phases, fell_back
from bridge.training.checkpointing.events.stream import EventStream
from bridge.training.checkpointing.layout import list_checkpoints, parse_iteration_name
from bridge.training.checkpointing.plans.load_plan import Saved
from bridge.training.checkpointing.resolve import Offer, Source
from bridge.training.checkpointing.source import older_sources

logger = logging.getLogger(__name__)

Stored = TypeVar("Stored")
T = TypeVar("T")


@dataclass
class Candidates:
    """The checkpoints that a run may start from, the best first, and those that turned out not to be good."""

    waiting: list[Source]
    offers: list[Offer] = field(default_factory=list)
    """What other tiers have, to go back to where the persistent checkpoint is damaged."""
    fallback: bool = True
    """Whether what is damaged may be passed over at all."""
    save_dir: Path | None = None
    """Where this run saves: only there are damaged checkpoints marked."""
    events: EventStream = field(default_factory=EventStream)
    """Hears of every step back."""
    phases: Phases | None = None
    """Of the load, in which the time that went into one that is passed over has a place of its own."""
    failed: list[CheckpointError] = field(default_factory=list)
    begun: Saved | None = None
    """What the last one says of itself that was read into the run, at least in part."""
    _damaged: list[tuple[Source, CheckpointError]] = field(default_factory=list)
    """The persistent ones among them: marked when another one was loaded, so that trouble that hits all marks none."""
    _went_back: bool = False

    def pass_over(self, source: Source, error: CheckpointError, ranks: Ranks) -> None:
        """Leave a checkpoint that could not be loaded for the next one. Collective.

        Raises:
            CheckpointError: it may not be passed over, or there is nothing left.
        """
        if not self._may_pass_over(source, error):
            raise error
        if self.phases is not None:
            self.phases.end("failed attempt")
        self.failed.append(_without_frames(error))
        if not self.waiting and source.kind == "persistent" and not self._went_back:
            self._went_back = True
            self.waiting = ranks.first("looking for an older checkpoint", lambda: self._older(source))
        if source.kind == "persistent":
            self._damaged.append((source, error))
        if not self.waiting:
            raise self._hopeless(error)
        self.events.emit(fell_back(source, self.waiting[0], error))
        if ranks.is_first:
            logger.error("PASSING OVER A DAMAGED CHECKPOINT, going back to %s: %s", self.waiting[0].path, error)

    def accept(self, source: Source, ranks: Ranks) -> None:
        """Take note that a checkpoint was loaded. Collective."""
        ranks.first("marking damaged checkpoints", lambda: self._note(source))

    def _note(self, loaded: Source) -> None:
        for source, error in self._damaged:
            if self._is_own(source):
                marks.mark(source.path, str(error))
        if loaded.kind == "persistent" and self._is_own(loaded) and marks.is_marked(loaded.path):
            logger.warning("%s was marked as damaged and is good again", loaded.path)
            marks.unmark(loaded.path)

    def _may_pass_over(self, source: Source, error: CheckpointError) -> bool:
        if source.kind != "persistent" and isinstance(error, CheckpointMismatchError | KeeperLostError):
            return True  # those of other tiers are bound to the layout that saved them, or to a process that may die
        return isinstance(error, DAMAGE) and self.fallback and not source.release

    def _older(self, source: Source) -> list[Source]:
        iteration = parse_iteration_name(source.path.name)
        if iteration is None:
            return []
        return older_sources(list_checkpoints(source.path.parent), iteration, self.offers)

    def _hopeless(self, last: CheckpointError) -> CheckpointError:
        if len(self.failed) == 1:
            return last
        return type(last)(f"no checkpoint can be loaded: {'; '.join(str(error) for error in self.failed)}")

    def _is_own(self, source: Source) -> bool:
        return self.save_dir is not None and self.save_dir.resolve() == source.path.parent.resolve()


def _without_frames(error: CheckpointError) -> CheckpointError:
    """The error without what its tracebacks keep alive: half a model, while another checkpoint is loaded."""
    cause: BaseException | None = error
    while cause is not None:
        cause.__traceback__ = None
        cause = cause.__cause__ or cause.__context__
    return error


def load_best(
    candidates: Candidates,
    describe: Callable[[Source], tuple[Stored, Saved]],
    restore: Callable[[Stored, Saved], T],
    ranks: Ranks,
) -> T:
    """Load the first candidate that is good. Collective.

    Args:
        candidates: at least one.
        describe: opens a checkpoint and reads what it says about itself; changes nothing of the run.
        restore: reads the rest of it into the run; sets `candidates.begun` when it begins to.
        ranks: all ranks.

    Returns:
        What `restore` returned.

    Raises:
        CheckpointError: what is wrong with one that may not be passed over, or with all of them.
    """
    while True:
        source = candidates.waiting.pop(0)
        try:
            stored, saved = describe(source)
            require_as_much(candidates.begun, saved, source.path)
            result = restore(stored, saved)
        except CheckpointError as error:
            candidates.pass_over(source, error, ranks)
        else:
            candidates.accept(source, ranks)
            return result


def require_as_much(begun: Saved | None, saved: Saved, path: Path) -> None:
    """Refuse a checkpoint that would not overwrite all that an earlier one may have left behind half-read.

    Args:
        begun: what the earlier one said of itself; None if there was none.
        saved: what this one says.
        path: of this one.

    Raises:
        CheckpointMismatchError: it lacks the optimizer's state.
    """
    if begun is not None and begun.has_optimizer and not saved.has_optimizer:
        raise CheckpointMismatchError(
            f"{path} has no optimizer state to go back to, and part of a damaged checkpoint's may have been read; "
            "start again with checkpoint.ckpt_step set to the iteration to load"
        )
