"""Megatron FSDP: parameters, gradients and optimizer state sharded over the data-parallel ranks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.distributed.fsdp import mcore_fsdp_adapter
from megatron.core.transformer import TransformerConfig

from bridge import accelerator
from bridge.training.config import ConfigContainer, ConfigError


def is_megatron_fsdp(chunk: Any) -> bool:
    """Whether a model chunk is wrapped in Megatron FSDP."""
    return isinstance(chunk, mcore_fsdp_adapter.FullyShardedDataParallel)


def megatron_fsdp_config(cfg: ConfigContainer) -> DistributedDataParallelConfig:
    """Megatron-Core's settings of the wrapper.

    Megatron FSDP itself turns the overlap of communication and computation on with every strategy that it is
    allowed here.
    """
    ddp = cfg.ddp
    return DistributedDataParallelConfig(
        use_megatron_fsdp=True,
        data_parallel_sharding_strategy=ddp.data_parallel_sharding_strategy,
        use_distributed_optimizer=True,
        overlap_grad_reduce=True,
        overlap_param_gather=True,
        grad_reduce_in_fp32=ddp.grad_reduce_in_fp32,
        average_in_collective=ddp.average_in_collective,
        check_for_nan_in_grad=ddp.check_for_nan_in_grad,
        bucket_size=ddp.bucket_size,
        # gloo cannot scale and sum in one collective.
        gradient_reduce_div_fusion=accelerator.is_cuda(),
    )


def wrap_in_megatron_fsdp(cfg: ConfigContainer, config: TransformerConfig, chunk: torch.nn.Module) -> Any:
    """Shard a chunk of the model over the data-parallel ranks. Collective.

    Raises:
        ConfigError: einops is not installed, which Megatron FSDP cannot do without.
    """
    if not mcore_fsdp_adapter.HAVE_EINOPS:
        raise ConfigError(
            "ddp.use_megatron_fsdp is true: Megatron FSDP needs einops, which is not installed; "
            "install bridge[fsdp], or set it to false"
        )
    accelerator.enable_sharding()
    if not isinstance(mcore_fsdp_adapter.TELinear, type):
        # Megatron-Core 0.16 compares with this class even where TransformerEngine is absent.
        mcore_fsdp_adapter.TELinear = type("TELinear", (), {})
    wrapped = mcore_fsdp_adapter.FullyShardedDataParallel(
        config, megatron_fsdp_config(cfg), chunk, device=accelerator.device()
    )
    _leave_unshared_gradients_alone(wrapped)
    return wrapped


def _leave_unshared_gradients_alone(wrapped: Any) -> None:
    """A repair of megatron-core 0.16: gradients of parameters that no other rank has a share of.

    Where the group that shares a parameter has one rank, as with one data-parallel rank or for experts with as many
    expert-parallel ranks as data-parallel ones, Megatron FSDP adds the gradients of a micro-batch to those of the
    earlier ones in place. It then reduces the sum into a second tensor, and adds that to the first once more, for every
    micro-batch. There is nothing to reduce, so those are left out, and scaled once when all micro-batches are done.
    """
    fsdp = wrapped.module
    groups = [
        group
        for group in fsdp.param_and_grad_buffer.parameter_groups
        if group.main_grad_buffer is not None and not group.main_grad_buffer.is_data_distributed
    ]
    if not groups:
        return
    unshared = {parameter for group in groups for parameter in group.params}
    reduce, finish = fsdp.grad_reduce_pipeline.reduce_gradients, wrapped.finish_grad_sync

    def reduce_shared(params: Iterable[Any], *args: Any, **kwargs: Any) -> Any:
        return reduce([parameter for parameter in params if parameter not in unshared], *args, **kwargs)

    def scale_and_finish(*args: Any, **kwargs: Any) -> Any:
        for group in groups:
            factor = group.main_grad_buffer.gradient_scaling_factor
            if factor is not None and not wrapped.ddp_config.average_in_collective:
                group.main_grad_buffer.data.mul_(factor)
        return finish(*args, **kwargs)

    fsdp.grad_reduce_pipeline.reduce_gradients = reduce_shared
    wrapped.finish_grad_sync = scale_and_finish
