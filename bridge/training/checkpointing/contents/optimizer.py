"""The optimizer's and the parameter scheduler's parts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import (
    ChainedOptimizer,
    Float16OptimizerWithFloat16Params,
    FP32Optimizer,
)

from bridge.training.checkpointing.contents import fsdp_dtensor
from bridge.training.checkpointing.contents.bucket_padding import padding_between_buckets
from bridge.training.checkpointing.contents.optimizer_forms import (
    ADAPTED,
    adapted_template,
    chained,
    form_of,
    load_adapted,
)
from bridge.training.checkpointing.contents.searching import without_search_of_everything
from bridge.training.checkpointing.contents.torch_fsdp2 import known_by_their_rows, loadable_state
from bridge.training.checkpointing.plans.resharding import (
    DP_RESHARDABLE,
    FSDP_DTENSOR,
    FULLY_RESHARDABLE,
    MEMORY_EFFICIENT,
    SHARDING_TYPE,
    OptimizerForm,
    is_adapted,
)

OPTIMIZER = "optimizer"
SCHEDULER = "opt_param_scheduler"
LEGACY_SCHEDULER = "lr_scheduler"

_LOCAL_MODULES = ("bridge.", "torch.optim.", "apex.", "transformer_engine.", "megatron.core.optimizer.", "builtins")
"""Of the optimizers inside those of megatron-core, if there are any, whose state a rank describes by itself."""


def build_sharded_state_dict_metadata(use_distributed_optimizer: bool, cfg: Any) -> dict[str, Any]:
    """What decides how the sharded state dicts are built; saved with the checkpoint as `content_metadata`.

    Args:
        use_distributed_optimizer: whether the optimizer's state is sharded over data-parallel ranks.
        cfg: checkpoint configuration; `ckpt_format`, `dist_ckpt_optim_fully_reshardable` and, with the latter,
            `distrib_optim_fully_reshardable_mem_efficient` are read.
    """
    metadata: dict[str, Any] = {}
    if cfg.ckpt_format == FSDP_DTENSOR:
        metadata[SHARDING_TYPE] = FSDP_DTENSOR
    elif use_distributed_optimizer and cfg.dist_ckpt_optim_fully_reshardable:
        metadata[SHARDING_TYPE] = FULLY_RESHARDABLE
        metadata[MEMORY_EFFICIENT] = cfg.distrib_optim_fully_reshardable_mem_efficient
    elif use_distributed_optimizer:
        metadata[SHARDING_TYPE] = DP_RESHARDABLE
    metadata["singleton_local_shards"] = False
    metadata["chained_optim_avoid_prefix"] = True
    return metadata


def generate_optimizer_state_dict(
    optimizer: Any,
    scheduler: Any | None,
    model_state_dict: Mapping[str, Any],
    *,
    is_loading: bool,
    optim_sd_kwargs: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The optimizer and scheduler sections.

    Args:
        optimizer: megatron-core optimizer.
        scheduler: its parameter scheduler, or None.
        model_state_dict: the model sections; the optimizer's shards follow from them.
        is_loading: build a template for loading; the optimizer then allocates its state first.
        optim_sd_kwargs: passed on to `sharded_state_dict`, except `saved_form`: for loading, the form of the
            checkpoint's optimizer, to which the template is adapted where it differs.
    """
    kwargs = dict(optim_sd_kwargs or {})
    saved: OptimizerForm | None = kwargs.pop("saved_form", None)
    if len(model_state_dict) == 1:
        (model_sections,) = model_state_dict.values()
    else:
        model_sections = dict(model_state_dict)
    sections: dict[str, Any] = {}
    if fsdp_dtensor.is_megatron_fsdp(optimizer):
        sections[OPTIMIZER] = fsdp_dtensor.optimizer_section(optimizer)
    elif optimizer is not None and not getattr(optimizer, "is_stub_optimizer", False):
        allocate_optimizer_state(optimizer)
        metadata = kwargs.get("metadata") or {}
        parts = chained(optimizer)
        with padding_between_buckets(parts), known_by_their_rows(parts), without_search_of_everything():
            if is_loading and saved is not None and is_adapted(metadata, saved, form_of(optimizer)):
                sections[OPTIMIZER] = adapted_template(optimizer, saved, model_sections, metadata)
            else:
                sections[OPTIMIZER] = optimizer.sharded_state_dict(model_sections, is_loading=is_loading, **kwargs)
    if scheduler is not None:
        sections[SCHEDULER] = scheduler.state_dict()
    return sections


