"""How ranks act as one: every rank's failure becomes the same error on every rank.

A rank that fails does not leave the others waiting in a collective. Work that can fail runs inside
`Ranks.run` (every rank does it) or `Ranks.first` (rank 0 does it for all); both end with one small
exchange, after which either all ranks have succeeded or all raise. The exchanges use a gloo group of
their own, so they never mix with training's collectives and work beside NCCL.
"""

from __future__ import annotations

import hashlib
import logging
import secrets
import time
import uuid
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from bridge.training.checkpointing.errors import RankLostError
from bridge.training.checkpointing.failed_steps import Failure, agreed, attempt, combined
from bridge.training.checkpointing.meeting import Meeting

T = TypeVar("T")
U = TypeVar("U")
logger = logging.getLogger(__name__)

TIMEOUT = timedelta(hours=2)
"""How long ranks wait for one another at one meeting point, unless `Ranks.waiting` has said otherwise.

A rank that died is noticed at once, whatever the limit. So it is generous: ranks that have little to write or read
wait here for one that has much.
"""

_ROLL_CALL_SECONDS = 3.0


@dataclass
class _Question:
    """Whether something holds on every rank, asked beside something else."""

    flag: bool
    """On this rank."""
    answer: bool | None = None


class Ranks:
    """The ranks of the job, seen from one of them. Every method that communicates is collective."""

    def __init__(self, group: Any | None, rank: int, size: int) -> None:
        self._group = group
        self.rank = rank
        self.size = size
        self._name = ""
        self._meetings = 0
        self._started = 0
        self._names = 0
        self._timeout = TIMEOUT
        self._questions: list[_Question] = []

    @classmethod
    def current(cls) -> Ranks:
        """All ranks of torch.distributed's default group; a single rank where it is not initialised."""
        if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
            return cls(None, 0, 1)
        default = dist.group.WORLD
        ranks = _of_group.get(default)
        if ranks is None:
            ranks = cls(dist.new_group(backend="gloo", timeout=TIMEOUT), dist.get_rank(), dist.get_world_size())
            # The store may outlive the group, with all that was said in it before.
            ranks._name = ranks.first("naming the ranks", lambda: uuid.uuid4().hex)
            ranks._meetings = 0
            _of_group[default] = ranks
        return ranks

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, the one that decides and publishes."""
        return self.rank == 0

    def waiting(self, minutes: float) -> Ranks:
        """The same ranks, waiting for one another for at most so long from now on. Local."""
        timeout = timedelta(minutes=minutes)
        if self._group is not None and timeout != self._timeout:
            dist.distributed_c10d._set_pg_timeout(timeout, self._group)
        self._timeout = timeout
        return self

    def new_name(self) -> str:
        """Eight hexadecimal digits that nothing has been named with, the same on all ranks. All ranks ask together."""
        self._names += 1
        if self._group is None:
            return secrets.token_hex(4)
        return hashlib.sha256(f"{self._name}/{self._names}".encode()).hexdigest()[:8]

    def run(self, phase: str, action: Callable[[], T]) -> T:
        """Run `action` on every rank and return this rank's result.

        An action is local, or a collective that nothing local precedes: what fails on one rank before a collective
        leaves the others waiting in it. One of several local steps says with `step` which of them fails.

        Raises:
            CheckpointError: `action` raised on some rank. Every rank raises, with the type of the lowest
                failing rank's error if that is one of ours, and a message that names the failing ranks (where
                all of them failed for the same reason, only the reason). That a checkpoint is damaged is only said
                if all failing ranks say so.
        """
        result, error = attempt(action)
        # One number says that all went well, which is nearly always all there is to say.
        (is_done,) = self._least(phase, [error is None])
        if not is_done:
            failure = None if error is None else Failure.of(self.rank, error)
            failures = [f for f in self.gather_all(phase, failure) if f is not None]
            raise combined(phase, failures, self.size) from error
        return result  # type: ignore[return-value]

    def ask_with_next(self, flag: bool) -> Callable[[], bool]:
        """Have the next `run` or `same` carry a question: whether `flag` is true on every rank. All ranks ask together.

        Returns:
            What returns the answer, the same on every rank. Where nothing has carried the question, it asks now, and
            then is collective itself.
        """
        question = _Question(flag)
        self._questions.append(question)

        def answer() -> bool:
            if question.answer is None:
                self._least("asking", [])
            return bool(question.answer)

        return answer

    def collect(self, phase: str, action: Callable[[], T]) -> list[T]:
        """Run `action` on every rank and return all results, by rank, on every rank. Raises as `run`.

        One meeting instead of the two of `run` and `gather_all`. Results are pickled: keep them small.
        """
        result, error = attempt(action)
        told = self.gather_all(phase, (None if error is None else Failure.of(self.rank, error), result))
        failures = [failure for failure, _ in told if failure is not None]
        if failures:
            raise combined(phase, failures, self.size) from error
        return [value for _, value in told]  # type: ignore[misc]

    def first(self, phase: str, action: Callable[[], T]) -> T:
        """Run `action` on rank 0 and return its result on every rank; its error is raised on every rank.

        The result is pickled between ranks: keep it small.
        """
        message: list[Any] = [None]
        error: Exception | None = None
        if self.is_first:
            result, error = attempt(action)
            message = [result if error is None else Failure.of(0, error)]
        if self._group is not None:
            self._meet(phase, lambda: dist.broadcast_object_list(message, src=0, group=self._group))
        if isinstance(message[0], Failure):
            raise agreed(phase, message[0]) from error
        return message[0]  # type: ignore[no-any-return]

    def decide(self, phase: str, action: Callable[[], T], decision: Callable[[list[T]], list[U]]) -> U:
        """Run `action` on every rank and let rank 0 decide on all results: one gather and one scatter.

        Args:
            phase: what this is, for messages.
            action: as for `run`.
            decision: called on rank 0 with the results by rank; returns what each rank is to get.

        Returns:
            This rank's part of the decision.

        Raises:
            CheckpointError: `action` raised on some rank, as `run` raises it, or `decision` did, as `first` raises it.
        """
        failures, refused, decided, error = self._decide(phase, action, decision)
        own = [(failures, refused, decided[0] if decided else None)]
        if self._group is not None:
            parts: list[Any] = [None] * self.size if decided is None else [*decided]
            given = [(failures, refused, part) for part in parts] if self.is_first else None
            self._meet(phase, lambda: dist.scatter_object_list(own, given, src=0, group=self._group))
        return self._settled(phase, own[0], error)  # type: ignore[no-any-return]

    def conclude(self, phase: str, action: Callable[[], T], conclusion: Callable[[list[T]], U]) -> U:
        """Run `action` on every rank, and on rank 0 what follows from all results: one gather and one broadcast.

        Args:
            phase: what this is, for messages.
            action: as for `run`.
            conclusion: called on rank 0 with the results by rank.

        Returns:
            What the conclusion returned, on every rank: keep it small.

        Raises:
            CheckpointError: as `decide`.
        """
        *told, error = self._decide(phase, action, conclusion)
        own = [told]
        if self._group is not None:
            self._meet(phase, lambda: dist.broadcast_object_list(own, src=0, group=self._group))
        return self._settled(phase, own[0], error)  # type: ignore[no-any-return]

    def _decide(
        self, phase: str, action: Callable[[], T], decision: Callable[[list[T]], U]
    ) -> tuple[list[Failure], Failure | None, U | None, Exception | None]:
        """On rank 0: which ranks have failed in the action; else the failure of the decision, or what it is.

        The last value is this rank's own error.
        """
        result, error = attempt(action)
        told = self.gather_first(phase, (None if error is None else Failure.of(self.rank, error), result))
        if told is None:
            return [], None, None, error
        failures = [failure for failure, _ in told if failure is not None]
        if failures:
            return failures, None, None, error
        decided, error = attempt(lambda: decision([value for _, value in told]))  # type: ignore[misc]
        return [], None if error is None else Failure.of(0, error), decided, error

    def _settled(self, phase: str, told: Sequence[Any], error: Exception | None) -> Any:
        failures, refused, value = told
        if failures:
            raise combined(phase, failures, self.size) from error
        if refused is not None:
            raise agreed(phase, refused) from error
        return value

    def gather_all(self, phase: str, value: T) -> list[T]:
        """Every rank's value, by rank, on every rank. Values are pickled: keep them small."""
        if self._group is None:
            return [value]
        values: list[Any] = [None] * self.size
        self._meet(phase, lambda: dist.all_gather_object(values, value, group=self._group))
        return values

    def gather_first(self, phase: str, value: T) -> list[T] | None:
        """Every rank's value, by rank, on rank 0; None elsewhere."""
        if self._group is None:
            return [value]
        values: list[Any] | None = [None] * self.size if self.is_first else None
        self._meet(phase, lambda: dist.gather_object(value, values, dst=0, group=self._group))
        return values

    def all_true(self, phase: str, flag: bool) -> bool:
        """Whether `flag` is true on every rank; the same answer on every rank."""
        return all(self.gather_all(phase, flag))

    def same(self, phase: str, value: str | None) -> bool:
        """Whether all ranks have the same text, which is not None; the same answer on every rank.

        24 bytes, however many ranks there are, and eight more for each question that they carry.
        """
        number = 0 if value is None else int(hashlib.sha256(value.encode()).hexdigest()[:15], 16)
        is_there, least, greatest = self._least(phase, [value is not None, number, -number])
        return bool(is_there) and least == -greatest

    def meeting(self) -> Meeting:
        """A way to agree on the step at which all ranks do something together. All ranks make theirs together."""
        self._started += 1
        store = None if self._group is None else dist.distributed_c10d._get_default_store()
        return Meeting(store, f"bridge/{self._name}/meeting/{self._started}", self.rank, self.size)

    def _least(self, phase: str, numbers: list[int]) -> list[int]:
        """The least of all ranks' numbers, place by place."""
        questions, self._questions = self._questions, []
        least = [*numbers, *(each.flag for each in questions)]
        if self._group is not None:
            told = torch.tensor(least, dtype=torch.int64, device="cpu")
            self._meet(phase, lambda: dist.all_reduce(told, dist.ReduceOp.MIN, group=self._group))
            least = told.tolist()
        for question, answer in zip(questions, least[len(numbers) :], strict=True):
            question.answer = bool(answer)
        return least[: len(numbers)]

    def _meet(self, phase: str, collective: Callable[[], Any]) -> None:
        self._meetings += 1
        try:
            collective()
        except RuntimeError as error:
            raise RankLostError(self._roll_call(phase)) from error

    def _roll_call(self, phase: str) -> str:
        """After a failed exchange: which ranks are still here? Costs nothing while all goes well."""
        where = f"the checkpoint layer's exchange after '{phase}'"
        missing, was_asked = set(range(self.size)) - {self.rank}, False
        try:
            store = dist.distributed_c10d._get_default_store()
            prefix = f"bridge/{self._name}/roll_call/{self._meetings}"
            store.set(f"{prefix}/{self.rank}", "here")
            deadline = time.monotonic() + _ROLL_CALL_SECONDS
            while missing and time.monotonic() < deadline:
                missing = {rank for rank in missing if not store.check([f"{prefix}/{rank}"])}
                was_asked = True
                time.sleep(0.05)
        except RuntimeError:
            # The store ends with rank 0. Where that has called too and gone, what it said before still counts.
            if was_asked and 0 not in missing:
                return self._missing(where, missing)
            return f"a rank was lost in {where}; the job's key-value store is gone too, so it has no name"
        if not missing:
            return f"{where} failed although every rank is alive"
        return self._missing(where, missing)

    def _missing(self, where: str, missing: set[int]) -> str:
        names = ", ".join(str(rank) for rank in sorted(missing))
        return f"rank {names} did not arrive at {where} (waited at most {self._timeout.total_seconds():g} s)"


_of_group: weakref.WeakKeyDictionary[Any, Ranks] = weakref.WeakKeyDictionary()
"""The ranks, with their control group, by torch.distributed's default group."""
