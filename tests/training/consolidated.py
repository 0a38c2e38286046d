"""Everything that a run is made of, put together from all ranks: independent of layout, equal bit for bit."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params
from megatron.core.utils import unwrap_model

from bridge.training.setup import Run

Piece = tuple[str, tuple[int, ...], tuple[int | slice, ...], np.ndarray]
"""Name, shape of the whole tensor, this piece's place in it, and its values; NaN where they lie on another rank."""


def consolidate(run: Run) -> dict[str, str] | None:
    """One hash for each whole tensor of model and optimizer and for each setting; on rank 0, else None.

    Collective. The optimizer's tensors are `main`, `exp_avg` and `exp_avg_sq` by the model tensor's name in a
    checkpoint. Replicas are compared on the way, so they must be equal.
    """
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.gather_object((list(_pieces(run)), _settings(run)), gathered if dist.get_rank() == 0 else None)
    if dist.get_rank() != 0:
        return None
    assert all(settings == gathered[0][1] for _, settings in gathered)
    tensors: dict[str, np.ndarray] = {}
    for pieces, _ in gathered:
        for name, shape, place, values in pieces:
            whole = tensors.setdefault(name, np.full(shape, np.nan, np.float32))
            present = ~np.isnan(values)
            known = present & ~np.isnan(whole[place])
            assert np.array_equal(whole[place][known], values[known]), f"replicas of {name} differ"
            whole[place][present] = values[present]
    holes = [name for name, whole in tensors.items() if np.isnan(whole).any()]
    assert not holes, f"no rank has all of {holes}"
    return {name: hashlib.sha256(whole.tobytes()).hexdigest()[:16] for name, whole in tensors.items()} | gathered[0][1]


def _pieces(run: Run) -> Iterator[Piece]:
    metadata = {"singleton_local_shards": False, "dp_cp_group": run.pg_collection.dp_cp}
    sharded: dict[int, Any] = {}
    for chunk in unwrap_model(run.model):
        for value in nested_values(chunk.sharded_state_dict(metadata=metadata)):
            if isinstance(value, (ShardedTensor, ShardedTensorFactory)):
                sharded[id(value.data)] = value
                yield from _placed("model", value, value.data)
    for parameter, state in _optimizer_state(run.optimizer):
        assert set(state) == {"main", "exp_avg", "exp_avg_sq"}
        for kind, tensor in state.items():
            yield from _placed(kind, sharded[id(parameter)], tensor)


def _placed(kind: str, like: Any, tensor: torch.Tensor) -> Iterator[Piece]:
    """The pieces of the tensor that has the sharding of `like`."""
    tensor = tensor.detach().float()
    if isinstance(like, ShardedTensorFactory):
        shards = list(nested_values({"": replace(like, data=tensor).build()}))
    else:
        shards = [replace(like, data=tensor, dtype=tensor.dtype)]
    for shard in shards:
        yield f"{kind} {shard.key}", shard.global_shape, shard.global_slice(), shard.data.numpy().copy()


def _optimizer_state(optimizer: Any) -> Iterator[tuple[torch.Tensor, dict[str, torch.Tensor]]]:
    """Each model parameter that this rank has optimizer state of; the state in its shape, with NaN for the rest."""
    for part in optimizer.chained_optimizers:
        if isinstance(part, DistributedOptimizer):
            for parameter in part.model_param_gbuf_map:
                held = part._get_model_param_range_map(parameter)["param"]
                state = part._get_main_param_and_optimizer_states(parameter)
                state["main"] = state.pop("param")
                yield parameter, {name: _filled(parameter, held, value) for name, value in state.items()}
        else:
            for parameter, main in _main_params(part):
                yield parameter, {"main": main, **part.optimizer.state[main]}


def _main_params(part: Any) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    if isinstance(part, Float16OptimizerWithFloat16Params):
        for group, main_group in zip(part.float16_groups, part.fp32_from_float16_groups, strict=True):
            yield from zip(group, main_group, strict=True)
    else:
        yield from ((parameter, parameter) for parameter in part.get_parameters())


def _filled(like: torch.Tensor, held: Any, values: torch.Tensor) -> torch.Tensor:
    whole = torch.full((like.numel(),), float("nan"))
    whole[held.start : held.end] = values.detach()
    return whole.view(like.shape)


def _settings(run: Run) -> dict[str, str]:
    """What is not a tensor and must not depend on the layout: parameter groups, schedule, counters."""
    groups = {
        repr(sorted((key, value) for key, value in group.items() if key not in ("params", "is_expert_parallel")))
        for group in run.optimizer.param_groups
    }
    train_state = run.state.train_state
    return {
        "parameter groups": repr(sorted(groups)),
        "scheduler": repr(run.scheduler.state_dict()),
        "progress": repr((train_state.step, train_state.consumed_train_samples)),
    }
