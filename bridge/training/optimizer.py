"""The optimizer and the schedule of its learning rate and weight decay."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

import megatron.core.optimizer as megatron_optimizer
import torch
from megatron.core.num_microbatches_calculator import RampupBatchsizeNumMicroBatchesCalculator
from megatron.core.optimizer import OptimizerConfig, distrib_optimizer, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from bridge.training.config import ConfigContainer

logger = logging.getLogger(__name__)


class GroupStepAdam(torch.optim.Adam):
    """torch's Adam with the state of the FusedAdam of TransformerEngine and Apex.

    The number of steps is an int under "step" in each parameter group, and a parameter's state holds
    `exp_avg` and `exp_avg_sq` only.
    """

    def __init__(self, params: Iterable[Any], adam_w_mode: bool = True, **options: Any) -> None:
        super().__init__(params, decoupled_weight_decay=adam_w_mode, **options)

    def __setstate__(self, state: dict[str, Any]) -> None:
        # torch.optim.Adam's own method expects a step in every parameter's state.
        torch.optim.Optimizer.__setstate__(self, state)
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)  # groups saved by another FusedAdam have fewer options

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step of Adam for every parameter that has a gradient."""
        for group in self.param_groups:
            done = int(group.get("step", 0))
            group["step"] = done + 1
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    state["exp_avg"] = torch.zeros_like(parameter)
                    state["exp_avg_sq"] = torch.zeros_like(parameter)
                state["step"] = torch.tensor(float(done))
        try:
            return super().step(closure)
        finally:
            for state in self.state.values():
                state.pop("step", None)


def supply_adam() -> None:
    """Give Megatron-Core an Adam that its optimizers can save and load, where it has found none.

    Without TransformerEngine and Apex, Megatron-Core falls back to torch.optim.AdamW, on a GPU as well as on a
    CPU. That keeps its step in every parameter's state, and `DistributedOptimizer` then cannot give the state of
    a fresh optimizer, shares one step tensor between all parameters after a load, and overwrites the loaded
    step. `GroupStepAdam` keeps the step where `DistributedOptimizer` expects a FusedAdam to keep it.
    """
    if megatron_optimizer.USING_PYTORCH_OPTIMIZER:
        megatron_optimizer.Adam = GroupStepAdam
        megatron_optimizer.USING_PYTORCH_OPTIMIZER = False
        distrib_optimizer.HAVE_APEX_OR_TE = True
        distrib_optimizer.USING_APEX_OPTIMIZER = True


def build_optimizer(cfg: ConfigContainer, model: list[Any]) -> Any:
    """Megatron-Core's optimizer for the DDP-wrapped chunks of a model.

    Also gives the model's configuration the optimizer's loss scaling, which the schedules ask it for.
    """
    supply_adam()
    settings = cfg.optimizer
    precision = cfg.model.precision
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer=settings.optimizer,
            lr=settings.lr,
            min_lr=settings.min_lr,
            weight_decay=settings.weight_decay,
            adam_beta1=settings.adam_beta1,
            adam_beta2=settings.adam_beta2,
            adam_eps=settings.adam_eps,
            sgd_momentum=settings.sgd_momentum,
            clip_grad=settings.clip_grad,
            fp16=precision == "fp16",
            bf16=precision == "bf16",
            params_dtype=dtype,
            loss_scale=settings.loss_scale,
            initial_loss_scale=settings.initial_loss_scale,
            min_loss_scale=settings.min_loss_scale,
            loss_scale_window=settings.loss_scale_window,
            use_distributed_optimizer=cfg.ddp.use_distributed_optimizer,
            overlap_param_gather=cfg.ddp.overlap_param_gather,
        ),
        model,
    )
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if part.init_state_fn is None:
            part.init_state_fn = _init_sgd_state
    model[0].config.grad_scale_func = optimizer.scale_loss
    return optimizer


def _init_sgd_state(optimizer: torch.optim.Optimizer, config: Any = None) -> None:
    """Give SGD the state that its first step would make, so that it can be saved before and loaded into.

    Megatron-Core has this for Adam only. A momentum of zero before the first step gives the same first step.
    """
    del config
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if group["momentum"] and not optimizer.state[parameter]:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter.data)


def build_scheduler(cfg: ConfigContainer, optimizer: Any, data_parallel_size: int) -> OptimizerParamScheduler:
    """The schedule of learning rate and weight decay.

    It counts samples, as Megatron-LM's does: `step(increment=...)` takes the samples of an iteration. The
    configuration in force decides the schedule; a checkpoint only says how far along it is.
    """
    scheduler = cfg.scheduler
    train_iters = required_train_iters(cfg)
    decay_iters = train_iters if scheduler.lr_decay_iters is None else scheduler.lr_decay_iters

    def samples(iterations: int) -> int:
        return samples_after(cfg, iterations, data_parallel_size)

    def weight_decay(value: float | None) -> float:
        return cfg.optimizer.weight_decay if value is None else value

    return OptimizerParamScheduler(
        optimizer,
        init_lr=scheduler.lr_warmup_init,
        max_lr=cfg.optimizer.lr,
        min_lr=cfg.optimizer.min_lr,
        lr_warmup_steps=samples(scheduler.lr_warmup_iters),
        lr_decay_steps=samples(decay_iters),
        lr_decay_style=scheduler.lr_decay_style,
        start_wd=weight_decay(scheduler.start_weight_decay),
        end_wd=weight_decay(scheduler.end_weight_decay),
        wd_incr_steps=samples(train_iters),
        wd_incr_style=scheduler.weight_decay_incr_style,
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )


def apply_configured_learning_rates(cfg: ConfigContainer, optimizer: Any, scheduler: Any) -> None:
    """Let the configured rates replace those that a loaded optimizer brought along in its parameter groups."""
    for group in optimizer.param_groups:
        group["max_lr"] = cfg.optimizer.lr
        group["min_lr"] = cfg.optimizer.min_lr
    scheduler.step(increment=0)


def required_train_iters(cfg: ConfigContainer) -> int:
    """`train.train_iters` of a validated configuration."""
    if cfg.train.train_iters is None:
        raise ValueError("train.train_iters is not set; give the iterations at which training ends")
    return cfg.train.train_iters


def global_batch_size(cfg: ConfigContainer, data_parallel_size: int) -> int:
    """Sequences in one iteration over all ranks, after any ramp-up."""
    return cfg.train.global_batch_size or cfg.train.micro_batch_size * data_parallel_size


def samples_after(cfg: ConfigContainer, iterations: int, data_parallel_size: int) -> int:
    """Samples that the first `iterations` iterations of a run consume, the batch-size ramp-up included."""
    full = global_batch_size(cfg, data_parallel_size)
    if not cfg.train.rampup_batch_size:
        return iterations * full
    start, increment, ramp = cfg.train.rampup_batch_size
    calculator = RampupBatchsizeNumMicroBatchesCalculator(
        full, cfg.train.micro_batch_size, data_parallel_size, False, 1, start, increment, ramp
    )
    consumed = 0
    for iteration in range(iterations):
        calculator.update(consumed, consistency_check=False)
        if calculator.get_current_global_batch_size() == full:
            return consumed + (iterations - iteration) * full
        consumed += calculator.get_current_global_batch_size()
    return consumed
