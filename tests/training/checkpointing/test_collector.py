"""Searches for objects that refer to themselves, while a save makes its state dict."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from megatron.core.optimizer import distrib_optimizer

from bridge.training.checkpointing.collector import without_collector
from bridge.training.checkpointing.contents.model import generate_model_state_dict
from bridge.training.checkpointing.contents.optimizer import generate_optimizer_state_dict
from bridge.training.checkpointing.contents.searching import without_search_of_everything
from bridge.training.checkpointing.plans.resharding import FULLY_RESHARDABLE, MEMORY_EFFICIENT, SHARDING_TYPE
from bridge.training.setup import setup
from tests.distributed.launch import run_ranks
from tests.training.tiny import tiny_config


class Loop:
    """Refers to itself, so that only a search finds that nobody needs it."""

    def __init__(self) -> None:
        self.own = self


def lost_loop() -> weakref.ref[Loop]:
    return weakref.ref(Loop())


@pytest.fixture(autouse=True)
def collector() -> Iterator[None]:
    gc.collect()
    yield
    gc.enable()


def searches_of_everything(action: Callable[[], object]) -> int:
    """How often all objects are searched meanwhile."""
    seen: list[int] = []

    def note(phase: str, info: dict[str, int]) -> None:
        if phase == "start" and info["generation"] == 2:
            seen.append(1)

    gc.callbacks.append(note)
    try:
        action()
    finally:
        gc.callbacks.remove(note)
    return len(seen)


def search_as_megatron_does() -> None:
    with without_search_of_everything():
        distrib_optimizer.gc.collect()


def test_a_save_leaves_old_objects_to_pythons_own_collector() -> None:
    new = lost_loop()
    assert searches_of_everything(search_as_megatron_does) == 0
    assert new() is None
    assert searches_of_everything(distrib_optimizer.gc.collect) == 1
    assert distrib_optimizer.gc is gc


def test_it_ends_with_an_error_too() -> None:
    with pytest.raises(ValueError, match="lost"), without_search_of_everything():
        raise ValueError("lost")
    assert distrib_optimizer.gc is gc


def test_programs_without_the_collector_keep_the_whole_search() -> None:
    gc.disable()
    assert searches_of_everything(search_as_megatron_does) == 1


def test_a_fully_reshardable_state_dict_is_made_without_it(tmp_path: Path) -> None:
    def case() -> tuple[int, int]:
        torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=torch.distributed.HashStore())
        run = setup(tiny_config(ddp={"use_distributed_optimizer": True}))
        model = generate_model_state_dict(run.model)
        metadata = {SHARDING_TYPE: FULLY_RESHARDABLE, MEMORY_EFFICIENT: False, "dp_cp_group": run.pg_collection.dp_cp}
        make = partial(run.optimizer.sharded_state_dict, model["model"], metadata=metadata)
        ours = partial(
            generate_optimizer_state_dict,
            *(run.optimizer, None, model),
            is_loading=False,
            optim_sd_kwargs={"metadata": metadata},
        )
        return searches_of_everything(ours), searches_of_everything(make)

    assert run_ranks(case, 1) == [(0, 1)]


def test_the_collector_waits_and_goes_on() -> None:
    with without_collector():
        assert not gc.isenabled()
        with without_collector():
            pass
        assert not gc.isenabled()
    assert gc.isenabled()
