"""Several calls at the same time, where the first failure ends all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import TypeVar

T = TypeVar("T")


def in_parallel(tasks: Sequence[Callable[[], T]], threads: int) -> list[T]:
    """Run tasks in threads and return their results in order.

    Raises:
        Exception: that of the first task that failed. What had not begun then is not begun; what had is waited for.
    """
    if len(tasks) <= 1 or threads <= 1:
        return [task() for task in tasks]
    with ThreadPoolExecutor(min(threads, len(tasks)), thread_name_prefix="objects") as pool:
        futures = [pool.submit(task) for task in tasks]
        done, _ = wait(futures, return_when=FIRST_EXCEPTION)
        if any(future.exception() for future in done):
            pool.shutdown(wait=True, cancel_futures=True)
        return [future.result() for future in futures if not future.cancelled()]
