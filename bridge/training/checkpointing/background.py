"""One function in a forked process: started, polled and collected without a thread or a queue.

A fork sees memory as it was at that instant (copy on write), so what it writes is a snapshot however
training goes on. The child sends back one pickled value through a pipe. Its death is noticed by the
pipe's end, so nobody waits for a process that is gone.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import logging
import math
import os
import pickle
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import Pipe
from typing import Any, Generic, NoReturn, Protocol, TypeVar

import torch

from bridge.training.checkpointing.errors import CheckpointSaveError, storage_error
from bridge.training.checkpointing.liveness import LOOK_SECONDS, Watch
from bridge.training.signals import leave_signals_to_parent

T = TypeVar("T")

_PR_SET_PDEATHSIG = 1  # <sys/prctl.h>

START_SECONDS = 10.0
"""How long a new process may take to its first instruction in Python before it is given up and forked again."""
_STARTS = 4

KILL_SECONDS = 10.0
"""How long the end of a killed process is waited for."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Raised:
    summary: str
    trace: str
    storage: OSError | None
    """What storage answered, if that was the reason."""

    @classmethod
    def of(cls, error: BaseException) -> _Raised:
        cause = storage_error(error)
        storage = None if cause is None else OSError(cause.errno, cause.strerror or str(cause))
        return cls(f"{type(error).__name__}: {error}", traceback.format_exc(), storage)


class BackgroundCall(Protocol):
    """Something that another process does."""

    def poll(self, timeout: float | None = 0.0) -> bool:
        """Whether it has ended; waits up to `timeout` seconds (None: as long as it takes)."""

    def result(self) -> Any:
        """What has come of it; waits for it, and raises CheckpointSaveError if it failed."""

    def leave(self) -> bool:
        """Leave it to the next start, whenever it is done. False, with nothing changed, where that cannot be."""

    def halt(self) -> None:
        """Tell it to end at once, and wait for nothing; `kill` has to follow."""

    def kill(self, until: float | None = None) -> None:
        """End it at once; the result is then an error.

        Args:
            until: how long its end is waited for, on the monotonic clock; None: `KILL_SECONDS` from now.
        """


def kill_all(calls: Sequence[BackgroundCall]) -> None:
    """End several at once: if storage holds them, they are waited for together and no longer than one."""
    for call in calls:
        call.halt()
    until = time.monotonic() + KILL_SECONDS
    for call in calls:
        call.kill(until)


def seconds_until(until: float | None) -> float:
    """How long the end of a killed process is still waited for."""
    return KILL_SECONDS if until is None else max(0.0, until - time.monotonic())


class FinishedCall(Generic[T]):
    """What has ended already: it was done at once, or could not be begun."""

    def __init__(self, outcome: Callable[[], T]) -> None:
        """
        Args:
            outcome: returns what has come of it, or raises why nothing has.
        """
        self._outcome = outcome

    def poll(self, timeout: float | None = 0.0) -> bool:
        """It has ended."""
        del timeout
        return True

    def result(self) -> T:
        """What has come of it."""
        return self._outcome()

    def leave(self) -> bool:
        """There is nothing to leave."""
        return False

    def halt(self) -> None:
        """There is nothing to end."""

    def kill(self, until: float | None = None) -> None:
        """There is nothing to end."""


