"""The queue of asynchronous saves: schedule, poll, finalize, and fail loudly.

Saves are finalized in the order in which they were scheduled, on all ranks at the same point of the
program, and only when every rank has written its part. A failure leaves the queue usable; whether training
goes on after it is decided by the failure policy.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest

from bridge.training.checkpointing.agreement import Ranks
from bridge.training.checkpointing.background import BackgroundCall, FinishedCall, ForkedCall, kill_all
from bridge.training.checkpointing.errors import CheckpointError, CheckpointSaveError, RankLostError
from bridge.training.checkpointing.failed_steps import attempted
from bridge.training.checkpointing.failures.policy import FailurePolicy
from bridge.training.checkpointing.meeting import Meeting

logger = logging.getLogger(__name__)

Finish = Callable[[str, Callable[[], Any]], None]
"""Ends a save, on all ranks together: given what messages call its writing, and what returns this rank's outcome."""

Settle = Callable[[bool, CheckpointError | None], None]
"""Told how a save ended: whether it is a persistent one, and why it failed, or None."""


def _raise(persistent: bool, error: CheckpointError | None) -> None:
    if error is not None:
        raise error


@dataclass
class _Pending:
    label: str
    persistent: bool
    call: BackgroundCall | None
    request: AsyncRequest
    receive: Callable[[Any], None] | None
    finish: Finish | None
    abandon: Callable[[], None] | None
    failed: Callable[[BaseException], None] | None
    halted: Callable[[], None] | None
    meeting: Meeting


class SaveQueue:
    """Asynchronous saves under way. Every rank schedules and finalizes the same saves in the same order."""

    def __init__(self) -> None:
        self._pending: deque[_Pending] = deque()
        self.scheduled = 0
        """Saves that were begun so far."""

    def __len__(self) -> int:
        return len(self._pending)

    @property
    def has_persistent(self) -> bool:
        """Whether a persistent save is under way."""
        return any(pending.persistent for pending in self._pending)

    def schedule(
        self,
        request: AsyncRequest,
        label: str = "asynchronous save",
        receive: Callable[[Any], None] | None = None,
        abandon: Callable[[], None] | None = None,
        persistent: bool = True,
        stall_seconds: float = math.inf,
        storage_seconds: float = 0.0,
        failed: Callable[[BaseException], None] | None = None,
        halted: Callable[[], None] | None = None,
        start: Callable[[str], BackgroundCall | None] | None = None,
        finish: Finish | None = None,
        awaited: bool = False,
    ) -> bool:
        """Start a request's function in a forked process and remember what finalizes it.

        A process that cannot be started is one that has failed: `finalize` raises it.

        Args:
            request: megatron-core's request. Its preload function runs here, before the fork; its finalize
                functions run on every rank, in order, once all ranks' processes have succeeded.
            label: what messages call this save.
            receive: called on this rank with the value that the forked function returned, before the
                finalize functions.
            abandon: called on this rank when the save failed on any rank.
            persistent: whether it is a persistent checkpoint, for the failure policy.
            stall_seconds: after so long without progress the process is ended, and the save has failed.
            storage_seconds: the same where it waits for storage all that time, if it is longer.
            failed: told on this rank why, before `abandon` is called.
            halted: told on this rank that the caller waits from now on, for the writing or for the finalize functions.
            start: starts what takes the place of the forked function, given a name for messages; None, or a return
                value of None, leaves it to that.
            finish: takes the place of the agreement that all ranks' processes have succeeded, and of the finalize
                functions.
            awaited: wait here until every rank has started its process, or has found that it cannot. Collective.

        Returns:
            Whether this rank's process was started.

        Raises:
            RankLostError: a rank did not arrive where the start is awaited.
        """
        name = f"the background writer of {label}"
        has_begun = True
        begun = attempted(f"starting {name}", lambda: _start(request, name, stall_seconds, storage_seconds, start))
        try:
            call = begun()
        except Exception as error:
            # Told to all ranks where they meet: nobody waits for another to have begun.
            logger.error("%s could not be started, so %s will fail: %s", name, label, error)
            call, has_begun = FinishedCall(begun), False
        if awaited:
            try:
                Ranks.current().run(f"starting {name}", lambda: None)
            except BaseException as error:
                is_left = isinstance(error, RankLostError) and call is not None and call.leave()
                if call is not None and not is_left:
                    with _logging_trouble(f"ending {name}"):
                        call.kill()
                raise
        self.scheduled += 1
        self._pending.append(
            _Pending(
                label, persistent, call, request, receive, finish, abandon, failed, halted, Ranks.current().meeting()
            )
        )
        return has_begun

    def finalize(self, blocking: bool = False, settle: Settle = _raise) -> int:
        """Finalize the saves that all ranks have written, and return how many there were.

        Args:
            blocking: wait for every scheduled save. Otherwise stop at the first one that is still being written.
            settle: told how each of them ended; by default it raises what one failed for, and then that save is
                dropped and later ones stay queued. The same on every rank.

        Raises:
            RankLostError: a rank did not arrive.
            CheckpointError: a rank's write or finalization failed, and `settle` raised it.
        """
        finalized = 0
        ranks = Ranks.current()
        while self._pending:
            head = self._pending[0]
            if not blocking and not head.meeting.due(head.call is None or head.call.poll()):
                break
            self._pending.popleft()
            if head.halted is not None:
                head.halted()
            try:
                self._finish(head, ranks)
                head.meeting.close()
            except BaseException as error:
                if head.failed is not None:
                    head.failed(error)
                if isinstance(error, RankLostError):
                    _leave(head)
                if head.abandon is not None:
                    head.abandon()
                if not isinstance(error, CheckpointError) or isinstance(error, RankLostError):
                    raise
                head.meeting.close()
                settle(head.persistent, error)
            else:
                finalized += 1
                settle(head.persistent, None)
        return finalized

    @staticmethod
    def _finish(save: _Pending, ranks: Ranks) -> None:
        def collect() -> Any:
            value = None if save.call is None else save.call.result()
            if save.receive is not None:
                save.receive(value)
            return value

        phase = f"writing {save.label}"
        if save.finish is not None:
            save.finish(phase, collect)
            return
        ranks.run(phase, collect)
        for function in save.request.finalize_fns:
            ranks.run(f"finalizing {save.label}", function)

    def abort(self) -> None:
        """End every background process of this rank, or leave what it writes to the next start. Not collective, and it
        never raises.

        Nothing that is written waits here, since storage may be why the run ends, and nothing is removed: a local
        snapshot that is whole on every rank may be the newest that there is.
        """
        pending = list(self._pending)
        self._pending.clear()
        calls = [save.call for save in pending if save.call is not None and not _leave(save)]
        with _logging_trouble(f"ending the background writers of {', '.join(save.label for save in pending)}"):
            kill_all(calls)
        for save in pending:
            logger.warning("abandoned %s; what it has written is left for the next start", save.label)
            if save.failed is not None:
                with _logging_trouble(f"reporting the end of {save.label}"):
                    save.failed(CheckpointSaveError("abandoned, because the run ended before it was published"))


