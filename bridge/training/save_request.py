"""A save on request: the file `SAVE_NOW` in the save directory."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from bridge.training.checkpointing.layout import SAVE_NOW

logger = logging.getLogger(__name__)

LOOK_SECONDS = 1.0
"""Least time between two looks: the directory may be on a network, and a look may take milliseconds there."""

_Identity = tuple[int, int]


class SaveRequest:
    """Looks for `SAVE_NOW`, and removes it once the checkpoint that it asked for is published.

    A run that dies in between leaves the file, so the next one saves after its first step. A file is answered
    once, even if it cannot be removed; touching it asks again. Nothing here raises: a directory that
    cannot be looked at asks for nothing.
    """

    def __init__(self, save_dir: Path, clock: Callable[[], float]) -> None:
        """Watch `save_dir`, which need not exist, by `clock`, in seconds."""
        self._path = save_dir / SAVE_NOW
        self._clock = clock
        self._next_look: float | None = None
        self._open: _Identity | None = None
        self._answered: _Identity | None = None
        self._answer: int | None = None
        self._complained = False

    def is_open(self) -> bool:
        """Whether a save is asked for that no checkpoint has answered. Looks at storage now and then."""
        now = self._clock()
        if self._next_look is None or now >= self._next_look:
            self._next_look = now + LOOK_SECONDS
            found = self._look()
            self._open = None if found == self._answered else found
        return self._open is not None

    def answered_by(self, iteration: int) -> None:
        """An open request is answered by the save of `iteration`, which begins."""
        if self._open is not None:
            self._answered, self._answer, self._open = self._open, iteration, None

    def published(self, iteration: int) -> None:
        """A persistent checkpoint is durable: remove the file that it answers, unless it was touched since."""
        if self._answer is None or iteration < self._answer:
            return
        self._answer = None
        try:
            if self._look() == self._answered:
                self._path.unlink()
        except OSError as error:
            logger.warning("%s is answered and cannot be removed (%s); touch it to ask again", self._path, error)

    def _look(self) -> _Identity | None:
        try:
            found = self._path.lstat()
        except FileNotFoundError:
            return None
        except OSError as error:
            if not self._complained:
                logger.warning("cannot look for %s: %s", self._path, error)
            self._complained = True
            return None
        return found.st_ino, found.st_mtime_ns