def is_described_alone(optimizer: Any | None, *, fully_reshardable: bool) -> bool:
    """Whether a rank certainly needs no other for the section of an optimizer that is saved.

    Args:
        optimizer: megatron-core optimizer, or None. Of classes of others, subclasses included, nothing is known.
        fully_reshardable: whether the state of a distributed one is saved in the model's shape.
    """
    parts = _with_state(optimizer)
    local = {Float16OptimizerWithFloat16Params, FP32Optimizer, *(() if fully_reshardable else (DistributedOptimizer,))}
    inner = {type(getattr(part, "optimizer", None)).__module__ for part in parts}
    return (
        (not parts or type(optimizer) in {ChainedOptimizer, *local})
        and {type(part) for part in parts} <= local
        and all(module.startswith(_LOCAL_MODULES) for module in inner)
    )


def allocate_optimizer_state(optimizer: Any) -> None:
    """Give an optimizer that has not stepped yet the zero moments that its first step would start from. Local.

    A checkpoint without them could not be loaded: loading asks for every moment.
    """
    for part in _with_state(optimizer):
        inner = getattr(part, "optimizer", None)
        if inner is not None and not inner.state:
            part.init_state_fn(inner, part.config)


def _with_state(optimizer: Any | None) -> list[Any]:
    """Its parts, unless it is none or a stand-in for one."""
    is_none = optimizer is None or getattr(optimizer, "is_stub_optimizer", False)
    return [] if is_none else chained(optimizer)


def load_optimizer(optimizer: Any, state_dict: Mapping[str, Any]) -> None:
    """Load the optimizer section. Local; `share_main_params` completes it.

    Raises:
        CheckpointMismatchError: the section has no settings for one of the optimizer's parameter groups.
    """
    section = state_dict.get(OPTIMIZER)
    if section is None:
        return
    with torch.no_grad():  # megatron-core copies in place into parameters that require gradients
        if ADAPTED in section:
            load_adapted(optimizer, section)
            return
        parts = chained(optimizer)
        if len(parts) == 1:
            optimizer.load_state_dict(loadable_state(parts[0], section))
        else:
            optimizer.load_state_dict({index: loadable_state(part, section[index]) for index, part in enumerate(parts)})


def share_main_params(optimizer: Any) -> None:
    """Give all data-parallel ranks the main parameters, where these are the model's own and shared among them.

    Collective, to be called when every rank has loaded its optimizer. Not needed where the checkpoint is of the
    same precision: there the model's parameters are the main ones.

    A checkpoint of a model in half precision has rounded model parameters and full main parameters. A distributed
    optimizer in fp32 loads the latter into its own share of the model, so the replicas would differ.
    """
    form = form_of(optimizer)
    if form is not None and form.distributed and not form.main_params:
        with torch.no_grad():
            for chunk in optimizer.model_chunks:
                chunk.start_param_sync(force_sync=True)


def load_scheduler(scheduler: Any, state_dict: Mapping[str, Any]) -> None:
    """Load the scheduler section, under its present or its older name."""
    section = state_dict.get(LEGACY_SCHEDULER, state_dict.get(SCHEDULER))
    if section is not None:
        # megatron-core adds the saved steps to those already taken, by an earlier load for one.
        scheduler.num_steps = 0
        scheduler.load_state_dict(section)
