"""Random number generator states: Python, numpy, torch, the device, and Megatron's tracker."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedObject

from bridge import accelerator
from bridge.training.checkpointing.errors import CheckpointMismatchError


def get_rng_state(
    data_parallel_random_init: bool,
    ckpt_format: str = "torch_dist",
    *,
    pg_collection: Any,
    module_name: str | None = None,
) -> ShardedObject:
    """Collect this rank's generator states as one sharded object.

    Args:
        data_parallel_random_init: data-parallel ranks have states of their own; they are gathered into a list
            in the order of their ranks in the data- and context-parallel group.
        ckpt_format: only `torch_dist` in this version.
        pg_collection: the process groups, with `tp`, `pp`, `dp_cp` and, for mixture of experts, `ep`.
        module_name: puts the key into a namespace, `rng_state.<module_name>`.

    Returns:
        A ShardedObject of a list of states. Its shape is (pipeline, tensor) with the data- and
        context-parallel rank as replica; with expert parallelism (pipeline, tensor, data and context).
    """
    if ckpt_format != "torch_dist":
        raise ValueError(f"random states have no form for ckpt_format {ckpt_format!r} yet; use 'torch_dist'")
    states = [_local_state()]
    groups = pg_collection
    if data_parallel_random_init and groups.dp_cp.size() > 1:
        gathered: list[Any] = [None] * groups.dp_cp.size()
        dist.all_gather_object(gathered, states[0], group=groups.dp_cp)
        states = gathered
    shape: tuple[int, ...] = (groups.pp.size(), groups.tp.size())
    offset: tuple[int, ...] = (groups.pp.rank(), groups.tp.rank())
    replica = groups.dp_cp.rank()
    expert_group = getattr(groups, "ep", None)
    if expert_group is not None and expert_group.size() > 1:
        shape, offset, replica = (*shape, groups.dp_cp.size()), (*offset, replica), 0
    key = "rng_state" if module_name is None else f"rng_state.{module_name}"
    return ShardedObject(key, states, shape, offset, replica_id=replica)


def set_rng_state(states: list[dict[str, Any]], *, pg_collection: Any) -> None:
    """Restore this rank's generators from a loaded list of states.

    Raises:
        CheckpointMismatchError: the list has neither one state nor one for each data- and context-parallel rank.
    """
    group = pg_collection.dp_cp
    if len(states) not in (1, group.size()):
        raise CheckpointMismatchError(
            f"the checkpoint holds the random states of {len(states)} data-parallel ranks and this run has "
            f"{group.size()}; set checkpoint.load_rng: false to start with fresh ones"
        )
    state = states[group.rank()] if len(states) > 1 else states[0]
    random.setstate(_as_tuples(state["random_rng_state"]))
    np.random.set_state(_as_tuples(state["np_rng_state"]))
    torch.set_rng_state(state["torch_rng_state"])
    accelerator.set_rng_state(state["cuda_rng_state"])
    tensor_parallel.get_cuda_rng_tracker().set_states(state["rng_tracker_states"])


def _local_state() -> dict[str, Any]:
    return {
        "random_rng_state": random.getstate(),
        "np_rng_state": np.random.get_state(),
        "torch_rng_state": torch.get_rng_state(),
        "cuda_rng_state": accelerator.get_rng_state(),
        "rng_tracker_states": tensor_parallel.get_cuda_rng_tracker().get_states(),
    }


def _as_tuples(value: Any) -> Any:
    """Tuples again where a round trip through the checkpoint made lists of them."""
    return tuple(_as_tuples(item) for item in value) if isinstance(value, (list, tuple)) else value
