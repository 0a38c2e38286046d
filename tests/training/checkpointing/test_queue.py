"""The queue of asynchronous saves on two real ranks: order, failure, and use after failure."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest

from bridge.training.checkpointing import is_empty_async_queue, maybe_finalize_async_save, schedule_async_save
from bridge.training.checkpointing.errors import CheckpointError, CheckpointSaveError
from bridge.training.checkpointing.failures.history import SaveFailures
from bridge.training.checkpointing.queue import SaveQueue
from bridge.training.config import CheckpointConfig
from tests.distributed.launch import init_ranks, run_ranks

ASYNC = CheckpointConfig(save="/nowhere", async_save=True)


def error_of(action: Callable[[], Any]) -> tuple[str, str]:
    try:
        action()
    except CheckpointError as error:
        return type(error).__name__, str(error)
    return "", ""


def life_of_a_queue() -> dict[str, Any]:
    init_ranks()
    rank = dist.get_rank()
    queue = SaveQueue()
    state = SimpleNamespace(async_calls_queue=queue, save_failures=SaveFailures())
    seen: list[Any] = []
    facts: dict[str, Any] = {"empty at first": is_empty_async_queue(state)}

    # Rank 1 writes longer: nothing is finalized anywhere before it is done.
    queue.schedule(
        AsyncRequest(lambda: time.sleep(0.6 * rank) or f"written by {rank}", (), [lambda: seen.append("finalized")]),
        "first",
        receive=seen.append,
    )
    facts["empty while writing"] = is_empty_async_queue(state)
    time.sleep(0.2)
    facts["finalized early"] = queue.finalize()
    maybe_finalize_async_save(state, ASYNC, blocking=True)
    facts["seen"] = list(seen)

    # One rank's writer dies: both ranks raise, the save is abandoned, the next save works.
    seen.clear()
    queue.schedule(
        AsyncRequest(lambda: os._exit(9) if rank == 1 else None, (), [lambda: seen.append("finalized")]),
        "second",
        abandon=lambda: seen.append("abandoned"),
    )
    facts["death"] = error_of(lambda: maybe_finalize_async_save(state, ASYNC, blocking=True))
    schedule_async_save(state, AsyncRequest(lambda: None, (), [lambda: seen.append("third")]))
    maybe_finalize_async_save(state, ASYNC, blocking=True, terminate=True)
    facts["after death"] = list(seen)

    # A finalize function fails on one rank: both raise, the functions after it do not run.
    seen.clear()

    def fail_on_first() -> None:
        if rank == 0:
            raise OSError(28, "No space left on device")

    queue.schedule(AsyncRequest(None, (), [fail_on_first, lambda: seen.append("after the failure")]), "fourth")
    facts["finalize failure"] = error_of(lambda: queue.finalize(blocking=True))
    facts["after finalize failure"] = (list(seen), is_empty_async_queue(state))

    # Two saves are finalized in their order, although the second is written first.
    seen.clear()
    queue.schedule(AsyncRequest(lambda: time.sleep(0.3), (), [lambda: seen.append("slow")]), "slow")
    queue.schedule(AsyncRequest(lambda: None, (), [lambda: seen.append("fast")]), "fast")
    time.sleep(0.1)
    facts["fast alone"] = queue.finalize()
    queue.finalize(blocking=True)
    facts["order"] = list(seen)

    # A failure that may pass stops no save behind it, and is told to whoever settles it.
    seen.clear()
    settled: list[tuple[bool, str]] = []
    queue.schedule(AsyncRequest(lambda: os._exit(9) if rank == 1 else None, (), []), "lost", persistent=False)
    queue.schedule(AsyncRequest(lambda: None, (), [lambda: seen.append("behind it")]), "next")
    count = queue.finalize(True, lambda persistent, error: settled.append((persistent, type(error).__name__)))
    facts["settled"] = (count, settled, list(seen))
    return facts


def test_the_queue_finalizes_in_order_and_fails_on_all_ranks() -> None:
    results = run_ranks(life_of_a_queue, 2)
    for rank, facts in enumerate(results):
        assert facts == {
            "empty at first": True,
            "empty while writing": False,
            "finalized early": 0,
            "seen": [f"written by {rank}", "finalized"],
            "death": (
                "CheckpointSaveError",
                "writing second failed on rank 1: the process of the background writer of second ended with status 9 "
                "and no result",
            ),
            "after death": ["abandoned", "third"],
            "finalize failure": (
                "CheckpointError",
                "finalizing fourth failed on rank 0: OSError: [Errno 28] No space left on device",
            ),
            "after finalize failure": ([], True),
            "fast alone": 0,
            "order": ["slow", "fast"],
            "settled": (1, [(False, "CheckpointSaveError"), (True, "NoneType")], ["behind it"]),
        }


def test_a_request_is_never_dropped_for_want_of_a_queue() -> None:
    with pytest.raises(CheckpointSaveError, match="async_calls_queue is None"):
        schedule_async_save(SimpleNamespace(async_calls_queue=None), AsyncRequest(None, (), []))


def test_nothing_is_finalized_without_async_save() -> None:
    queue = SaveQueue()
    queue.schedule(AsyncRequest(None, (), []))
    maybe_finalize_async_save(SimpleNamespace(async_calls_queue=queue), SimpleNamespace(async_save=False))
    assert len(queue) == 1
    queue.abort()
    assert len(queue) == 0


def test_an_aborted_save_is_ended_and_what_it_has_written_is_left_to_the_next_start(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    staging = tmp_path / "staging"

    def write() -> None:
        staging.mkdir()
        (staging / "shard").write_bytes(b"half")
        time.sleep(60)

    told: list[str] = []

    def failed(error: BaseException) -> None:
        told.append(str(error))
        raise OSError(5, "the disk is gone")

    def abandon() -> None:
        told.append("storage is touched")

    queue = SaveQueue()
    queue.schedule(AsyncRequest(write, (), []), "a save", abandon=abandon, failed=failed)
    queue.schedule(AsyncRequest(None, (), []), "another", abandon=abandon, failed=failed)
    call = queue._pending[0].call
    assert call is not None
    while not (staging / "shard").exists() or not (staging / "shard").stat().st_size:
        time.sleep(0.01)
    queue.abort()
    assert told == ["abandoned, because the run ended before it was published"] * 2
    assert ((staging / "shard").read_bytes(), len(queue)) == (b"half", 0)
    with pytest.raises(CheckpointSaveError, match="was killed by SIGKILL"):
        call.result()
    messages = [record.getMessage() for record in caplog.records]
    assert [message for message in messages if message.startswith(("abandoned", "reporting"))] == [
        "abandoned a save; what it has written is left for the next start",
        "reporting the end of a save failed",
        "abandoned another; what it has written is left for the next start",
        "reporting the end of another failed",
    ]
