"""Main parameters from the checkpoint's model: at the precision that was saved, not the model's."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.utils import unwrap_model

from bridge.training.checkpointing.contents.model import model_section
from bridge.training.checkpointing.contents.torch_fsdp2 import loadable

_HALF = (torch.bfloat16, torch.float16)


def with_full_precision(template: dict[str, Any], chunks: int) -> None:
    """Make the model tensors of a load template float32 where the model's own are half precision.

    A checkpoint that was saved in float32 then reaches the optimizer's main parameters without being rounded to
    the model's precision on the way.

    Args:
        template: as `generate_state_dict` makes it for loading; its model sections are replaced.
        chunks: model chunks of this rank.
    """
    for index in range(chunks):
        section = model_section(index, chunks)
        template[section] = dict_list_map_inplace(_in_float32, dict(template[section]))


def load_main_params(optimizer: Any, model: list[Any], state_dict: dict[str, Any]) -> None:
    """Copy the loaded model sections into the optimizer's main parameters.

    Args:
        optimizer: megatron-core optimizer, distributed or not.
        model: model chunks of this rank.
        state_dict: the loaded checkpoint.
    """
    with torch.no_grad():
        for part in getattr(optimizer, "chained_optimizers", [optimizer]):
            if isinstance(part, DistributedOptimizer):
                part.reload_model_params(state_dict=state_dict)
        for index, chunk in enumerate(unwrap_model(model)):
            section = loadable(chunk, state_dict[model_section(index, len(model))])
            for name, parameter in chunk.named_parameters():
                # Optimizers that are not distributed keep the whole main parameter beside the model's.
                main = getattr(parameter, "main_param", None)
                if main is not None and main.shape == parameter.shape:
                    main.copy_(section[name])


def _in_float32(value: Any) -> Any:
    if isinstance(value, ShardedTensor) and value.dtype in _HALF:
        return replace(value, data=torch.empty_like(value.data, dtype=torch.float32), dtype=torch.float32)
    if isinstance(value, ShardedTensorFactory) and value.data is not None and value.data.dtype in _HALF:
        return replace(value, data=torch.empty_like(value.data, dtype=torch.float32))
    return value
