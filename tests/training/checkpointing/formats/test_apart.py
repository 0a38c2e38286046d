"""A state dict is taken apart as megatron-core takes it apart."""

from __future__ import annotations

import copy
import random
from collections import OrderedDict
from typing import Any

import pytest
import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import (
    LocalNonpersistentObject,
    ShardedObject,
    ShardedTensor,
    ShardedTensorFactory,
)
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess

from bridge.training.checkpointing.formats.apart import TakenApart


def built(key: str, data: torch.Tensor, *_: Any) -> Any:
    halves = [ShardedTensor.from_rank_offsets(f"{key}.{number}", part) for number, part in enumerate(data.chunk(2))]
    return {"first": halves[0], "rest": halves[1:]}


def leaf(chance: random.Random, key: str) -> Any:
    value = torch.zeros(4)
    makers = [
        lambda: ShardedTensor.from_rank_offsets(key, value),
        lambda: ShardedObject(key, {"a": 1}, (1,), (0,)),
        lambda: ShardedTensorFactory(key, value, built, lambda parts: parts),
        lambda: LocalNonpersistentObject(3),
        lambda: None,
        lambda: 7,
        lambda: (1, [2]),
    ]
    return chance.choice(makers)()


def container(chance: random.Random, depth: int, path: str = "k") -> Any:
    size = chance.choice([0, 0, 1, 2, 4])
    values = [
        container(chance, depth - 1, f"{path}.{n}") if depth and chance.random() < 0.5 else leaf(chance, f"{path}.{n}")
        for n in range(size)
    ]
    if chance.random() < 0.4:
        return values
    kind = chance.choice([dict, OrderedDict])
    return kind((chance.choice([f"name{n}", n]), value) for n, value in enumerate(values))


@pytest.mark.parametrize("seed", range(150))
def test_random_states(seed: int) -> None:
    chance = random.Random(seed)
    state = {f"part{number}": container(chance, 3, f"p{number}") for number in range(4)}
    sharded, common = save_preprocess(copy.deepcopy(state), validate_access_integrity=False)
    taken = TakenApart(state)
    assert repr(taken.sharded) == repr(sharded)
    assert repr(taken.common) == repr(common)
    assert [id(item) for item in taken.items] == [id(item) for item in nested_values(taken.sharded)]
