"""The optimizer's and the parameter scheduler's parts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

OPTIMIZER = "optimizer"
SCHEDULER = "opt_param_scheduler"
LEGACY_SCHEDULER = "lr_scheduler"


def build_sharded_state_dict_metadata(use_distributed_optimizer: bool, fully_reshardable: bool) -> dict[str, Any]:
    """What decides how the sharded state dicts are built; saved with the checkpoint as `content_metadata`.

    Args:
        use_distributed_optimizer: whether the optimizer's state is sharded over data-parallel ranks.
        fully_reshardable: whether that state may be loaded under other tensor- and pipeline-parallel sizes.
    """
    metadata: dict[str, Any] = {}
    if use_distributed_optimizer:
        metadata["distrib_optim_sharding_type"] = "fully_reshardable" if fully_reshardable else "dp_reshardable"
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
        optim_sd_kwargs: passed on to `sharded_state_dict`.
    """
    if len(model_state_dict) == 1:
        (model_sections,) = model_state_dict.values()
    else:
        model_sections = dict(model_state_dict)
    sections: dict[str, Any] = {}
    if optimizer is not None and not getattr(optimizer, "is_stub_optimizer", False):
        _allocate_state(optimizer)
        sections[OPTIMIZER] = optimizer.sharded_state_dict(
            model_sections, is_loading=is_loading, **(optim_sd_kwargs or {})
        )
    if scheduler is not None:
        sections[SCHEDULER] = scheduler.state_dict()
    return sections


def _allocate_state(optimizer: Any) -> None:
    """Give an optimizer that has not stepped yet the zero moments that its first step would start from.

    A checkpoint without them could not be loaded: loading asks for every moment.
    """
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        inner = getattr(part, "optimizer", None)
        if inner is not None and not inner.state:
            part.init_state_fn(inner, part.config)


def load_optimizer(optimizer: Any, state_dict: Mapping[str, Any]) -> None:
    """Load the optimizer section. In place: megatron-core copies into parameters that require gradients."""
    if OPTIMIZER in state_dict:
        with torch.no_grad():
            optimizer.load_state_dict(state_dict[OPTIMIZER])


def load_scheduler(scheduler: Any, state_dict: Mapping[str, Any]) -> None:
    """Load the scheduler section, under its present or its older name."""
    section = state_dict.get(LEGACY_SCHEDULER, state_dict.get(SCHEDULER))
    if section is not None:
        scheduler.load_state_dict(section)
