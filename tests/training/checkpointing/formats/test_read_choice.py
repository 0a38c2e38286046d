"""Whether to read everything on every rank or each shard once."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bridge.training.checkpointing.formats.read_choice import (
    READ_ONCE_FROM,
    SMALL_BYTES,
    Choice,
    Measured,
    Speeds,
    Work,
    choose,
    process_group,
    sharing_group,
    worth_measuring,
)

GIB = 1 << 30


def work(replicas: int, speeds: Speeds | None, wanted: int = 4 * GIB) -> Work:
    """One of `replicas` ranks that all want the same."""
    share = wanted // replicas
    return Work(replicas, wanted, share, wanted - share, speeds)


MEASURED: dict[str, tuple[int, Speeds, bool]] = {
    "each rank has the store for itself, and the network is slower": (2, Speeds(2e9, 2e9, 1e9), False),
    "the same with many replicas": (32, Speeds(2e9, 2e9, 1e9), False),
    "everything lies in the node's cache": (8, Speeds(8e9, 8e9, 1e9), False),
    "32 ranks share one store": (32, Speeds(0.1e9, 0.1e9, 1e9), True),
    "2 ranks share one store, and the network is fast": (2, Speeds(0.5e9, 0.5e9, 10e9), True),
    "2 ranks share one store, and the network is slower": (2, Speeds(0.5e9, 0.5e9, 0.3e9), False),
    "the node reads once what its ranks all want": (4, Speeds(4e9, 1e9, 1e9), False),
    "a gain within the error of measuring": (2, Speeds(1e9, 1e9, 0.7e9), False),
}


@pytest.mark.parametrize(("replicas", "speeds", "once"), MEASURED.values(), ids=MEASURED.keys())
def test_the_faster_way_is_chosen(replicas: int, speeds: Speeds, once: bool) -> None:
    choice = choose([work(replicas, speeds)] * replicas)
    assert choice.once is once
    assert choice.reason.startswith(f"with {replicas} replicas, ")


def test_the_slowest_rank_counts() -> None:
    fast, slow = work(2, Speeds(8e9, 8e9, 8e9)), work(2, Speeds(0.2e9, 0.2e9, 8e9))
    assert choose([fast, slow]).once
    assert not choose([fast, replace(slow, speeds=Speeds(8e9, 8e9, 0.2e9))]).once


@pytest.mark.parametrize(("replicas", "once"), [(READ_ONCE_FROM - 1, False), (READ_ONCE_FROM, True)])
def test_without_measurements_the_number_of_replicas_decides(replicas: int, once: bool) -> None:
    choice = choose([work(replicas, None), work(replicas, Speeds(1e9, 1e9, 1e9))])
    assert choice.once is once
    assert choice.reason.startswith("nothing could be measured")


def test_what_cannot_gain_is_not_measured() -> None:
    alone = Work(4, GIB, GIB, 0)
    small = work(32, None, wanted=SMALL_BYTES)
    assert worth_measuring([alone] * 4) == Choice(False, "no two ranks load the same")
    assert worth_measuring([small] * 32) == Choice(False, "no rank loads more than 256 MiB")
    assert worth_measuring([small] * 32, SMALL_BYTES - 1) is None
    assert worth_measuring([work(2, None), alone]) is None


def test_the_setting_says_which_ranks_share() -> None:
    group = object()
    assert sharing_group(False, group) is None
    assert sharing_group(True, group) is group
    assert sharing_group("auto", group) == Measured(group)
    assert sharing_group("auto", None) is None
    assert process_group(Measured(group)) is group
    assert process_group(group) is group
    assert process_group(None) is None
