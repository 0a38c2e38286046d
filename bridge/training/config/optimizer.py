"""The optimizer, the schedule of its parameters, and the data-parallel reduction of its gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(kw_only=True)
class OptimizerConfig:
    """The optimizer and its loss scaling."""

    optimizer: Literal["adam", "sgd"] = "adam"
    """Algorithm. `adam` decouples weight decay (AdamW)."""

    lr: float = 3e-4
    """Highest learning rate of the schedule."""

    min_lr: float = 0.0
    """Learning rate where the decay ends."""

    weight_decay: float = 0.01
    """Weight decay, unless the scheduler changes it over time."""

    adam_beta1: float = 0.9
    """Decay of Adam's first moment."""

    adam_beta2: float = 0.95
    """Decay of Adam's second moment."""

    adam_eps: float = 1e-8
    """Added to Adam's denominator."""

    sgd_momentum: float = 0.9
    """Momentum of SGD."""

    clip_grad: float = 1.0
    """Largest L2 norm of the gradients; 0 does not clip."""

    loss_scale: float | None = None
    """Constant loss scale; None adapts it. For `model.precision: fp16` only."""

    initial_loss_scale: float = 4096.0
    """First value of the adaptive loss scale."""

    min_loss_scale: float = 1.0
    """Lowest value of the adaptive loss scale."""

    loss_scale_window: int = 1000
    """Iterations without overflow after which the adaptive loss scale doubles."""


@dataclass(kw_only=True)
class SchedulerConfig:
    """How learning rate and weight decay move with the iterations."""

    lr_decay_style: Literal["cosine", "linear", "constant", "inverse-square-root"] = "cosine"
    """Shape of the decay after warm-up."""

    lr_decay_iters: int | None = None
    """Iteration at which the decay ends; None is `train.train_iters`."""

    lr_warmup_iters: int = 0
    """Iterations of linear warm-up."""

    lr_warmup_init: float = 0.0
    """Learning rate at the start of warm-up."""

    start_weight_decay: float | None = None
    """Weight decay at the start; None is `optimizer.weight_decay`."""

    end_weight_decay: float | None = None
    """Weight decay at the end; None is `optimizer.weight_decay`."""

    weight_decay_incr_style: Literal["constant", "linear", "cosine"] = "constant"
    """Shape of the way from start to end weight decay; `constant` needs both to be equal."""


@dataclass(kw_only=True)
class DistributedDataParallelConfig:
    """Reduction of gradients over data-parallel ranks, by the names of megatron-core's DDP."""

    use_distributed_optimizer: bool = True
    """Whether data-parallel ranks share the optimizer state instead of each holding all of it."""

    overlap_grad_reduce: bool = False
    """Whether gradients are reduced while the backward pass goes on."""

    overlap_param_gather: bool = False
    """Whether parameters are gathered during the next forward pass."""

    grad_reduce_in_fp32: bool = True
    """Whether gradients are accumulated and reduced in fp32."""

    average_in_collective: bool = False
    """Whether the collective averages, instead of a scaling before it."""

    check_for_nan_in_grad: bool = True
    """Whether a NaN in the gradients stops training."""

    bucket_size: int | None = None
    """Parameters in one reduction bucket; None leaves it to megatron-core."""

    use_megatron_fsdp: bool = False
    """Whether Megatron FSDP shards the model over the data-parallel ranks. Needs `checkpoint.ckpt_format` to be
    `fsdp_dtensor`."""

    data_parallel_sharding_strategy: Literal["no_shard", "optim", "optim_grads", "optim_grads_params"] = (
        "optim_grads_params"
    )
    """What Megatron FSDP shards: optimizer state and gradients, with `optim_grads_params` the parameters too. The other
    two are refused: megatron-core trains wrongly with them."""
