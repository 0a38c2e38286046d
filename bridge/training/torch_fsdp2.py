"""Torch FSDP2: parameters, gradients and optimizer state sharded over the data-parallel ranks by torch itself."""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallelConfig, TorchFullyShardedDataParallel
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch.distributed.fsdp import FSDPModule

from bridge import accelerator
from bridge.training.checkpointing.contents.torch_fsdp2 import require_saveable
from bridge.training.checkpointing.errors import CheckpointSaveError
from bridge.training.config import ConfigContainer, ConfigError

_UNITS = {TransformerLayer, LanguageModelEmbedding, RotaryEmbedding}
"""Modules whose parameters are gathered when they are needed, and no longer."""


class TorchFsdp2(TorchFullyShardedDataParallel):  # type: ignore[misc]
    """megatron-core's wrapper, with two additions.

    Its own `finish_grad_sync` refuses an argument that megatron-core 0.16 passes to it, and it does not carry out
    `ddp.check_for_nan_in_grad`.
    """

    def finish_grad_sync(self, force_all_reduce: bool | None = False) -> None:
        """Look for gradients that are not finite, if the settings ask for it. Collective over all ranks.

        Args:
            force_all_reduce: of no meaning here; FSDP2 has reduced the gradients during the backward pass.

        Raises:
            RuntimeError: there are some on any rank. Every rank raises.
        """
        del force_all_reduce
        if not self.ddp_config.check_for_nan_in_grad:
            return
        # What one rank has contributed may be seen on another alone.
        found = torch.zeros((), device=accelerator.device())
        for parameter in self.parameters():
            if parameter.grad is not None:
                found += (~parameter.grad.to_local().isfinite()).any()
        dist.all_reduce(found)
        if found.item():
            raise RuntimeError("found a gradient that is NaN or infinite (ddp.check_for_nan_in_grad is true)")


def wrap_in_torch_fsdp2(
    cfg: ConfigContainer, config: TransformerConfig, chunk: torch.nn.Module, *, transformer_engine: bool
) -> TorchFsdp2:
    """Shard a model over the data-parallel ranks. Collective.

    Args:
        cfg: the run's configuration.
        config: megatron-core's configuration of the model.
        chunk: the model, on the device.
        transformer_engine: whether its layers are those of TransformerEngine.

    Raises:
        ConfigError: the model has parameters that could not be saved.
    """
    accelerator.enable_sharding()
    if cfg.rng.data_parallel_random_init:
        _take_from_first(chunk)
    wrapped = TorchFsdp2(
        config,
        DistributedDataParallelConfig(check_for_nan_in_grad=cfg.ddp.check_for_nan_in_grad),
        chunk,
        # Within megatron-core's own layers there are linear layers of this class, which FSDP2 would have had to be
        # told of before the layer.
        sub_modules_to_wrap=_UNITS | {ColumnParallelLinear} if transformer_engine else _UNITS,
    )
    if not accelerator.is_cuda():
        for module in wrapped.modules():
            if isinstance(module, FSDPModule):
                module.set_force_sum_reduction_for_comms(True)  # gloo cannot average
    try:
        require_saveable(wrapped)
    except CheckpointSaveError as error:
        raise ConfigError(f"dist.use_torch_fsdp2 is true: {error}; set it to false") from error
    return wrapped


def _take_from_first(chunk: torch.nn.Module) -> None:
    """Let every data-parallel rank start from the values of the first one. Collective."""
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    first = dist.get_process_group_ranks(group)[0]
    with torch.no_grad():
        for tensor in [*chunk.parameters(), *chunk.buffers()]:
            dist.broadcast(tensor, first, group=group)
