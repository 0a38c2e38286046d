"""The queue of asynchronous saves: schedule, poll, finalize, and fail loudly.

Saves are finalized in the order in which they were scheduled, on all ranks at the same point of the
program, and only when every rank has written its part. A failure leaves the queue usable.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest

from bridge.training.checkpointing.agreement import Ranks
from bridge.training.checkpointing.background import ForkedCall
from bridge.training.checkpointing.errors import CheckpointSaveError

logger = logging.getLogger(__name__)


@dataclass
class _Pending:
    label: str
    call: ForkedCall[Any] | None
    request: AsyncRequest
    receive: Callable[[Any], None] | None
    abandon: Callable[[], None] | None


class SaveQueue:
    """Asynchronous saves under way. Every rank schedules and finalizes the same saves in the same order."""

    def __init__(self) -> None:
        self._pending: deque[_Pending] = deque()

    def __len__(self) -> int:
        return len(self._pending)

    def schedule(
        self,
        request: AsyncRequest,
        label: str = "asynchronous save",
        receive: Callable[[Any], None] | None = None,
        abandon: Callable[[], None] | None = None,
    ) -> None:
        """Start a request's function in a forked process and remember what finalizes it.

        Args:
            request: megatron-core's request. Its preload function runs here, before the fork; its finalize
                functions run on every rank, in order, once all ranks' processes have succeeded.
            label: what messages call this save.
            receive: called on this rank with the value that the forked function returned, before the
                finalize functions.
            abandon: called on this rank when the save failed on any rank.

        Raises:
            CheckpointError: a rank could not start its process.
        """
        call = Ranks.current().run(f"starting the background writer of {label}", lambda: _start(request, label))
        self._pending.append(_Pending(label, call, request, receive, abandon))

    def finalize(self, blocking: bool = False) -> int:
        """Finalize the saves that all ranks have written, and return how many there were.

        Args:
            blocking: wait for every scheduled save. Otherwise stop at the first one that is still being written.

        Raises:
            CheckpointError: a rank's write or finalization failed. That save is dropped; later ones stay queued.
        """
        finalized = 0
        ranks = Ranks.current()
        while self._pending:
            head = self._pending[0]
            if not blocking and not ranks.all_true("polling", head.call is None or head.call.poll()):
                break
            self._pending.popleft()
            try:
                self._finish(head, ranks)
            except BaseException:
                if head.abandon is not None:
                    head.abandon()
                raise
            finalized += 1
        return finalized

    @staticmethod
    def _finish(save: _Pending, ranks: Ranks) -> None:
        value = ranks.run(f"writing {save.label}", lambda: None if save.call is None else save.call.result())
        if save.receive is not None:
            save.receive(value)
        for function in save.request.finalize_fns:
            ranks.run(f"finalizing {save.label}", function)

    def abort(self) -> None:
        """End every background process of this rank and forget its saves. Not collective."""
        while self._pending:
            pending = self._pending.popleft()
            logger.warning("abandoned %s", pending.label)
            if pending.call is not None:
                pending.call.kill()


def _start(request: AsyncRequest, label: str) -> ForkedCall[Any] | None:
    if request.async_fn is None:
        return None
    arguments = list(request.async_fn_args)
    if request.preload_fn is not None:
        arguments[1] = request.preload_fn()
    function, keywords = request.async_fn, request.async_fn_kwargs
    return ForkedCall(lambda: function(*arguments, **keywords), f"the background writer of {label}")


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
        terminate: afterwards end what is left in the queue; use it with `blocking` at the end of a run.

    Raises:
        CheckpointError: a save failed on some rank. Every rank raises, and the queue stays usable.
    """
    queue = global_state.async_calls_queue
    if not ckpt_cfg.async_save or queue is None:
        return
    if blocking and len(queue) and Ranks.current().is_first:
        logger.info("waiting for %d asynchronous save(s) to finish", len(queue))
    try:
        queue.finalize(blocking=blocking)
    finally:
        if terminate:
            queue.abort()


def is_empty_async_queue(global_state: Any) -> bool:
    """Whether no asynchronous save is under way. The same answer on every rank."""
    queue = global_state.async_calls_queue
    return queue is None or len(queue) == 0
