"""The launcher that the multi-rank tests stand on."""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch

from tests.distributed.launch import RankError, init_ranks, run_ranks


def test_results_come_back_in_rank_order() -> None:
    def total(offset: int) -> tuple[int, float]:
        init_ranks()
        rank = torch.distributed.get_rank()
        value = torch.tensor([float(rank + offset)])
        torch.distributed.all_reduce(value)
        return rank, value.item()

    assert run_ranks(total, 3, 10) == [(0, 33.0), (1, 33.0), (2, 33.0)]


def test_a_ranks_exception_is_raised_with_rank_traceback_and_output() -> None:
    def fail() -> None:
        init_ranks()
        if os.environ["RANK"] == "1":
            print("about to fail")
            raise ValueError("no such luck")
        time.sleep(60)

    with pytest.raises(RankError) as error:
        run_ranks(fail, 2)
    message = str(error.value)
    assert message.startswith("rank 1 raised:\nTraceback")
    assert "ValueError: no such luck" in message
    assert message.endswith("--- output of rank 1 ---\nabout to fail\n")


def test_a_rank_that_dies_is_noticed() -> None:
    def die() -> None:
        if os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)

    with pytest.raises(RankError, match="rank 1 died: killed by signal 9"):
        run_ranks(die, 2)


def test_ranks_are_killed_at_the_timeout() -> None:
    def hang() -> None:
        if os.environ["RANK"] == "1":
            time.sleep(60)

    started = time.monotonic()
    with pytest.raises(RankError, match=r"rank 1 of 2 did not finish within 0\.5 s"):
        run_ranks(hang, 2, timeout=0.5)
    assert time.monotonic() - started < 10


def test_a_result_that_cannot_be_pickled_is_an_error_of_that_rank() -> None:
    with pytest.raises(RankError, match="rank 0 raised:"):
        run_ranks(lambda: lambda: None, 1)