class ForkedCall(Generic[T]):
    """A call of `function()` in a child process that dies with its parent.

    Before Python 3.12 a child deadlocks inside `fork` if at that instant another thread, such as one of gloo's, was
    entering or leaving Python: the interpreter's lock for that is then held by a thread that the child does not
    have. Such a child has done nothing yet, so it is killed, and the fork is made again.
    """

    def __init__(
        self, function: Callable[[], T], name: str, stall_seconds: float = math.inf, storage_seconds: float = 0.0
    ) -> None:
        self.name = name
        self._outcome: T | None = None
        self._error: CheckpointSaveError | None = None
        self._done = False
        parent = os.getpid()
        for _ in range(_STARTS):
            self._receiver, sender = Pipe(duplex=False)
            self.pid = os.fork()
            if self.pid == 0:
                self._receiver.close()
                _run_child(function, sender, parent)
            sender.close()
            if self._has_started():
                self._watch = Watch(self.pid, name, stall_seconds, storage_seconds)
                return
        self._done = True
        self._error = CheckpointSaveError(f"the process of {name} did not start in {_STARTS} tries")

    def _has_started(self) -> bool:
        """Wait for the child's first sign of life; end a child that gives none."""
        if self._receiver.poll(START_SECONDS):
            # A child that died instead has closed the pipe; collecting the result will say so.
            with contextlib.suppress(EOFError):
                self._receiver.recv_bytes()
            return True
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        self._receiver.close()
        return False

    def poll(self, timeout: float | None = 0.0) -> bool:
        """Whether the call has ended; waits up to `timeout` seconds (None: as long as it takes).

        A process that has done nothing for `stall_seconds` is ended, and the result is an error; one that waits for
        storage all that time after `storage_seconds`, if that is longer.
        """
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        while not self._done:
            left = deadline - time.monotonic()
            if self._receiver.poll(max(0.0, min(left, LOOK_SECONDS))):
                self._collect()
            elif (problem := self._watch.problem()) is not None:
                self._give_up(f"the process of {self.name} {problem}, so it was ended")
            elif left <= 0:
                break
        return self._done

    def result(self) -> T:
        """The value that the function returned; waits for it.

        Raises:
            CheckpointSaveError: the function raised, or its process died.
        """
        self.poll(None)
        if self._error is not None:
            raise self._error
        return self._outcome  # type: ignore[return-value]

    def leave(self) -> bool:
        """It ends with its parent."""
        return False

    def halt(self) -> None:
        """Send the process SIGKILL; `kill` has to follow."""
        if not self._done:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)

    def kill(self, until: float | None = None) -> None:
        """End the process at once; the result is then an error."""
        if not self._done:
            self._give_up(f"the process of {self.name} was killed by SIGKILL", until)

    def _give_up(self, reason: str, until: float | None = None) -> None:
        """End the process; one that storage holds, so that no signal reaches it, is left behind."""
        self.halt()
        if self._receiver.poll(seconds_until(until)):
            self._collect()
        else:
            logger.error("process %d of %s cannot be ended: storage holds it", self.pid, self.name)
            self._receiver.close()
            self._done = True
        self._error = CheckpointSaveError(reason)

    def _collect(self) -> None:
        try:
            outcome = pickle.loads(self._receiver.recv_bytes())
        except (EOFError, OSError):
            outcome = None
            died = True
        except Exception as error:
            outcome = _Raised(f"what it returned cannot be read: {type(error).__name__}: {error}", "", None)
            died = False
        else:
            died = False
        self._receiver.close()
        try:
            _, status = os.waitpid(self.pid, 0)
        except ChildProcessError:  # somebody who ignores or reaps all children was faster
            status = 0
        self._done = True
        if died:
            self._error = CheckpointSaveError(f"the process of {self.name} {how_it_ended(status)}")
        elif isinstance(outcome, _Raised):
            self._error = CheckpointSaveError(f"the process of {self.name} failed: {outcome.summary}")
            self._error.__cause__ = CheckpointSaveError(f"in process {self.pid}:\n{outcome.trace}")
            self._error.__cause__.__cause__ = outcome.storage
        else:
            self._outcome = outcome


def _run_child(function: Callable[[], Any], sender: Any, parent: int) -> NoReturn:
    status = 1
    try:
        sender.send_bytes(b"started")
        _die_with(parent)
        # A signal for the job is the trainer's to handle; it waits for this process to finish its save.
        leave_signals_to_parent()
        # The collector would touch, and so copy, pages that belong to the trainer, and could free its CUDA objects.
        gc.disable()
        # The threads with which torch computes are the parent's; waiting for them would never end.
        torch.set_num_threads(1)
        try:
            outcome = function()
        except BaseException as error:
            outcome = _Raised.of(error)
        sender.send_bytes(pickle.dumps(outcome))
        status = 0
    except BaseException:
        traceback.print_exc(file=sys.stderr)
        sys.stderr.flush()
    finally:
        # No exit handlers: they are the parent's (process groups, CUDA, temporary files).
        os._exit(status)


def _die_with(parent: int) -> None:
    """Ask the kernel (Linux) to end this process when the parent ends: what it writes could not be published."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)


def how_it_ended(status: int) -> str:
    """The end of a process that gave no result, in words, from its wait status."""
    if os.WIFSIGNALED(status):
        return f"was killed by {signal.Signals(os.WTERMSIG(status)).name}"
    return f"ended with status {os.waitstatus_to_exitcode(status)} and no result"
