"""Gated linear units whose two halves are interleaved in memory, and contiguous in every checkpoint.

The first linear layer of a gated MLP has rows for W and for V (gate and up projection). Checkpoints hold them
one after the other, [W, V]. Kernels that fuse the activation want blocks of k rows in turn,
[W[0:k], V[0:k], W[k:2k], V[k:2k], …], within what one tensor-parallel rank holds.

megatron-core saves such a layer through a ShardedTensorFactory, which cuts it into W and V so that each is
sharded on its own, and it derives the optimizer's shards from the same factory. `ContiguousFactory` puts the
change of order before the cut and after the rejoining: the model and every optimizer state that is sharded
like it are then contiguous on disk, and in the run's own order after a load. The order of a checkpoint therefore
never depends on k or on the number of tensor-parallel ranks.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory
from megatron.core.utils import unwrap_model
from torch.distributed.tensor import DTensor, distribute_tensor

from bridge.training.checkpointing.errors import CheckpointMismatchError

DENSE_VARIABLE = "USE_ACT_FUSION_FOR_DENSE"
"""Environment variable; with the value 1 dense MLPs are interleaved like routed experts."""

ROUTED_SETTING = "moe_mlp_glu_interleave_size"
SHARED_SETTING = "moe_shared_expert_glu_interleave_size"
CONTENT_KEY = "glu_interleave_sizes"
"""In `content_metadata`, only where something is interleaved: the sizes [routed, shared] of the run that saved."""

GluSizes = tuple[int | None, int | None]
"""Rows in a block of the routed (and dense) and of the shared experts; None where W and V are contiguous."""

# Grouped experts number their weights: linear_fc1.weight0, weight1 … The groups split dense from expert keys.
_FC1 = re.compile(r"(?:^|\.)linear_fc1\.(?:weight|bias)\d*$")


class ContiguousFactory(ShardedTensorFactory):  # type: ignore[misc]
    """A factory whose shards are contiguous although the tensor in memory is interleaved."""


def deinterleave_tensor(tensor: torch.Tensor, interleave_size: int) -> torch.Tensor:
    """From blocks of W and V in turn to [W, V], along dimension 0.

    Args:
        tensor: `[2 n, …]`, the weight or the bias.
        interleave_size: rows in a block; must divide n.

    Returns:
        A new tensor of the same shape.

    Raises:
        CheckpointMismatchError: the rows cannot be divided into such blocks.
    """
    _require_blocks(tensor, interleave_size)
    rest = tensor.shape[1:]
    return tensor.reshape(-1, 2, interleave_size, *rest).transpose(0, 1).reshape(tensor.shape)


def interleave_tensor(tensor: torch.Tensor, interleave_size: int) -> torch.Tensor:
    """The reverse of `deinterleave_tensor`: from [W, V] to blocks of W and V in turn, along dimension 0.

    Raises:
        CheckpointMismatchError: the rows cannot be divided into such blocks.
    """
    _require_blocks(tensor, interleave_size)
    rest = tensor.shape[1:]
    return tensor.reshape(2, -1, interleave_size, *rest).transpose(0, 1).reshape(tensor.shape)


def _require_blocks(tensor: torch.Tensor, interleave_size: int) -> None:
    if interleave_size < 1 or tensor.ndim == 0 or tensor.shape[0] % (2 * interleave_size):
        raise CheckpointMismatchError(
            f"a gated linear_fc1 of shape {list(tensor.shape)} cannot be interleaved in blocks of {interleave_size}: "
            f"expected a positive number that divides half of its rows on one rank; set the model's {ROUTED_SETTING} "
            f"(or {SHARED_SETTING}) to one"
        )


def apply_to_tensor(tensor: torch.Tensor, interleave_size: int, interleave: bool) -> torch.Tensor:
    """`interleave_tensor` or `deinterleave_tensor`, for a weight or a bias.

    Args:
        tensor: a tensor, or a DTensor that is sharded evenly; the latter is gathered and cut again.
        interleave_size: rows in a block.
        interleave: the direction.

    Raises:
        CheckpointMismatchError: the rows cannot be divided, or a DTensor is sharded unevenly.
    """
    change = interleave_tensor if interleave else deinterleave_tensor
    if not isinstance(tensor, DTensor):
        return change(tensor, interleave_size)
    changed = distribute_tensor(
        change(tensor.full_tensor(), interleave_size), tensor.device_mesh, tensor.placements, src_data_rank=None
    )
    if changed.to_local().shape != tensor.to_local().shape:
        raise CheckpointMismatchError(
            "a gated linear_fc1 is sharded unevenly over its device mesh, and such a tensor cannot be interleaved; "
            f"leave the model's {ROUTED_SETTING} and {SHARED_SETTING} unset"
        )
    return changed


def is_gated_fc1_key(
    key: str, *, include_routed_experts: bool = True, include_shared_experts: bool = False, include_dense: bool = True
) -> bool:
    """Whether a state dict key is a `linear_fc1` weight or bias of a selected kind of MLP.

    Args:
        key: key in a model's state dict.
        include_routed_experts: experts that a router chooses.
        include_shared_experts: experts that every token passes.
        include_dense: MLPs without experts; these only if the environment sets USE_ACT_FUSION_FOR_DENSE=1.
    """
    if _FC1.search(key) is None:
        return False
    if "shared_experts" in key:
        return include_shared_experts
    if "experts" in key:
        return include_routed_experts
    return include_dense and "mlp" in key and os.environ.get(DENSE_VARIABLE) == "1"


def process_state_dict(
    model_state_dict: Mapping[str, Any],
    interleave_size: int,
    interleave: bool = True,
    use_megatron_fsdp: bool = False,
    include_routed_experts: bool = True,
    include_shared_experts: bool = False,
    include_dense: bool = True,
) -> dict[str, Any]:
    """Change the order of every selected gated `linear_fc1` of one model chunk.

    A tensor, the data of a ShardedTensor or ShardedObject, and the two halves [W, V] that an expanded factory
    leaves are changed at once; data that is absent stays absent. A factory is changed to cut contiguous shards
    and to rejoin them interleaved, whatever the direction, because it serves both; one that does so already
    stays as it is.

    Args:
        model_state_dict: one model section.
        interleave_size: rows in a block.
        interleave: from contiguous to interleaved, as after a load; False: the reverse, as before a save.
        use_megatron_fsdp: accepted for compatibility; DTensors are recognised by their type.
        include_routed_experts: as in `is_gated_fc1_key`.
        include_shared_experts: likewise.
        include_dense: likewise.

    Returns:
        A new dictionary with sorted keys.

    Raises:
        CheckpointMismatchError: some rows cannot be divided into such blocks; the message names the key.
    """
    del use_megatron_fsdp
    processed: dict[str, Any] = {}
    for key in sorted(model_state_dict):
        value = model_state_dict[key]
        if is_gated_fc1_key(
            key,
            include_routed_experts=include_routed_experts,
            include_shared_experts=include_shared_experts,
            include_dense=include_dense,
        ):
            try:
                value = _process(value, interleave_size, interleave)
            except CheckpointMismatchError as error:
                raise CheckpointMismatchError(f"{key}: {error}") from error
        processed[key] = value
    return processed


def _process(value: Any, size: int, to_interleaved: bool) -> Any:
    if isinstance(value, ShardedTensorFactory):
        return value if isinstance(value, ContiguousFactory) else contiguous_factory(value, size)
    if isinstance(value, (ShardedTensor, ShardedObject)):
        if not torch.is_tensor(value.data):
            return value
        data = apply_to_tensor(value.data, size, to_interleaved)
        return replace(value, data=data) if isinstance(value, ShardedObject) else _with_data(value, data)
    if isinstance(value, list):
        return _process_halves(value, size, to_interleaved)
    return apply_to_tensor(value, size, to_interleaved) if torch.is_tensor(value) else value


def _process_halves(value: list[Any], size: int, to_interleaved: bool) -> list[Any]:
    if len(value) != 2 or not all(isinstance(half, ShardedTensor) and torch.is_tensor(half.data) for half in value):
        return value
    halves = apply_to_tensor(torch.cat([half.data for half in value]), size, to_interleaved).chunk(2)
    return [_with_data(half, data) for half, data in zip(value, halves, strict=True)]


def _with_data(sharded: ShardedTensor, data: torch.Tensor) -> ShardedTensor:
    return replace(sharded, data=data, local_shape=tuple(data.shape))


def contiguous_factory(factory: ShardedTensorFactory, interleave_size: int) -> ContiguousFactory:
    """Let a factory cut contiguous shards out of an interleaved tensor, and rejoin them interleaved.

    The tensor itself is kept, because megatron-core finds a parameter's optimizer state by its identity.

    Raises:
        CheckpointMismatchError: its rows cannot be divided into such blocks.
    """
    if factory.data is not None:
        _require_blocks(factory.data, interleave_size)
    build, merge = factory.build_fn, factory.merge_fn

    def build_contiguous(key: str, tensor: torch.Tensor, replica_id: Any, flattened_range: slice | None) -> Any:
        if flattened_range is not None:
            raise CheckpointMismatchError(
                f"{key}: an interleaved tensor cannot be saved as flattened shards; use an optimizer format that "
                "keeps whole tensors (checkpoint.dist_ckpt_optim_fully_reshardable: true)"
            )
        with torch.no_grad():
            return build(key, deinterleave_tensor(tensor, interleave_size), replica_id, flattened_range)

    def merge_interleaved(shards: Any) -> torch.Tensor:
        with torch.no_grad():
            return interleave_tensor(merge(shards), interleave_size)

    return ContiguousFactory(
        factory.key, factory.data, build_contiguous, merge_interleaved, factory.replica_id, factory.flattened_range
    )


def process_model_state_dict(
    model_state_dict: Mapping[str, Any],
    routed_interleave_size: int | None,
    shared_interleave_size: int | None,
    interleave: bool = True,
    use_megatron_fsdp: bool = False,
) -> dict[str, Any]:
    """Change the order of every component of one model chunk that has a size.

    Args:
        model_state_dict: one model section.
        routed_interleave_size: rows in a block of the routed experts and of dense MLPs; None leaves them alone.
        shared_interleave_size: likewise of the shared experts.
        interleave: as in `process_state_dict`.
        use_megatron_fsdp: likewise.

    Raises:
        CheckpointMismatchError: as in `process_state_dict`.
    """
    processed = dict(model_state_dict)
    if routed_interleave_size is not None:
        processed = process_state_dict(processed, routed_interleave_size, interleave, use_megatron_fsdp)
    if shared_interleave_size is not None:
        processed = process_state_dict(
            processed,
            shared_interleave_size,
            interleave,
            use_megatron_fsdp,
            include_routed_experts=False,
            include_shared_experts=True,
            include_dense=False,
        )
    return processed


def model_glu_sizes(model: list[Any], cfg: Any = None) -> GluSizes:
    """The sizes that a model is interleaved with.

    Args:
        model: model chunks of this rank, wrapped or not; the chunks share one configuration.
        cfg: the run's configuration, whose `model` section is asked where there is no chunk.

    Returns:
        (routed and dense, shared); None for each that is contiguous.
    """
    chunks = unwrap_model(model) if model else []
    settings = chunks[0].config if chunks else getattr(cfg, "model", None)
    overrides = getattr(settings, "transformer_overrides", None) or {}

    def size(name: str) -> int | None:
        value = getattr(settings, name, None)
        return overrides.get(name) if value is None else value

    return size(ROUTED_SETTING), size(SHARED_SETTING)


def require_same_optimizer_order(content_metadata: Mapping[str, Any] | None, sizes: GluSizes) -> None:
    """Refuse optimizer state that was saved in the order of memory, by a run that had another order.

    `dp_reshardable` state is a copy of the optimizer's flat buffers; there is no tensor in it to reorder.

    Args:
        content_metadata: what the checkpoint says about itself.
        sizes: the sizes of this run.

    Raises:
        CheckpointMismatchError: the sizes differ and the state is `dp_reshardable`.
    """
    metadata = content_metadata or {}
    if metadata.get("distrib_optim_sharding_type") != "dp_reshardable":
        return
    saved = tuple(metadata.get(CONTENT_KEY) or (None, None))
    if saved != sizes:
        raise CheckpointMismatchError(
            "the checkpoint's optimizer state is dp_reshardable, which keeps the order of memory: it was saved with "
            f"{ROUTED_SETTING} {saved[0]} and {SHARED_SETTING} {saved[1]}, and this run has {sizes[0]} and {sizes[1]}; "
            "keep the sizes, save with checkpoint.dist_ckpt_optim_fully_reshardable: true, or set "
            "checkpoint.load_optim: false"
        )
