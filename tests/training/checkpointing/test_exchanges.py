"""How often ranks exchange something for a save and for a load: real calls of torch.distributed, counted in a real run.

The numbers are those of `docs/scale.md`. Each is an upper bound: fewer is no fault.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from bridge.training.checkpointing import load_checkpoint, maybe_finalize_async_save, save_checkpoint
from bridge.training.setup import Run, setup
from tests.distributed.launch import run_ranks
from tests.training.tiny import tiny_config

DOCS = Path(__file__).parents[3] / "docs" / "scale.md"
EXCHANGES = (
    *("all_reduce", "all_gather", "all_gather_into_tensor", "all_gather_object", "all_to_all", "barrier"),
    *("broadcast", "broadcast_object_list", "gather", "gather_object", "reduce_scatter_tensor", "scatter"),
    *("scatter_object_list", "send", "recv", "isend", "irecv", "new_group"),
)


@contextmanager
def counted(into: list[str]) -> Iterator[None]:
    """Note every call of one of torch.distributed's exchanges, and carry it out."""
    real = {name: getattr(dist, name) for name in EXCHANGES}

    def noting(name: str) -> Any:
        def call(*arguments: Any, **keywords: Any) -> Any:
            into.append(f"{name} {_phase()}")
            return real[name](*arguments, **keywords)

        return call

    try:
        for name in real:
            setattr(dist, name, noting(name))
        yield
    finally:
        for name, function in real.items():
            setattr(dist, name, function)


def _phase() -> str:
    """What the exchange is for, as the checkpoint layer calls it."""
    frame = sys._getframe(2)
    while frame is not None:
        if "phase" in frame.f_locals:
            return str(frame.f_locals["phase"])
        frame = frame.f_back  # type: ignore[assignment]
    return "?"


def save(run: Run, step: int, context: dict[str, Any]) -> None:
    run.state.train_state.step = step
    save_checkpoint(
        run.state,
        run.model,
        run.optimizer,
        run.scheduler,
        0,
        context,
        train_data_iterator=run.train_data_iterator,
        pg_collection=run.pg_collection,
    )


def exchanges(root: Path, fully_reshardable: bool) -> dict[str, list[str]]:
    """By occasion, the exchanges of this rank."""
    checkpoint = {"save": str(root), "load": str(root), "dist_ckpt_optim_fully_reshardable": fully_reshardable}
    run = setup(tiny_config(train_iters=2, checkpoint=checkpoint))
    cfg, context = run.cfg.checkpoint, {}  # type: tuple[Any, dict[str, Any]]
    found: dict[str, list[str]] = {}

    def noted(occasion: str) -> Any:
        return counted(found.setdefault(occasion, []))

    with noted("first synchronous save"):
        save(run, 1, context)
    with noted("repeated synchronous save"):
        save(run, 2, context)
    cfg.async_save = True
    save(run, 3, context)
    maybe_finalize_async_save(run.state, cfg, blocking=True)
    with noted("start of a repeated asynchronous save"):
        save(run, 4, context)
    steps = 0
    while len(run.state.async_calls_queue):
        into: list[str] = []
        with counted(into):
            maybe_finalize_async_save(run.state, cfg)
        found["publication" if into else "a training step"] = into
        steps += 1
        dist.barrier()  # as training keeps ranks together
        if steps > 100_000:
            raise AssertionError("the save was never published")
    with noted("load"):
        load_checkpoint(run.state, run.model, run.optimizer, run.scheduler, pg_collection=run.pg_collection)
    return found


def documented(fully_reshardable: bool) -> dict[str, int]:
    """The numbers in the page: rows of a table, the occasion first and a number for each kind of state last."""
    rows = re.findall(r"^\| ([a-z ]+?) \|.*\| (\d+) \| (\d+) \|$", DOCS.read_text(), re.MULTILINE)
    return {occasion: int(numbers[fully_reshardable]) for occasion, *numbers in rows}


@pytest.mark.parametrize("fully_reshardable", [False, True])
def test_ranks_exchange_no_more_than_is_documented(tmp_path: Path, fully_reshardable: bool) -> None:
    first, second = run_ranks(exchanges, 2, tmp_path, fully_reshardable, timeout=240)
    assert first == second
    bounds = documented(fully_reshardable)
    assert bounds.keys() == first.keys()
    assert bounds["a training step"] == 0
    over = {occasion: calls for occasion, calls in first.items() if len(calls) > bounds[occasion]}
    assert not over, over
