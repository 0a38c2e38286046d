"""Who speaks in a job with many ranks."""

from __future__ import annotations

import contextlib
import io
import logging

import pytest

from bridge.training.logs import EVERY_RANK, configure_logging
from tests.distributed.launch import run_ranks


def _heard(rank: int, level: str) -> list[str]:
    stream = io.StringIO()
    with contextlib.redirect_stderr(stream):
        configure_logging(level, rank, world_size=2)
        logging.getLogger("bridge").info("common")
        logging.getLogger("bridge").info("mine", extra=EVERY_RANK)
        logging.getLogger("bridge").warning("trouble")
        logging.getLogger("megatron.core").warning("noise")
        logging.getLogger("megatron.core").error("failure")
    return [line.partition(" ")[2] for line in stream.getvalue().splitlines()]


@pytest.mark.parametrize(
    ("rank", "level", "heard"),
    [
        (0, "INFO", ["INFO common", "INFO mine", "WARNING trouble", "ERROR failure"]),
        (1, "INFO", ["INFO mine", "WARNING trouble", "ERROR failure"]),
        (1, "ERROR", ["ERROR failure"]),
        (0, "DEBUG", ["INFO common", "INFO mine", "WARNING trouble", "WARNING noise", "ERROR failure"]),
    ],
)
def test_what_a_rank_says(rank: int, level: str, heard: list[str]) -> None:
    # In a process of its own: logging is configured once for all of it.
    assert run_ranks(_heard, 1, rank, level) == [[f"[rank {rank}] {line}" for line in heard]]
