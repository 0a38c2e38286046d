"""Random number generator states: Python, numpy, torch, the device, and Megatron's tracker."""

from __future__ import annotations

import hashlib
import random
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.tensor_parallel.random import (
    _EXPERT_PARALLEL_RNG_TRACKER_NAME,
    _MODEL_PARALLEL_RNG_TRACKER_NAME,
)

from bridge import accelerator
from bridge.training.checkpointing.contents.fsdp_dtensor import rng_key
from bridge.training.checkpointing.errors import CheckpointMismatchError
from bridge.training.checkpointing.plans.random_states import Place, RngRequest


def get_rng_state(
    data_parallel_random_init: bool,
    ckpt_format: str = "torch_dist",
    *,
    pg_collection: Any,
    module_name: str | None = None,
) -> ShardedObject | dict[str, list[dict[str, Any]]]:
    """Collect this rank's generator states as one sharded object, or for `fsdp_dtensor` as a dictionary.

    Args:
        data_parallel_random_init: data-parallel ranks have states of their own; they are gathered into a list
            in the order of their ranks in the data- and context-parallel group.
        ckpt_format: decides about the form, as `checkpoint.ckpt_format` does.
        pg_collection: the process groups, with `tp`, `pp`, `dp_cp` and, for mixture of experts, `ep`.
        module_name: puts the key into a namespace, `rng_state.<module_name>`.

    Returns:
        A ShardedObject of a list of states. Its shape is (pipeline, tensor) with the data- and
        context-parallel rank as replica; with expert parallelism (pipeline, tensor, data and context). For
        `fsdp_dtensor` the list under the key `(<pipeline rank>, <tensor rank>)`, with an entry for each replica where
        they have states of their own.
    """
    own = capture_rng_state(ckpt_format)
    apart = data_parallel_random_init or has_states_of_replicas(ckpt_format, pg_collection)
    states = gather_rng_states(own, apart, pg_collection=pg_collection)
    if ckpt_format == "fsdp_dtensor":
        return keyed_rng_state(states, pg_collection=pg_collection)
    return sharded_rng_state(states, pg_collection=pg_collection, module_name=module_name)


def has_states_of_replicas(ckpt_format: str, pg_collection: Any) -> bool:
    """Whether the form of a format has no other place for the states that experts' replicas have of their own."""
    expert_group = getattr(pg_collection, "ep", None)
    return ckpt_format == "fsdp_dtensor" and expert_group is not None and expert_group.size() > 1


def keyed_rng_state(states: list[dict[str, Any]], *, pg_collection: Any) -> dict[str, list[dict[str, Any]]]:
    """The third step for `fsdp_dtensor`: the states by the rank's place. Local."""
    return {rng_key(pg_collection.pp.rank(), pg_collection.tp.rank()): states}


def capture_rng_state(ckpt_format: str = "torch_dist") -> dict[str, Any]:
    """The first step of `get_rng_state`: the states of this rank's generators. Local."""
    del ckpt_format  # they have one form in all of them
    return {
        "random_rng_state": random.getstate(),
        "np_rng_state": np.random.get_state(),
        "torch_rng_state": torch.get_rng_state(),
        "cuda_rng_state": accelerator.get_rng_state(),
        "rng_tracker_states": tensor_parallel.get_cuda_rng_tracker().get_states(),
    }


def gather_rng_states(
    own: dict[str, Any], data_parallel_random_init: bool, *, pg_collection: Any
) -> list[dict[str, Any]]:
    """The second step: the states of all replicas that have their own. Collective, and nothing else."""
    group = pg_collection.dp_cp
    if not data_parallel_random_init or group.size() == 1:
        return [own]
    gathered: list[Any] = [None] * group.size()
    dist.all_gather_object(gathered, own, group=group)
    return gathered


def sharded_rng_state(
    states: list[dict[str, Any]], *, pg_collection: Any, module_name: str | None = None
) -> ShardedObject:
    """The third step: the sharded object that holds the states. Local."""
    groups = pg_collection
    shape: tuple[int, ...] = (groups.pp.size(), groups.tp.size())
    offset: tuple[int, ...] = (groups.pp.rank(), groups.tp.rank())
    replica = groups.dp_cp.rank()
    expert_group = getattr(groups, "ep", None)
    if expert_group is not None and expert_group.size() > 1:
        shape, offset, replica = (*shape, groups.dp_cp.size()), (*offset, replica), 0
    return ShardedObject(_key(module_name), states, shape, offset, replica_id=replica)


def rng_place(pg_collection: Any) -> Place:
    """This rank's position in the groups that decide about random states."""
    groups = pg_collection
    return Place(pipeline=groups.pp.rank(), tensor=groups.tp.rank(), replica=groups.dp_cp.rank())


def rng_template(request: RngRequest, module_name: str | None = None) -> ShardedObject:
    """The sharded object to load for a request."""
    return ShardedObject(_key(module_name), None, request.shape, request.offset, replica_id=request.replica_id)


def set_rng_state(states: list[dict[str, Any]], request: RngRequest) -> None:
    """Take over a loaded state as far as `request` says it applies; the rest of the tracker stays as it is seeded.

    Raises:
        CheckpointMismatchError: the states have no entry for this rank.
    """
    if not 0 <= request.entry < len(states):
        raise CheckpointMismatchError(
            f"the checkpoint holds the random states of {len(states)} replicas, and this rank needs number "
            f"{request.entry}; set checkpoint.load_rng: false to start with fresh ones"
        )
    state = states[request.entry]
    random.setstate(_as_tuples(state["random_rng_state"]))
    np.random.set_state(_as_tuples(state["np_rng_state"]))
    torch.set_rng_state(state["torch_rng_state"])
    accelerator.set_rng_state(state["cuda_rng_state"])
    tracker = tensor_parallel.get_cuda_rng_tracker()
    if request.tensor and request.expert:
        tracker.set_states(state["rng_tracker_states"])
        return
    kept = tracker.get_states()
    for name, value in state["rng_tracker_states"].items():
        if _applies(name, request):
            kept[name] = value
    tracker.set_states(kept)


def reseed(seed: int, iteration: int, data_parallel_random_init: bool, *, pg_collection: Any) -> None:
    """Seed every generator of this rank from the run's seed and the iteration that it continues after.

    The iteration takes part, so that a resumed run does not repeat the random numbers of its beginning.
    """
    place = rng_place(pg_collection)
    digest = hashlib.sha256(f"{seed} after {iteration}".encode()).digest()
    own = int.from_bytes(digest[:4], "big") + 100 * place.pipeline
    if data_parallel_random_init:
        own += 10 * place.replica
    random.seed(own)
    np.random.seed(own % 2**32)
    torch.manual_seed(own)
    tensor_parallel.model_parallel_cuda_manual_seed(own, force_reset_rng=True)


def _applies(tracker_name: str, request: RngRequest) -> bool:
    if tracker_name == _MODEL_PARALLEL_RNG_TRACKER_NAME:
        return request.tensor
    if tracker_name == _EXPERT_PARALLEL_RNG_TRACKER_NAME:
        return request.expert
    return True


def _key(module_name: str | None) -> str:
    return "rng_state" if module_name is None else f"rng_state.{module_name}"


def _as_tuples(value: Any) -> Any:
    """Tuples again where a round trip through the checkpoint made lists of them."""
    return tuple(_as_tuples(item) for item in value) if isinstance(value, (list, tuple)) else value
