"""Attention for context parallelism on a CPU: the keys and values of all ranks are gathered.

Megatron-Core's own attention refuses context parallelism and leaves it to TransformerEngine, which needs CUDA.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.module import MegatronModule

from bridge.training import gpt


class GatheringAttention(MegatronModule):
    """Causal attention in which each rank's queries meet the keys and values of the whole sequence."""

    def __init__(self, config: Any, layer_number: int, **options: Any) -> None:
        super().__init__(config=config)

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any, **options: Any
    ) -> torch.Tensor:
        """Query, key and value [local sequence, batch, heads, channels] → [local sequence, batch, heads * channels]."""
        group = parallel_state.get_context_parallel_group()
        keys, values = _Gather.apply(key, group), _Gather.apply(value, group)
        scores = torch.einsum("sbhc,tbhc->bhst", query.float(), keys.float()) / math.sqrt(query.shape[-1])
        own, all_ = _positions(group.rank(), group.size(), len(query)), _all_positions(group.size(), len(query))
        scores = scores.masked_fill(all_[None, :] > own[:, None], float("-inf"))
        mixed = torch.einsum("bhst,tbhc->sbhc", scores.softmax(-1).to(values.dtype), values)
        return mixed.reshape(*mixed.shape[:2], -1)


class _Gather(torch.autograd.Function):
    """The tensors of all ranks of a group, joined along the first dimension in rank order."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, group: Any) -> torch.Tensor:
        ctx.group, ctx.length = group, len(tensor)
        parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(group.size())]
        dist.all_gather(parts, tensor.contiguous(), group=group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        total = gradient.contiguous()
        dist.all_reduce(total, group=ctx.group)
        return total[ctx.group.rank() * ctx.length :][: ctx.length], None


def _positions(rank: int, size: int, length: int) -> torch.Tensor:
    """Where a rank's part lies in the sequence: Megatron gives each rank an early and a late chunk."""
    chunk = torch.arange(length // 2)
    return torch.cat([chunk + rank * len(chunk), chunk + (2 * size - 1 - rank) * len(chunk)])


def _all_positions(size: int, length: int) -> torch.Tensor:
    return torch.cat([_positions(rank, size, length) for rank in range(size)])


def supply_context_parallel_attention() -> None:
    """Let this process build models with context parallelism, through the layer spec."""
    stock_spec = gpt._layer_spec

    def layer_spec(model: Any, config: Any, stage: int | None) -> Any:
        spec = stock_spec(model, config, stage)
        if model.context_parallel_size > 1:
            for layer in getattr(spec, "layer_specs", [spec]):
                layer.submodules.self_attention.submodules.core_attention = GatheringAttention
        return spec

    gpt._layer_spec = layer_spec
    gpt.check_layers = lambda model: None
