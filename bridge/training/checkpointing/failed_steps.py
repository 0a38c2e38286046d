"""What failed on which rank, in which step: how that is noted, how it travels, and how messages word it."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from bridge.training.checkpointing.errors import (
    DAMAGE,
    ERRORS_BY_NAME,
    CheckpointError,
    UnsafeCheckpointError,
    is_storage_failure,
)

T = TypeVar("T")
logger = logging.getLogger(__name__)

_STEP = "_bridge_step"
"""Attribute of an exception: the step that it is from."""
_UNSAFE = UnsafeCheckpointError.__name__
_DAMAGE = frozenset(error.__name__ for error in DAMAGE)


@dataclass(frozen=True)
class _Step:
    name: str
    for_all: bool


@contextlib.contextmanager
def step(name: str, *, for_all: bool = False) -> Iterator[None]:
    """One of several steps of an action: what fails in it is told under its name. Local.

    Args:
        name: what this is, for messages.
        for_all: rank 0 does it for all ranks, so that messages need not say where it failed.
    """
    try:
        yield
    except Exception as error:
        if not hasattr(error, _STEP):
            with contextlib.suppress(AttributeError):
                setattr(error, _STEP, _Step(name, for_all))
        raise


def attempted(phase: str, action: Callable[[], T]) -> Callable[[], T]:
    """Carry out a step now, and leave its failure to the next agreement: there the returned function is to be called.

    Returns:
        What returns the step's result, or raises its error.
    """

    def named() -> T:
        with step(phase):
            return action()

    result, error = attempt(named)

    def outcome() -> T:
        if error is not None:
            raise error
        return result  # type: ignore[return-value]

    return outcome


@dataclass(frozen=True)
class Failure:
    """A rank's exception in a form that travels between ranks."""

    rank: int
    kind: str
    message: str
    in_storage: bool = False
    step: _Step | None = None
    """Where the exception is from, if its action has several steps."""

    @classmethod
    def of(cls, rank: int, error: BaseException) -> Failure:
        return cls(rank, type(error).__name__, str(error), is_storage_failure(error), getattr(error, _STEP, None))

    def text(self) -> str:
        """The message; errors that are not ours keep their type's name."""
        return self.message if self.kind in ERRORS_BY_NAME else f"{self.kind}: {self.message}"


def attempt(action: Callable[[], T]) -> tuple[T | None, Exception | None]:
    """An action's result, or its error."""
    try:
        return action(), None
    except Exception as error:
        logger.debug("a step failed on this rank", exc_info=True)
        return None, error


def agreed(phase: str, failure: Failure) -> CheckpointError:
    """What every rank raises where rank 0 has failed for all."""
    phase = phase if failure.step is None else failure.step.name
    known = ERRORS_BY_NAME.get(failure.kind)
    error = known(failure.message) if known else CheckpointError(f"{phase}: {failure.text()}")
    error.in_storage = failure.in_storage
    return error


def combined(phase: str, failures: list[Failure], size: int) -> CheckpointError:
    """What every rank raises where some have failed."""
    for failure in failures:
        if failure.step is not None and failure.step.for_all:
            return agreed(phase, failure)
    error = _worded(phase, failures, size)
    error.in_storage = all(failure.in_storage for failure in failures)
    return error


def _kind_of(kinds: list[str]) -> str:
    """The kind of error that all ranks raise, by those of the ranks that failed."""
    # That somebody may be attacking the run must not be hidden by a rank that could not read.
    if _UNSAFE in kinds:
        return _UNSAFE
    # Damage leads to a mark and an older checkpoint. A rank in trouble of its own (memory, open files) shows that
    # something else may be wrong, and that is for the user to decide about.
    return next((kind for kind in kinds if kind not in _DAMAGE), kinds[0])


def _worded(phase: str, failures: list[Failure], size: int) -> CheckpointError:
    known = ERRORS_BY_NAME.get(_kind_of([failure.kind for failure in failures]))
    by_phase: dict[str, dict[str, list[int]]] = {}
    for failure in failures:
        by_text = by_phase.setdefault(phase if failure.step is None else failure.step.name, {})
        by_text.setdefault(failure.text(), []).append(failure.rank)
    if [len(ranks) for by_text in by_phase.values() for ranks in by_text.values()] == [size]:
        ((phase, by_text),) = by_phase.items()
        (text,) = by_text
        return known(text) if known else CheckpointError(f"{phase} failed: {text}")
    return (known or CheckpointError)("; ".join(_where(*each) for each in by_phase.items()))


def _where(phase: str, by_text: dict[str, list[int]]) -> str:
    parts = [f"rank {', '.join(map(str, ranks))}: {text}" for text, ranks in by_text.items()]
    return f"{phase} failed on {'; '.join(parts)}"