def _leave(save: _Pending) -> bool:
    """Leave a save to the next start, which finishes it if all ranks have. Never raises."""
    if save.call is None or not save.call.leave():
        return False
    logger.warning("%s goes on being written; the next start publishes it if all ranks have written theirs", save.label)
    return True


@contextlib.contextmanager
def _logging_trouble(deed: str) -> Iterator[None]:
    try:
        yield
    except Exception:
        logger.exception("%s failed", deed)


def _start(
    request: AsyncRequest,
    name: str,
    stall_seconds: float,
    storage_seconds: float,
    start: Callable[[str], BackgroundCall | None] | None,
) -> BackgroundCall | None:
    call = None if start is None else start(name)
    if call is not None or request.async_fn is None:
        return call
    arguments = list(request.async_fn_args)
    if request.preload_fn is not None:
        arguments[1] = request.preload_fn()
    function, keywords = request.async_fn, request.async_fn_kwargs
    return ForkedCall(lambda: function(*arguments, **keywords), name, stall_seconds, storage_seconds)


def schedule_async_save(global_state: Any, async_request: AsyncRequest) -> None:
    """Start a request's background function and queue its finalization.

    Args:
        global_state: holds the queue, `async_calls_queue`.
        async_request: what to run, and what to call on all ranks when it is done.

    Raises:
        CheckpointSaveError: the state has no queue, so the request could only be lost.
    """
    queue_of(global_state).schedule(async_request)


def queue_of(global_state: Any) -> SaveQueue:
    """The state's queue.

    Raises:
        CheckpointSaveError: it has none.
    """
    queue = global_state.async_calls_queue
    if queue is None:
        raise CheckpointSaveError("asynchronous saves need a queue, and the global state's async_calls_queue is None")
    return queue  # type: ignore[no-any-return]


def maybe_finalize_async_save(
    global_state: Any, ckpt_cfg: Any, blocking: bool = False, terminate: bool = False
) -> None:
    """Finalize asynchronous saves that every rank has written. Collective while any save is under way.

    Args:
        global_state: holds the queue.
        ckpt_cfg: checkpoint configuration; nothing happens without `async_save`.
        blocking: wait for all of them.
        terminate: this is the end of the run: afterwards end what is left in the queue. Use it with `blocking`.

    Raises:
        CheckpointError: a save failed on some rank, and the failure policy does not let that pass. Every rank
            raises, and the queue stays usable. With `terminate` the failure of the last persistent save is
            raised whatever the policy says, of a synchronous one too: no later save makes up for it.
    """
    queue = global_state.async_calls_queue
    failed: CheckpointError | None = None
    if ckpt_cfg.async_save and queue is not None:
        if blocking and len(queue) and Ranks.current().is_first:
            logger.info("waiting for %d asynchronous save(s) to finish", len(queue))
        try:
            failed = finish_saves(global_state, ckpt_cfg, blocking=blocking)
        finally:
            if terminate:
                queue.abort()
    if failed is None and terminate:
        failed = global_state.save_failures.take_passed_over()
    if failed is not None:
        raise failed


def finish_saves(global_state: Any, ckpt_cfg: Any, blocking: bool) -> CheckpointError | None:
    """Finalize asynchronous saves and settle those that failed.

    Args:
        global_state: holds the queue and what is known of failed saves.
        ckpt_cfg: checkpoint configuration, with the failure policy.
        blocking: wait for all of them.

    Returns:
        The first failure that is to be raised; None if there is none.

    Raises:
        RankLostError: a rank did not arrive.
    """
    policy = FailurePolicy.of(ckpt_cfg)
    failed: list[CheckpointError] = []

    def settle(persistent: bool, error: CheckpointError | None) -> None:
        if not global_state.save_failures.settle(persistent, error, policy) and error is not None:
            failed.append(error)

    queue_of(global_state).finalize(blocking, settle)
    for error in failed[1:]:
        logger.error("a further save failed: %s", error)
    return failed[0] if failed else None


def is_empty_async_queue(global_state: Any) -> bool:
    """Whether no asynchronous save is under way. The same answer on every rank."""
    queue = global_state.async_calls_queue
    return queue is None or len(queue) == 0
