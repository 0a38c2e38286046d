"""Models under torch FSDP2: sharded state dicts of their parameters' parts, and loading these back.

FSDP2 gives each data-parallel rank some rows of every parameter. megatron-core's own sharded state dicts of such
parameters are right only where the rows divide evenly, and wrong for gated layers. So the model is asked for the
sharded state dict that it would have without FSDP2, with parameters that have a shape and no values in place of its
own, and of each shard every rank takes the rows that it has. The keys and the global tensors are therefore those of a
model under plain data parallelism.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain
from math import prod
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace
from megatron.core.dist_checkpointing.mapping import (
    LocalNonpersistentObject,
    ReplicaId,
    ShardedBase,
    ShardedTensor,
    ShardedTensorFactory,
)
from megatron.core.distributed import TorchFullyShardedDataParallel
from megatron.core.utils import unwrap_model
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard

from bridge.training.checkpointing.contents.fsdp_dtensor import is_megatron_fsdp
from bridge.training.checkpointing.contents.glu import model_glu_sizes
from bridge.training.checkpointing.errors import CheckpointSaveError


def is_torch_fsdp2(chunk: Any) -> bool:
    """Whether torch FSDP2 divides the parameters of a model chunk, which may have been taken out of its wrapper."""
    if isinstance(chunk, TorchFullyShardedDataParallel):
        return True
    return not is_megatron_fsdp(chunk) and any(isinstance(parameter, DTensor) for parameter in chunk.parameters())


@dataclass(frozen=True)
class Rows:
    """The rows of a parameter that this rank has."""

    start: int
    count: int
    of: int
    """Rows of the whole parameter, as it is on one tensor-parallel rank."""
    ranks: int
    """Data-parallel ranks that share them."""

    @classmethod
    def of_parameter(cls, parameter: DTensor) -> Rows:
        """The rows that FSDP2 gives this rank: as many as the other ranks have, until there are no more.

        Raises:
            CheckpointSaveError: the parameter is divided in another way.
        """
        mesh = parameter.device_mesh
        if parameter.placements != (Shard(0),) or mesh.ndim != 1:
            raise CheckpointSaveError(f"a parameter is divided as {parameter.placements}, and not by its rows alone")
        of, ranks = parameter.shape[0], mesh.size()
        each = -(-of // ranks)
        start = min(mesh.get_local_rank() * each, of)
        return cls(start, min(each, of - start), of, ranks)

    def lie_in_a_grid_with(self, blocks: list[Block]) -> bool:
        """Whether blocks, cut where the ranks' rows end, have pieces that are all of one size."""
        each = -(-self.of // self.ranks)
        return self.of % self.ranks == 0 and all(
            block.count == blocks[0].count and (each % block.count == 0 or block.count % each == 0) for block in blocks
        )


@dataclass(frozen=True)
class Block:
    """The rows of a parameter that are one shard where FSDP2 does not divide it."""

    shard: ShardedTensor
    start: int
    count: int


def require_saveable(chunk: Any) -> None:
    """Refuse a model that has parameters whose parts cannot be described. Local.

    Raises:
        CheckpointSaveError: it has.
    """
    if any(model_glu_sizes([chunk])):
        raise CheckpointSaveError("gated layers whose halves are interleaved cannot be saved under torch FSDP2")
    metadata = {"dp_cp_group": chunk.process_group, "singleton_local_shards": False}
    for value in model_section(chunk, {"metadata": metadata}).values():
        if isinstance(value, ShardedTensorFactory):
            value.build()


def model_section(chunk: Any, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The sharded state dict of a model chunk: this rank's rows of its parameters, and everything else of it. Local.

    Args:
        chunk: a model under FSDP2.
        kwargs: passed on to its `sharded_state_dict`.

    Raises:
        CheckpointSaveError: a part of a parameter cannot be described.
    """
    (model,) = unwrap_model([chunk])
    with _shapes_instead_of_parameters(chunk) as parameters:
        whole = model.sharded_state_dict(**kwargs)

    def part(value: Any) -> Any:
        if isinstance(value, ShardedBase) and id(value.data) in parameters:
            return _part_of(value, *parameters[id(value.data)])
        if isinstance(getattr(value, "data", None), torch.Tensor) and value.data.is_meta:
            raise CheckpointSaveError(f"{value.key} is made of a parameter that FSDP2 has divided, in an unknown way")
        return value

    section: dict[str, Any] = dict_list_map_inplace(part, whole)
    return section


@contextlib.contextmanager
def _shapes_instead_of_parameters(chunk: Any) -> Iterator[dict[int, tuple[torch.Tensor, DTensor]]]:
    """For a while, give a model undivided parameters without values in place of its own.

    Yields:
        By the `id` of such a parameter: itself, which keeps the `id` its own, and the one in whose place it is.
    """
    for module in chunk.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # what is gathered at the moment is no parameter that the optimizer knows
    replaced: list[tuple[dict[str, Any], str, DTensor]] = []
    stand_ins: dict[int, torch.Tensor] = {}
    found: dict[int, tuple[torch.Tensor, DTensor]] = {}
    try:
        for module in chunk.modules():
            for name, parameter in module._parameters.items():
                if not isinstance(parameter, DTensor):
                    continue
                stand_in = stand_ins.setdefault(id(parameter), _stand_in(parameter))
                found[id(stand_in)] = stand_in, parameter
                replaced.append((module._parameters, name, parameter))
                module._parameters[name] = stand_in
        yield found
    finally:
        for parameters, name, parameter in replaced:
            parameters[name] = parameter


def _stand_in(parameter: DTensor) -> torch.nn.Parameter:
    shape = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
    stand_in = torch.nn.Parameter(shape, requires_grad=parameter.requires_grad)
    stand_in.__dict__.update(vars(parameter))  # megatron-core says there how tensor parallelism divides it
    return stand_in


def _part_of(value: Any, stand_in: torch.Tensor, parameter: DTensor) -> Any:
    """This rank's part of a shard, or of what makes shards, of the whole parameter."""
    rows = Rows.of_parameter(parameter)
    replica = _without_data_parallelism(value, parameter)
    local = parameter._local_tensor
    if isinstance(value, ShardedTensor):
        block = Block(value, 0, rows.of)
        if rows.lie_in_a_grid_with([block]):
            return _narrowed(block, rows, local, replica, in_grid=True)

    def build(key: str, data: torch.Tensor, replica_id: ReplicaId, flattened_range: slice | None = None) -> Any:
        if isinstance(value, ShardedTensor):
            whole = replace(value, key=key, data=None, dtype=data.dtype)
            return _pieces([Block(whole, 0, rows.of)], rows, data, replica_id)
        shape = torch.empty(stand_in.shape, dtype=data.dtype, device="meta")
        made = value.build_fn(key, shape, replica_id, flattened_range)
        return _pieces(_blocks(made, shape, key), rows, data, replica_id)

    def merge(loaded: Any) -> torch.Tensor:
        pieces = loaded if isinstance(loaded, list) else [loaded]
        whole = [piece.reshape(-1, *stand_in.shape[1:]) for piece in pieces]
        return whole[0] if len(whole) == 1 else torch.cat(whole)

    return ShardedTensorFactory(value.key, local, build, merge, replica)


def _without_data_parallelism(value: ShardedBase, parameter: DTensor) -> ReplicaId:
    """The replica id of a part that no other data-parallel rank has.

    Raises:
        CheckpointSaveError: the whole's does not end with the data-parallel rank, as megatron-core's do.
    """
    replica = value.replica_id
    if isinstance(replica, int) or replica[-1] != parameter.device_mesh.get_local_rank():
        raise CheckpointSaveError(
            f"{value.key} has the replica id {replica}, which does not end with the rank among those that share it"
        )
    return (*replica[:-1], 0)


def _blocks(made: Any, whole: torch.Tensor, key: str) -> list[Block]:
    """Where the shards that a factory makes of a whole parameter lie in it.

    Raises:
        CheckpointSaveError: they are not rows of it, in order.
    """
    shards = list(made) if isinstance(made, list | tuple) else [made]
    blocks, start = [], 0
    for shard in shards:
        if not isinstance(shard, ShardedTensor) or not _is_rows(shard.data, whole, start):
            raise CheckpointSaveError(f"{key} is saved in another form than its own, which FSDP2 has divided by rows")
        count = shard.local_shape[0]
        blocks.append(Block(replace(shard, data=None), start, count))
        start += count
    return blocks


def _is_rows(part: Any, whole: torch.Tensor, start: int) -> bool:
    """Whether a tensor is a view of the rows of another one that begin at `start`."""
    return (
        isinstance(part, torch.Tensor)
        and part.untyped_storage()._cdata == whole.untyped_storage()._cdata
        and part.is_contiguous()
        and part.shape[1:] == whole.shape[1:]
        and part.storage_offset() == start * prod(whole.shape[1:])
    )


def _pieces(blocks: list[Block], rows: Rows, local: torch.Tensor, replica: ReplicaId) -> Any:
    """This rank's pieces of all blocks: one, a list, or, where it has no rows, something that is not saved."""
    in_grid = rows.lie_in_a_grid_with(blocks)
    pieces = [
        _narrowed(block, rows, local, replica, in_grid=in_grid)
        for block in blocks
        if min(block.start + block.count, rows.start + rows.count) > max(block.start, rows.start)
    ]
    if not pieces:
        return LocalNonpersistentObject(local)
    return pieces[0] if len(pieces) == 1 else pieces


def _narrowed(block: Block, rows: Rows, local: torch.Tensor, replica: ReplicaId, *, in_grid: bool) -> ShardedTensor:
    """A block's rows that this rank has.

    Without a grid, the axes that megatron-core puts before a tensor's own become its own: it knows no other way to
    save such parts.
    """
    shard = block.shard
    start = max(block.start, rows.start)
    count = min(block.start + block.count, rows.start + rows.count) - start
    data = local if count == rows.count else local.narrow(0, start - rows.start, count)
    axis = shard.prepend_axis_num
    offset = list(shard.global_offset)
    offset[axis] += start - block.start
    if not in_grid:
        shape = (1,) * axis + tuple(data.shape)
        return replace(
            shard,
            data=data.view(shape),
            dtype=data.dtype,
            local_shape=shape,
            global_offset=tuple(offset),
            axis_fragmentations=None,
            prepend_axis_num=0,
            replica_id=replica,
        )
    fragments = list(shard.axis_fragmentations or ())
    fragments[axis] = shard.global_shape[axis] // count
    return replace(
        shard,
        data=data,
        dtype=data.dtype,
        local_shape=tuple(data.shape),
        global_offset=tuple(offset),
        axis_fragmentations=tuple(fragments),
        replica_id=replica,
    )


@contextlib.contextmanager
def known_by_their_rows(optimizers: list[Any]) -> Iterator[None]:
    """For a while, let megatron-core find out which shards of the model belong to which parameters of optimizers.

    It compares the shards' tensors with what `to_local` returns of a parameter. With torch 2.13 that is another tensor
    each time, unless the parameter's own rows are marked as a parameter too.
    """
    marked = []
    try:
        for optimizer in optimizers:
            groups = [group["params"] for group in optimizer.optimizer.param_groups]
            for parameter in chain(*groups, *getattr(optimizer, "float16_groups", ())):
                if isinstance(parameter, DTensor) and not hasattr(parameter._local_tensor, "_is_param"):
                    marked.append(parameter._local_tensor)
                    marked[-1]._is_param = True
        yield
    finally:
        for rows in marked:
            del rows._is_param


def loadable(module: torch.nn.Module, section: Mapping[str, Any]) -> Mapping[str, Any]:
    """A loaded section as a model takes it: under FSDP2 with this rank's rows as parts of the parameters. Local.

    Args:
        module: a model, without its wrappers; under FSDP2 or not.
        section: what was loaded by the model's sharded state dict.
    """
    parameters = dict(module.named_parameters())
    if not any(isinstance(parameter, DTensor) for parameter in parameters.values()):
        return section
    return {key: like(value, parameters.get(key)) for key, value in section.items()}


def loadable_state(optimizer: Any, section: dict[Any, Any]) -> dict[Any, Any]:
    """A loaded optimizer state dict as one of megatron-core's optimizers takes it, as `loadable`. Local.

    Args:
        optimizer: not a chain of several.
        section: what was loaded by its sharded state dict. Its own dictionaries are not changed.
    """
    inner = optimizer.optimizer
    parameters = [parameter for group in inner.param_groups for parameter in group["params"]]
    if not any(isinstance(parameter, DTensor) for parameter in parameters):
        return section

    def loadable_values(state: Mapping[Any, Any]) -> dict[Any, Any]:
        return {
            index: {key: like(value, parameters[index]) for key, value in values.items()}
            if isinstance(index, int)
            else values
            for index, values in state.items()
        }

    section = dict(section)
    if "state" in section:
        section["state"] = loadable_values(section["state"])
    if "optimizer" in section:
        section["optimizer"] = {**section["optimizer"], "state": loadable_values(section["optimizer"]["state"])}
    if "fp32_from_fp16_params" in section:
        section["fp32_from_fp16_params"] = [
            [like(value, main) for value, main in zip(values, mains, strict=True)]
            for values, mains in zip(section["fp32_from_fp16_params"], optimizer.fp32_from_float16_groups, strict=True)
        ]
    return section


def like(value: Any, parameter: Any) -> Any:
    """This rank's rows of a tensor as what they are rows of, where a parameter is divided so; any other value as it is.

    Args:
        value: the rows, of any type of number.
        parameter: divided in the same way, or none.
    """
    if not isinstance(value, torch.Tensor) or isinstance(value, DTensor) or not isinstance(parameter, DTensor):
        return value
    return DTensor.from_local(
        value.detach(),
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )
