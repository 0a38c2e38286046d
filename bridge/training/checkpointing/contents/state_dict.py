"""The sharded state dict: every part that goes through the format, joined under the documented keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron.core.dist_checkpointing.mapping import ShardedObject

from bridge.training.checkpointing.contents.model import generate_model_state_dict
from bridge.training.checkpointing.contents.optimizer import generate_optimizer_state_dict
from bridge.training.checkpointing.contents.rerun import RERUN

CHECKPOINT_VERSION = 3.0
RNG = "rng_state"


def generate_state_dict(
    ckpt_cfg: Any,
    model: list[Any],
    optimizer: Any | None,
    opt_param_scheduler: Any | None,
    rng_state: ShardedObject | Mapping[str, Any] | None,
    iteration: int | None = None,
    optim_sd_kwargs: Mapping[str, Any] | None = None,
    model_sd_kwargs: Mapping[str, Any] | None = None,
    rerun_state: Mapping[str, Any] | None = None,
    *,
    pg_collection: Any | None = None,
) -> dict[str, Any]:
    """The state dict to save, or with `optim_sd_kwargs={"is_loading": True, ...}` the template to load.

    Args:
        ckpt_cfg: checkpoint configuration. `save_optim` and `save_rng` leave their parts out of a save; a
            template holds what is passed in.
        model: model chunks of this rank.
        optimizer: megatron-core optimizer, or None.
        opt_param_scheduler: its parameter scheduler, or None.
        rng_state: as `get_rng_state` returns it, or None.
        iteration: completed iterations.
        optim_sd_kwargs: passed on to the optimizer's `sharded_state_dict`.
        model_sd_kwargs: passed on to the model's `sharded_state_dict`.
        rerun_state: as the rerun state machine's `state_dict` returns it, or None.
        pg_collection: accepted for compatibility; the shards follow from the model.

    Returns:
        The sections `checkpoint_version`, `iteration`, `model` (or `model0` …), `optimizer`,
        `opt_param_scheduler`, `rerun_state_machine` and `rng_state`.
    """
    del pg_collection
    is_loading = bool((optim_sd_kwargs or {}).get("is_loading", False))
    model_sections = generate_model_state_dict(model, model_sd_kwargs, ckpt_cfg.ckpt_format)
    optimizer_sections = optimizer_part(ckpt_cfg, optimizer, opt_param_scheduler, model_sections, optim_sd_kwargs)
    if not (ckpt_cfg.save_rng or is_loading):
        rng_state = None
    return joined(model_sections, optimizer_sections, rng_state, iteration, rerun_state)


def optimizer_part(
    ckpt_cfg: Any,
    optimizer: Any | None,
    opt_param_scheduler: Any | None,
    model_sections: Mapping[str, Any],
    optim_sd_kwargs: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The sections `optimizer` and `opt_param_scheduler`, as far as they are saved.

    This is the one part of `generate_state_dict` in which ranks may talk to one another: to save fully reshardable
    state, a distributed optimizer gathers it.
    """
    kwargs = dict(optim_sd_kwargs or {})
    is_loading = bool(kwargs.pop("is_loading", False))
    if not (ckpt_cfg.save_optim or is_loading):
        return {}
    return generate_optimizer_state_dict(
        optimizer, opt_param_scheduler, model_sections, is_loading=is_loading, optim_sd_kwargs=kwargs
    )


def joined(
    model_sections: Mapping[str, Any],
    optimizer_sections: Mapping[str, Any],
    rng_state: ShardedObject | Mapping[str, Any] | None,
    iteration: int | None,
    rerun_state: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """The whole state dict, from its parts. Local."""
    state_dict: dict[str, Any] = {"checkpoint_version": CHECKPOINT_VERSION}
    if iteration is not None:
        state_dict["iteration"] = iteration
    state_dict |= {**model_sections, **optimizer_sections}
    if rerun_state is not None:
        state_dict[RERUN] = dict(rerun_state)
    if rng_state is not None:
        state_dict[RNG] = rng_state
    return state_dict
