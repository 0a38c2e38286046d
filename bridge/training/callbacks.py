"""Callbacks: how user code hears of what happens in a run."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from bridge.training.state import GlobalState

CheckpointKind = Literal["persistent", "non_persistent_global", "local", "in_memory"]

EVENTS = ("on_train_start", "on_train_step_end", "on_checkpoint_save", "on_train_end")


@dataclass(frozen=True)
class CheckpointInfo:
    """A checkpoint as a callback sees it: where it lies, which iteration it holds, and of what kind it is."""

    path: Path
    iteration: int
    kind: CheckpointKind


@dataclass
class CallbackContext:
    """What a callback receives. `checkpoint` is set for `on_checkpoint_save`, None for the others."""

    state: GlobalState
    model: list[Any] = field(default_factory=list)
    optimizer: Any | None = None
    scheduler: Any | None = None
    checkpoint: CheckpointInfo | None = None
    user_state: dict[str, Any] = field(default_factory=dict)
    """A dictionary that all callbacks of a manager share, for their own use."""


Callback = Callable[[CallbackContext], None]


class CallbackManager:
    """Keeps functions by event name and calls them in the order in which they were registered.

    `on_checkpoint_save` is called on every rank, after the checkpoint was published: an asynchronous
    save calls it when the save is finalized, with the path and iteration that were saved.
    """

    def __init__(self) -> None:
        self._callbacks: dict[str, list[Callback]] = defaultdict(list)
        self.user_state: dict[str, Any] = {}

    def register(self, event: str, callback: Callback) -> None:
        """Add a function to an event.

        Raises:
            ValueError: the event is not one of `EVENTS`.
        """
        self._require_known(event)
        self._callbacks[event].append(callback)

    @contextmanager
    def listening(self, event: str, callback: Callback) -> Iterator[None]:
        """Call a function at an event, before all others, as long as this is entered.

        Raises:
            ValueError: the event is not one of `EVENTS`.
        """
        self._require_known(event)
        self._callbacks[event].insert(0, callback)
        try:
            yield
        finally:
            self._callbacks[event].remove(callback)

    def fire(self, event: str, context: CallbackContext) -> None:
        """Call every function of an event with `context`; an exception of a callback passes through."""
        context.user_state = self.user_state
        for callback in self._callbacks[event]:
            callback(context)

    @staticmethod
    def _require_known(event: str) -> None:
        if event not in EVENTS:
            raise ValueError(f"unknown callback event {event!r}; the events are {', '.join(EVENTS)}")
