"""The sharded state dict: every part that goes through the format, joined under the documented keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron.core.dist_checkpointing.mapping import ShardedObject

from bridge.training.checkpointing.contents.model import generate_model_state_dict
from bridge.training.checkpointing.contents.optimizer import generate_optimizer_state_dict

CHECKPOINT_VERSION = 3.0
RNG = "rng_state"


def generate_state_dict(
    ckpt_cfg: Any,
    model: list[Any],
    optimizer: Any | None,
    opt_param_scheduler: Any | None,
    rng_state: ShardedObject | None,
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
        rerun_state: not available in this version.
        pg_collection: accepted for compatibility; the shards follow from the model.

    Returns:
        The sections `checkpoint_version`, `iteration`, `model` (or `model0` …), `optimizer`,
        `opt_param_scheduler` and `rng_state`.
    """
    del pg_collection
    if rerun_state is not None:
        raise ValueError("saving the rerun state machine is not available in this version; pass rerun_state=None")
    optimizer_kwargs = dict(optim_sd_kwargs or {})
    is_loading = bool(optimizer_kwargs.pop("is_loading", False))
    state_dict: dict[str, Any] = {"checkpoint_version": CHECKPOINT_VERSION}
    if iteration is not None:
        state_dict["iteration"] = iteration
    model_sections = generate_model_state_dict(model, model_sd_kwargs)
    state_dict.update(model_sections)
    if ckpt_cfg.save_optim or is_loading:
        state_dict.update(
            generate_optimizer_state_dict(
                optimizer,
                opt_param_scheduler,
                model_sections,
                is_loading=is_loading,
                optim_sd_kwargs=optimizer_kwargs,
            )
        )
    if rng_state is not None and (ckpt_cfg.save_rng or is_loading):
        state_dict[RNG] = rng_state
    return state_dict
