"""What is left out of megatron-core's validation is what that finds valid."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedObject, ShardedTensor
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.validation import validate_sharding_integrity

from bridge.training.checkpointing.io.access import left_to_validate


def tensor(key: str, *offsets: tuple[int, int, int], **settings: Any) -> ShardedTensor:
    return ShardedTensor.from_rank_offsets(key, torch.zeros(2, 3), *offsets, **settings)


@pytest.fixture
def only_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


HALVES = [tensor("halves", (0, 0, 2)), tensor("halves", (0, 1, 2))]


@pytest.mark.parametrize(
    "item",
    [
        pytest.param(tensor("a"), id="a tensor"),
        pytest.param(tensor("a", (0, 0, 1), prepend_axis_num=1), id="with an axis more"),
        pytest.param(tensor("a", replica_id=(0, 0)), id="with a long replica id"),
    ],
)
@pytest.mark.usefixtures("only_rank")
def test_a_whole_tensor_is_left_out_and_is_valid(item: ShardedTensor) -> None:
    assert left_to_validate([item, *HALVES]) == HALVES
    validate_sharding_integrity([[item.without_data()]])


@pytest.mark.parametrize(
    "items",
    [
        pytest.param([tensor("a"), tensor("a")], id="one twice"),
        pytest.param([tensor("a", replica_id=1)], id="a copy"),
        pytest.param([tensor("a", (0, 0, 2))], id="a half"),
        pytest.param([tensor("a", (0, 1, 2), prepend_axis_num=1)], id="a layer of two"),
        pytest.param([ShardedObject("a", None, (2,), (0,))], id="one object of two"),
    ],
)
@pytest.mark.usefixtures("only_rank")
def test_what_is_invalid_is_left(items: list[Any]) -> None:
    assert left_to_validate([*items, tensor("b")]) == items
    with pytest.raises(CheckpointingException):
        validate_sharding_integrity([[item.without_data() for item in items]])


def test_nothing_is_left_of_nothing() -> None:
    assert left_to_validate([]) == []
