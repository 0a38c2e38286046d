"""Which optimizers a rank describes by itself: the others may need all ranks to be there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.optimizer.layer_wise_optimizer import LayerWiseDistributedOptimizer
from megatron.core.utils import unwrap_model

from bridge.training.checkpointing import save_checkpoint
from bridge.training.checkpointing.contents.optimizer import is_described_alone
from bridge.training.checkpointing.contents.optimizer_forms import chained
from bridge.training.checkpointing.errors import CheckpointError
from bridge.training.checkpointing.parallel import default_pg_collection
from bridge.training.checkpointing.save_plans import COLLECTED_ALONE
from bridge.training.setup import Run, setup
from tests.distributed.launch import run_ranks
from tests.training.tiny import tiny_config


def in_every_form() -> dict[str, tuple[bool, bool]]:
    """By kind of optimizer: the answers for state that is not fully reshardable, and that is."""
    found = {}
    for precision in ("fp32", "bf16"):
        for distributed in (False, True):
            ddp = {"use_distributed_optimizer": distributed}
            run = setup(tiny_config(model={"precision": precision}, ddp=ddp))
            found[f"{precision}, {'distributed' if distributed else 'plain'}"] = answers(run.optimizer)
    (part,) = chained(run.optimizer)
    part.optimizer.__class__ = type("Unknown", (type(part.optimizer),), {})
    found["an unknown one inside"] = answers(run.optimizer)
    return found


def answers(optimizer: Any) -> tuple[bool, bool]:
    plain, fully = (is_described_alone(optimizer, fully_reshardable=fully) for fully in (False, True))
    return plain, fully


def test_only_what_is_known_is_described_alone() -> None:
    (found,) = run_ranks(in_every_form, 1)
    assert found == {
        "fp32, plain": (True, True),
        "fp32, distributed": (True, False),
        "bf16, plain": (True, True),
        "bf16, distributed": (True, False),
        "an unknown one inside": (False, False),
    }
    assert answers(None) == (True, True)


def layer_wise(run: Run) -> Any:
    """Megatron-core's optimizer for whole layers, which gathers when it is saved: a chain of parts that do not."""
    (part,) = chained(run.optimizer)
    groups = default_pg_collection()
    groups.expt_dp = parallel_state.get_expert_data_parallel_group()
    (settings, *_) = [{key: value for key, value in group.items() if key != "params"} for group in part.param_groups]
    inner = type(part.optimizer)([{**settings, "params": [*run.model[0].parameters()]}], lr=0.01)
    return LayerWiseDistributedOptimizer([inner], part.config, groups, [part.init_state_fn])


def fail_in_the_third_save(cfg: Any) -> tuple[list[str], tuple[bool, bool]]:
    run = setup(cfg)
    optimizer, context, seen = layer_wise(run), {}, []  # type: tuple[Any, dict[str, Any], list[str]]
    (chunk,) = unwrap_model(run.model)

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise ValueError("broken")

    for step in (1, 2, 3):
        run.state.train_state.step = step
        if step == 3 and dist.get_rank() == 1:
            chunk.sharded_state_dict = fail
        try:
            save_checkpoint(run.state, run.model, optimizer, run.scheduler, 0, context)
        except CheckpointError as error:
            seen.append(str(error))
        else:
            seen.append("saved")
    return seen, answers(optimizer)


class Slotted:
    """An optimizer of another program: no weak reference to it can be made, and it is equal to all others."""

    __slots__ = ("is_stub_optimizer",)

    def __init__(self) -> None:
        self.is_stub_optimizer = False

    def __eq__(self, other: object) -> bool:
        raise ValueError("it holds tensors")


def save_with_optimizers_of_others(cfg: Any) -> list[bool]:
    """Whether ranks may collect their state alone after each save."""
    run = setup(cfg)
    context: dict[str, Any] = {}
    found = []
    for step, optimizer in enumerate((run.optimizer, run.optimizer, Slotted(), Slotted(), None, None, run.optimizer)):
        run.state.train_state.step = step
        save_checkpoint(run.state, run.model, optimizer, None, 0, context)
        found.append(context[COLLECTED_ALONE] is not None)
    return found


def test_any_optimizer_may_come_along_when_none_is_saved(tmp_path: Path) -> None:
    cfg = tiny_config(checkpoint={"save": str(tmp_path), "save_optim": False})
    expected = [True, True, False, False, True, True, True]
    assert run_ranks(save_with_optimizers_of_others, 2, cfg) == [expected, expected]


@pytest.mark.filterwarnings("ignore")
def test_no_rank_waits_in_an_optimizer_for_one_that_has_failed(tmp_path: Path) -> None:
    cfg = tiny_config(
        checkpoint={"save": str(tmp_path)}, model={"precision": "bf16"}, ddp={"use_distributed_optimizer": False}
    )
    message = "collecting the model's state failed on rank 1: ValueError: broken"
    for found in run_ranks(fail_in_the_third_save, 2, cfg, timeout=60):
        assert found == (["saved", "saved", message], (False, False))
