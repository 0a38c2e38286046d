"""Optimizer state of another form: saved with other data-parallel sharing, precision or expert parallelism.

State in the model's shape has the same tensors in every form. What differs is the name of the main parameters,
and how the small rest (parameter groups, loss scale) is nested. So the template for loading is the optimizer's
own, with the saved names, and the rest is put together anew after the load.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace
from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject, ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.optimizer import (
    get_param_id_to_sharded_param_map,
    make_sharded_optimizer_tensor,
)
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import (
    Float16OptimizerWithFloat16Params,
    FP32Optimizer,
    param_group_identifier_keys,
)

from bridge.training.checkpointing.contents.torch_fsdp2 import like, loadable_state
from bridge.training.checkpointing.errors import CheckpointMismatchError
from bridge.training.checkpointing.plans.resharding import FULLY_RESHARDABLE, SHARDING_TYPE, OptimizerForm, parts_of

ADAPTED = "adapted"
"""Key of the optimizer section under which the loaded tensors of another form lie, one entry a part."""

_STATE = "optimizer.state"
_STATE_DICT = "optimizer"
_SCALER = "grad_scaler"
_MAIN = "main"


def chained(optimizer: Any) -> list[Any]:
    """The optimizers of a chain, or the one that is not chained."""
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))


def form_of(optimizer: Any | None) -> OptimizerForm | None:
    """How an optimizer arranges its state; None for kinds whose state cannot be translated."""
    parts = [] if optimizer is None else chained(optimizer)
    if not parts or any(getattr(part, "is_stub_optimizer", False) for part in parts):
        return None
    if all(isinstance(part, DistributedOptimizer) and not part.ddp_config.use_megatron_fsdp for part in parts):
        is_half = parts[0].config.bf16 or parts[0].config.fp16
        return OptimizerForm(distributed=True, main_params=bool(is_half), parts=len(parts))
    for kind, main_params in ((Float16OptimizerWithFloat16Params, True), (FP32Optimizer, False)):
        if all(isinstance(part, kind) for part in parts):
            return OptimizerForm(distributed=False, main_params=main_params, parts=len(parts))
    return None


def adapted_template(
    optimizer: Any, saved: OptimizerForm, model_sections: Mapping[str, Any], metadata: Mapping[str, Any]
) -> dict[str, Any]:
    """The optimizer section to load from a checkpoint of another form.

    Args:
        optimizer: megatron-core optimizer, its state allocated.
        saved: the checkpoint's form; its state must be in the model's shape.
        model_sections: sharded state dict of the model.
        metadata: as `sharded_state_dict` takes it.
    """
    parts = [_part_template(part, saved, model_sections, metadata) for part in chained(optimizer)]
    return {ADAPTED: dict(enumerate(parts))}


def load_adapted(optimizer: Any, section: Mapping[Any, Any]) -> None:
    """Load a section that was read with `adapted_template`. The model must have been loaded before.

    Raises:
        CheckpointMismatchError: the checkpoint has no settings for one of the optimizer's parameter groups.
    """
    tensors = section[ADAPTED]
    saved = parts_of({key: value for key, value in section.items() if key != ADAPTED})
    for index, part in enumerate(chained(optimizer)):
        _load_part(part, tensors[index], saved)


def _part_template(
    part: Any, saved: OptimizerForm, model_sections: Mapping[str, Any], metadata: Mapping[str, Any]
) -> dict[Any, Any]:
    saved_main = f"{_STATE}.{'param' if saved.distributed else 'fp32_param'}"
    if isinstance(part, DistributedOptimizer):
        building = {**metadata, SHARDING_TYPE: FULLY_RESHARDABLE}
        own = part.sharded_state_dict(model_sections, is_loading=True, metadata=building)
        state: dict[Any, Any] = own["param_state"]
        if not saved.main_params:
            _take_main_params_from_model(part, state)
        return {"state": _renamed(state, f"{_STATE}.param", saved_main)}
    own = part.sharded_state_dict(model_sections, is_loading=True, metadata=dict(metadata))
    if isinstance(part, Float16OptimizerWithFloat16Params):
        main = _renamed(own["fp32_from_fp16_params"], f"{_STATE}.fp32_param", saved_main)
        return {"state": _tensors_of(own[_STATE_DICT]), _MAIN: main}
    template: dict[Any, Any] = {"state": _tensors_of(own)}
    if saved.main_params:
        parameters = part.get_parameters()
        sharded = get_param_id_to_sharded_param_map(model_sections, parameters)
        template[_MAIN] = [
            make_sharded_optimizer_tensor(sharded[index], torch.empty_like(parameter), prefix=saved_main)
            for index, parameter in enumerate(parameters)
        ]
    return template


def _take_main_params_from_model(part: DistributedOptimizer, state: dict[Any, Any]) -> None:
    """Let the main parameters come from the fp32 model, which is loaded before the optimizer."""
    parameters = [parameter for buffer in part.buffers for parameter in buffer.param_index_map]
    for index, parameter in enumerate(parameters):
        state[index]["param"] = LocalNonpersistentObject(parameter.detach())


def _tensors_of(state_dict: Mapping[str, Any]) -> dict[Any, Any]:
    return {key: value for key, value in state_dict["state"].items() if key != "common_step"}


def _renamed(tree: Any, own: str, saved: str) -> Any:
    def rename(value: Any) -> Any:
        if isinstance(value, (ShardedTensor, ShardedTensorFactory)) and value.key.startswith(f"{own}."):
            return replace(value, key=saved + value.key[len(own) :])
        return value

    return tree if own == saved else dict_list_map_inplace(rename, tree)


def _load_part(part: Any, tensors: Mapping[Any, Any], saved: list[Any]) -> None:
    groups = _param_groups(part, saved)
    scaler = {_SCALER: saved[0][_SCALER]} if _SCALER in saved[0] else {}  # the same in all parts
    if isinstance(part, DistributedOptimizer):
        part.load_state_dict(
            {
                _STATE_DICT: {"param_groups": groups},
                "param_state": tensors["state"],
                "param_state_sharding_type": FULLY_RESHARDABLE,
                **scaler,
            }
        )
        return
    state_dict = {"state": tensors["state"], "param_groups": groups}
    if isinstance(part, Float16OptimizerWithFloat16Params):
        section = {_STATE_DICT: state_dict, "fp32_from_fp16_params": tensors[_MAIN], **scaler}
        part.load_state_dict(loadable_state(part, section))
        return
    part.load_state_dict(loadable_state(part, state_dict))
    for parameter, main in zip(part.get_parameters(), tensors.get(_MAIN, ()), strict=_MAIN in tensors):
        parameter.copy_(like(main, parameter))


def _param_groups(part: Any, saved: list[Any]) -> list[dict[str, Any]]:
    """The optimizer's parameter groups with the saved settings; each keeps its own parameters."""
    available = [group for section in saved for group in section.get(_STATE_DICT, section)["param_groups"]]
    return [_with_settings(group, available) for group in part.optimizer.state_dict()["param_groups"]]


def _with_settings(own: Mapping[str, Any], available: list[dict[str, Any]]) -> dict[str, Any]:
    identity = {key: own[key] for key in param_group_identifier_keys}
    # Without expert parallelism, experts' parameters are in the groups of the others, with the same settings.
    for keys in (tuple(identity), tuple(key for key in identity if key != "is_expert_parallel")):
        for group in available:
            if all(group.get(key) == identity[key] for key in keys):
                return {**group, **identity, "params": own["params"]}
    raise CheckpointMismatchError(
        f"the checkpoint's optimizer has no parameter group with {identity}; it was saved with other multipliers of "
        "learning rate or weight decay; set checkpoint.load_optim: false to take only the model"
    )
