"""Megatron-Core's parallel linear layers with an adapter beside the weight.

An adapted layer is the layer itself with its class exchanged, as torch's `fully_shard` does it: every base
parameter keeps its place and its name, and the adapter's stand beside them as `adapter.linear_in.weight` and
`adapter.linear_out.weight`. A checkpoint of the base model knows no difference.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    get_cuda_rng_tracker,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
    set_tensor_model_parallel_attributes,
)
from megatron.core.tensor_parallel.random import get_expert_parallel_rng_tracker_name
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

Offsets = tuple[tuple[int, int, int], ...]


class Projection(torch.nn.Module):
    """A weight without bias [outputs, inputs], whole on every tensor-parallel rank or split along one axis."""

    def __init__(self, weight: torch.Tensor, split_axis: int | None, tp_group: Any) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(weight)
        self.split_axis = split_axis
        self.tp_group = tp_group
        if split_axis is not None:
            set_tensor_model_parallel_attributes(self.weight, True, split_axis, 1)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """[..., inputs] to [..., outputs]."""
        return F.linear(inputs, self.weight)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Offsets = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """The weight as a ShardedTensor, split as it is over tensor-parallel ranks."""
        axes = {} if self.split_axis is None else {"weight": self.split_axis}
        sharded: dict[str, Any] = make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            axes,
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=(metadata or {})["dp_cp_group"],
        )
        return sharded


class LinearAdapter(torch.nn.Module):
    """scale * B A x, for the x and the ranks of a parallel linear layer.

    Beside a column-parallel layer A is whole on every rank and B is split like the layer's weight; beside a
    row-parallel one A is split and B is whole. Ranks exchange only the result of A, `dim` values a token: its
    gradient in the first case, itself in the second. Initial values do not depend on the tensor-parallel size.

    Args:
        base: the layer; the adapter takes its sizes, type, device and group.
        dim: rows of A and columns of B.
        scale: factor of the result.
        dropout: dropout probability on x.
        linear_in_init: how A is initialized; B is zero.
        is_gated: the outputs are the two halves of a gated unit, which are sharded one by one.
    """

    def __init__(
        self,
        base: ColumnParallelLinear | RowParallelLinear,
        *,
        dim: int,
        scale: float,
        dropout: float,
        linear_in_init: Literal["kaiming", "xavier"],
        is_gated: bool = False,
    ) -> None:
        super().__init__()
        self.scale = scale
        self.dropout = dropout
        self.is_column = isinstance(base, ColumnParallelLinear)
        self.is_gated = is_gated
        self.sequence_parallel = base.sequence_parallel
        self.tp_group = base.tp_group
        weight = base.weight
        linear_in = _initial_linear_in(base, dim, linear_in_init)
        if not self.is_column:
            linear_in = linear_in.chunk(self.tp_group.size(), dim=1)[self.tp_group.rank()].contiguous()
        linear_out = torch.zeros(weight.shape[0], dim, dtype=weight.dtype, device=weight.device)
        self.linear_in = Projection(linear_in.to(weight.dtype), None if self.is_column else 1, self.tp_group)
        self.linear_out = Projection(linear_out, 0 if self.is_column else None, self.tp_group)
        whole = self.linear_in.weight if self.is_column else self.linear_out.weight
        # Under sequence parallelism each rank sees its tokens only: Megatron-Core then adds up the gradients.
        whole.sequence_parallel = self.sequence_parallel  # type: ignore[attr-defined]
        for projection in (self.linear_in, self.linear_out):
            projection.weight.allreduce = weight.allreduce  # type: ignore[attr-defined]

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """What is added to the layer's output, in its shape."""
        added: torch.Tensor = self.linear_out(self._exchange(self.linear_in(self._drop(inputs))))
        return self.scale * added

    def _drop(self, inputs: torch.Tensor) -> torch.Tensor:
        if not (self.training and self.dropout):
            return inputs
        if self.is_column and not self.sequence_parallel:
            return F.dropout(inputs, self.dropout)  # the same inputs on every tensor-parallel rank
        with get_cuda_rng_tracker().fork():
            return F.dropout(inputs, self.dropout)

    def _exchange(self, hidden: torch.Tensor) -> torch.Tensor:
        """Let tensor-parallel ranks agree on A x, or on its gradient."""
        exchange: Any
        if self.is_column:
            exchange = (
                gather_from_sequence_parallel_region if self.sequence_parallel else copy_to_tensor_model_parallel_region
            )
        else:
            exchange = (
                reduce_scatter_to_sequence_parallel_region
                if self.sequence_parallel
                else reduce_from_tensor_model_parallel_region
            )
        exchanged: torch.Tensor = exchange(hidden, group=self.tp_group)
        return exchanged

    def update(self) -> torch.Tensor:
        """This rank's part of scale * B A, in fp32 and in the shape of the layer's weight."""
        with torch.no_grad():
            product: torch.Tensor = self.linear_out.weight.float() @ self.linear_in.weight.float()
            return self.scale * product

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Offsets = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Both weights as ShardedTensors, so that they load under other parallel sizes."""
        sharded = self.linear_in.sharded_state_dict(f"{prefix}linear_in.", sharded_offsets, metadata)
        sharded |= self.linear_out.sharded_state_dict(f"{prefix}linear_out.", sharded_offsets, metadata)
        if self.is_gated:
            key = f"{prefix}linear_out.weight"
            singleton = bool((metadata or {}).get("singleton_local_shards", False))
            sharded[key] = apply_swiglu_sharded_factory(sharded[key], sharded_offsets, singleton)
        return sharded


def _initial_linear_in(base: Any, dim: int, method: str) -> torch.Tensor:
    """A whole A [dim, inputs] in fp32.

    Tensor-parallel ranks draw the same numbers and take their part, so that nothing depends on how many they
    are. Experts on different ranks draw different ones.
    """
    weight = torch.empty(dim, base.input_size, dtype=torch.float32, device=base.weight.device)
    if base.is_expert:
        with get_cuda_rng_tracker().fork(get_expert_parallel_rng_tracker_name()):
            _initialize(weight, method)
    else:
        _initialize(weight, method)
    return weight


def _initialize(weight: torch.Tensor, method: str) -> None:
    if method == "xavier":
        torch.nn.init.xavier_uniform_(weight)
    else:
        torch.nn.init.kaiming_uniform_(weight, a=math.sqrt(5))


class AdaptedColumnParallelLinear(ColumnParallelLinear):  # type: ignore[misc]
    """A column-parallel layer whose output an adapter adds to; made of an existing layer by `adapt`."""

    adapter: LinearAdapter

    def forward(self, input_: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As the layer without adapter, plus the adapter's part."""
        output, bias = super().forward(input_, *args, **kwargs)
        return output + self.adapter(input_), bias

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Offsets = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """The layer's own entries, and those of the adapter."""
        return _with_adapter(super().sharded_state_dict, self.adapter, prefix, sharded_offsets, metadata)


