"""The Adam for runs without TransformerEngine, and the schedule."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from bridge.training.optimizer import GroupStepAdam, build_scheduler, samples_after
from tests.training.tiny import tiny_config


def _gradients(parameters: list[torch.nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def _parameters() -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((3, 5), (7,))]


@pytest.mark.parametrize("decoupled", [True, False])
def test_it_computes_what_torchs_own_computes(decoupled: bool) -> None:
    options: dict[str, Any] = {"lr": 0.1, "weight_decay": 0.3, "betas": (0.8, 0.9), "eps": 1e-6}
    ours, theirs = _parameters(), _parameters()
    reference = (torch.optim.AdamW if decoupled else torch.optim.Adam)(theirs, **options)
    adam = GroupStepAdam(ours, adam_w_mode=decoupled, **options)
    for step in range(5):
        _gradients(ours, step)
        _gradients(theirs, step)
        adam.step()
        reference.step()
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_the_step_is_an_int_of_the_group_and_a_reload_continues_bit_for_bit() -> None:
    straight = _parameters()
    adam = GroupStepAdam(straight, lr=0.1)
    for step in range(2):
        _gradients(straight, step)
        adam.step()
    assert adam.param_groups[0]["step"] == 2 and type(adam.param_groups[0]["step"]) is int
    assert all(set(state) == {"exp_avg", "exp_avg_sq"} for state in adam.state.values())

    resumed = [torch.nn.Parameter(parameter.detach().clone()) for parameter in straight]
    other = GroupStepAdam(resumed, lr=0.1)
    other.load_state_dict(copy.deepcopy(adam.state_dict()))
    for step in range(2, 4):
        for optimizer, parameters in ((adam, straight), (other, resumed)):
            _gradients(parameters, step)
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(straight, resumed, strict=True))


def test_it_takes_the_groups_of_another_fused_adam() -> None:
    parameters = _parameters()
    adam = GroupStepAdam(parameters, lr=0.1)
    fused = {"lr": 0.2, "bias_correction": True, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.0, "step": 3}
    adam.load_state_dict({"state": {}, "param_groups": [{**fused, "params": [0, 1]}]})
    _gradients(parameters, 0)
    adam.step()
    assert adam.param_groups[0]["step"] == 4
    assert adam.param_groups[0]["lr"] == 0.2


@pytest.mark.parametrize(
    ("iterations", "rampup", "samples"),
    [
        (0, None, 0),
        (5, None, 40),
        (2, [4, 4, 8], 8),
        (3, [4, 4, 8], 16),
        (5, [4, 4, 8], 32),
    ],
)
def test_samples_after_counts_the_ramp_up(iterations: int, rampup: list[int] | None, samples: int) -> None:
    assert samples_after(tiny_config(train={"rampup_batch_size": rampup}), iterations, 2) == samples


class _Groups:
    """An optimizer as far as the schedule sees it."""

    def __init__(self) -> None:
        self.param_groups: list[dict[str, Any]] = [{"max_lr": 0.01, "min_lr": 1e-4, "default_config": True}]


def test_the_schedule_counts_samples_and_the_configuration_wins_over_a_checkpoint() -> None:
    cfg = tiny_config(train_iters=10, scheduler={"lr_warmup_iters": 2, "lr_decay_style": "linear"})
    scheduler = build_scheduler(cfg, _Groups(), data_parallel_size=1)
    scheduler.step(increment=8)
    assert scheduler.optimizer.param_groups[0]["lr"] == pytest.approx(0.005)
    state = scheduler.state_dict()
    assert (state["lr_warmup_steps"], state["lr_decay_steps"], state["wd_incr_steps"]) == (16, 80, 80)

    longer = build_scheduler(tiny_config(train_iters=20), _Groups(), data_parallel_size=1)
    longer.load_state_dict(state)
    assert longer.num_steps == 8
    assert longer.lr_decay_steps == 160
