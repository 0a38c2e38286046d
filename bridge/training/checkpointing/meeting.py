"""Agreeing on the step at which all ranks finish a save, while training goes on and without a collective.

A collective in every step would hold up training for as long as a save is written. Here a step costs a rank a look at
its own process; once that has written, and until all have, a few look-ups in the job's key-value store, which wait for
nobody. When all ranks have written, rank 0 proposes a step that lies a few ahead. Each rank that has not come to it yet
says that it will be there. If all have said so before any of them is there, they are agreed, and finish together.
Otherwise the proposal has failed for all, and rank 0 makes another one, further ahead. No rank ever waits for another:
so ranks that are far apart, or meet in the middle of a step, cannot lock each other out.
"""

from __future__ import annotations

import time
from typing import Any, Protocol

_FIRST_AHEAD, _MOST_AHEAD = 3, 96
"""Steps between a proposal and the step that it names."""
_TRIES, _RETRY_SECONDS = 4, 0.25
"""How often, and how far apart, the store is asked before it counts as gone."""
_GO, _NO = "go", "no"


class Store(Protocol):
    """What is needed of torch.distributed's key-value store."""

    def add(self, key: str, amount: int) -> int:
        """Add to a number, which is 0 before, and return it."""

    def set(self, key: str, value: str) -> None:
        """Set a value."""

    def get(self, key: str) -> bytes:
        """A value that is there."""

    def check(self, keys: list[str]) -> bool:
        """Whether all keys are there."""

    def compare_set(self, key: str, expected: str, desired: str) -> bytes:
        """Set a value if it is as expected, empty where it is not there; what it is afterwards."""


class Meeting:
    """One save's end, seen from one rank. Every rank calls `due` equally often until it says so."""

    def __init__(self, store: Store | None, name: str, rank: int, size: int) -> None:
        """
        Args:
            store: shared by all ranks; None for an only rank.
            name: of this save, the same on all ranks and used for no other.
            rank: this one.
            size: ranks.
        """
        self._store: Any = store
        self._name = name
        self._rank = rank
        self._size = size
        self._polls = 0
        self._has_told = False
        self._round = 0
        self._ahead = _FIRST_AHEAD
        self._at: int | None = None

    def due(self, done: bool) -> bool:
        """Whether it is time to finish: true at the same call on all ranks, and only when all have been done.

        A store that is gone is a reason to finish, too: the exchange that follows says who is missing. One that fails
        for a moment is asked again, in the same call, because a later one would not be the same on all ranks.

        Args:
            done: whether this rank has written.
        """
        self._polls += 1
        if self._store is None:
            return done
        for tried in range(_TRIES):
            if tried:
                time.sleep(_RETRY_SECONDS)
            try:
                return self._is_due(done)
            except RuntimeError:
                continue
        return True

    def close(self) -> None:
        """Forget what is in the store; rank 0, when all ranks have finished."""
        if self._store is None or self._rank != 0:
            return
        keys = [f"{self._name}/done"]
        keys += [self._key(name, number) for number in range(self._round + 1) for name in ("at", "yes", "decision")]
        for key in keys:
            try:
                self._store.delete_key(key)
            except (RuntimeError, NotImplementedError):
                return

    def _is_due(self, done: bool) -> bool:
        if done and not self._has_told:
            # Noted before, here and below: what may have been counted is not counted again. Too few is only too late.
            self._has_told = True
            self._store.add(f"{self._name}/done", 1)
        if not self._has_told:
            return False
        if self._at is None:
            self._find_step()
            return False
        if self._rank == 0 and self._store.add(self._key("yes"), 0) == self._size:
            self._store.compare_set(self._key("decision"), "", _GO)
        if self._polls < self._at:
            return False
        if self._decision() == _GO:
            return True
        self._next_round()
        return False

    def _find_step(self) -> None:
        """Propose a step, or take note of the one that rank 0 has proposed."""
        if self._rank == 0:
            if self._store.add(f"{self._name}/done", 0) < self._size:
                return
            proposed = self._polls + self._ahead
            self._store.set(self._key("at"), str(proposed))  # first: without it the others would stay in this round
            self._at = proposed
            self._store.add(self._key("yes"), 1)
        elif self._store.check([self._key("at")]):
            proposed = int(self._store.get(self._key("at")))
            if proposed <= self._polls:
                self._decision()  # it is past: nobody may be there
                self._next_round()
                return
            self._at = proposed
            self._store.add(self._key("yes"), 1)

    def _decision(self) -> str:
        """What has been decided about the proposal; that it has failed, if nothing was before."""
        found: bytes | str = self._store.compare_set(self._key("decision"), "", _NO)
        return found.decode() if isinstance(found, bytes) else found

    def _next_round(self) -> None:
        self._round += 1
        self._ahead = min(2 * self._ahead, _MOST_AHEAD)
        self._at = None

    def _key(self, name: str, number: int | None = None) -> str:
        return f"{self._name}/{self._round if number is None else number}/{name}"
