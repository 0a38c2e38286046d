"""Sharing tasks among processes: the largest first, each to whoever is free. The first error ends all of them.

The processes are spawned, because Zarr's library has threads, which do not survive a fork. They end with the process
that started them, however that ends: what goes on writing would write into the files of the next try.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import connection, get_context
from typing import Any

import torch

from bridge.training.checkpointing.conversion.work import Job, Outcome, Task, Work
from bridge.training.checkpointing.errors import ERRORS_BY_NAME, CheckpointError
from bridge.training.checkpointing.safety.safe_globals import allow
from bridge.training.spawned import enter

_PR_SET_PDEATHSIG = 1  # <sys/prctl.h>
_M_MMAP_THRESHOLD = -3  # <malloc.h>
_LARGE = 1 << 20
"""Bytes from which memory that is let go of is given back at once."""
_ENDING_SECONDS = 5.0

Finished = Callable[[Task, Outcome], None]
"""Told of each task when it is done."""


class Pool:
    """Carries out tasks, some at a time."""

    def run(self, tasks: Sequence[Task], finished: Finished, report: Callable[[int], None]) -> None:
        """Carry out all tasks.

        Args:
            tasks: in any order.
            finished: called in this process.
            report: told the bytes that have been handled since it was last told.

        Raises:
            CheckpointError: one failed, or a process died. No other is at work any more.
        """
        raise NotImplementedError


@contextmanager
def pool_of(job: Job, processes: int) -> Iterator[Pool]:
    """What carries out the tasks of a job; with one process it is this one."""
    if processes == 1:
        yield _Alone(job)
        return
    pool = _Processes(job, processes)
    try:
        yield pool
    finally:
        pool.end()


def _in_order(tasks: Sequence[Task]) -> list[Task]:
    return sorted(tasks, key=lambda task: -task.size)


class _Alone(Pool):
    def __init__(self, job: Job) -> None:
        self._job = job
        self._work: Work | None = None
        self._report: Callable[[int], None] = _nobody

    def run(self, tasks: Sequence[Task], finished: Finished, report: Callable[[int], None]) -> None:
        self._report = report
        self._work = self._work or Work(self._job, lambda size: self._report(size))
        for task in _in_order(tasks):
            finished(task, self._work.do(task))


def _nobody(size: int) -> None:
    del size


class _Processes(Pool):
    def __init__(self, job: Job, count: int) -> None:
        context = get_context("spawn")
        self._processes: list[Any] = []
        self._connections: list[Any] = []
        try:
            for number in range(count):
                own, theirs = context.Pipe()
                name = f"convert-{number}"
                process = context.Process(
                    target=enter, args=(f"{__name__}.serve", theirs, os.getpid()), name=name, daemon=True
                )
                self._connections.append(own)
                process.start()
                self._processes.append(process)
                theirs.close()
            for each in self._connections:
                each.send(job)
        except BaseException:
            self.end()
            raise

    def run(self, tasks: Sequence[Task], finished: Finished, report: Callable[[int], None]) -> None:
        waiting = _in_order(tasks)[::-1]
        busy: dict[Any, Task] = {}
        for each in self._connections:
            _give(each, waiting, busy)
        while busy:
            # A process that has died is at the end of its connection.
            for ready in connection.wait(list(busy)):
                kind, value = self._receive(ready)
                if kind == "progress":
                    report(value)
                elif kind == "error":
                    name, message = value
                    raise ERRORS_BY_NAME.get(name, CheckpointError)(message)
                else:
                    finished(busy.pop(ready), value)
                    _give(ready, waiting, busy)

    def _receive(self, ready: Any) -> Any:
        try:
            return ready.recv()
        except (EOFError, OSError) as error:
            process = self._processes[self._connections.index(ready)]
            process.join(_ENDING_SECONDS)
            status = process.exitcode
            how = f"was killed by {signal.Signals(-status).name}" if status and status < 0 else f"ended with {status}"
            raise CheckpointError(f"a process of the conversion {how}; start it again to continue it") from error

    def end(self) -> None:
        """End all processes, whatever they do."""
        for each in self._connections:
            each.close()
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join(_ENDING_SECONDS)


def _give(to: Any, waiting: list[Task], busy: dict[Any, Task]) -> None:
    if waiting:
        task = waiting.pop()
        busy[to] = task
        # One that has died is noticed when its answer is waited for.
        with suppress(OSError):
            to.send(task)


def serve(to: Any, parent: int) -> None:
    """Carry out tasks for another process until it is gone."""
    _die_with(parent)
    give_memory_back()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it is the parent's to handle
    torch.set_num_threads(1)
    with suppress(EOFError, OSError):
        job: Job = to.recv()
        allow(job.safe_globals)
        work = Work(job, lambda size: to.send(("progress", size)))
        while True:
            to.send(_answer(work, to.recv()))


def _answer(work: Work, task: Task) -> tuple[str, Any]:
    try:
        return "done", work.do(task)
    except CheckpointError as error:
        return "error", (type(error).__name__, str(error))
    except Exception as error:
        return "error", ("", f"{type(error).__name__}: {error}")


def _die_with(parent: int) -> None:
    """Ask the kernel (Linux) to end this process when the parent ends."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)


def give_memory_back() -> None:
    """Let this process return large buffers to the system as soon as they are free (glibc).

    By default it keeps those below 32 MiB, which adds up to more than what is in use.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _LARGE)