class AdaptedRowParallelLinear(RowParallelLinear):  # type: ignore[misc]
    """A row-parallel layer whose output an adapter adds to; made of an existing layer by `adapt`."""

    adapter: LinearAdapter

    def forward(self, input_: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As the layer without adapter, plus the adapter's part."""
        output, bias = super().forward(input_)
        return output + self.adapter(input_), bias

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Offsets = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """The layer's own entries, and those of the adapter."""
        return _with_adapter(super().sharded_state_dict, self.adapter, prefix, sharded_offsets, metadata)


def _with_adapter(
    own: Any, adapter: LinearAdapter, prefix: str, sharded_offsets: Offsets, metadata: dict[str, Any] | None
) -> dict[str, Any]:
    # The layer takes every weight that it does not know for one that is whole on every rank: the adapter's
    # entries replace those that it made of them.
    entries: dict[str, Any] = own(prefix, sharded_offsets, metadata)
    return entries | adapter.sharded_state_dict(f"{prefix}adapter.", sharded_offsets, metadata)


ADAPTED: dict[type, type] = {
    ColumnParallelLinear: AdaptedColumnParallelLinear,
    RowParallelLinear: AdaptedRowParallelLinear,
}
"""Each layer class that can be adapted, with the class that it becomes."""


def adapt(layer: Any, adapter: LinearAdapter) -> None:
    """Put an adapter beside the weight of a layer, in place."""
    layer.adapter = adapter
    layer.__class__ = ADAPTED[type(layer)]


def merge(layer: Any) -> None:
    """Add the adapter's part to the weight of an adapted layer, and make it a plain layer again, in place."""
    with torch.no_grad():
        layer.weight.copy_(merged_weight(layer))
    del layer.adapter
    layer.__class__ = {adapted: plain for plain, adapted in ADAPTED.items()}[type(layer)]


def merged_weight(layer: Any) -> torch.Tensor:
    """This rank's part of the one weight that does what an adapted layer's weight and adapter do together.

    It is added up in fp32 and given in the weight's type; dropout is left out, as in evaluation.
    """
    weight: torch.Tensor = layer.weight.detach()
    merged: torch.Tensor = weight.float() + layer.adapter.update()
    return merged.to(weight.dtype)
